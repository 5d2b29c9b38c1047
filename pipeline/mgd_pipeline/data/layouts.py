"""Which mask belongs to which image: what a pair of globs matches, and the pair of globs that fits the folders of a data set."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path, PurePath

from mgd_pipeline.data.labels.files import split_folder
from mgd_pipeline.errors import DataError

_MASK_WORDS = (
    *("masks", "mask", "labels", "label", "labelids", "annotations", "annotation", "annot", "groundtruth", "ground_truth", "gt"),
    *("segmentationclass", "segmentationclasspng", "masken", "segmentations", "segmentation", "segs", "seg", "l"),
)
_IMAGE_WORDS = (
    "images",
    "image",
    "imgs",
    "img",
    "photos",
    "photo",
    "fotos",
    "bilder",
    "jpegimages",
    "pictures",
    "rgb",
    "inputs",
    "input",
    "frames",
    "sat",
)


@dataclass(frozen=True)
class Pairing:
    """Two globs below the root of a data set, and the ids that they give to images and masks.

    The id of an image is its path below the fixed part of the glob, without suffix. Where the two globs differ behind their first
    wildcard, as */images/* and */masks/* or *.jpg and *_mask.png do, the id is the text that the wildcards match. A file that the
    glob of masks matches is not an image.
    """

    images: str
    masks: str | None = None
    """None where labels are not masks."""

    def image_id(self, path: PurePath) -> str | None:
        """The id of an image at a path relative to the root; None where the glob does not match, or the path is a mask's."""
        return None if self.mask_id(path) is not None else self._id_of(path, self.images)

    def mask_id(self, path: PurePath) -> str | None:
        return None if self.masks is None else self._id_of(path, self.masks)

    @cached_property
    def _captures(self) -> bool:
        """Whether an id is the text that the wildcards match."""
        behind = {_stem(glob)[len(fixed_part(glob)) :] for glob in (self.images, self.masks) if glob is not None}
        return len(behind) > 1

    def _id_of(self, path: PurePath, glob: str) -> str | None:
        match = _pattern(glob).fullmatch(path.as_posix())
        if match is None:
            return None
        if self._captures:
            text = "/".join(part for part in (group.strip("/") for group in match.groups()) if part)
        else:
            text = path.relative_to(Path(*fixed_part(glob))).with_suffix("").as_posix()
        return unicodedata.normalize("NFC", text)


_SUFFIX = r"\.(?:[^.\[\]]*|(?:[^.\[\]*?]|\[[^\]]+\])+)"
"""The suffix of a glob, such as .png, .* and .[Pp][Nn][Gg]."""


@lru_cache
def fixed_part(glob: str) -> tuple[str, ...]:
    """The parts of a glob before the first one with a wildcard; of a glob without wildcards all but the last part."""
    parts = Path(glob).parts
    wild = next((place for place, part in enumerate(parts) if re.search(r"[*?\[]", part)), len(parts) - 1)
    return parts[: max(0, wild)]


def _stem(glob: str) -> tuple[str, ...]:
    """The parts of a glob, the last one without its suffix."""
    parts = Path(glob).parts
    return (*parts[:-1], re.sub(rf"{_SUFFIX}$", "", parts[-1]) or parts[-1])


@lru_cache
def _pattern(glob: str) -> re.Pattern[str]:
    """A glob as a regular expression with a group for each wildcard. The suffix of the last part is in no group."""
    parts = Path(glob).parts
    text = ""
    for part in parts[:-1]:
        text += r"((?:[^/]+/)*)" if part == "**" else _translate(part) + "/"
    last = parts[-1]
    stem, suffix = re.fullmatch(rf"(.*?)({_SUFFIX})?", last).groups()  # pyright: ignore[reportOptionalMemberAccess]
    if last == "**":
        return re.compile(text + r"((?:[^/]+/)*[^/]+?)(?:\.[^./]*)?")
    if suffix is None:  # a wildcard at the end takes the suffix, too
        return re.compile(text + _translate(stem) + (r"(?:\.[^./]*)?" if stem.endswith(("*", "?", "]")) else ""))
    return re.compile(text + _translate(stem) + re.sub(r"\((.*?)\)", r"(?:\1)", _translate(suffix)))


def _translate(part: str) -> str:
    text, place = "", 0
    while place < len(part):
        character = part[place]
        close = part.find("]", place + 2) if character == "[" else -1
        if character == "*":
            text += "([^/]*?)"
        elif character == "?":
            text += "([^/])"
        elif close > 0:
            inside = part[place + 1 : close].replace("\\", "\\\\")
            text += "([" + ("^" + inside[1:] if inside.startswith("!") else inside) + "])"
            place = close
        else:
            text += re.escape(character)
        place += 1
    return text


@dataclass(frozen=True)
class _File:
    """A file as its name tells it."""

    path: Path
    is_mask: bool
    key: tuple[str, ...]
    """What an image and its mask share."""
    glob: tuple[str, ...]
    """The parts of the path, words of a role kept and everything else as `*`."""


def pairing_of(paths: Sequence[Path]) -> Pairing | None:
    """The pair of globs for images and masks in folders that a person named: images/ and masks/, train/images and train/masks,
    train and trainannot, photo.jpg and photo_mask.png, photo.jpg and photo.png. None where no image has a mask.

    `paths`: the images and masks, relative to the root. Raises DataError for images with masks that no pair of globs fits.
    """
    paths = [path for path in paths if not is_rendering(path)]
    plain = [_look_at(path) for path in paths]
    for files in (plain, [_look_at(path, prefixes=True) for path in paths], *_without_tops(plain), _by_suffix(paths)):
        images = {file.key: file for file in files if not file.is_mask}
        pairs = [(images[file.key], file) for file in files if file.is_mask and file.key and file.key in images]
        if pairs:
            break
    else:
        return None
    image_glob = _common([image.glob for image, _ in pairs], [image.path for image, _ in pairs])
    mask_glob = _common([mask.glob for _, mask in pairs], [mask.path for _, mask in pairs])
    pairing = None if image_glob is None or mask_glob is None else Pairing(image_glob, mask_glob)
    if pairing and all(pairing.image_id(image.path) == pairing.mask_id(mask.path) is not None for image, mask in pairs):
        return pairing
    other = next((mask for _, mask in pairs if mask.glob != pairs[0][1].glob), pairs[-1][1])
    raise DataError(
        f"{pairs[0][1].path} and {other.path}: are masks that no pair of globs fits together with their images "
        f"({pairs[0][0].path}); call all masks in one way, such as masks/a.png beside images/a.jpg"
    )


def is_rendering(path: PurePath) -> bool:
    """Whether a picture is a third one that tools write beside a photo and its mask: instances, or the mask over the photo."""
    return any(part.lower() in ("segmentationobject", "segmentationclassvisualization") for part in path.parts)


def _without_tops(files: Sequence[_File]) -> Iterator[list[_File]]:
    """The files of two folders, one of images and one of masks, whose names tell nothing, such as Fotos and masks."""
    tops = [{file.path.parts[0] for file in files if file.is_mask == mask and len(file.path.parts) > 1} for mask in (False, True)]
    if all(len(some) == 1 for some in tops) and tops[0] != tops[1]:
        for cut_masks in (False, True):
            yield [replace(file, key=file.key[1:]) if not file.is_mask or cut_masks else file for file in files]


def _look_at(path: Path, prefixes: bool = False) -> _File:
    """`prefixes`: whether a word for images counts at the beginning of a name, too; photo_1 may be the name of image and mask."""
    mask, key, glob = False, [], []
    for part in path.parts[:-1]:
        word, rest, shown = _role(part, prefixes)
        mask |= word in _MASK_WORDS and word != "l"
        key += [rest.lower()] if rest else []
        glob.append(shown)
    word, rest, shown = _role(path.stem, prefixes)
    mask |= word in _MASK_WORDS
    key.append(rest or path.stem)
    return _File(path, mask, _nfc(key), (*glob, shown + (".*" if word and rest else "")))


def _role(text: str, prefixes: bool) -> tuple[str, str, str]:
    """A word for images or masks in a name, what is left, and the name as a glob: train_masks -> masks, train, *_masks."""
    low = text.lower()
    for word in (*_MASK_WORDS, *_IMAGE_WORDS):
        if low == word:
            return word, "", text
        for joint in ("_", "-", ".", ""):
            whole = joint + word
            if joint or word == "annot":
                if low.endswith(whole) and len(text) > len(whole):
                    return word, text[: -len(whole)], "*" + text[-len(whole) :]
                whole = word + joint
                if joint and (prefixes or word in _MASK_WORDS) and low.startswith(whole) and len(text) > len(whole):
                    return word, text[len(whole) :], text[: len(whole)] + "*"
    return "", text, "*"


def _by_suffix(paths: Sequence[Path]) -> list[_File]:
    """Images and masks that differ in their suffix alone: the masks are the PNGs, as photos are JPEGs."""
    files = []
    suffixes = {mask: {path.suffix for path in paths if (path.suffix.lower() == ".png") == mask} for mask in (False, True)}
    for path in paths:
        mask = path.suffix.lower() == ".png"
        last = f"*{path.suffix}" if len(suffixes[mask]) == 1 else "*.[Pp][Nn][Gg]" if mask else "*"
        files.append(_File(path, mask, _nfc(path.with_suffix("").parts), (*("*" for _ in path.parts[:-1]), last)))
    return files


def _nfc(parts: Iterable[str]) -> tuple[str, ...]:
    return tuple(unicodedata.normalize("NFC", part) for part in parts)


def _common(globs: Sequence[tuple[str, ...]], paths: Sequence[Path]) -> str | None:
    """One glob for paths of one shape; folders that all paths share keep their names. None where the shapes differ."""
    lengths = {len(glob) for glob in globs}
    if len(lengths) == 1:
        parts = []
        for place in range(lengths.pop()):
            shown, named = {glob[place] for glob in globs}, {path.parts[place] for path in paths}
            last = place == len(globs[0]) - 1
            if len(shown) > 1:
                return None
            parts.append(named.pop() if len(named) == 1 and not last else shown.pop())
        return "/".join(parts)
    first = {glob[0] for glob in globs}
    roles = {glob[1:-1] for glob in globs if any(part != "*" for part in glob[1:-1])}
    named = {path.parts[0] for path in paths}
    tops, lasts = first if len(named) > 1 else named, {glob[-1] for glob in globs}
    if roles or len(tops) > 1 or len(lasts) > 1:
        return None
    return f"{tops.pop()}/**/{lasts.pop()}"


def compared_on(paths: Iterable[PurePath]) -> str | None:
    """val, or test without it, if folders of images are splits with images to compare networks on; None otherwise."""
    splits = {split_folder(part) for path in paths for part in path.parent.parts}
    return next((split for split in ("val", "test") if split in splits), None)
