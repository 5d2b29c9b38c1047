"""Teacher caches in a bucket or on a web server, read by obstore: as much of a `Path` as the reader needs.

Nothing is listed. The sizes of all files are in commit.json, so a plain web server is enough. Keys come from the environment only:
a URL with a password or a query is refused, and no message quotes what a server or a library says beyond its status.
"""

from __future__ import annotations

import os
import random
import re
import stat
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

from mgd_pipeline.errors import AccessError, CacheError, LoaderError, ParamsError

T = TypeVar("T")

_SCHEMES = {"s3", "gs", "az", "http", "https"}
_ADDRESSES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "GOOGLE_BASE_URL")
"""Variables of the environment that name servers. The library ends the process for an address that is none."""
_SECONDS = 20.0
"""A server that sends nothing for so long does not answer."""
_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each repetition of a request that failed; up to half of each, drawn at random, is left out, so that the processes
of many machines do not come back together."""
_CHUNK = 2**20
_FINAL = re.compile(r"status code: (3\d\d|4(?!08|29)\d\d)|Received redirect|169\.254\.169\.254|metadata\.google")
"""Answers that a repetition does not change; the last two are where machines of a provider ask for keys, if they are given none."""
_NO_KEYS = re.compile(r"status code: 40[13]|169\.254\.169\.254|metadata\.google|[Cc]redential")


class Traffic(NamedTuple):
    """What was read over the network."""

    requests: int = 0
    bytes: int = 0

    def __add__(self, other: tuple[Any, ...]) -> Traffic:
        return Traffic(self.requests + other[0], self.bytes + other[1])


NOTHING = Traffic()


class _Counter:
    """The traffic of this process."""

    def __init__(self) -> None:
        self._sum, self._lock = Traffic(), threading.Lock()

    def add(self, requests: int, bytes_: int) -> None:
        with self._lock:
            self._sum += (requests, bytes_)

    def take(self) -> Traffic:
        """What was counted since the last call."""
        with self._lock:
            taken, self._sum = self._sum, Traffic()
        return taken


counter = _Counter()
_first_process: list[int] = []
"""The process that made the first request. What carries its requests does not survive a fork: another one would wait for ever."""


class ObjectChanged(CacheError):
    """An object is not what the commit of its cache says."""


class ObjectMissing(ObjectChanged):
    """There is no such object."""


class RangesRefused(CacheError):
    """The server gives objects as a whole only."""


class RemotePath:
    """A path in a cache at a URL. All paths of a cache share one connection, and the sizes that its commit names."""

    def __init__(self, url: str, store: Any, key: str, sizes: dict[str, int]) -> None:
        self.name = key.rsplit("/", 1)[-1]
        self._url, self._store, self._key, self._sizes = url, store, key, sizes

    def __str__(self) -> str:
        return f"{self._url}/{self._key}" if self._key else self._url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self._url, self._store, f"{self._key}/{name}" if self._key else name, self._sizes)

    def size(self) -> int:
        """Bytes of the object now, by a request. Raises ObjectMissing, AccessError."""
        import obstore

        return self._try(lambda: obstore.head(self._store, self._key))["size"]

    def exists(self) -> bool:
        """Whether there is such an object. Raises AccessError if the server does not tell."""
        try:
            self._sizes[self._key] = self.size()
        except ObjectMissing:
            return False
        return True

    def know_sizes(self, sizes: dict[str, int]) -> None:
        """Notes the sizes of the objects below this path, by name: those of the commit."""
        self._sizes |= {(self / name)._key: size for name, size in sizes.items()}

    @property
    def bytes_known(self) -> int:
        """Bytes of all objects whose sizes are known: after the commit was read, those of the cache."""
        return sum(self._sizes.values())

    def stat(self) -> os.stat_result:
        """Size of an object, as committed. Raises FileNotFoundError."""
        if self._key not in self._sizes:
            raise FileNotFoundError(2, "is missing", str(self))
        return os.stat_result((stat.S_IFREG, 0, 0, 1, 0, 0, self._sizes[self._key], 0, 0, 0))

    def read_bytes(self) -> bytes:
        """A whole object. Raises ObjectMissing, CacheError for another size than committed, AccessError."""
        parts: list[bytes] = []
        self.copy_to(parts.append, parts.clear)
        return b"".join(parts)

    def copy_to(self, write: Callable[[bytes], Any], restart: Callable[[], Any]) -> None:
        """A whole object in parts, by one request. `restart` is called before the first part, each time that the request is
        repeated. Raises as `read_bytes`."""
        import obstore

        def ask() -> None:
            restart()
            answer = obstore.get(self._store, self._key)
            self._require_size(answer.meta["size"])
            for part in answer.stream(min_chunk_size=_CHUNK):
                counter.add(0, len(part))
                write(bytes(part))

        self._try(ask)

    def read_range(self, start: int, end: int) -> bytes:
        """Bytes of an object, by one request. Raises as `read_bytes`, and RangesRefused."""
        import obstore

        def ask() -> bytes:
            answer = obstore.get(self._store, self._key, options={"range": (start, end)})
            self._require_size(answer.meta["size"])
            return bytes(answer.bytes())

        data = self._try(ask) if end > start else b""
        counter.add(0, len(data))
        return data

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """As `os.preadv`, by one request. Raises as `read_range`."""
        return scatter(memoryview(self.read_range(offset, offset + sum(map(len, buffers)))), buffers)

    def _require_size(self, size: int) -> None:
        if size != self.stat().st_size:
            raise ObjectChanged(f"{self}: has {size} bytes, not {self.stat().st_size}; {_CHANGED}")

    def _try(self, work: Callable[[], T]) -> T:
        """The result of a request, which is repeated while the server fails. Raises ObjectMissing, AccessError, CacheError."""
        from obstore import exceptions

        _require_unforked(str(self))
        waits = list(_WAITS)
        while True:
            counter.add(1, 0)
            try:
                return work()
            except FileNotFoundError:
                raise ObjectMissing(f"{self}: cannot be read: is missing; {_CHANGED}") from None
            except exceptions.BaseError as error:
                said = str(error)
                if "non-partial response" in said or isinstance(error, exceptions.NotSupportedError):
                    raise RangesRefused(
                        f"{self}: the server gives whole files only, and single images need parts of files; train by --cache-from, "
                        "which reads whole files, or make a copy"
                    ) from None
                if "Wanted range" in said:
                    raise ObjectChanged(f"{self}: is shorter than it was committed; {_CHANGED}") from None
                denied = isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError)
                if denied or not waits or _FINAL.search(said):
                    raise _unreadable(str(self), said, denied=denied) from None
            time.sleep(waits.pop(0) * random.uniform(0.5, 1))


Place = Path | RemotePath
"""Where a cache, or a file of a cache, lies."""


class RemoteFile(NamedTuple):
    """An object, and what its cache's commit says of it."""

    place: RemotePath
    size: int
    sha256: str


