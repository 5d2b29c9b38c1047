// A photo as `mgd-pipeline predict` reads it: the stored values without colour profiles, turned as the student's rules say. What
// predict refuses is refused here, too: browsers would convert it in silence.

import { Problem } from "./problem.js";

const STRIP = 512; // rows that are read at a time: phones limit the size of a canvas

/** {pixels, width, height} of a file, RGBA without transparency, one byte a value. `rules`: `photos` of student.json. Throws Problem. */
export async function readPhoto(file, rules) {
  let bytes = new Uint8Array(await file.arrayBuffer());
  const kind = kindOf(bytes);
  const name = file.name || "The picture";
  if (kind === null) throw new Problem(`${name} is not a picture that the student reads. Choose a JPEG, PNG, WebP, BMP or AVIF file.`);
  const fault = faultOf(bytes, kind);
  if (fault) throw new Problem(`${name} ${fault}`);
  if (!rules.apply_orientation) bytes = withoutOrientation(bytes);
  let bitmap;
  try {
    bitmap = await createImageBitmap(new Blob([bytes]), { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    throw new Problem(`${name} cannot be opened. The file is damaged, too large, or this browser does not read ${kind}: try a JPEG or PNG file.`);
  }
  const { width, height } = bitmap;
  const size = `${width} × ${height} pixels`;
  if (width * height > rules.most_pixels) {
    throw new Problem(`${name} has ${size}, more than ${rules.most_pixels / 1e6} million. Cut it into tiles.`);
  }
  if (Math.max(width, height) > rules.longest_strip * Math.min(width, height)) {
    throw new Problem(`${name} is a strip of ${size}, over ${rules.longest_strip} times as long as wide. Cut it into pieces.`);
  }
  const pixels = pixelsOf(bitmap, width, height, `${name} (${size})`);
  bitmap.close();
  fill(pixels, rules.background_colour, name, kind);
  return { pixels, width, height };
}

/** RGBA of anything that a canvas can draw: a picture or a frame of a video. */
export function pixelsOf(source, width, height, name) {
  try {
    const pixels = new Uint8ClampedArray(4 * width * height);
    const canvas = document.createElement("canvas");
    canvas.width = width;
    canvas.height = Math.min(height, STRIP);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    for (let top = 0; top < height; top += STRIP) {
      const rows = Math.min(STRIP, height - top);
      context.clearRect(0, 0, width, rows);
      context.drawImage(source, 0, top, width, rows, 0, 0, width, rows);
      pixels.set(context.getImageData(0, 0, width, rows).data, 4 * width * top);
    }
    return pixels;
  } catch {
    throw new Problem(`${name} is too large for this browser's memory. Take a smaller one.`);
  }
}

/** Puts the background colour behind transparent pixels; without one they are an error, as in predict. */
function fill(pixels, background, name, kind) {
  let transparent = 0;
  for (let at = 3; at < pixels.length; at += 4) transparent += pixels[at] < 255;
  if (!transparent) return;
  if (kind === "JPEG" || kind === "BMP") throw new Problem(`${name} is too large for this browser's memory. Take a smaller one.`);
  if (!background) {
    const share = ((400 * transparent) / pixels.length).toPrecision(3);
    throw new Problem(`${share} % of the pixels of ${name} are transparent, and the student knows no colour behind them. Save it without transparency.`);
  }
  for (let at = 0; at < pixels.length; at += 4) {
    const alpha = pixels[at + 3];
    for (let c = 0; c < 3; c++) pixels[at + c] = Math.round((pixels[at + c] * alpha + background[c] * (255 - alpha)) / 255);
    pixels[at + 3] = 255;
  }
}

/** The format, by content as in predict; null for all others. */
function kindOf(bytes) {
  const text = latin(bytes, 0, 32);
  if (text.startsWith("\xff\xd8\xff")) return "JPEG";
  if (text.startsWith("\x89PNG\r\n\x1a\n")) return "PNG";
  if (text.startsWith("BM")) return "BMP";
  if (text.startsWith("RIFF") && text.slice(8, 12) === "WEBP") return "WebP";
  if (text.startsWith("II*\0") || text.startsWith("MM\0*")) return "TIFF";
  if (text.slice(4, 8) !== "ftyp") return null;
  if (/^avi[fs]/.test(text.slice(8))) return "AVIF";
  return /^(hei|hev|mif1|msf1)/.test(text.slice(8)) ? "HEIC" : null;
}

/** Why predict refuses a file, or null: browsers show the first frame, and cut 16 bits to 8. */
function faultOf(bytes, kind) {
  const frames = "holds several frames. Save the one that you mean.";
  if (kind === "PNG") {
    if (bytes[24] === 16) return "has 16 bits a channel. Save it with 8 bits.";
    if (pngChunks(bytes).some(({ name }) => name === "acTL")) return frames;
  }
  if (kind === "WebP" && latin(bytes, 12, 4) === "VP8X" && bytes[20] & 2) return frames;
  if (kind === "AVIF" && latin(bytes, 8, 4) === "avis") return frames;
  return null;
}

function pngChunks(bytes) {
  const view = new DataView(bytes.buffer), chunks = [];
  for (let at = 8; at + 12 <= bytes.length; at += 12 + view.getUint32(at)) chunks.push({ name: latin(bytes, at + 4, 4), at });
  return chunks;
}

/** The file with EXIF orientation 1 wherever it holds an EXIF block, for students that were trained on pixels as they are stored. */
function withoutOrientation(given) {
  const bytes = given.slice(), view = new DataView(bytes.buffer);
  for (let start = 0; start + 14 < bytes.length && start < 1 << 18; start++) {
    const mark = view.getUint32(start);
    if (mark !== 0x49492a00 && mark !== 0x4d4d002a) continue;
    const little = mark === 0x49492a00;
    const table = start + view.getUint32(start + 4, little);
    if (table + 2 > bytes.length) continue;
    const entries = view.getUint16(table, little);
    for (let at = table + 2; at < table + 2 + 12 * entries && at + 12 <= bytes.length; at += 12) {
      if (view.getUint16(at, little) === 0x112) view.setUint16(at + 8, 1, little);
    }
  }
  return bytes;
}

function latin(bytes, start, count) {
  return String.fromCharCode(...bytes.subarray(start, start + count));
}
