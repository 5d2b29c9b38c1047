// A photo as `mgd-pipeline predict` reads it: the stored values without colour profiles, turned as the student's rules say. What
// predict refuses is refused here, too: browsers would convert it in silence.

import { Problem } from "./problem.js";

const STRIP = 512; // rows that are read at a time: phones limit the size of a canvas
const LOOKED_AT = 1 << 18; // bytes in which notes of other programs about the orientation stand

/** {pixels, width, height} of a file, RGBA without transparency, one byte a value. `rules`: `photos` of student.json. Throws Problem. */
export async function readPhoto(file, rules) {
  const given = new Uint8Array(await file.arrayBuffer());
  const kind = kindOf(given);
  const name = file.name || "The picture";
  if (kind === null) throw new Problem(`${name} is not a picture that the student reads. Choose a JPEG, PNG, WebP, BMP or AVIF file.`);
  const fault = faultOf(given, kind, rules);
  if (fault) throw new Problem(`${name} ${fault}`);
  const { orientation, bytes } = orientationOf(given, kind);
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
  const draw = (background) => pixelsOf(bitmap, width, height, `${name} (${size})`, background);
  const pixels = opaque(draw, rules.background_colour, name, kind);
  bitmap.close();
  return turned({ pixels, width, height }, rules.apply_orientation ? orientation : 1);
}

/** RGBA of anything that a canvas can draw: a picture or a frame of a video; `background` is the colour behind it. */
export function pixelsOf(source, width, height, name, background = null) {
  try {
    const pixels = new Uint8ClampedArray(4 * width * height);
    const canvas = document.createElement("canvas");
    canvas.width = width;
    canvas.height = Math.min(height, STRIP);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    if (background) context.fillStyle = `rgb(${background.join(" ")})`;
    for (let top = 0; top < height; top += STRIP) {
      const rows = Math.min(STRIP, height - top);
      context.clearRect(0, 0, width, rows);
      if (background) context.fillRect(0, 0, width, rows);
      context.drawImage(source, 0, top, width, rows, 0, 0, width, rows);
      pixels.set(context.getImageData(0, 0, width, rows).data, 4 * width * top);
    }
    return pixels;
  } catch {
    throw new Problem(`${name} is too large for this browser's memory. Take a smaller one.`);
  }
}

/** The pixels that are drawn, over the background colour if they need one; without a colour they are an error, as in predict. */
function opaque(draw, background, name, kind) {
  const pixels = draw();
  let transparent = 0;
  for (let at = 3; at < pixels.length; at += 4) transparent += pixels[at] < 255;
  if (!transparent) return pixels;
  if (kind === "JPEG" || kind === "BMP") throw new Problem(`${name} is too large for this browser's memory. Take a smaller one.`);
  if (background) return draw(background);
  const share = ((400 * transparent) / pixels.length).toPrecision(3);
  throw new Problem(`${share} % of the pixels of ${name} are transparent, and the student knows no colour behind them. Save it without transparency.`);
}

/** The format, by content as in predict; null for all others. */
function kindOf(bytes) {
  const text = latin(bytes.subarray(0, 32));
  if (text.startsWith("\xff\xd8\xff")) return "JPEG";
  if (bytes[0] === 0x89 && text.slice(1).startsWith("PNG\r\n\x1a\n")) return "PNG";
  if (text.startsWith("BM")) return "BMP";
  if (text.startsWith("RIFF") && text.slice(8, 12) === "WEBP") return "WebP";
  if (text.startsWith("II*\0") || text.startsWith("MM\0*")) return "TIFF";
  if (text.slice(4, 8) !== "ftyp") return null;
  if (/^avi[fs]/.test(text.slice(8))) return "AVIF";
  return /^(hei|hev|mif1|msf1)/.test(text.slice(8)) ? "HEIC" : null;
}

/** Why predict refuses a file, or null: browsers show the first frame, cut 16 bits to 8, and show scans of one bit. */
function faultOf(bytes, kind, { apply_orientation }) {
  const frames = "holds several frames. Save the one that you mean.";
  const scan = "has 1 bit a pixel, black or white. Save it with 8 bits.";
  if (kind === "PNG") {
    if (bytes[24] === 1 && bytes[25] === 0) return scan; // grey values, not a palette
    if (bytes[24] === 16) return "has 16 bits a channel. Save it with 8 bits.";
    if (pngChunks(bytes).some(({ name }) => name === "acTL")) return frames;
  }
  const colours = 14 + bytes[14]; // after the two heads of a BMP
  if (kind === "BMP" && bytes[28] === 1 && latin(bytes.subarray(colours, colours + 7)) === "\0\0\0\0\xff\xff\xff") return scan;
  if (kind === "WebP" && latin(bytes.subarray(12, 16)) === "VP8X" && bytes[20] & 2) return frames;
  if (kind === "AVIF" && latin(bytes.subarray(8, 12)) === "avis") return frames;
  // Browsers turn these files in any case, and this student was trained on pixels as they are stored.
  if (!apply_orientation && (kind === "AVIF" || kind === "HEIC") && /irot|imir/.test(latin(bytes.subarray(0, LOOKED_AT)))) {
    return "is stored turned. Save it upright, as JPEG or PNG.";
  }
  return null;
}

