"""What errors of the system mean: a file that may not be read, or a disk that does not answer, is neither missing nor damaged.

Few errors say that there is no such file. A program that takes any other error for absence or damage advises the user to remove
or compute again a file that is whole.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from mgd_pipeline.errors import AccessError, shell_command

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_FORBIDDEN = (errno.EACCES, errno.EPERM)
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)
_NO_ANSWER = (
    *(errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN),
    getattr(errno, "EREMOTEIO", errno.EIO),  # Linux alone has it
    *(errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EBUSY),
)


def is_absent(error: OSError) -> bool:
    """Whether the system says that there is no such file."""
    return isinstance(error, (FileNotFoundError, NotADirectoryError)) or error.errno in _ABSENT


def says_nothing(error: OSError) -> bool:
    """Whether an error says nothing about the file itself: it is not allowed, the disk does not answer, no descriptor is left."""
    forbidden = isinstance(error, PermissionError) or error.errno in (*_FORBIDDEN, *_NO_DESCRIPTOR)
    return forbidden or gives_no_answer(error)


def gives_no_answer(error: OSError) -> bool:
    """Whether the disk or the network failed: nothing is known about the file."""
    return isinstance(error, (TimeoutError, ConnectionError)) or error.errno in _NO_ANSWER


def is_there(path: Path) -> bool:
    """Whether there is such a file or folder. Raises AccessError if the system does not tell.

    `Path.exists` raises or says no, depending on the version of Python.
    """
    try:
        os.stat(path)
    except OSError as error:
        if is_absent(error):
            return False
        raise access_error(path, error) from None
    return True


def stand_in(start: bytes) -> str | None:
    """What a file is that is neither an image nor weights, and the remedy, from its first 64 bytes; None if it may be either."""
    if not start:
        return "the file is empty; fetch it again, or remove it"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS; fetch the file by `git lfs pull`"
    if start.startswith(b"/annex/objects/"):
        return "it is a pointer of git-annex; fetch the file by `git annex get`"
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "it is a web page, which a server sent in its place; fetch the file again"
    return None


def access_error(path: object, error: OSError) -> AccessError:
    """One line for an error that `says_nothing` about the file: the reason, and a remedy that destroys nothing."""
    reason = " ".join((error.strerror or str(error) or type(error).__name__).split())[:200]
    if isinstance(error, PermissionError) or error.errno in _FORBIDDEN:
        return AccessError(f"{path}: you may not read it ({reason}); {_permit(path)}")
    if error.errno in _NO_DESCRIPTOR:
        return AccessError(
            f"{path}: cannot be opened, too many files are open; raise `ulimit -n`, then call the same command again"
        )
    return AccessError(
        f"{path}: cannot be read now ({reason}), which does not mean that it is damaged; see whether its disk is mounted and "
        "answers, then call the same command again"
    )


def _permit(path: object) -> str:
    """Who can open a path that may not be read, and how."""
    closed = _closed(Path(path)) if isinstance(path, (str, Path)) and "://" not in str(path) else None
    if closed is None:
        return "check its permissions, or ask its owner for them (see the page Sharing)"
    place, status = closed
    who, of_group = _owner(status.st_uid), status.st_gid in {os.getegid(), *os.getgroups()}
    what = "folder" if stat.S_ISDIR(status.st_mode) else "file"
    ask = "call" if status.st_uid == os.geteuid() else f"ask {who} to call"
    for_whom = "u" if status.st_uid == os.geteuid() else "g" if of_group else "o"
    remedy = shell_command("chmod", "-R", f"{for_whom}+rX", place)
    mode = stat.filemode(status.st_mode)
    return f"check the permissions {mode} of the {what} {place}, which belongs to {who}: {ask} `{remedy}` (see the page Sharing)"


def _closed(path: Path) -> tuple[Path, os.stat_result] | None:
    """The first folder of a path that may not be entered, or the file itself; None if the reason is unknown."""
    whole = Path(os.path.abspath(path))
    for place in (*reversed(whole.parents), whole):
        try:
            status = os.stat(place)
        except OSError:
            return None
        need = os.R_OK if place == whole else 0
        if stat.S_ISDIR(status.st_mode):
            need |= os.X_OK
        if not os.access(place, need, effective_ids=True):
            return place, status
    return None


def _owner(number: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"the user {number}"
