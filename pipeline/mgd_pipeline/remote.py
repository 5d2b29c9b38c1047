"""Stores in a bucket, or wherever else fsspec reads (Zarr uses it, too): as much of a `Path` as the reader of stores needs."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from typing import Any

from mgd_pipeline.errors import CacheError


class RemotePath:
    """A place in a store at a URL. All places share one listing of the store: asking for each of 10,000 sizes takes minutes."""

    def __init__(self, filesystem: Any, key: str, sizes: dict[str, int]) -> None:
        self.name = key.rsplit("/", 1)[-1]
        self._filesystem, self._key, self._sizes = filesystem, key, sizes

    def __str__(self) -> str:
        return self._filesystem.unstrip_protocol(self._key)

    def __truediv__(self, name: object) -> RemotePath:
        return self.joinpath(str(name))

    def joinpath(self, *parts: str) -> RemotePath:
        return RemotePath(self._filesystem, "/".join([self._key, *parts]), self._sizes)

    def exists(self) -> bool:
        """Whether there is such a file, or a folder with files."""
        return self._key in self._sizes or any(key.startswith(f"{self._key}/") for key in self._sizes)

    def stat(self) -> os.stat_result:
        """Size of a file, as it was listed; FileNotFoundError where there is none."""
        if self._key not in self._sizes:
            raise FileNotFoundError(2, "is missing", str(self))
        return os.stat_result((stat.S_IFREG, 0, 0, 1, 0, 0, self._sizes[self._key], 0, 0, 0))

    def read_bytes(self) -> bytes:
        """A whole file, at most what was listed of it."""
        return self._filesystem.cat_file(self._key, start=0, end=self.stat().st_size)

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """As `os.preadv` does, by one request; CacheError where that fails."""
        try:
            data = self._filesystem.cat_file(self._key, start=offset, end=offset + sum(map(len, buffers)))
        except OSError as error:
            raise CacheError(f"{self}: cannot be read: {error}") from None
        start = 0
        for buffer in buffers:
            part = data[start : start + len(buffer)]
            buffer[: len(part)] = part
            start += len(part)
        return len(data)


def remote_path(url: str) -> RemotePath:
    """The store at an fsspec URL such as s3://bucket/wide.zarr, with a listing of it; CacheError where that cannot be had."""
    try:
        from fsspec.core import url_to_fs

        filesystem, key = url_to_fs(url)
        filesystem.invalidate_cache()
        found = filesystem.find(key, detail=True)
    except (ImportError, OSError, ValueError) as error:
        raise CacheError(f"{url}: cannot be read: {error}; pip install 'mgd-pipeline[remote]' brings S3") from None
    return RemotePath(filesystem, key, {name: entry["size"] for name, entry in found.items()})