/** EXIF orientation, 1 to 8, as Pillow reads it, and the file without it: browsers differ in which files they turn. */
function orientationOf(given, kind) {
  const bytes = given.slice();
  let orientation = 0;
  for (const { start, chunk, end } of exifBlocks(bytes, kind)) {
    orientation ||= patched(new DataView(bytes.buffer, start, end - start));
    if (kind === "PNG") bytes.set(latinBytes("exIf"), chunk + 4); // an unknown chunk; a checksum guards its former name
  }
  if (!orientation) orientation = Number(/tiff:Orientation(?:="|>)([0-9])/.exec(latin(bytes.subarray(0, LOOKED_AT)))?.[1] ?? 1);
  return { orientation: orientation >= 1 && orientation <= 8 ? orientation : 1, bytes };
}

/** Where a file has EXIF blocks, without what stands before them; `chunk` is where a PNG's chunk begins. */
function* exifBlocks(bytes, kind) {
  const view = new DataView(bytes.buffer);
  if (kind === "JPEG") {
    for (let at = 2; at + 4 < bytes.length && bytes[at] === 0xff && bytes[at + 1] !== 0xda; at += 2 + view.getUint16(at + 2)) {
      const end = at + 2 + view.getUint16(at + 2);
      if (bytes[at + 1] === 0xe1 && latin(bytes.subarray(at + 4, at + 10)) === "Exif\0\0") yield { start: at + 10, end };
    }
  } else if (kind === "PNG") {
    for (const { name, at, end } of pngChunks(bytes)) if (name === "eXIf") yield { start: at + 8, chunk: at, end: end - 4 };
  } else if (kind === "WebP") {
    for (let at = 12; at + 8 < bytes.length; ) {
      const start = at + 8, end = start + view.getUint32(at + 4, true);
      if (latin(bytes.subarray(at, at + 4)) === "EXIF") {
        yield { start: latin(bytes.subarray(start, start + 6)) === "Exif\0\0" ? start + 6 : start, end };
      }
      at = end + (end & 1);
    }
  }
}

/** The orientation in an EXIF block, which becomes 1; 0 where there is none, or the block is damaged. */
function patched(block) {
  try {
    const little = block.getUint16(0) === 0x4949;
    const table = block.getUint32(4, little);
    for (let at = table + 2, left = block.getUint16(table, little); left; at += 12, left--) {
      if (block.getUint16(at, little) !== 0x112) continue;
      const value = block.getUint16(at + 8, little);
      block.setUint16(at + 8, 1, little);
      return value;
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
  }
  return 0;
}

/** The picture as a viewer shows it that applies the EXIF orientation. */
function turned(picture, orientation) {
  if (orientation === 1) return picture;
  const { width, height } = picture;
  const from = new Uint32Array(picture.pixels.buffer), to = new Uint32Array(from.length);
  const [wide, tall] = orientation > 4 ? [height, width] : [width, height];
  const mirrored = [2, 3, 7, 8].includes(orientation), flipped = [3, 4, 6, 7].includes(orientation);
  for (let y = 0, at = 0; y < tall; y++) {
    for (let x = 0; x < wide; x++, at++) {
      const [column, row] = orientation > 4 ? [y, x] : [x, y];
      to[at] = from[(flipped ? height - 1 - row : row) * width + (mirrored ? width - 1 - column : column)];
    }
  }
  return { pixels: new Uint8ClampedArray(to.buffer), width: wide, height: tall };
}

function pngChunks(bytes) {
  const view = new DataView(bytes.buffer), chunks = [];
  for (let at = 8, end; at + 12 <= bytes.length; at = end) {
    end = at + 12 + view.getUint32(at);
    chunks.push({ name: latin(bytes.subarray(at + 4, at + 8)), at, end });
  }
  return chunks;
}

function latin(bytes) {
  return new TextDecoder("latin1").decode(bytes);
}

function latinBytes(text) {
  return Uint8Array.from(text, (letter) => letter.charCodeAt(0));
}
