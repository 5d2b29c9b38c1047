"""Reads lists of images: VOC's lists, published lists and users' lists, with one reader."""

from __future__ import annotations

import codecs
import posixpath
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from mgd_pipeline.access import access_error, says_nothing
from mgd_pipeline.data.images import SUFFIXES
from mgd_pipeline.errors import DataError
from mgd_pipeline.params_file import merge_markers

_SUFFIX = "(?:" + "|".join(re.escape(suffix) for suffix in SUFFIXES) + ")"
_TWO_PATHS = re.compile(rf"(.+?{_SUFFIX})\s*[\s,;]\s*(.+{_SUFFIX})", re.IGNORECASE)
_WITH_SUFFIX = re.compile(rf"(.+){_SUFFIX}", re.IGNORECASE)
_MARKS = (  # UTF-32's begins with UTF-16's
    *((mark, "utf-32") for mark in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),
    *((mark, "utf-16") for mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
)


@dataclass(frozen=True)
class Entry:
    line: int
    """From 1 on."""
    image: str
    """The id or path of the image as the list has it, NFC-normalised."""
    mask: str | None
    """The path of the mask, where the line has one."""

    @property
    def path(self) -> tuple[str, ...]:
        """The parts of `image` without the suffix of an image; see `path_parts`."""
        return path_parts(self.image)


def read_entries(path: Path, remedy: str) -> list[Entry]:
    """The entries of a list in its order: an id or path a line, or an image and a mask path a line with a tab, spaces,
    a comma or a semicolon between.

    UTF-8 with or without a byte order mark, or UTF-16 and UTF-32 with one; any line ends; empty lines are skipped.
    Raises DataError for a list that cannot be read or is empty; `remedy` says what to do where the list is missing.
    """
    try:
        content = path.read_bytes()
        encoding = next((encoding for mark, encoding in _MARKS if content.startswith(mark)), "utf-8-sig")
        text = content.decode(encoding)
    except FileNotFoundError:
        raise DataError(f"{path}: no such list of ids; {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and says_nothing(error):
            raise DataError(str(access_error(path, error))) from None
        raise DataError(f"{path}: cannot be read ({error}); expected UTF-8 text, one image a line") from None
    if "\0" in text:
        raise DataError(f"{path}: cannot be read (it holds zero bytes); expected UTF-8 text, one image a line")
    if markers := merge_markers(text):
        raise DataError(f"{path}: {markers}; keep one version of each conflict and remove the marked lines")
    entries = [_entry(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not entries:
        raise DataError(f"{path}: holds no id; write one image a line")
    return entries


def path_parts(text: str) -> tuple[str, ...]:
    """The parts of a path as any system writes it, without the suffix of an image and without a leading /, ./ or ../."""
    parts = posixpath.normpath(text.replace("\\", "/")).split("/")
    *folders, name = [part for part in parts if part not in ("", ".", "..")] or [""]
    suffixed = _WITH_SUFFIX.fullmatch(name)
    return (*folders, suffixed[1] if suffixed else name)


def _entry(number: int, line: str) -> Entry:
    line = unicodedata.normalize("NFC", line.strip())
    columns = [column.strip() for column in line.split("\t") if column.strip()]
    if len(columns) == 1 and (pair := _TWO_PATHS.fullmatch(line)):
        columns = [pair[1], pair[2]]
    return Entry(number, columns[0], columns[1] if len(columns) > 1 else None)