_CHANGED = (
    "the cache at this URL has changed or was not copied whole; open it again, or copy it again with commit.json as the last file"
)


def scatter(data: memoryview, buffers: Sequence[memoryview]) -> int:
    """Fills the buffers one after the other from the start of `data`, as far as `data` lasts; returns the bytes used."""
    start = 0
    for buffer in buffers:
        part = data[start : start + len(buffer)]
        buffer[: len(part)] = part
        start += len(part)
    return start


def is_url(path: str | Place) -> bool:
    return isinstance(path, str) and "://" in path


def place_of(path: str | Place) -> Place:
    """A folder, or the cache at a URL: s3://bucket/wide.zarr, gs://, az://container/..., http:// or https://; file:// is a folder.

    Raises ParamsError for a URL that holds keys, CacheError for one that cannot be read here. Nothing is asked of the server.
    """
    if isinstance(path, RemotePath):
        return path
    if not (isinstance(path, str) and is_url(path)):
        return Path(path)
    no_url = CacheError(
        f"{path.partition('://')[0]}://...: is not a URL of a teacher cache; write s3://bucket/..., gs://, az://, http:// or https://, "
        "and %25 for a percent sign"
    )
    try:
        parts = urlsplit(path)
        decoded, _ = unquote(parts.path, errors="strict"), parts.port
    except ValueError:
        raise no_url from None
    if not (path + decoded).isprintable() or re.search("%(?![0-9A-Fa-f]{2})", parts.path):
        raise no_url
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(decoded)
    clean = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ParamsError(
            f"{clean}: the URL holds more than a place; write it without user, password and query, and give the keys in the "
            "environment (see the page Sharing)"
        )
    if parts.scheme not in _SCHEMES or not parts.netloc:
        raise no_url
    try:
        from obstore import exceptions, store
    except ImportError as error:
        raise CacheError(f"{clean}: cannot be read: {error}; pip install 'mgd-pipeline[remote]' brings what is missing") from None
    _require_unforked(clean)
    for name in _ADDRESSES:
        if not re.fullmatch(r"(https?://[^\s/]+\S*)?", os.environ.get(name, "")):
            raise ParamsError(f"{name}: this variable of the environment is not the URL of a server; write http://server:9000")
    seconds = timedelta(seconds=_SECONDS)
    # The time for a whole answer has no bound: a shard may take minutes. That for each part of it has.
    client: Any = {"allow_http": True, "timeout": "1 day", "read_timeout": seconds, "connect_timeout": seconds}
    make = store.HTTPStore.from_url if parts.scheme in ("http", "https") else store.from_url
    try:
        return RemotePath(clean, make(clean, client_options=client, retry_config={"max_retries": 0}), "", {})
    except exceptions.BaseError as error:  # no server was asked: keys are missing, or none of what is asked for
        raise _unreadable(clean, str(error), denied=True) from None
    except ValueError:  # of another host than URLs can have
        raise no_url from None


def _require_unforked(url: str) -> None:
    if not _first_process:
        _first_process.append(os.getpid())
    if _first_process[0] != os.getpid():
        raise LoaderError(
            f"{url}: this process was forked from one that reads URLs, and cannot read any itself; give the DataLoader "
            'multiprocessing_context="spawn"'
        )


def _unreadable(url: str, said: str, *, denied: bool = False) -> AccessError:
    """Quotes the status that a server answered, or what the library says of the connection: an answer's body may hold keys."""
    first = " ".join(said.partition("Debug source")[0].split())
    status, code = re.search(r"status code: (\d+( [A-Z][A-Za-z]*)*)", first), re.search(r"<Code>(\w+)</Code>", said)
    if status is None:
        reason = re.sub(r"Error performing \w+ \S+ in \S+ - |Generic \w+ error: ", "", re.sub(r"\?\S*", "", first))[:200]
    else:
        reason = f"the server answers {status[1]}" + (f", {code[1]}" if code else "")
    if denied or _NO_KEYS.search(first):
        return AccessError(
            f"{url}: you may not read it ({reason}); give the keys that the bucket's owner gave you in the environment, such as "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ask the owner for the right to read it (see the page Sharing)"
        )
    return AccessError(
        f"{url}: cannot be read now ({reason}), which does not mean that it is damaged; see whether the server answers and its "
        "address is right, then call the same command again"
    )
