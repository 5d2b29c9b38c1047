"""Teacher caches in a bucket, or wherever fsspec reads: as much of a `Path` as the reader needs."""

from __future__ import annotations

import os
import pickle
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mgd_pipeline.errors import AccessError, CacheError

_OF_LIBRARIES = (("botocore.exceptions", "BotoCoreError"), ("botocore.exceptions", "ClientError"), ("aiohttp", "ClientError"))
_WITHOUT_KEYS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError")


class RemotePath:
    """A path in a cache at a URL. All paths share one listing of the cache: asking for each of 10,000 sizes takes minutes."""

    def __init__(self, filesystem: Any, key: str, sizes: dict[str, int]) -> None:
        self.name = key.rsplit("/", 1)[-1]
        self._filesystem, self._key, self._sizes = filesystem, key, sizes

    def __str__(self) -> str:
        return self._filesystem.unstrip_protocol(self._key)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self._filesystem, f"{self._key}/{name}", self._sizes)

    def exists(self) -> bool:
        """Whether there is such a file, or a folder with files."""
        return self._key in self._sizes or any(key.startswith(f"{self._key}/") for key in self._sizes)

    def stat(self) -> os.stat_result:
        """Size of a file, as listed. Raises FileNotFoundError."""
        if self._key not in self._sizes:
            raise FileNotFoundError(2, "is missing", str(self))
        return os.stat_result((stat.S_IFREG, 0, 0, 1, 0, 0, self._sizes[self._key], 0, 0, 0))

    def read_bytes(self) -> bytes:
        """A whole file, at most the size that was listed. Raises AccessError if the server does not give it."""
        size = self.stat().st_size
        try:
            return self._filesystem.cat_file(self._key, start=0, end=size)
        except FileNotFoundError:
            raise
        except _failures() as error:
            raise _unreadable(str(self), error) from None

    def names(self) -> set[str]:
        """Names of the files and folders in this folder."""
        return {key.removeprefix(f"{self._key}/").split("/")[0] for key in self._sizes if key.startswith(f"{self._key}/")}

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """As `os.preadv`, by one request. Raises CacheError if there is no such file, AccessError if the request fails."""
        try:
            data = self._filesystem.cat_file(self._key, start=offset, end=offset + sum(map(len, buffers)))
        except FileNotFoundError as error:
            raise CacheError(f"{self}: cannot be read: {error}") from None
        except _failures() as error:
            raise _unreadable(str(self), error) from None
        return scatter(memoryview(data), buffers)


Place = Path | RemotePath
"""Where a cache, or a file of a cache, lies."""


def scatter(data: memoryview, buffers: Sequence[memoryview]) -> int:
    """Fills the buffers one after the other from the start of `data`, as far as `data` lasts; returns the bytes used."""
    start = 0
    for buffer in buffers:
        part = data[start : start + len(buffer)]
        buffer[: len(part)] = part
        start += len(part)
    return start


class _Connection:
    """A file system of fsspec that forked processes may use, too: each opens connections of its own."""

    def __init__(self, filesystem: Any) -> None:
        self._filesystem, self._process = filesystem, os.getpid()

    def cat_file(self, key: str, start: int, end: int) -> bytes:
        if self._process != os.getpid():
            self._filesystem, self._process = pickle.loads(pickle.dumps(self._filesystem)), os.getpid()
        return self._filesystem.cat_file(key, start=start, end=end)

    def unstrip_protocol(self, key: str) -> str:
        return self._filesystem.unstrip_protocol(key)


def remote_path(url: str) -> RemotePath:
    """The cache at an fsspec URL such as s3://bucket/wide.zarr, with a listing of it.

    Raises CacheError if such a URL cannot be read here, AccessError if the server refuses or does not answer.
    """
    try:
        from fsspec.core import url_to_fs

        filesystem, key = url_to_fs(url)
        filesystem.invalidate_cache()
        listing = filesystem.find(key, detail=True)
    except (ImportError, ValueError) as error:
        raise CacheError(f"{url}: cannot be read: {error}; pip install 'mgd-pipeline[remote]' brings S3") from None
    except FileNotFoundError:
        listing = {}
    except _failures() as error:
        raise _unreadable(url, error) from None
    return RemotePath(_Connection(filesystem), key, {name: entry["size"] for name, entry in listing.items()})


def _failures() -> tuple[type[Exception], ...]:
    """What a request may fail with: errors of the system, and errors of the library that makes the requests."""
    loaded = [(sys.modules.get(module), name) for module, name in _OF_LIBRARIES]
    return (OSError, *(getattr(module, name) for module, name in loaded if module is not None))


def _unreadable(url: str, error: Exception) -> AccessError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, PermissionError) or type(error).__name__ in _WITHOUT_KEYS:
        return AccessError(
            f"{url}: you may not read it ({reason}); give the keys that the bucket's owner gave you, such as AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or ask the owner for the right to list and read it (see the page Sharing)"
        )
    return AccessError(
        f"{url}: cannot be read now ({reason}), which does not mean that it is damaged; see whether the server answers and its "
        "address is right, then call the same command again"
    )
