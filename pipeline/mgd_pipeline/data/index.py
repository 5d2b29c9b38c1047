"""What every layout of a data set is read into: a flat list of samples, its classes, and notes about files that are left out.

Nothing is opened here; the manifest reads and checks the files. Ids are NFC-normalised Unicode, so that a mask written on one
operating system is found for an image written on another. Paths stay as the disk has them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mgd_pipeline.access import is_there
from mgd_pipeline.data.images import IGNORE
from mgd_pipeline.data.listing import printed
from mgd_pipeline.errors import DataError, shell_command
from mgd_pipeline.words import verb

Colour = tuple[int, int, int]
SPLITS = ("train", "val", "test")
LEFT_OUT = "picture is left out", "pictures are left out"


@dataclass(frozen=True)
class Sample:
    image_id: str
    image: Path
    """Relative to the root of the data set, like `mask`."""
    mask: Path | None
    split: str
    """train, val or test."""


@dataclass(frozen=True)
class Note:
    """What the owner of a usable data set should know about it."""

    text: str
    remedy: str
    files: tuple[Path, ...] = ()
    """The files that are left out."""

    def __str__(self) -> str:
        return f"{self.text}; {self.remedy}"


@dataclass(frozen=True)
class DatasetIndex:
    samples: list[Sample]
    """Sorted by image_id, which is unique."""
    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    """RGB of each class, 0 to 255."""
    lookup: tuple[int, ...]
    """256 train ids, one for each stored mask value: 255 = ignore, -1 = not allowed."""
    notes: tuple[Note, ...] = ()
    masks: Path | None = None
    """Folder of the masks, relative to the folder of params.yaml, if labels are converted; None if masks lie below the root."""
    drawn: Mapping[str, Callable[[], np.ndarray]] = field(default_factory=dict, compare=False, repr=False)
    """Draws the mask of an image, (H, W) uint8 class ids, by image_id, if labels are converted."""


def lookup_of(classes: int, ignore: int) -> tuple[int, ...]:
    """The table of a data set whose stored values are train ids, but for `ignore`; every further value is not allowed."""
    return tuple(IGNORE if value == ignore else value if value < classes else -1 for value in range(256))


def sorted_unique(samples: list[Sample]) -> list[Sample]:
    """The samples sorted by id. Raises DataError for two of one id."""
    ordered = sorted(samples, key=lambda sample: (sample.image_id, str(sample.image)))
    for one, other in itertools.pairwise(ordered):
        if one.image_id == other.image_id:
            raise DataError(
                f"{one.image} and {other.image}: both have the image_id {one.image_id!r}; rename one, or remove it from "
                f"{one.split if one.split == other.split else f'{one.split} or {other.split}'}"
            )
    return ordered


def unread_note(pictures: list[Path]) -> tuple[Note, ...]:
    suffixes = ", ".join(sorted({path.suffix for path in pictures}))
    return note_of(pictures, LEFT_OUT, f"{suffixes} is not read", "save them as PNG or JPEG")


def note_of(paths: list[Path], what: tuple[str, str], why: str, remedy: str) -> tuple[Note, ...]:
    """A note about files, none where there are no files; `what` says of one file and of several what happens to them."""
    if not paths:
        return ()
    text = f"{len(paths)} {verb(len(paths), *what)}, such as {printed(paths[0].name)}: {why}"
    return (Note(text, remedy, tuple(paths)),)


def require_folder(folder: Path, layout: str, example: str) -> None:
    """Raises DataError for a folder that is missing; `layout` says what is expected there, `example` what could be linked."""
    if not is_there(folder) and folder.is_symlink():
        again = shell_command("ln", "-sfn", example, folder)
        raise DataError(f"{folder}: is a link to {os.readlink(folder)}, which does not exist; link it again: {again}")
    if folder.is_dir():
        return
    if other := written_otherwise(folder):
        raise DataError(f"{other}: must be called {folder.name}; rename it: {shell_command('mv', other, folder)}")
    raise DataError(f"{folder}: no such folder; expected {layout}; link it: {shell_command('ln', '-s', example, folder)}")


def written_otherwise(folder: Path) -> Path | None:
    """A folder beside it whose name differs in capitals only. Windows and macOS take both for the same."""
    beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
    return next((path for path in sorted(beside) if path.name.lower() == folder.name.lower() and path.is_dir()), None)


def unread_mask(path: Path, image: Path, further: int) -> DataError:
    more = f" (and {further} more such files)" if further else ""
    kind = f"the format {path.suffix}" if path.suffix else "a file without suffix"
    return DataError(
        f"{path}: would be the mask of {image.name}, but {kind} is not read{more}; save the mask as PNG with one value a pixel, "
        "or move the file out of the masks"
    )
