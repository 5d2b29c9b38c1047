"""Local copies of shards of caches at URLs: plain files, named by their SHA-256, in a folder that processes and trainings share.

    <folder>/<2 digits>/<SHA-256>          a whole shard; compared with its SHA-256 when it arrived
    <folder>/<2 digits>/<SHA-256>.rows     a sparse file: the shard's index and some of its records, each at its place
    <folder>/<2 digits>/<SHA-256>.part     a whole shard on its way; whoever brings it holds the file's lock
    <folder>/lock                          held while room is made

Any of them may be deleted at any time. Files that were used longest ago go first when the folder reaches its limit; a process that
has such a file open reads on. The ordinary reader reads the copies, so every record is checked again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np

from mgd_pipeline.caches.format import sha256_file, shard_name
from mgd_pipeline.caches.opening import Contents
from mgd_pipeline.caches.reader import READ, TargetCache
from mgd_pipeline.caches.remote import ObjectChanged, Place, RangesRefused, RemoteFile, RemotePath
from mgd_pipeline.caches.shard_reader import ShardMissing, ShardReader
from mgd_pipeline.durable import naming, write_all
from mgd_pipeline.errors import CacheError, MGDError

_GAP = 2**20
"""Bytes between two records that are read along: a request takes as long as a megabyte."""
_TRIES = 3
"""How often what arrives with another SHA-256, or is read from a damaged copy, is asked for again."""
_OPENED = 100
"""How often a copy is brought again that other processes remove before it is opened."""
_THREADS = 4
_BLOCK = 4096
"""A file takes whole blocks of the disk."""
_COPY = re.compile(r"[0-9a-f]{64}(\.rows|\.part)?")
"""Names of copies. Whatever else lies in the folder is somebody's own."""
_AGAIN = "copy the cache there again, commit.json as the last file"


def copies_folder() -> Path:
    """The folder of copies in the user's cache directory."""
    default = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or default).expanduser() / "mgd-pipeline/shards"


