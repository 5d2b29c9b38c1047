"""Your own data set: images/<split>/ and masks/<split>/, or two globs."""

from __future__ import annotations

import hashlib
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from mgd_pipeline.data.images import IGNORE, SUFFIXES, read_raw_mask
from mgd_pipeline.data.index import (
    SPLITS,
    Colour,
    DatasetIndex,
    Note,
    Sample,
    lookup_of,
    note_of,
    require_folder,
    sorted_unique,
    unread_mask,
    unread_note,
)
from mgd_pipeline.data.labels.files import SPLIT_OF, split_of
from mgd_pipeline.data.layouts import Pairing, fixed_part
from mgd_pipeline.data.listing import UNREAD_SUFFIXES, list_files, readable, require_no_link, unread
from mgd_pipeline.data.partition import listed_images
from mgd_pipeline.data.voc import voc_palette
from mgd_pipeline.errors import DataError
from mgd_pipeline.params import FolderData

Shown = Callable[[str], frozenset[Hashable]]
"""The classes that the mask of an image shows, by image_id, under any name that tells one class from another."""


def index_folder(root: Path, params: FolderData) -> DatasetIndex:
    """Your own data set: images/<split>/ and masks/<split>/ below root, or the two globs of params.

    The image_id is the path below images/<split>/, or below the fixed part of the glob, without suffix. A mask has the id of its
    image. Train images may lack a mask. With globs, images with a mask are drawn into val and test: see `with_splits`.
    """
    require_folder(root, "images/<split>/ and masks/<split>/, or the globs images and masks in params.yaml", "/path/to/dataset")
    if params.images is None:
        samples, notes = _split_folders(root)
    else:
        labelled, notes = pair_globs(root, params)
        ignored = {params.ignore}.difference(params.values or ())  # a value of a class is one, even 255
        samples = with_splits(root, labelled, params, shown_by_masks(root, labelled, _values_in, ignored))
    count = len(params.classes)
    if params.values is None:
        lookup = lookup_of(count, params.ignore)
    else:
        place = {params.ignore: IGNORE} | {value: number for number, value in enumerate(params.values)}
        lookup = tuple(place.get(value, -1) for value in range(256))
    return DatasetIndex(sorted_unique(samples), tuple(params.classes), palette_of(params), lookup, tuple(notes))


def palette_of(params: FolderData) -> tuple[Colour, ...]:
    """Colours of the classes in pictures: PASCAL VOC's if none are given, and in place of greys, which pictures could not show."""
    given = tuple((red, green, blue) for red, green, blue in params.colours or ())
    return given if any(len(set(colour)) > 1 for colour in given) else voc_palette(len(params.classes))


def shown_by_masks(
    root: Path,
    labelled: list[tuple[str, Path, Path | None]],
    read: Callable[[Path], Iterable[Hashable]],
    ignored: Iterable[Hashable],
) -> Shown:
    """Of images with masks below the root: what `read` says of a mask, but for what is ignored. A mask that cannot be read shows
    nothing; prepare-data names it.
    """
    masks = {image_id: root / mask for image_id, _, mask in labelled if mask is not None}

    def shown(image_id: str) -> frozenset[Hashable]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # prepare-data says what matters
            try:
                return frozenset(read(masks[image_id])).difference(ignored)
            except DataError:
                return frozenset()

    return shown


def _values_in(mask: Path) -> list[int]:
    occurs = np.zeros(256, bool)
    occurs[read_raw_mask(mask)] = True
    return np.flatnonzero(occurs).tolist()


def with_splits(
    root: Path,
    labelled: list[tuple[str, Path, Path | None]],
    params: FolderData,
    shown: Shown = lambda image_id: frozenset(),
    sources: Mapping[str, Path] = {},
) -> list[Sample]:
    """Samples from ids, images and masks: splits are the folders of the images or of their annotation files (`sources`, by id), as
    `split_of` reads them, or lists below the root, or drawn. Raises DataError for lists that do not fit the images.

    A split is drawn by a hash of the id, so that further images move no image between splits once the fractions give `_FEW` images
    to val and to test. While a fraction gives fewer, images of train fill the split up, first with the classes that the split
    lacks: `shown` is asked for these sets alone. An added image may then bring an image back to train, and where it changes which
    class is lacked or rare, it exchanges a few of the images that fill up. A set of fewer than 20 images is not filled up:
    a split whose fraction is not 0 gets at least one image. Of fewer than three images the first goes to train and the second to
    val. An image without a mask belongs to train, whatever its folder is called.
    """
    masked = [image_id for image_id, _, mask in labelled if mask is not None]
    if params.splits == "lists":
        splits = _listed_splits(root, [Sample(*one, "train") for one in labelled])
    elif params.splits == "folders":
        by_id = {image_id: image for image_id, image, _ in labelled}
        splits = {i: split_of(by_id[i].parent / "x") or split_of(sources.get(i, "x")) or split_of(by_id[i].name) for i in masked}
    else:
        splits = _drawn_splits(masked, params, cache(shown))
    return [Sample(image_id, image, mask, splits.get(image_id) or "train") for image_id, image, mask in labelled]


