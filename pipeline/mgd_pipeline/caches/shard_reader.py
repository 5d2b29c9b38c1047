"""One shard of a teacher cache, opened for reading."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np

from mgd_pipeline.access import access_error, is_absent
from mgd_pipeline.caches.commit import REBUILD
from mgd_pipeline.caches.remote import Place, scatter
from mgd_pipeline.errors import CacheError, MGDError

_WHOLE = 2**14
"""Bytes. Files up to this size are read whole when they are opened, and closed. Shards of affines and extents are that small,
and a system call for each of their records would take a third of the time of one for a map of logits."""


class ShardMissing(CacheError):
    """There is no such file."""


class KnownIndex(NamedTuple):
    """The index of a shard, and of which file it is."""

    identity: int
    offsets: memoryview
    """Of each record in the file; negative if there is none (MISSING is beyond every end), or none of a size that it may have."""
    sizes: memoryview
    """Of each record, with its checksum; bytes."""


class ShardReader:
    """An open shard. It is closed when nothing refers to it any more.

    So no thread reads from a descriptor that another thread has just closed, and that may be another file by now.
    """

    def __init__(self, path: Place, rows_per_shard: int, record_sizes: range, known: KnownIndex | None) -> None:
        """`record_sizes` are those that a record may have, with its checksum. `known` is what was read of the file when it was open
        before; then it need not be read again."""
        try:
            if isinstance(path, Path):
                self.descriptor = os.open(path, os.O_RDONLY)
                self.preadv: Callable[[Sequence[memoryview], int], int] = partial(os.preadv, self.descriptor)
                status = os.fstat(self.descriptor)
                if status.st_size <= _WHOLE:
                    content = memoryview(os.pread(self.descriptor, status.st_size, 0))
                    self.preadv = lambda buffers, offset: scatter(content[offset:], buffers)
                    self._close()
            else:
                self.preadv, status = path.preadv, path.stat()
        except OSError as error:
            raise shard_error(path, error) from None
        self.path = path
        self.identity = hash((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
        """With another identity it is another file, or its content has changed."""
        if known is None or known.identity != self.identity:
            known = KnownIndex(self.identity, *self._read_index(rows_per_shard, record_sizes, status.st_size))
        self.known = known
        self.offsets, self.sizes = known.offsets, known.sizes

    def _read_index(self, rows_per_shard: int, record_sizes: range, size: int) -> tuple[memoryview, memoryview]:
        length = rows_per_shard * 16 + 4
        end = size - length
        data = bytearray(length)
        try:
            read = self.preadv((memoryview(data),), max(0, end))
        except OSError as error:
            raise shard_error(self.path, error) from None
        if read != length or google_crc32c.value(bytes(data[:-4])) != struct.unpack("<I", data[-4:])[0]:
            raise CacheError(f"{self.path}: the shard's index is damaged; {REBUILD}")
        places = np.frombuffer(data[:-4], "<u8").reshape(-1, 2)
        fits = (places[:, 1] >= record_sizes[0]) & (places[:, 1] <= record_sizes[-1]) & (places[:, 0] <= max(0, end))
        offsets, sizes = np.where(fits[:, None], places, 0).astype(np.int64).T
        return np.where(fits & (offsets + sizes <= end), offsets, -1).data, sizes.data

    def _close(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
            del self.descriptor

    __del__ = _close


def shard_error(path: Place, error: OSError) -> MGDError:
    """ShardMissing if the shard is missing, else AccessError."""
    if is_absent(error):
        return ShardMissing(f"{path}: shard cannot be opened: {error.strerror}; {REBUILD}")
    return access_error(path, error)