@dataclass(frozen=True)
class ShardFolder:
    """A folder of copies, with a limit in bytes."""

    folder: Path
    limit: int

    def fetch(self, file: RemoteFile, *, wait: bool = True, given_up: threading.Event | None = None) -> Path | None:
        """The copy of a whole shard, which is brought first if it is not there.

        If another process or thread is bringing it, waits for it, or returns None without `wait`. Raises CacheError if the object
        is missing or not as committed, AccessError if it cannot be read, OSError if it cannot be written, GivenUp.
        """
        place = self._place(file.sha256)
        while not _touched(place):
            with _claimed(place.with_suffix(".part"), wait=wait) as part:
                if part is None:
                    if not wait:
                        return None
                elif not place.exists():
                    self._bring(file, part, place, given_up or threading.Event())
        return place

    def fetch_now(self, file: RemoteFile) -> Path:
        place = self.fetch(file)
        assert place is not None
        return place

    def fetch_records(self, file: RemoteFile, per_shard: int, slots: Sequence[int]) -> Path:
        """A sparse copy of a shard with its index and at least the records in these slots. Raises what `fetch` raises.

        A record that arrives damaged is left out, and its reader says so.
        """
        if file.size <= _GAP:
            return self.fetch_now(file)
        place = self._place(file.sha256).with_suffix(".rows")
        while True:
            with _claimed(place, wait=True) as copy, naming(place):
                if copy is not None and _touched(place):
                    os.ftruncate(copy, file.size)
                    self._complete(copy, self._reader(file), per_shard * 16 + 4, slots)
                    return place

    def _complete(self, copy: int, read: Callable[[int, int], bytes], index_bytes: int, slots: Sequence[int]) -> None:
        """Writes what a sparse copy lacks: its shard's index and the records in these slots."""
        end = os.fstat(copy).st_size
        index = os.pread(copy, index_bytes, end - index_bytes)
        if not _sound(index):
            index = read(end - index_bytes, end)
            if not _sound(index):
                return
            self.make_room(_on_disk(index_bytes) + _BLOCK)
            _write_at(copy, index, end - index_bytes)
        missing = _missing(copy, index, slots)
        if missing:
            self.make_room(sum(_on_disk(last - first) + _BLOCK for first, last in missing))
        for start, stop in _merged(missing):
            data = read(start, stop)
            for first, last in missing:
                if start <= first and last <= stop and _sound(record := data[first - start : last - start]):
                    _write_at(copy, record, first)

    def renew(self, sha256: str) -> None:
        """Removes copies of a shard whose content is not what it was on arrival."""
        place = self._place(sha256)
        with suppress(FileNotFoundError):
            if sha256_file(place) != sha256:
                place.unlink()
        place.with_suffix(".rows").unlink(missing_ok=True)  # its records are compared one by one when they are asked for again

    def touch(self, sha256: str) -> bool:
        """Notes that a shard's copies are in use; whether there is a whole one."""
        place = self._place(sha256)
        _touched(place.with_suffix(".rows"))
        return _touched(place)

    def used(self) -> int:
        """Bytes of all copies on the disk."""
        return sum(_bytes_of(entry) for entry in self._entries())

    def make_room(self, size: int, part: int | None = None, length: int = 0) -> None:
        """Removes the copies that were used longest ago until `size` bytes more fit the limit, and the disk; gives the file `part`
        its length, by which other processes know that the room is taken."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # First what killed processes were bringing.
            entries = sorted(self._entries(), key=lambda entry: (not entry.name.endswith(".part"), entry.stat().st_mtime_ns))
            surplus = max(sum(map(_bytes_of, entries)) - self.limit, -shutil.disk_usage(self.folder).free) + size
            for entry in entries:
                if surplus <= 0:
                    break
                if entry.name.endswith((".part", ".rows")) and _is_claimed(Path(entry.path)):
                    continue
                with suppress(FileNotFoundError):
                    surplus -= _bytes_of(entry)
                    os.unlink(entry.path)
            if part is not None:
                os.ftruncate(part, length)
        finally:
            os.close(descriptor)

    def _place(self, sha256: str) -> Path:
        return self.folder / sha256[:2] / sha256

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        for below in self.folder.glob("[0-9a-f][0-9a-f]"):
            with suppress(FileNotFoundError), os.scandir(below) as entries:
                yield from [entry for entry in entries if _COPY.fullmatch(entry.name) and _exists(entry)]

    def _bring(self, file: RemoteFile, part: int, place: Path, given_up: threading.Event) -> None:
        self.make_room(_on_disk(file.size), part, file.size)
        beside = place.with_suffix(".part")
        try:
            with naming(beside):
                for _ in range(_TRIES):
                    arriving = Arriving(part, given_up)
                    file.place.copy_to(arriving.write, arriving.restart)
                    if arriving.digest.hexdigest() == file.sha256:
                        os.fsync(part)
                        with suppress(FileNotFoundError):  # somebody has emptied the folder: it is brought again
                            os.rename(beside, place)
                        return
            raise ObjectChanged(
                f"{file.place}: differs from what was committed ({file.size} bytes with another SHA-256): the cache at this URL "
                f"has changed or is damaged; {_AGAIN}"
            )
        finally:
            beside.unlink(missing_ok=True)

    def _reader(self, file: RemoteFile) -> Callable[[int, int], bytes]:
        """Reads parts of a shard: from its whole copy if it is there or if the server gives whole files only, else by requests."""

        def by_request(start: int, end: int) -> bytes:
            try:
                return file.place.read_range(start, end)
            except RangesRefused:
                return from_copy(start, end)

        def from_copy(start: int, end: int) -> bytes:
            with open(self.fetch_now(file), "rb") as whole:
                whole.seek(start)
                return whole.read(end - start)

        return from_copy if self._place(file.sha256).exists() else by_request


class CopiedCache(TargetCache):
    """A cache at a URL, read from copies: of whole shards, or of the records of `rows` only."""

    def __init__(self, contents: Contents, folder: ShardFolder, rows: Iterable[int] | None = None) -> None:
        super().__init__(contents)
        self.folder = folder
        self._wanted: dict[int, list[int]] | None = None if rows is None else {}
        self._complete: dict[tuple[str, int], Path] = {}
        """Sparse copies that have been compared record by record."""
        for row in sorted(set(rows or ())):
            assert self._wanted is not None
            number, slot = divmod(row, self.layout.rows_per_shard)
            self._wanted.setdefault(number, []).append(slot)

    def shard_bytes(self, number: int) -> int:
        """What the copies of a shard take of the disk."""
        return sum(_on_disk(file.size) for file in self.files_of([number]))

    def files_of(self, numbers: Iterable[int]) -> list[RemoteFile]:
        """What training reads of these shards."""
        return [self._object(name, number) for number in numbers for name in self._read]

    def fetch_rows(self) -> None:
        """Brings the records of all `rows`, before anything reads them one after the other."""
        with ThreadPoolExecutor(_THREADS) as pool:
            calls = [pool.submit(self._shard_place, name, number) for number in self._wanted or () for name in self._read]
            for call in calls:
                call.result()

    def bytes_of_rows(self) -> int:
        """About what the copies of `rows` take of the disk."""
        records, total = self.index.stored(self.layout.rows_per_shard), 0
        for number, slots in (self._wanted or {}).items():
            share = len(slots) / max(1, int(records[number]))
            total += sum(_on_disk(file.size if file.size <= _GAP else int(file.size * share)) for file in self.files_of([number]))
        return total

    def touch(self) -> None:
        """Notes that the copies of `rows` are in use."""
        for file in self.files_of(self._wanted or ()):
            self.folder.touch(file.sha256)

    @property
    def _read(self) -> list[str]:
        return [name for name in READ if name in self.layout.records]

    @property
    def _by_requests(self) -> bool:
        return False

    def _object(self, name: str, number: int) -> RemoteFile:
        file = shard_name(self.layout, name, number)
        place, entry = self.path / file, self.commit["files"][file]
        assert isinstance(place, RemotePath)
        if not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):  # it is to be the name of a file here
            raise CacheError(f"{place}: its SHA-256 in commit.json is none; this is not an mgd-pipeline cache")
        return RemoteFile(place, entry["size"], entry["sha256"])

    def _shard_place(self, name: str, number: int) -> Place:
        file = self._object(name, number)
        if self._wanted is None:
            return self.folder.fetch_now(file)
        known = self._complete.get((name, number))
        if known is None or not known.exists():
            known = self.folder.fetch_records(file, self.layout.rows_per_shard, self._wanted.get(number, []))
            self._complete[name, number] = known
        return known

    def _open_shard(self, name: str, number: int) -> ShardReader:
        for _ in range(_OPENED):
            with suppress(ShardMissing):  # somebody has made room before the copy was opened
                return super()._open_shard(name, number)
        return super()._open_shard(name, number)

    def _gather(self, name: str, places: list[tuple[int, int, int]]) -> np.ndarray:
        for _ in range(_TRIES):
            try:
                return super()._gather(name, places)
            except ObjectChanged:
                raise
            except CacheError:
                # A copy was damaged, or another process has made a new one with other records. Damage at the URL is met again.
                self._renew(name, places)
        return super()._gather(name, places)

    def _renew(self, name: str, places: list[tuple[int, int, int]]) -> None:
        for number in {number for _, number, _ in places}:
            self.folder.renew(self._object(name, number).sha256)
            self._shards.pop((name, number), None)
            self._known.pop((name, number), None)
            self._complete.pop((name, number), None)


class Ahead:
    """Brings shards in the background, in the order in which they are asked for."""

    def __init__(self, folder: ShardFolder) -> None:
        self._folder = folder
        self._waiting: deque[RemoteFile] = deque()
        self._threads: list[threading.Thread] = []
        self._wake, self._closed = threading.Condition(), threading.Event()

    def close(self) -> None:
        """Ends all threads: a thread within a request would crash the end of the process."""
        with self._wake:
            self._closed.set()
            self._waiting.clear()
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def want(self, files: Iterable[RemoteFile]) -> None:
        """From now on these files, in this order, instead of those that were asked for before and have not begun."""
        files = [file for file in files if not self._folder.touch(file.sha256)]
        with self._wake:
            self._waiting = deque(files)
            self._wake.notify_all()
        while len(self._threads) < min(_THREADS, len(files)):
            self._threads.append(threading.Thread(target=self._bring, name="read-ahead", daemon=True))
            self._threads[-1].start()

    def _bring(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._closed.is_set())
                if self._closed.is_set():
                    return
                file = self._waiting.popleft()
            with suppress(MGDError, OSError):  # whoever reads the shard meets the same failure, and says so
                self._folder.fetch(file, wait=False, given_up=self._closed)


class GivenUp(MGDError):
    """Nobody needs the rest of a file."""


class Arriving:
    """A file on its way, and the hash of what has arrived."""

    def __init__(self, descriptor: int, given_up: threading.Event) -> None:
        self._descriptor, self._given_up, self.digest = descriptor, given_up, hashlib.sha256()

    def restart(self) -> None:
        self.digest = hashlib.sha256()
        os.lseek(self._descriptor, 0, os.SEEK_SET)

    def write(self, data: bytes) -> None:
        if self._given_up.is_set():
            raise GivenUp
        self.digest.update(data)
        write_all(self._descriptor, data)


def _touched(path: Path) -> bool:
    """Whether a file is there; its time is then now."""
    now = time.time_ns()  # the system's own notes of the time are coarse
    try:
        os.utime(path, ns=(now, now))
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _claimed(path: Path, *, wait: bool) -> Iterator[int | None]:
    """The descriptor of a file whose lock this thread alone holds. None if another has it (without `wait`), or had it meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:  # somebody removes the folder
        yield None
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        # Its last holder may have renamed or removed the file.
        yield descriptor if _is_at(descriptor, path) else None
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _is_claimed(path: Path) -> bool:
    with suppress(FileNotFoundError), open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _write_at(descriptor: int, data: bytes, place: int) -> None:
    os.lseek(descriptor, place, os.SEEK_SET)
    write_all(descriptor, data)


