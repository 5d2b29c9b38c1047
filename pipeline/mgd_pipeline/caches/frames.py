"""Frames of Zstandard: whether bytes are what a teacher cache holds. Decoding alone accepts more than that."""

from __future__ import annotations

_MAGIC = b"\x28\xb5\x2f\xfd"
_RLE, _RESERVED = 1, 3


def holds(data: bytes | memoryview, size: int) -> bool:
    """Whether `data` is one whole frame that says it has `size` bytes of content, and nothing else (RFC 8878, section 3.1.1).

    Decoders also take several frames, frames of less content, frames to skip, and empty frames. Nothing is decoded here.
    """
    try:
        descriptor = data[4]
        single_segment, size_bytes = bool(descriptor & 0x20), (1, 2, 4, 8)[descriptor >> 6]
        # A frame of the project has no checksum, no dictionary, and its size; a flag of 0 gives a size only in a single segment.
        if data[:4] != _MAGIC or descriptor & 0x1F or not (single_segment or descriptor >> 6):
            return False
        place = 5 if single_segment else 6
        content = int.from_bytes(data[place : place + size_bytes], "little") + (256 if size_bytes == 2 else 0)
        place, last = place + size_bytes, False
        while not last:
            header = data[place] | data[place + 1] << 8 | data[place + 2] << 16
            last, kind = bool(header & 1), header >> 1 & 3
            if kind == _RESERVED:
                return False
            place += 3 + (1 if kind == _RLE else header >> 3)
    except IndexError:
        return False
    return content == size and place == len(data)