def split_lists(root: Path, files: Iterable[Path]) -> dict[Path, str]:
    """The split of each list ImageSets/Segmentation/{train,val,test}.txt among files that are relative to the root. Lists of no
    split, such as default.txt and trainval.txt, and empty lists are left out.
    """
    lists = [path for path in files if path.parts[-3:-1] == ("ImageSets", "Segmentation") and path.suffix.lower() == ".txt"]
    splits = {path: SPLIT_OF.get(path.stem.lower()) for path in lists}
    return {path: split for path, split in splits.items() if split and not _is_empty(root / path)}


def _is_empty(path: Path) -> bool:
    try:
        return not path.read_bytes().strip()
    except OSError:  # whoever reads the list says what is wrong
        return False


def _listed_splits(root: Path, samples: list[Sample]) -> dict[str, str]:
    """Splits by id. Raises DataError for a list that names an image of another list, of no mask in val or test, or none; and for
    images with a mask that stand in no list although train has one.
    """
    lists = split_lists(root, [path.relative_to(root) for path in list_files(root)])
    if not lists:
        raise DataError(f"{root}: has no ImageSets/Segmentation/train.txt, val.txt or test.txt; set data.splits to drawn")
    splits, places = dict[str, str](), dict[str, Path]()
    for path, split in lists.items():
        top = path.parents[2]
        for sample in listed_images(root / path, [one for one in samples if one.image.is_relative_to(top)], root):
            if sample.image_id in splits:
                raise DataError(f"{root / path}: {sample.image_id!r} is in {places[sample.image_id]} too; remove it from one list")
            if sample.mask is None and split != "train":
                raise DataError(
                    f"{root / path}: the {split} image {sample.image_id!r} has no mask; add the mask or remove the line"
                )
            splits[sample.image_id], places[sample.image_id] = split, path
    lost = [sample.image_id for sample in samples if sample.mask is not None and sample.image_id not in splits]
    if lost and "train" in lists.values():
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise DataError(
            f"{root}: {lost[0]!r} has a mask and stands in no list of ImageSets/Segmentation{more}; add it to train.txt, or remove "
            "the lists and set data.splits to drawn"
        )
    return splits


_FEW, _ENOUGH_TO_FILL = 5, 20
"""Images that val, test and train get at least, in a set with so many masks."""
_LOOKED_AT = 80
"""Images at each end of train, of which val and test are filled up: with tiny fractions, large sets are filled up too."""


def _drawn_splits(masked: list[str], params: FolderData, shown: Shown) -> dict[str, str]:
    # A number in [0, 1) from a hash, not a shuffle: the draw of one image does not depend on which others exist.
    digests = {image_id: hashlib.sha256(f"{params.partition_seed}:{image_id}".encode()).digest() for image_id in masked}
    key = {image_id: int.from_bytes(digest[:6], "big") / 2**48 for image_id, digest in digests.items()}
    order = sorted(key, key=lambda image_id: key[image_id])
    val_end, test_end = params.val_fraction, params.val_fraction + params.test_fraction
    val, test = [i for i in order if key[i] < val_end], [i for i in order if val_end <= key[i] < test_end]
    if len(order) >= _ENOUGH_TO_FILL:
        train = order[len(val) + len(test) :]
        for_val = min(max(0, _FEW - len(val)), max(0, len(train) - _FEW)) if params.val_fraction else 0
        for_test = min(max(0, _FEW - len(test)), max(0, len(train) - for_val - _FEW)) if params.test_fraction else 0
        # From the two ends of train, so that what one split lacks moves little of the other.
        near = train[:_LOOKED_AT] + train[_LOOKED_AT:][-_LOOKED_AT:]
        if for_val:
            spared = _seen(near, shown) - _seen(test, shown) if for_test else set()
            val = val + _chosen(near[::-1], for_val, _seen(val, shown), spared, shown)
        if for_test:
            test = test + _chosen([i for i in near if i not in val], for_test, _seen(test, shown), set(), shown)
    val = val or order[: params.val_fraction > 0]
    test = [i for i in test if i not in val] or [i for i in order if i not in val][: params.test_fraction > 0]
    if order and len(val) + len(test) == len(order):  # labels that nothing trains on are worth nothing
        (test or val).pop()
        if not test and len(val) > 1 and params.test_fraction > 0:
            test = [val.pop()]
    return {**dict.fromkeys(val, "val"), **dict.fromkeys(test, "test")}


