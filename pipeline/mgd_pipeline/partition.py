"""Which training images count as labelled: a drawn fraction, or lists of ids in either of the published formats."""

from __future__ import annotations

import difflib
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mgd_pipeline.access import access_error, says_nothing
from mgd_pipeline.datasets import Sample
from mgd_pipeline.errors import DataError
from mgd_pipeline.images import SUFFIXES
from mgd_pipeline.params import CityscapesData, FolderData, IdLists, ShapesData, VocData

_SUFFIX = "(?:" + "|".join(re.escape(suffix) for suffix in SUFFIXES) + ")"
_TWO_PATHS = re.compile(rf"(.+?{_SUFFIX})\s+(.+{_SUFFIX})", re.IGNORECASE)
_ONE_PATH = re.compile(rf"(?:.*[/\\])?([^/\\]+){_SUFFIX}", re.IGNORECASE)


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


def read_id_list(path: Path) -> list[str]:
    """The ids of a list, in its order: one id a line, or an image and a mask path a line with a tab or spaces between.

    The id of a path is the image's file name without suffix and without Cityscapes' `_leftImg8bit`. Empty lines are skipped.
    Raises DataError for a list that cannot be read, is empty, or names an image twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such list of ids; correct data.partition in params.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and says_nothing(error):
            raise DataError(str(access_error(path, error))) from None
        raise DataError(f"{path}: cannot be read ({error}); expected UTF-8 text, one image a line") from None
    ids = [_id_of(line) for line in lines if line.strip()]
    if not ids:
        raise DataError(f"{path}: holds no id; write one image a line")
    repeated = [image_id for image_id, count in Counter(ids).items() if count > 1]
    if repeated:
        raise DataError(f"{path}: {repeated[0]!r} stands {ids.count(repeated[0])} times{_more(repeated)}; keep one line of each")
    return ids


def partition_images(
    params: ShapesData | VocData | CityscapesData | FolderData, samples: list[Sample], base: Path = Path()
) -> dict[str, str]:
    """image_id -> 'labelled' or 'unlabelled', sorted by id: images of train, and those of val and test that a list declares.

    With a fraction, labelled images are drawn from those with a mask and all others are unlabelled. With lists, whose paths are
    relative to `base`, an image of train in neither list takes no part; an image of val or test may stand in the unlabelled
    list alone: then its picture trains, its mask never. Raises DataError for a partition that cannot be trained.
    """
    train = {sample.image_id: sample for sample in samples if sample.split == "train"}
    if isinstance(params.partition, IdLists):
        labelled, unlabelled = _listed(params.partition, base, samples, train)
    else:
        denominator = int(params.partition.removeprefix("1/"))
        labelled, _ = draw_partition([i for i, sample in train.items() if sample.mask], denominator, params.partition_seed)
        unlabelled = sorted(train.keys() - set(labelled))
    if not unlabelled:
        raise DataError(
            f"data.partition: all {len(labelled)} train images are labelled, none is left to distil on; "
            "choose a smaller share such as 1/8, or add images without masks to train"
        )
    subsets = {**dict.fromkeys(labelled, "labelled"), **dict.fromkeys(unlabelled, "unlabelled")}
    return dict(sorted(subsets.items()))


def partition_fingerprint(labelled_ids: Iterable[str]) -> str:
    """Hexadecimal SHA-256 of the sorted labelled ids, one a line: equal for two partitions with the same labels."""
    return hashlib.sha256("\n".join(sorted(labelled_ids)).encode()).hexdigest()


def _listed(lists: IdLists, base: Path, samples: list[Sample], train: dict[str, Sample]) -> tuple[list[str], list[str]]:
    splits = {sample.image_id: sample.split for sample in samples}
    labelled = read_id_list(base / lists.labelled)
    _require_known(base / lists.labelled, labelled, splits)
    held_out = [image_id for image_id in labelled if splits[image_id] != "train"]
    if held_out:
        raise DataError(
            f"{base / lists.labelled}: {held_out[0]!r} is in the {splits[held_out[0]]} split{_more(held_out)}; "
            "labels of val and test never enter training, remove it"
        )
    maskless = [image_id for image_id in labelled if train[image_id].mask is None]
    if maskless:
        raise DataError(
            f"{base / lists.labelled}: labelled image {maskless[0]!r} has no mask{_more(maskless)}; "
            "add the mask or move the id to the unlabelled list"
        )
    if lists.unlabelled is None:
        return labelled, sorted(train.keys() - set(labelled))
    unlabelled = read_id_list(base / lists.unlabelled)
    _require_known(base / lists.unlabelled, unlabelled, splits)
    both = sorted(set(labelled) & set(unlabelled))
    if both:
        raise DataError(
            f"{base / lists.unlabelled}: {both[0]!r} is also in {base / lists.labelled}{_more(both)}; remove it from one list"
        )
    return labelled, unlabelled


def _require_known(path: Path, ids: list[str], splits: dict[str, str]) -> None:
    foreign = [image_id for image_id in ids if image_id not in splits]
    if not foreign:
        return
    first = foreign[0]
    near = difflib.get_close_matches(first, [i for i in splits if splits[i] == "train"], n=1)
    hint = f"nearest is {near[0]!r}" if near else "check that the list belongs to this data set"
    raise DataError(f"{path}: no train image has the id {first!r}{_more(foreign)}; {hint}")


def _id_of(line: str) -> str:
    entry = line.split("\t")[0].strip() if "\t" in line.strip() else line.strip()
    pair = _TWO_PATHS.fullmatch(entry)
    path = _ONE_PATH.fullmatch(pair[1] if pair else entry)
    image_id = path[1].removesuffix("_leftImg8bit") if path else entry
    return unicodedata.normalize("NFC", image_id)


def _more(ids: list[str]) -> str:
    return f" (and {len(ids) - 1} more)" if len(ids) > 1 else ""
