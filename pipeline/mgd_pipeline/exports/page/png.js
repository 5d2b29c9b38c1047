// The PNG that `mgd-pipeline predict` writes: pixel values are class ids, the palette has the colours of the classes.
// No canvas is involved, which would store colours, not ids.

const TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let value = byte;
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});

/** `ids`: one byte a pixel, row by row. `palette`: 256 colours. */
export async function pngOfMask(ids, width, height, palette) {
  const rows = new Uint8Array(height * (width + 1)); // each row begins with the number of its filter, 0
  for (let y = 0; y < height; y++) rows.set(ids.subarray(y * width, (y + 1) * width), y * (width + 1) + 1);
  const header = new DataView(new ArrayBuffer(13));
  header.setUint32(0, width);
  header.setUint32(4, height);
  header.setUint8(8, 8); // bits
  header.setUint8(9, 3); // indexed
  return new Blob(
    [
      Uint8Array.of(0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a),
      ...chunk("IHDR", new Uint8Array(header.buffer)),
      ...chunk("tEXt", latin("Software\0mgd-pipeline: predicted mask")),
      ...chunk("tEXt", latin(`Pixels CRC32\0${crc(ids).toString(16).padStart(8, "0")}`)),
      ...chunk("PLTE", Uint8Array.from(palette.flat())),
      ...chunk("IDAT", await compressed(rows)),
      ...chunk("IEND", new Uint8Array(0)),
    ],
    { type: "image/png" },
  );
}

function chunk(name, data) {
  const head = new DataView(new ArrayBuffer(4)), end = new DataView(new ArrayBuffer(4));
  head.setUint32(0, data.length);
  end.setUint32(0, crc(data, crc(latin(name))));
  return [head.buffer, latin(name), data, end.buffer];
}

function crc(bytes, before = 0) {
  let value = ~before;
  for (const byte of bytes) value = TABLE[(value ^ byte) & 255] ^ (value >>> 8);
  return ~value >>> 0;
}

function latin(text) {
  return Uint8Array.from(text, (letter) => letter.charCodeAt(0));
}

async function compressed(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new CompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