def _seen(ids: Iterable[str], shown: Shown) -> set[Hashable]:
    return set[Hashable]().union(*map(shown, ids))


def _chosen(train: list[str], count: int, seen: set[Hashable], spared: set[Hashable], shown: Shown) -> list[str]:
    """`count` images of train for a split that shows the classes `seen`: one after the other the image with the class that is
    rarest in train among those that the split lacks, of these the image with most such classes, of these the first.

    Train keeps an image of each class, and two of a class that this split shows and another one lacks (`spared`). If each image
    would break this, the image goes that breaks it for the fewest classes.
    """
    rest, chosen = list(train), list[str]()
    left = Counter(name for image_id in train for name in shown(image_id))

    def rank(image_id: str) -> tuple[int, int, int]:
        lost = sum(left[name] <= 1 + (name in seen and name in spared) for name in shown(image_id))
        lacked = [left[name] for name in shown(image_id) - seen]
        return lost, min(lacked, default=len(train) + 1), -len(lacked)

    for _ in range(count):
        image_id = min(rest, key=rank)
        rest.remove(image_id)
        chosen.append(image_id)
        seen = seen | shown(image_id)
        left.subtract(shown(image_id))
    return chosen


def scan_mask_values(root: Path, index: DatasetIndex) -> list[int]:
    """The sorted values of up to 200 masks, spread evenly over all masks of a data set, for a first params.yaml."""
    paths = sorted(root / sample.mask for sample in index.samples if sample.mask)
    if not paths:
        raise DataError(f"{root / 'masks'}: no mask found; expected masks/<split>/<id>.png")
    chosen = sorted({place * len(paths) // 200 for place in range(200)}) if len(paths) > 200 else range(len(paths))
    return sorted({value for place in chosen for value in _values_in(paths[place])})


@dataclass(frozen=True)
class _Place:
    """Where the images, or the masks, are expected, and what lies there."""

    shown: Path
    """What errors call it: a folder or a glob."""
    by_id: dict[str, Path]
    """Images or masks by their path without suffix, NFC, with / between parts."""
    unread: list[Path]
    """Files with another suffix than that of an image which is read."""
    folder: Path
    """The ids are paths below it, unless `named` knows another one."""
    named: Callable[[Path], str | None] = lambda path: None

    def id_of(self, path: Path) -> str:
        return self.named(path) or unicodedata.normalize("NFC", path.relative_to(self.folder).with_suffix("").as_posix())

    def ids_of(self, path: Path) -> list[str]:
        """The ids of the images that a file may belong to: its name without the last suffix, the last two (.png.bak), and so on."""
        parts = path.name.split(".")
        names = [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)] or [path.name]
        return [self.id_of(path.with_name(f"{name}.x")) for name in names]


def _place(shown: Path, folder: Path, files: list[Path], named: Callable[[Path], str | None] = lambda path: None) -> _Place:
    """Raises DataError for two images of one id, and for a link to nothing, which may have been a folder of images."""
    place = _Place(shown, {}, [path for path in files if path.suffix.lower() not in SUFFIXES], folder, named)
    for path in readable(files):
        other = place.by_id.setdefault(place.id_of(path), path)
        if other != path:
            raise DataError(f"{path}: same name as {other} but for the suffix or Unicode form; remove or rename one")
    for path in place.unread:
        require_no_link(path)
    return place


def _split_folders(root: Path) -> tuple[list[Sample], list[Note]]:
    layout = "images/{train,val,test}/ and masks/{train,val,test}/"
    require_folder(root / "images" / "train", layout, "/path/to/images")
    samples: list[Sample] = []
    pictures: list[Path] = []
    notes: list[Note] = []
    for split in SPLITS:
        folders = root / "images" / split, root / "masks" / split
        images, masks = (_place(folder, folder, list_files(folder)) for folder in folders)
        if split == "train" and not images.by_id:
            raise DataError(f"{root / 'images/train'}: no image found; readable suffixes are {', '.join(SUFFIXES)}")
        notes += _require_matches(images, masks)
        pictures += unread(images.unread)
        for image_id, path in images.by_id.items():
            mask = masks.by_id.get(image_id)
            if mask is None and split != "train":
                raise DataError(
                    f"{path}: {split} image without a mask; expected masks/{split}/{image_id}.png below {root}, "
                    "or move the image to images/train"
                )
            samples.append(Sample(image_id, path.relative_to(root), mask and mask.relative_to(root), split))
    return samples, [*unread_note(pictures), *notes]


def pair_globs(root: Path, params: FolderData) -> tuple[list[tuple[str, Path, Path | None]], list[Note]]:
    """Id, image and mask, relative to the root, of all images that the globs match, and notes."""
    assert params.images is not None and params.masks is not None
    pairing = Pairing(params.images, params.masks)
    images, masks = _globbed(root, params.images, pairing.image_id), _globbed(root, params.masks, pairing.mask_id)
    if not images.by_id:
        raise DataError(f"{root}: no image matches {params.images!r}; readable suffixes are {', '.join(SUFFIXES)}")
    notes = [*unread_note(unread(images.unread)), *_require_matches(images, masks), *_unmatched_masks(images, masks)]
    labelled = []
    for image_id, path in images.by_id.items():
        mask = masks.by_id.get(image_id)
        labelled.append((image_id, path.relative_to(root), mask and mask.relative_to(root)))
    return labelled, notes


def _globbed(root: Path, pattern: str, id_of: Callable[[Path], str | None]) -> _Place:
    parts = Path(pattern).parts
    if Path(pattern).is_absolute() or ".." in parts:
        raise DataError(f"{pattern}: a glob must stay below root, {root}; write it relative, such as photos/**/*.jpg")
    folder = root.joinpath(*fixed_part(pattern))

    def named(path: Path) -> str | None:
        return id_of(path.relative_to(root))

    return _place(root / pattern, folder, [path for path in list_files(folder) if named(path) is not None], named)


def _unmatched_masks(images: _Place, masks: _Place) -> tuple[Note, ...]:
    """A note about pictures beside the masks that would be masks if the glob of masks matched them."""
    known = {*images.by_id.values(), *masks.unread}
    lacking = images.by_id.keys() - masks.by_id.keys()
    pictures = [path for path in list_files(masks.folder) if path.suffix.lower() in (*SUFFIXES, *UNREAD_SUFFIXES)]
    lost = [path for path in pictures if path not in known and masks.id_of(path) in lacking]
    why = f"called like an image without a mask, but {masks.shown} does not match"
    return note_of(lost, ("picture is not a mask", "pictures are not masks"), why, "correct data.masks, or remove them")


def _require_matches(images: _Place, masks: _Place) -> tuple[Note, ...]:
    """Raises DataError for a mask that is not read, has no image or is named otherwise than its image: its image would pass as
    "unlabelled". Returns a note about files among the masks that are not masks.
    """
    lacking = images.by_id.keys() - masks.by_id.keys()
    unread_masks = [(path, of) for path in masks.unread if (of := next((i for i in masks.ids_of(path) if i in lacking), None))]
    if unread_masks:
        path, image_id = unread_masks[0]
        raise unread_mask(path, images.by_id[image_id], len(unread_masks) - 1)
    if images.by_id and masks.by_id and not images.by_id.keys() & masks.by_id.keys():
        raise DataError(
            f"{images.shown}: no mask belongs to an image, such as mask {min(masks.by_id)!r} and image {min(images.by_id)!r}; "
            "give a mask its image's path and name, but for the suffix"
        )
    pictures = {**{masks.id_of(path): path for path in unread(masks.unread)}, **masks.by_id}
    if lonely := sorted(pictures.keys() - images.by_id.keys()):
        path, more = pictures[lonely[0]], f" (and {len(lonely) - 1} more such masks)" if len(lonely) > 1 else ""
        unread_image = next((path for path in images.unread if images.id_of(path) == lonely[0]), None)
        add = f"add the image ({', '.join(SUFFIXES)})"
        if near := next((images.by_id[image_id] for image_id in lacking if image_id.lower() == lonely[0].lower()), None):
            add = f"give it the capitals of {near.name},"
        if unread_image:
            add = f"save {unread_image.name}, which is not read, as PNG or JPEG,"
        raise DataError(f"{path}: no image {lonely[0]!r} in {images.shown}{more}; {add} or remove the mask")
    left_out = [path for path in masks.unread if path.name.lower() not in ("thumbs.db", "desktop.ini", "icon\r")]
    what = "file among the masks is left out", "files among the masks are left out"
    return note_of(left_out, what, "no mask in a format that is read", "remove them, or save what is a mask as PNG")
