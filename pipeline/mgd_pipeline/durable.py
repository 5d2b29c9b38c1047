"""Files that survive kills and power cuts: written under another name, synced, then renamed in one step.

A file that has its final name is never written again. All calls go through `os`, so that tests can let each call fail.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import shutil
import signal
import socket
import threading
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mgd_pipeline.errors import DataError


def private_name(prefix: str) -> str:
    """A name that no other process on any machine uses."""
    return f"{prefix}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file's name to errors of writing: errors of descriptors, such as a full disk, have none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Writes all bytes; `os.write` may write fewer, for instance on a nearly full disk."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def write_synced(path: Path, data: bytes, mode: int = 0o666) -> None:
    """A new file, on the disk before this returns, under a name that nobody reads yet. Raises FileExistsError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with naming(path):
        try:
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with naming(folder):
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_folders(folders: Iterable[Path]) -> None:
    """Makes the names in many folders last; in parallel, so that one flush of the disk serves several folders."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(sync_folder, folders))


def _alive(process: int) -> bool:
    """Whether another process on this machine has this number; a container may give a killed process's number to the next one."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def remove_left(folder: Path, prefix: str, suffix: str = "") -> None:
    """Removes files and folders that killed processes of this machine left here, called `private_name(prefix)` and the suffix."""
    for left in folder.glob(glob.escape(f"{prefix}-{socket.gethostname()}-") + "*" + glob.escape(suffix)):
        process = left.name.rsplit("-", 2)[1]
        if process.isdecimal() and not _alive(int(process)):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)  # another user's stays
            else:
                left.unlink(missing_ok=True)


def replace_file(path: Path, data: bytes) -> None:
    """`path` holds its old content or `data`, never a part of it. See `replacing`."""
    with replacing(path) as beside:
        write_synced(beside, data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A private name beside `path`. The synced file that the block writes there becomes `path`; after an error nothing is left.

    Temporary files of killed processes are removed. Errors of the system in the block name `path`. Raises DataError for a name that
    is too long for the file system.
    """
    with _private(path) as beside:
        yield beside
        os.replace(beside, path)
        sync_folder(path.parent)


def _hidden(path: Path) -> str:
    """How the private names beside `path` begin. With a host name of 64 bytes, 48 bytes of its name fit into every file system."""
    name = path.name if len(os.fsencode(path.name)) <= 48 else hashlib.sha256(os.fsencode(path.name)).hexdigest()[:40]
    return f".{name}"


@contextmanager
def _private(path: Path) -> Iterator[Path]:
    """A private name beside `path`, which is gone after the block; what killed processes left goes before. See `replacing`."""
    prefix = _hidden(path)
    beside = path.with_name(private_name(prefix) + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_left(path.parent, prefix, ".tmp")
        try:
            yield beside
        finally:
            with uninterrupted():
                beside.unlink(missing_ok=True)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise OSError(error.errno, error.strerror, str(path)) from None  # nobody knows the temporary file
        name, whole = len(os.fsencode(path.name)), len(os.fsencode(path))
        raise DataError(
            f"{path}: the name ({name} bytes) or the path ({whole} bytes) is too long for the file system; shorten it"
        ) from None


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block has ended, which takes moments: what it renames and removes belongs together."""
    before, heard = signal.getsignal(signal.SIGINT), False
    if not callable(before) or threading.current_thread() is not threading.main_thread():  # Ctrl-C never ends this block
        yield
        return

    def remember(number: int, frame: object) -> None:
        nonlocal heard
        heard = True

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if heard:
            signal.raise_signal(signal.SIGINT)


def renew_folder(folder: Path) -> None:
    """An empty folder in the place of anything that was there. Of a link only the link is removed, not its target."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def publish_folder(staged: Path, place: Path) -> bool:
    """Gives a finished folder its name; False if another folder has this name already. The other folder stays unchanged.

    A folder cannot be renamed onto a folder that is not empty, so exactly one of several builders wins, with all its files.
    """
    try:
        os.rename(staged, place)
    except OSError as error:
        if error.errno == errno.EXDEV:
            why = f"is on another file system than {staged}; do not link .mgd or data elsewhere"
            raise OSError(error.errno, why, str(place)) from None
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    sync_folder(place.parent)
    return True


@contextmanager
def _taking_turns(folder: Path) -> Iterator[None]:
    """Lets one process at a time into the block, of those that publish in this folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def replace_together(files: dict[Path, bytes]) -> None:
    """Files of one folder that belong together; the last one is what readers open, and never lies beside files of another set.

    A reader sees the old files, or the new ones, or for a moment no last file. The old ones go when all new ones are on the disk,
    so a full disk changes nothing, and come back where a new one cannot get its name. Two processes take turns.
    """
    *beside, last = files
    if not beside:
        return replace_file(last, files[last])
    if folder := next((path for path in files if path.is_dir()), None):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(folder))
    last.parent.mkdir(parents=True, exist_ok=True)
    with _taking_turns(last.parent), ExitStack() as written:
        new = {path: written.enter_context(_private(path)) for path in (last, *beside)}
        for path, name in new.items():
            write_synced(name, files[path])
        with uninterrupted():
            _exchange(last.parent, {path: new[path] for path in files}, ".tmp")


def was_killed(path: Path) -> bool:
    """Whether a killed process left a temporary file for `path`, so that files that belong to `path` may lie there without it."""
    return any(path.parent.glob(f"{glob.escape(_hidden(path))}-*.tmp"))


def copy_folder(staged: Path, place: Path, *, replace: bool) -> bool:
    """A synced copy of a folder under its name; False if the name is taken and shall not be replaced.

    With `replace`, what has the name goes, of a link only the link; a reader sees the old folder, or the new one, or for a moment
    none. Two processes take turns.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with _taking_turns(place.parent):
        remove_left(place.parent, _hidden(place))
        new = place.with_name(private_name(_hidden(place)))
        try:
            for source in (staged, *sorted(staged.rglob("*"))):
                copy = new / source.relative_to(staged)
                if source.is_dir():
                    copy.mkdir()
                else:
                    write_synced(copy, source.read_bytes())
            if not replace:
                return publish_folder(new, place)
            with uninterrupted():
                _exchange(place.parent, {place: new}, "")
            return True
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(place)) from None  # nobody knows the temporary folder
        finally:
            with uninterrupted():
                shutil.rmtree(new, ignore_errors=True)


def _exchange(folder: Path, new: dict[Path, Path], suffix: str) -> None:
    """Gives finished files and folders their places in `folder`, by place, and removes what was there; of a link only the link.

    The last place is empty first and filled last. After an error all places have again what they had.
    """
    old = {path: path.with_name(private_name(_hidden(path)) + suffix) for path in reversed(new) if os.path.lexists(path)}
    renamed: list[tuple[Path, Path]] = []
    try:
        for source, target in (*old.items(), *((name, path) for path, name in new.items())):
            os.rename(source, target)
            renamed.append((source, target))
    except OSError:
        for source, target in reversed(renamed):
            os.rename(target, source)
        raise
    sync_folder(folder)
    for left in old.values():
        if left.is_symlink() or not left.is_dir():
            left.unlink()
        else:
            shutil.rmtree(left, ignore_errors=True)


def link_or_copy(source: Path, place: Path) -> None:
    """A further name for a file, or a synced copy if the file system or the file's owner does not allow a link."""
    try:
        os.link(source, place)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        write_synced(place, source.read_bytes(), 0o444)
