"""The machine that a stage runs on: what it lends, and what it refuses, as one line with the remedy: places that cannot be
written, full disks, limits on memory and processes.

Nothing heavy is imported: this is called where torch cannot be imported.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mgd_pipeline.durable import private_name, write_synced
from mgd_pipeline.errors import OutputError, ParamsError

if TYPE_CHECKING:
    import torch

    from mgd_stages.run.sinks import SinkName

_PROBE = bytes(4096)
_AGAIN = "then run the same command again"
_ONE_DISK = "link .mgd and data to folders of the same disk, or move the whole project there"
_UNREACHABLE = f"the disk does not answer; see whether it is mounted and its server runs, {_AGAIN}"
_REMEDIES = {
    errno.EFBIG: f"files may not become that large here; raise the limit (`ulimit -f`) or take another file system, {_AGAIN}",
    errno.ENFILE: f"the whole machine has too many open files; end other programs, {_AGAIN}",
    errno.ENAMETOOLONG: "the file system allows no name of that length (255 bytes); take a shorter one",
    errno.EIO: f"the disk fails; the system's log (`dmesg`) says more; mend or change the disk, {_AGAIN}",
    errno.ESTALE: f"the network disk has lost the file, as after a restart of its server; mount the disk again, {_AGAIN}",
    errno.EBUSY: f"something else holds it, such as a mount; release it, {_AGAIN}",
    errno.ENOTDIR: "a file stands where a folder must be; move it away",
    errno.EISDIR: "a folder stands where a file must be; move it away",
    errno.ELOOP: "links lead in a circle; remove one of them",
    errno.EXDEV: f"finished work is moved there by renaming, which needs one file system; {_ONE_DISK}, {_AGAIN}",
    errno.ETIMEDOUT: _UNREACHABLE,
    errno.ENOTCONN: _UNREACHABLE,
    errno.EHOSTDOWN: _UNREACHABLE,
    errno.ENODEV: _UNREACHABLE,
}
_NAMED = {*_REMEDIES, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.ENOMEM, errno.EAGAIN}

_NO_PLACE = re.compile("[^\n]*(No space left|quota exceeded|Permission denied|Read-only file system|cannot create)[^\n]*")
"""What compilers and torch say of a folder that they cannot write to."""


@dataclass(frozen=True)
class Machine:
    """What a training uses of this machine. Only the kind of device, cpu or cuda, affects the result."""

    device: torch.device
    num_workers: int = 0
    """Processes that decode images; 0 decodes in the training process"""
    resume: bool = True
    """Continue from the checkpoint of an interrupted run"""
    compiled: bool = False
    """Compile the network first"""
    cache_images: bool = False
    """Keep decoded images in .mgd/work/images"""
    log_to: SinkName | None = None
    """Log the metrics there, besides the files that DVC reads"""


def explain(error: BaseException) -> str | None:
    """File, reason and remedy if the machine is the cause of an error; None if a traceback explains it better."""
    kept = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if isinstance(error, OSError) and kept and error.filename and Path(os.fsdecode(error.filename)).is_relative_to(kept):
        # torch makes it when it is imported, whatever is called
        reason = f"{error.strerror}, and torch makes its folder TORCHINDUCTOR_CACHE_DIR there"
        return f"{error.filename}: {reason}; name a folder that can be written, or unset the variable"
    if isinstance(error, OSError) and error.errno in _NAMED and error.errno not in (errno.ENOMEM, errno.EAGAIN):
        path = None if error.filename is None else Path(os.fsdecode(error.filename))
        reason = os.strerror(error.errno)
        return f"{path or 'a file'}: {reason}; {_remedy(error.errno, path)}"
    return explain_limit(error)


def _remedy(number: int, path: Path | None) -> str:
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"{_disk(number, path)}; make room there, {_AGAIN}"
    if number in (errno.EACCES, errno.EPERM):
        return _permission(number, path)
    if number == errno.EROFS:
        mounted = "" if path is None else f" (mounted at {mount_point(path)})"
        return f"its file system{mounted} is read-only; mount it writable, or move the project to another disk"
    if number == errno.EMFILE:
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"this process may open {soft} files; raise the limit, such as `ulimit -n {max(4096, 4 * soft)}`, {_AGAIN}"
    return _REMEDIES[number]


def _disk(number: int, path: Path | None) -> str:
    if path is None:
        return "the disk is full" if number == errno.ENOSPC else "your quota is used up"
    place = mount_point(path)
    if number == errno.EDQUOT:
        return f"your quota on the disk at {place} is used up"
    usage, entries = shutil.disk_usage(place), os.statvfs(place)
    if entries.f_files and not entries.f_favail:
        return f"the disk at {place} has no room for further files (`df -i`), however small"
    return f"the disk at {place} has {_megabytes(usage.free)} of {_megabytes(usage.total)} free"


def _permission(number: int, path: Path | None) -> str:
    there = None if path is None else nearest(path)
    if there is None:
        return "change its permissions"
    if number == errno.EPERM:
        return f"the file system forbids it, as where {there} cannot be changed (`lsattr -d` shows i or a); `chattr -ia` allows it"
    try:
        facts = there.stat()
    except OSError:
        return f"user {_user(os.geteuid())} may not even look at {there}; change its permissions"
    owner = f"{there} belongs to {_user(facts.st_uid)}, mode {stat.S_IMODE(facts.st_mode):o}"
    return f"{owner}, and this is user {_user(os.geteuid())}; change its permissions (chmod, chown)"


def _user(number: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:  # as in containers
        return str(number)


def mount_point(path: Path) -> Path:
    """The mount point of the file system that holds a path, or would hold it."""
    there = nearest(path).resolve()
    mounted: set[Path] = set()
    with suppress(OSError):  # Linux; a folder that is mounted onto itself looks like any other elsewhere
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        mounted = {Path(line.split()[4].encode().decode("unicode_escape")) for line in lines}
    return next(place for place in (there, *there.parents) if place in mounted or os.path.ismount(place))


def nearest(path: Path, is_there: Callable[[Path], bool] = os.path.exists) -> Path:
    """The path, or the nearest folder above it that exists and can be seen; with `lexists` a link that leads nowhere, too."""
    path = Path(os.path.abspath(path))
    return next(place for place in (path, *path.parents) if is_there(place))


def _megabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e10 else f"{size / 1e6:,.1f} MB"


def require_writable(folders: Iterable[Path] = (), files: Iterable[Path] = ()) -> None:
    """Tries to write to these folders, or to the nearest folders above that exist, and whether these files could be replaced.

    A stage calls it first, so that no result is lost at its end. It leaves nothing behind. Raises OutputError, a line a fault.
    """
    files = list(files)
    places = dict.fromkeys(nearest(folder, os.path.lexists) for folder in [*folders, *(file.parent for file in files)])
    if problems := [problem for problem in [*map(unwritable, places), *map(_irreplaceable, files)] if problem]:
        raise OutputError("\n".join(problems))


def require_room(file: Path, size: int) -> None:
    """Raises OutputError if a file of `size` bytes does not fit the disk, or is larger than this process may write."""
    largest = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if largest != resource.RLIM_INFINITY and largest < size:
        raise OutputError(
            f"{file}: needs {_megabytes(size)}, and this process may write files of {_megabytes(largest)}; raise the limit "
            f"(`ulimit -f unlimited`), {_AGAIN}"
        )
    place = mount_point(file)
    if (free := shutil.disk_usage(place).free) < size:
        raise OutputError(
            f"{file}: needs {_megabytes(size)}, and the disk at {place} has {_megabytes(free)} free; make room there, {_AGAIN}"
        )


def unwritable(folder: Path) -> str | None:
    """Why nothing can be written to a folder, which may not exist yet, with the remedy; None if it can be written."""
    there = nearest(folder, os.path.lexists)
    if not there.is_dir():
        kind = "is a link that leads nowhere" if there.is_symlink() and not there.exists() else "is not a folder"
        return f"{there}: {kind}, so nothing can be written below it; move it away, or name another place"
    probe = there / private_name(".write-test")
    try:
        try:
            write_synced(probe, _PROBE)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        if (why := explain(error)) is None:  # as below /proc, which says that the new file is not there
            return f"{there}: takes no new files ({error.strerror}); name another place"
        return f"{there}: {why.partition(': ')[2]}"
    return None


def require_movable(source: Path, target: Path) -> None:
    """Raises OutputError if finished work below `source` cannot be renamed into `target`."""
    if why := unmovable(source, target):
        raise OutputError("; ".join(why))


def unmovable(source: Path, target: Path) -> tuple[str, str] | None:
    """Why nothing can be renamed from one writable folder into another, and the remedy; None if it can.

    A file is moved to find out: two mounts of one disk have the same device number.
    """
    probe, there = nearest(source) / private_name(".write-test"), nearest(target) / private_name(".write-test")
    try:
        write_synced(probe, b"")
        os.rename(probe, there)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        apart = f"{source} and {target} are on different file systems, and finished work is moved from one to the other by renaming"
        return apart, _ONE_DISK
    finally:
        probe.unlink(missing_ok=True)
        there.unlink(missing_ok=True)
    return None


def _irreplaceable(file: Path) -> str | None:
    """Why an existing file cannot be replaced although its folder can be written."""
    if file.is_dir():
        return f"{file}: is a folder, so no file of that name can be written; move it away, or name another place"
    if not file.is_file():
        return None
    if not file.is_symlink() and mount_point(file) == file.resolve():
        return f"{file}: is mounted by itself, as containers mount a file, so it cannot be replaced; mount its folder"
    if os.access(file, os.W_OK):
        return None
    # A file that is merely protected (mode 444, as DVC's) can be replaced. One whose owner may not write either, cannot.
    user, facts = os.geteuid(), file.stat()
    if user == 0 or (facts.st_uid == user and facts.st_mode & stat.S_IWUSR):
        return f"{file}: cannot be changed (immutable, or mounted read-only); `chattr -ia` or another mount allows it"
    return None


_SHORT = re.compile(
    r"cannot allocate memory|can't allocate memory|out of memory|failed to map segment|bad_alloc|mmap", re.IGNORECASE
)
_THREADS = re.compile(
    r"can't start new thread|resource temporarily unavailable|thread creation failed|pthread_create", re.IGNORECASE
)


def memory_limit() -> int | None:
    """Bytes of addresses that this process may use (`ulimit -v`, as some queues set it); None without a limit."""
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def explain_limit(error: BaseException) -> str | None:
    """Which limit of this process caused an error; None if no limit did."""
    text, limit = " ".join(str(error).split()), memory_limit()
    number = error.errno if isinstance(error, OSError) else None
    said, no_memory = text[:200] or type(error).__name__, isinstance(error, MemoryError) or number == errno.ENOMEM
    if no_memory or (_SHORT.search(text) and "CUDA" not in text):
        if limit is not None:
            return f"{said}: {limit_text(limit)}"
        little = f"{said}: this machine or container has too little memory; give it more, or take smaller batches"
        return little if no_memory else None
    if number == errno.EAGAIN or _THREADS.search(text):
        soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
        allowed = "the system" if soft == resource.RLIM_INFINITY else f"`ulimit -u` ({soft} for this user)"
        also = "" if limit is None else f"; {limit_text(limit)}"
        return (
            f"{said}: no further thread or process is allowed by {allowed} or by the container; "
            f"raise the limit, or take fewer --threads, --num-workers or --workers{also}"
        )
    return None


def limit_text(limit: int) -> str:
    return (
        f"this process may use {limit / 1e9:.1f} GB of addresses (`ulimit -v`, as a queue's memory limit sets it), and torch alone "
        "takes several; raise it (`ulimit -v unlimited`, or more memory from the queue)"
    )


def cores() -> int:
    """CPU cores that this process may use. macOS does not say which, so there all of the machine's count."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_compiler(device: torch.device) -> None:
    """Compiles one line, so that a machine without a compiler is named before a training begins.

    Raises ParamsError; OutputError if the compiler cannot write its files.
    """
    import torch

    zeros = torch.zeros(8, device=device)  # not below: a device that fails here has no lack of compilers
    try:
        torch.compile(torch.exp)(zeros)
    except OSError as error:
        raise OutputError(f"--compile: {error.filename}: {error.strerror}; {_compiles_into()}") from None
    except RuntimeError as error:  # torch's own wear private names
        if (no_place := _NO_PLACE.search(str(error))) is not None:
            said = " ".join(no_place[0].split())
            raise OutputError(f"--compile: the compiler cannot write: {said}; {_compiles_into()}") from None
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise ParamsError(f"--compile: no compiler for {device}: {reason}; install one, or leave --compile out") from None


def _compiles_into() -> str:
    """Where compilers write, how much room is there, and how to change the place."""
    temporary = Path(os.environ.get("TMPDIR", tempfile.gettempdir()))
    kept = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir()))
    free = [
        f"{place} ({name}) has {shutil.disk_usage(nearest(place)).free / 1e6:,.1f} MB free"
        for name, place in (("TMPDIR", temporary), ("TORCHINDUCTOR_CACHE_DIR", kept))
    ]
    return f"{', '.join(free)}; make room there, or name other folders by TMPDIR and TORCHINDUCTOR_CACHE_DIR"