def _exists(entry: os.DirEntry[str]) -> bool:
    try:
        entry.stat()
    except FileNotFoundError:
        return False
    return True


def _bytes_of(entry: os.DirEntry[str]) -> int:
    """What a file takes of the disk, or will take."""
    status = entry.stat()  # which is remembered
    return _on_disk(status.st_size) if entry.name.endswith(".part") else status.st_blocks * 512


def _on_disk(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _sound(stored: bytes) -> bool:
    """Whether a record, or an index, fits the CRC32C at its end."""
    return len(stored) > 4 and google_crc32c.value(stored[:-4]) == int.from_bytes(stored[-4:], "little")


def _missing(descriptor: int, index: bytes, slots: Sequence[int]) -> list[tuple[int, int]]:
    """Start and end of each record in these slots that a sparse copy lacks, ascending."""
    size = os.fstat(descriptor).st_size - len(index)
    places = np.frombuffer(index[:-4], "<u8").reshape(-1, 2)[list(slots)].tolist()
    inside = sorted((start, start + length) for start, length in places if start + length <= size)
    return [(start, end) for start, end in inside if not _sound(os.pread(descriptor, end - start, start))]


def _merged(ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ascending ranges with those between which there is less than a gap in one."""
    begun: tuple[int, int] | None = None
    for start, end in ranges:
        if begun is not None and start - begun[1] <= _GAP:
            begun = begun[0], max(begun[1], end)
            continue
        if begun is not None:
            yield begun
        begun = start, end
    if begun is not None:
        yield begun
