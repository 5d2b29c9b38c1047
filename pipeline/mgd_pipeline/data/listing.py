"""Lists files on disk: one walk for every layout of a data set, for globs and for predict; and decodes texts of a data set.

Links are followed. A folder that cannot be listed, and a link to a folder that contains it, are errors: their files would be
missing without a word.
"""

from __future__ import annotations

import codecs
import fnmatch
import os
import stat
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from mgd_pipeline.access import access_error, is_there, says_nothing
from mgd_pipeline.data.images import SUFFIXES
from mgd_pipeline.errors import DataError

UNREAD_SUFFIXES = (
    *(".gif", ".jp2", ".j2k", ".jxl", ".jpe", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".tga", ".exr", ".hdr", ".dds", ".ico", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),
)
"""Suffixes of pictures in formats that are not read."""
_HIDDEN = ("@eadir", "__macosx", "$recycle.bin", "#recycle", "system volume information")
"""Folders of thumbnails and deleted files, in lower case, that file servers, archivers and file managers leave behind."""
_MARKS = (  # UTF-32's begins with UTF-16's
    *((mark, "utf-32") for mark in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),
    *((mark, "utf-16") for mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
)


def read_text(path: Path) -> str:
    """A file's text: UTF-8 with or without a byte order mark, or UTF-16 and UTF-32 with one.

    Raises OSError, and ValueError for another encoding.
    """
    content = path.read_bytes()
    text = content.decode(next((encoding for mark, encoding in _MARKS if content.startswith(mark)), "utf-8-sig"))
    if "\0" in text:  # UTF-16 without a mark
        raise ValueError("it holds zero bytes")
    return text


def list_files(folder: Path) -> list[Path]:
    """All files below a folder, sorted; none where the folder does not exist. Hidden files (such as macOS's ._a.jpg) and files in
    hidden folders (such as .ipynb_checkpoints, .Trash-1000, @eaDir) are left out.

    A folder that is named like an image is listed, so that reading it fails instead of leaving it out.
    Raises DataError for a file or a dangling link in place of the folder, and for a link that cannot be followed.
    """
    if not is_there(folder):
        require_no_link(folder)
        return []
    if not folder.is_dir():
        raise DataError(f"{folder}: is a file, not a folder; rename or remove it")

    def stop(error: OSError) -> None:  # os.walk passes over what it may not list
        if says_nothing(error):
            raise DataError(str(access_error(error.filename, error)))
        raise DataError(f"{error.filename}: the folder cannot be listed ({error.strerror}); check its permissions")

    paths: list[Path] = []
    for top, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(name)]
        for link in (path for path in (Path(top, name) for name in folders) if path.is_symlink()):
            if link.resolve() in {above.resolve() for above in link.parents}:
                raise DataError(f"{link}: is a link to a folder that contains it, so it has no end; remove the link")
        paths += [Path(top, name) for name in folders if name.lower().endswith(SUFFIXES)]
        paths += [Path(top, name) for name in names if not name.startswith(".")]
    return sorted(paths)


def require_no_link(path: Path) -> None:
    """Raises DataError for a link to nothing."""
    if path.is_symlink() and not path.exists():
        raise DataError(
            f"{path}: is a link to {os.readlink(path)}, which does not exist; restore what it links to, or remove the link"
        )


def image_files(folder: Path) -> list[Path]:
    """The files of `list_files` with the suffix of an image."""
    return readable(list_files(folder))


def is_hidden(name: str) -> bool:
    """Whether a folder of this name is passed over."""
    return name.startswith(".") or name.lower() in _HIDDEN


def readable(paths: Iterable[Path]) -> list[Path]:
    """The paths with the suffix of an image that is read. Raises DataError for a name that lists of ids cannot hold."""
    kept = [path for path in paths if path.suffix.lower() in SUFFIXES]
    for path in kept:
        check_name(path)
    return kept


def unread(paths: Iterable[Path]) -> list[Path]:
    """The paths with the suffix of a picture that is not read."""
    return [path for path in paths if path.suffix.lower() in UNREAD_SUFFIXES]


def check_name(path: Path) -> None:
    """Raises DataError for a name that cannot be printed or written into a list of ids."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{str(path)!a}: the file name is not UTF-8; rename it (convmv -f latin1 -t utf8)") from None
    if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in str(path)):
        raise DataError(f"{str(path)!a}: a line break, tab or control character in the name cannot stand in id lists; rename it")


def matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path match the parts of a glob; `**` matches any number of parts, at the end at least one."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        rest = pattern[1:] or ("*",)
        return any(matches(parts[start:], rest) for start in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


def what_dvc_cannot_read(root: Path, most: int = 10) -> list[DataError]:
    """An error for each file below a data set at which `dvc repro` stops or waits for ever. DVC reads every file, also hidden
    ones and ones that the pipeline does not need. At most `most` files are named, further ones are counted. The last error names
    the folders that are links: DVC does not look behind them.
    """
    faults: list[tuple[Path, str, str]] = []

    def unlisted(error: OSError) -> None:
        faults.append((Path(error.filename), f"the folder cannot be listed ({error.strerror})", "check its permissions"))

    linked: list[Path] = []
    for top, folders, names in os.walk(root, onerror=unlisted):
        linked += [path for path in (Path(top, name) for name in folders) if path.is_symlink()]
        faults += [(path, *fault) for path in (Path(top, name) for name in names) if (fault := _fault(path))]
    faults.sort(key=lambda fault: str(fault[0]))
    errors = [DataError(f"{printed(path)}: {fault}, and DVC reads every file; {remedy}") for path, fault, remedy in faults[:most]]
    if len(faults) > most:
        errors.append(DataError(f"{root}: {len(faults) - most} more files that DVC cannot read; mend them likewise"))
    if linked:
        more = f" (and {len(linked) - 1} more)" if len(linked) > 1 else ""
        errors.append(
            DataError(
                f"{printed(min(linked))}: is a link to a folder{more}, and `dvc repro` does not notice changes behind it; "
                "after a change there run `dvc repro --force --single-item prepare-data`, then `dvc repro`"
            )
        )
    return errors


def _fault(path: Path) -> tuple[str, str] | None:
    """Why a file cannot be read, and what to do."""
    try:
        str(path).encode("utf-8")
        mode = os.stat(path).st_mode
    except UnicodeEncodeError:
        return "the file name is not UTF-8", "rename it (convmv -f latin1 -t utf8)"
    except OSError as error:
        if path.is_symlink():
            return "is a link that leads to no file", "restore what it links to, or remove the link"
        return f"cannot be read ({error.strerror})", "check the file, its permissions and the disk"
    if not stat.S_ISREG(mode):
        return "is a pipe, socket or device", "remove it from the data set"
    return None if os.access(path, os.R_OK) else ("cannot be read (Permission denied)", "check its permissions")


def printed(path: Path | str) -> str:
    """A path for a message of one line: quoted and escaped where it is not UTF-8 or holds a line break."""
    text = str(path)
    return text if text.isprintable() else f"{text!a}"
