"""Decoded images and masks on this machine's disk, for machines where decoding them in every step would keep a GPU waiting.

Each array is one file, named after everything that decides its content, so it never grows stale. It may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np

from mgd_pipeline.durable import replace_file


def decoded(folder: Path, parts: tuple[object, ...], decode: Callable[[], np.ndarray]) -> np.ndarray:
    """The array that `decode` makes, kept in the folder for the next time; `parts` must differ whenever the array does.

    A damaged file is made again.
    """
    name = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    path = folder / name[:2] / name[2:]
    try:
        data = memoryview(path.read_bytes())
    except FileNotFoundError:
        data = memoryview(b"")
    # A file of zeros has a checksum of zero: the length is part of it.
    if len(data) > 4 and _checksum(data[:-4]) == struct.unpack("<I", data[-4:])[0]:
        return np.load(io.BytesIO(data[:-4]), allow_pickle=False)
    values = decode()
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    content = buffer.getvalue()
    replace_file(path, content + struct.pack("<I", _checksum(content)))
    return values


def _checksum(data: bytes | memoryview) -> int:
    return google_crc32c.extend(google_crc32c.value(bytes(data)), struct.pack("<Q", len(data)))
