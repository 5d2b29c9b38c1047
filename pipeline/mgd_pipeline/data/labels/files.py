"""Finds the images that annotation files name, and reads the files."""

from __future__ import annotations

import contextlib
import json
import re
import unicodedata
import urllib.parse
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mgd_pipeline.data.index import Note, note_of
from mgd_pipeline.data.listing import list_files, readable
from mgd_pipeline.errors import DataError

_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_UPLOAD = re.compile(r"[0-9a-f]{8}-(.+)")
"""Label Studio writes eight hexadecimal digits before the name of an uploaded file."""
SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words}
"""What folders and lists are called, in lower case, and the split that each stands for."""


class ImageFiles:
    """The images below a folder, found by the names that annotation tools give them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._kinds: dict[Path, str] | None = None

    @cached_property
    def files(self) -> list[Path]:
        """All files, relative to the root."""
        return [path.relative_to(self.root) for path in list_files(self.root)]

    @cached_property
    def images(self) -> list[Path]:
        """All images, relative to the root."""
        return readable(self.files)

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        """NFC paths by their names in lower case: a tool on another operating system may write names in another form."""
        names: dict[str, list[Path]] = defaultdict(list)
        for path in self._known:
            names[path.name.lower()].append(path)
        return names

    @cached_property
    def by_stem(self) -> dict[Path, list[Path]]:
        """Images by their NFC paths without suffix."""
        stems: dict[Path, list[Path]] = defaultdict(list)
        for path, image in self._known.items():
            stems[path.with_suffix("")].append(image)
        return stems

    @cached_property
    def _known(self) -> dict[Path, Path]:
        """Images by their NFC paths."""
        return {nfc(path): path for path in self.images}

    def kinds_of_json(self, tests: Mapping[str, Callable[[Any], bool]]) -> dict[Path, str]:
        """The first kind whose test each JSON file passes, "" for a file that is not JSON; files of no kind are left out. Every
        file is read once for all calls, which give the same tests.
        """
        if self._kinds is None:
            kinds: dict[Path, str | None] = {}
            for path in self.with_suffix(".json"):
                try:
                    content = read_json(self.root / path)
                    kinds[path] = next((kind for kind, test in tests.items() if test(content)), None)
                except DataError:
                    kinds[path] = ""
            self._kinds = {path: kind for path, kind in kinds.items() if kind is not None}
        return self._kinds

    def with_suffix(self, *suffixes: str) -> list[Path]:
        return [path for path in self.files if path.suffix.lower() in suffixes]

    def named(self, name: str, near: Path, where: str, split: str | None = None) -> Path | None:
        """The image of a name or path in an annotation file that lies in the folder `near`; None where there is no such image.

        The path counts as it stands from the file's own folder or from the root, then its last parts, then the name alone; capitals
        do not count where the names tell no difference. Of several images that fit, one in a folder of `split` counts. An address
        is a path with %20 for a blank. Raises DataError, which begins with `where`, if several images fit.
        """
        parts = _parts(unicodedata.normalize("NFC", name))
        if not parts:
            return None
        near = nfc(near)
        for folder in (near, near.parent, Path()):
            for inside in ("", "images", "img"):
                path = folder.joinpath(inside, *parts)
                if path in self._known:
                    return self._known[path]
        candidates = self._by_name.get(parts[-1].lower(), [])
        candidates = [path for path in candidates if path.name == parts[-1]] or candidates
        for count in range(len(parts), 0, -1):
            fits = [path for path in candidates if _lower(path.parts[-count:]) == _lower(parts[-count:])]
            close = [path for path in fits if near.parts and path.parts[: len(near.parts)] == near.parts]
            for some in (close, fits, [path for path in fits if split and split_of(path.parent / "x") == split]):
                if len(some) == 1:
                    return self._known[some[0]]
            if fits:
                raise DataError(
                    f"{where}: names the image {name!r}, and {len(fits)} images fit, such as {fits[0]} and {fits[1]}; rename one, "
                    "or write the path into the annotation file"
                )
        uploaded = _UPLOAD.fullmatch(parts[-1])
        plain = uploaded[1] if uploaded else urllib.parse.unquote(urllib.parse.urlsplit(name).path if "://" in name else name)
        return self.named(plain, near, where, split) if plain != name else None


def nfc(path: Path) -> Path:
    """A path as another operating system writes it: macOS takes letters and their accents apart."""
    return Path(unicodedata.normalize("NFC", str(path)))


def _lower(parts: Iterable[str]) -> list[str]:
    return [part.lower() for part in parts]


def _parts(name: str) -> tuple[str, ...]:
    """The parts of a path as tools of any operating system write it, without drive, root, `.` and `..`."""
    path = PureWindowsPath(name) if "\\" in name else PurePosixPath(name)
    return tuple(part for part in path.parts if part not in (path.anchor, ".", ".."))


def split_of(path: str | Path) -> str | None:
    """train, val or test, as the first of these says it: a folder's name, a word in a folder's name, a word in the file's name.

    A photo called train_7.jpg in the folder val belongs to val. Of several the last one counts; None where none says it.
    """
    folders = [part.lower() for part in Path(path).parent.parts]
    words = [re.findall(r"[a-z]+", " ".join(text)) for text in (folders, [Path(path).stem.lower()])]
    for said in ([split_folder(part) for part in folders], *([SPLIT_OF.get(word) for word in some] for some in words)):
        if splits := [split for split in said if split]:
            return splits[-1]
    return None


def split_folder(name: str) -> str | None:
    """The split that a folder's whole name says, such as val2017 or images_val; a folder called test drive says none."""
    match = re.fullmatch(r"(?:images?[_-])?([a-z]+?)[_-]?\d*(?:[_-]images?)?", name.lower())
    return SPLIT_OF.get(match[1]) if match else None


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises DataError where it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({error}); export it again") from None


@contextlib.contextmanager
def as_expected(where: str) -> Iterator[None]:
    """Content of another structure than the tool writes, such as a list in place of a name, becomes a DataError."""
    try:
        yield
    except DataError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        raise DataError(f"{where}: is not built as its tool writes it ({reason}); export it again") from None


def twice(where: str, image: Path, source: Path) -> DataError:
    """Of two annotations of one image."""
    return DataError(f"{where}: {image} is annotated twice, in {source} too; remove one of the two")


def missing_note(names: Iterable[str], source: Path) -> tuple[Note, ...]:
    """A note about images that an annotation file names and that are not there."""
    paths = sorted(Path(name) for name in names)
    what = f"image that {source} names is not there", f"images that {source} names are not there"
    notes = note_of(paths, what, "their labels are left out", "copy them below the root of the data set")
    return tuple(replace(note, files=()) for note in notes)


def unconverted_note(kinds: Mapping[str, int], source: str | Path) -> tuple[Note, ...]:
    """A note about annotations that have no area; `kinds` counts them."""
    said = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()) if count)
    if not said:
        return ()
    return (Note(f"{source}: what has no area is left out: {said}", "draw polygons or masks where they matter"),)
