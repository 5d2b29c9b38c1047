"""Which training images count as labelled: a drawn fraction, or lists of ids, which VOC has as well. One reader reads all lists."""

from __future__ import annotations

import difflib
import hashlib
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mgd_pipeline.access import access_error, says_nothing
from mgd_pipeline.data.images import SUFFIXES
from mgd_pipeline.data.index import Sample
from mgd_pipeline.data.listing import read_text
from mgd_pipeline.errors import DataError, ParamsError
from mgd_pipeline.params import CityscapesData, FolderData, IdLists, LossesParams, ShapesData, VocData
from mgd_pipeline.params_file import merge_markers

_SUFFIX = "(?:" + "|".join(re.escape(suffix) for suffix in SUFFIXES) + ")"
_TWO_PATHS = re.compile(rf"(.+?{_SUFFIX})\s*[\s,;]\s*(.+{_SUFFIX})", re.IGNORECASE)
_WITH_SUFFIX = re.compile(rf"(.+){_SUFFIX}", re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """A line of a list."""

    line: int
    """From 1 on."""
    image: str
    """The id or path of the image as the list has it, NFC-normalised."""
    mask: str | None
    """The path of the mask, where the line has one."""


@dataclass(frozen=True)
class _Known:
    """The images of a data set by every name that a list may give them; paths are below the data set, without suffix."""

    ids: dict[str, Sample]
    paths: dict[str, Sample]
    tails: dict[str, list[Sample]]
    """By each trailing part of the path."""
    of_split: dict[str, Sample]
    """By split and id: the end of a path on another machine with a folder for each split."""
    masks: dict[str, Sample]
    """By the path of the mask."""


def read_entries(path: Path, remedy: str) -> list[Entry]:
    """The entries of a list in its order: an id or path a line, or an image and a mask path a line with a tab, spaces,
    a comma or a semicolon between.

    UTF-8 with or without a byte order mark, or UTF-16 and UTF-32 with one; any line ends; empty lines are skipped.
    Raises DataError for a list that cannot be read or is empty; `remedy` says what to do where the list is missing.
    """
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such list of ids; {remedy}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and says_nothing(error):
            raise DataError(str(access_error(path, error))) from None
        raise DataError(f"{path}: cannot be read ({error}); expected UTF-8 text, one image a line") from None
    if markers := merge_markers(text):
        raise DataError(f"{path}: {markers}; keep one version of each conflict and remove the marked lines")
    entries = []
    for number, line in enumerate(unicodedata.normalize("NFC", text).splitlines(), start=1):
        columns = [column.strip() for column in line.split("\t") if column.strip()]
        if len(columns) == 1 and (pair := _TWO_PATHS.fullmatch(line.strip())):
            columns = [pair[1], pair[2]]
        if columns:
            entries.append(Entry(number, columns[0], columns[1] if len(columns) > 1 else None))
    if not entries:
        raise DataError(f"{path}: holds no id; write one image a line")
    return entries


def path_parts(text: str) -> tuple[str, ...]:
    """The parts of a path as any system writes it, without the suffix of an image and without a leading /, ./ or ../."""
    parts = posixpath.normpath(text.replace("\\", "/")).split("/")
    *folders, name = [part for part in parts if part not in ("", ".", "..")] or [""]
    suffixed = _WITH_SUFFIX.fullmatch(name)
    return (*folders, suffixed[1] if suffixed else name)


def draw_partition(labelled_candidates: list[str], denominator: int, seed: int) -> tuple[list[str], list[str]]:
    """Draws max(1, round(n / denominator)) of n ids; returns (labelled, rest), both sorted.

    The order of the candidates does not matter. Raises DataError where there are none.

    >>> [len(part) for part in draw_partition([f"{i:02d}" for i in range(32)], denominator=8, seed=0)]
    [4, 28]
    """
    if not labelled_candidates:
        raise DataError(
            "data.partition: no train image has a mask, so none can be labelled; add masks or check where they are expected"
        )
    ids = sorted(labelled_candidates)
    order = np.random.default_rng(seed % 2**64).permutation(len(ids))
    count = max(1, round(len(ids) / denominator))
    return sorted(ids[i] for i in order[:count]), sorted(ids[i] for i in order[count:])


def listed_images(path: Path, samples: list[Sample], root: Path, *, by_name: bool = False) -> list[Sample]:
    """The images that a list of ids names, in its order.

    An entry is an image's id, its path, or the end of its path where only one image has it. A longer path must end with the
    image's path below `root`, the folder of the data set. Suffixes do not count. `by_name`: the file name alone identifies an
    image of this data set, whatever folders stand before it. Raises DataError for a list that cannot be read, for an entry of no
    image or of more than one, and for an image that stands twice.
    """
    entries = read_entries(path, "correct data.partition in params.yaml")
    known = _known(samples)
    candidates = [_candidates(entry, known, by_name) for entry in entries]
    if missing := [entry for entry, of in zip(entries, candidates, strict=True) if not of]:
        raise DataError(
            f"{path}, line {missing[0].line}: no image has the id or path {missing[0].image!r}{_more(missing)}; "
            f"{_hint(missing[0], samples)}"
        )
    for entry, of in zip(entries, candidates, strict=True):
        if len(of) > 1:
            named = " or ".join(sample.image.as_posix() for sample in of[:3])
            more = f" (or {len(of) - 3} more)" if len(of) > 3 else ""
            raise DataError(f"{path}, line {entry.line}: {entry.image!r} may be {named}{more}; write the path of one of them")
        _require_same_files(path, entry, of[0], known, root)
    chosen = [of[0] for of in candidates]
    if repeated := [image_id for image_id, count in Counter(sample.image_id for sample in chosen).items() if count > 1]:
        lines = [entry.line for entry, sample in zip(entries, chosen, strict=True) if sample.image_id == repeated[0]]
        at = ", ".join(map(str, lines[:5]))
        raise DataError(f"{path}: {repeated[0]!r} stands {len(lines)} times (lines {at}){_more(repeated)}; keep one line of each")
    return chosen


def partition_images(
    params: ShapesData | VocData | CityscapesData | FolderData, samples: list[Sample], base: Path = Path()
) -> dict[str, str]:
    """image_id -> 'labelled' or 'unlabelled', sorted by id: images of train, and images of val and test that a list declares.

    With a fraction, labelled images are drawn from the images with a mask; all further images are unlabelled. With lists, whose
    paths are relative to `base`, an image of train in neither list takes no part. An image of val or test may only stand in the
    unlabelled list: then its pixels train, its mask never. All images may be labelled. Raises DataError for a partition that
    cannot be trained.
    """
    train = {sample.image_id: sample for sample in samples if sample.split == "train"}
    if isinstance(params.partition, IdLists):
        by_name = isinstance(params, (VocData, CityscapesData))
        labelled, unlabelled = _listed(params.partition, base, base / params.root, samples, by_name)
    else:
        denominator = int(params.partition.removeprefix("1/"))
        candidates = [image_id for image_id, sample in train.items() if sample.mask]
        held_out = Counter(sample.split for sample in samples if sample.mask and sample.split != "train")
        if held_out and not candidates:
            taken = " and ".join(f"{split} has {count}" for split, count in sorted(held_out.items(), reverse=True))
            raise DataError(f"data.partition: no train image has a mask ({taken}); move images with their masks to train")
        labelled, _ = draw_partition(candidates, denominator, params.partition_seed)
        unlabelled = sorted(train.keys() - set(labelled))
    subsets = {**dict.fromkeys(labelled, "labelled"), **dict.fromkeys(unlabelled, "unlabelled")}
    return dict(sorted(subsets.items()))


def partition_fingerprint(labelled_ids: Iterable[str]) -> str:
    """Hexadecimal SHA-256 of the sorted labelled ids, one a line: equal for two partitions with the same labels."""
    return hashlib.sha256("\n".join(sorted(labelled_ids)).encode()).hexdigest()


def check_listening(losses: LossesParams, subsets: Mapping[str, str]) -> None:
    """Raises ParamsError where the losses ask for unlabelled images only and there are none."""
    if "labelled" not in losses.images and "unlabelled" not in subsets.values():
        raise ParamsError(
            f"losses.images: is [unlabelled], but all {len(subsets)} training images are labelled; "
            "write [labelled, unlabelled], or hide labels by data.partition, such as 1/8"
        )


def _listed(lists: IdLists, base: Path, root: Path, samples: list[Sample], by_name: bool) -> tuple[list[str], list[str]]:
    chosen = listed_images(base / lists.labelled, samples, root, by_name=by_name)
    labelled = [sample.image_id for sample in chosen]
    if held_out := [sample for sample in chosen if sample.split != "train"]:
        raise DataError(
            f"{base / lists.labelled}: {held_out[0].image_id!r} is in the {held_out[0].split} split{_more(held_out)}; "
            "labels of val and test never enter training, remove it"
        )
    if maskless := [sample.image_id for sample in chosen if sample.mask is None]:
        raise DataError(
            f"{base / lists.labelled}: labelled image {maskless[0]!r} has no mask{_more(maskless)}; "
            "add the mask or move the id to the unlabelled list"
        )
    if lists.unlabelled is None:
        return labelled, sorted({sample.image_id for sample in samples if sample.split == "train"} - set(labelled))
    unlabelled = [sample.image_id for sample in listed_images(base / lists.unlabelled, samples, root, by_name=by_name)]
    if both := sorted(set(labelled) & set(unlabelled)):
        raise DataError(
            f"{base / lists.unlabelled}: {both[0]!r} is also in {base / lists.labelled}{_more(both)}; remove it from one list"
        )
    return labelled, unlabelled


def _known(samples: list[Sample]) -> _Known:
    known = _Known({}, {}, {}, {}, {})
    for sample in samples:
        parts = path_parts(_nfc(sample.image))
        path, by_split = "/".join(parts), f"{sample.split}/{sample.image_id}"
        known.ids[sample.image_id] = known.paths[path] = sample
        for start in range(1, len(parts)):
            known.tails.setdefault("/".join(parts[start:]), []).append(sample)
        if path.endswith(f"/{by_split}"):
            known.of_split[by_split] = sample
        if sample.mask:
            known.masks["/".join(path_parts(_nfc(sample.mask)))] = sample
    return known


def _candidates(entry: Entry, known: _Known, by_name: bool) -> list[Sample]:
    """The images that an entry may mean, by the first rule that gives one."""
    if called := _called(entry.image, known):
        return called
    parts = path_parts(entry.image)
    samples = _ends(parts, known.paths) or _ends(parts, known.of_split)
    name = parts[-1].removesuffix("_leftImg8bit")
    if not samples and by_name and name in known.ids:
        samples = [known.ids[name]]
    # "seq1/a masks/b.png" ends like another image; what stands before the first blank or comma must not be an image as well.
    first, *further = re.split(r"[\s,;]", entry.image, maxsplit=1)
    return list(dict.fromkeys([*samples, *(_called(first, known) if samples and further else [])]))


def _called(text: str, known: _Known) -> list[Sample]:
    """The images that have a text as their id or path or, where there is none, as the end of their path."""
    path = "/".join(path_parts(text))
    exact = [known.ids.get(text), known.ids.get(path), known.paths.get(path)]
    return list(dict.fromkeys(sample for sample in exact if sample)) or known.tails.get(path, [])


def _ends(parts: tuple[str, ...], table: Mapping[str, Sample]) -> list[Sample]:
    """The samples whose key in the table is the end of a path."""
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return list(dict.fromkeys(table[end] for end in ends if end in table))


def _require_same_files(path: Path, entry: Entry, sample: Sample, known: _Known, root: Path) -> None:
    """Raises DataError where the line names an image of another folder on this machine, or the mask of another image."""
    listed, ours = Path(entry.image), root / sample.image
    if listed.is_absolute() and listed.exists() and ours.exists() and not listed.samefile(ours):
        raise DataError(f"{path}, line {entry.line}: {entry.image!r} is not the file {ours}; write the path below {root}")
    others = _ends(path_parts(entry.mask), known.masks) if entry.mask else []
    if others and sample not in others:
        raise DataError(
            f"{path}, line {entry.line}: {entry.mask!r} is the mask of {others[0].image_id!r}, not of {sample.image_id!r}; "
            "correct the line"
        )


def _hint(entry: Entry, samples: list[Sample]) -> str:
    name = path_parts(entry.image)[-1]
    alike = [sample.image.as_posix() for sample in samples if path_parts(_nfc(sample.image))[-1] == name]
    if alike:
        more = f" and {len(alike) - 3} more" if len(alike) > 3 else ""
        return f"images of this name are {', '.join(alike[:3])}{more}: write the path of one"
    train = [sample.image_id for sample in samples if sample.split == "train"]
    near = difflib.get_close_matches(entry.image, train, n=1) or difflib.get_close_matches(name, train, n=1)
    return f"nearest is {near[0]!r}" if near else "check that the list belongs to this data set"


def _nfc(path: Path) -> str:
    return unicodedata.normalize("NFC", path.as_posix())


def _more(things: Sequence[object]) -> str:
    return f" (and {len(things) - 1} more)" if len(things) > 1 else ""
