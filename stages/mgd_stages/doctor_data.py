"""What `mgd-pipeline doctor` checks of the data set: against its manifest, and a sample of its files in full."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mgd_pipeline.access import is_there
from mgd_pipeline.datasets import SPLITS, DatasetIndex, Sample, index_dataset, unread_pictures
from mgd_pipeline.images import IGNORE, read_mask
from mgd_pipeline.manifest import ImageRow, Manifest, Skipped, check_sample, read_manifest
from mgd_pipeline.params import FolderData, ShapesData
from mgd_pipeline.partition import partition_images
from mgd_stages.checks import Check, Checks, of_error
from mgd_stages.progress import progress
from mgd_stages.project import Project

_SAMPLE = 200
"""Images that are read without --full; half of them labelled, where there are so many."""
_NAMED = 10
"""Bad files that are named one by one."""


@dataclass(frozen=True)
class Sight:
    """What was seen of a data set."""

    manifest: Manifest
    """Of the images that were read and can be used, with the partition that params.yaml asks for."""
    training: int
    """Labelled and unlabelled images of the whole data set."""


@dataclass(frozen=True)
class _Files:
    """What was read."""

    rows: dict[str, ImageRow]
    bad: list[Check]
    masks: int
    """Of labelled images."""
    pixels: np.ndarray
    """How many pixels of these masks have each train id, (256,)."""


def recorded(project: Project) -> Checks[Manifest | None]:
    if not is_there(project.manifest / "images.parquet"):
        yield Check("data", "ok", "there is no manifest yet: `mgd-pipeline prepare-data` makes it")
        return None
    return read_manifest(project.manifest, project.base)


def data_set(project: Project, manifest: Manifest | None, *, full: bool, quiet: bool) -> Checks[Sight | None]:
    """The data set as it lies there: against the manifest, where there is one, and a sample of its files in full."""
    data, root = project.params.data, project.base / project.params.data.root
    if isinstance(data, ShapesData) and not root.exists():
        scenes = data.train + data.val + data.test
        found = f"the built-in data set of {scenes} scenes is not there yet: `mgd-pipeline prepare-data` renders it"
        yield Check("data", "ok", found)
        return None
    index = index_dataset(data, project.base)
    if isinstance(data, FolderData) and (unread := unread_pictures(root, data)):
        found = f"{len(unread)} pictures are left out, such as {unread[0].name}: their format is not read"
        yield Check("data", "warning", found, "save them as PNG or JPEG")
    subsets = partition_images(data, index.samples, project.base)
    if manifest is not None:
        yield from _against(project, manifest, index, subsets)

    left_out = {bad.image_id for bad in manifest.skipped} if manifest else set()
    samples = [sample for sample in index.samples if sample.image_id not in left_out]
    labelled = [sample for sample in samples if subsets.get(sample.image_id) == "labelled"]
    unlabelled = sum(subsets.get(sample.image_id) == "unlabelled" for sample in samples)
    splits = {split: sum(sample.split == split for sample in samples) for split in SPLITS}
    train = f"{splits['train']} train images ({len(labelled)} labelled, {unlabelled} unlabelled)"
    counts = f"{train}, {splits['val']} val, {splits['test']} test{f', {len(left_out)} left out' if left_out else ''}"
    yield Check("data", "ok", f"{data.dataset}, {len(index.classes)} classes: {counts}")
    if not splits[project.params.evaluation.split]:
        found = f"evaluation.split is {project.params.evaluation.split}, which has no images"
        yield Check("data", "problem", found, "choose the other split, or add images and masks to it")

    chosen = samples if full else _sample(samples, labelled)
    files = _read_all(root, chosen, index.lookup, {sample.image_id for sample in labelled}, manifest, quiet)
    yield from _bad_files(files.bad, len(chosen), len(samples))
    kept = {image_id: subset for image_id, subset in subsets.items() if image_id in files.rows}
    seen = Manifest(Path(data.root), data.long_side, index.classes, index.palette, index.lookup, files.rows, kept)
    yield from _sizes(list((manifest or seen).rows.values()))
    if files.masks:
        yield from _class_shares(index.classes, files.pixels, files.masks, len(labelled))
    return Sight(seen, len(labelled) + unlabelled)


def _against(project: Project, manifest: Manifest, index: DatasetIndex, subsets: dict[str, str]) -> Iterator[Check]:
    """What has changed since the manifest was made."""
    data, again = project.params.data, "run `mgd-pipeline prepare-data` again"
    settings = {
        "data.root": (manifest.root, Path(data.root)),
        "data.long_side": (manifest.long_side, data.long_side),
        "data.classes": (list(manifest.classes), list(index.classes)),
        "data.ignore": (manifest.lookup, index.lookup),
    }
    stale = [key for key, (then, now) in settings.items() if then != now]
    left_out = {bad.image_id for bad in manifest.skipped}
    known, here = {*manifest.rows, *left_out}, {sample.image_id for sample in index.samples}
    gone, new = sorted(known - here), sorted(here - known)
    if stale:
        yield Check("data", "warning", f"the manifest was made with another {', '.join(stale)} than params.yaml has now", again)
    if gone:
        found = f"{len(gone)} images of the manifest are not in the data set, such as {gone[0]!r}"
        yield Check("data", "problem", found, f"restore them, or {again}")
    if new:
        yield Check("data", "warning", f"{len(new)} images of the data set are not in the manifest, such as {new[0]!r}", again)
    drawn = {image_id: subset for image_id, subset in subsets.items() if image_id not in left_out}
    if not gone and not new and drawn != manifest.subsets:
        yield Check("data", "warning", "the manifest has another partition than params.yaml asks for now", again)
    if manifest.declared:
        found = f"{len(manifest.declared)} val or test images train as unlabelled, as a list declares"
        yield Check("data", "warning", found, "say so beside every result")


def _sample(samples: list[Sample], labelled: list[Sample]) -> list[Sample]:
    """At most 200, seeded, half of them labelled where there are so many, in the order of their ids."""
    rng = np.random.default_rng(0)

    def some(of: list[Sample], count: int) -> list[Sample]:
        return [of[i] for i in rng.permutation(len(of))[:count]]

    with_labels = {sample.image_id for sample in labelled}
    others = [sample for sample in samples if sample.image_id not in with_labels]
    first = some(labelled, max(_SAMPLE // 2, _SAMPLE - len(others)))
    return sorted([*first, *some(others, _SAMPLE - len(first))], key=lambda sample: sample.image_id)


def _read_all(
    root: Path, chosen: list[Sample], lookup: Sequence[int], labelled: set[str], manifest: Manifest | None, quiet: bool
) -> _Files:
    """What the manifest would say of each file, or does not say any more, and the classes of the labelled masks."""
    table = np.array(lookup, np.int16)
    rows: dict[str, ImageRow] = {}
    bad: list[Check] = []
    counts: list[np.ndarray] = []

    def read(sample: Sample) -> tuple[ImageRow | Skipped, np.ndarray | None]:
        outcome = check_sample(root, sample, table)
        if isinstance(outcome, Skipped) or sample.mask is None or sample.image_id not in labelled:
            return outcome, None
        return outcome, np.bincount(read_mask(root / sample.mask, table).ravel(), minlength=256)

    shown = contextlib.nullcontext(lambda done, note: None) if quiet else progress("doctor: read", len(chosen), "images")
    with shown as advance, ThreadPoolExecutor(2) as pool, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # what it warns of and matters is an error of ours
        for done, (sample, (outcome, counted)) in enumerate(zip(chosen, pool.map(read, chosen), strict=True), start=1):
            advance(done, "")
            if isinstance(outcome, Skipped):
                bad += of_error("data", f"{root / outcome.path}: {outcome.reason}")
                continue
            rows[sample.image_id] = outcome
            if counted is not None:
                counts.append(counted)
            if manifest and manifest.rows.get(sample.image_id, outcome) != outcome:
                found = f"{root / outcome.image_path}: image or mask has changed since the manifest was made"
                bad.append(Check("data", "problem", found, "restore it, or run `mgd-pipeline prepare-data` again"))
    return _Files(rows, bad, len(counts), sum(counts, np.zeros(256, np.int64)))


def _bad_files(bad: list[Check], read: int, there: int) -> Iterator[Check]:
    yield from bad[:_NAMED]
    if len(bad) > _NAMED:
        remedy = "`mgd-pipeline prepare-data --on-error skip` leaves them out"
        yield Check("data", "problem", f"... and {len(bad) - _NAMED} more files", remedy)
    if not bad:
        how = f"all {read} images" if read == there else f"a sample of {read} of the {there} images"
        more = "" if read == there else " (--full reads all)"
        yield Check("data", "ok", f"{how} and their masks were read in full, nothing is wrong with them{more}")


def _sizes(rows: list[ImageRow]) -> Iterator[Check]:
    if rows:
        heights, widths = [row.height for row in rows], [row.width for row in rows]
        small, large = f"{min(widths)} x {min(heights)}", f"{max(widths)} x {max(heights)}"
        yield Check("data", "ok", f"images of {small}{f' to {large}' if small != large else ''} pixels (width x height)")


def _class_shares(classes: tuple[str, ...], pixels: np.ndarray, masks: int, labelled: int) -> Iterator[Check]:
    of = f"all {masks} labelled masks" if masks == labelled else f"{masks} of the {labelled} labelled masks"
    total = max(1, int(pixels.sum()))
    shares = [f"{name} {100 * count / total:.3g} %" for name, count in zip(classes, pixels.tolist(), strict=False)]
    yield Check("data", "ok", f"pixels of {of}: {', '.join(shares)}, no class {100 * int(pixels[IGNORE]) / total:.3g} %")
    never = [name for name, count in zip(classes, pixels.tolist(), strict=False) if not count]
    if never:
        remedy = "--full reads all of them" if masks < labelled else "label images with it, or draw others by data.partition_seed"
        read = "" if masks == labelled else " that were read"
        noun = "the class" if len(never) == 1 else "the classes"
        found = f"none of the {masks} labelled masks{read} holds {noun} {', '.join(never)}"
        yield Check("data", "warning", found, remedy)
