"""What `mgd-pipeline doctor` checks of the data set: against its manifest, and a sample of its files in full."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mgd_pipeline.access import is_there
from mgd_pipeline.data.build import Places, Seen, check_sample, places_of, twins_of_held_out
from mgd_pipeline.data.datasets import index_dataset
from mgd_pipeline.data.images import IGNORE
from mgd_pipeline.data.index import SPLITS, DatasetIndex, Note, Sample
from mgd_pipeline.data.listing import what_dvc_cannot_read
from mgd_pipeline.data.manifest import ImageRow, Manifest, Skipped, read_manifest, require_classes
from mgd_pipeline.data.partition import check_listening, partition_images
from mgd_pipeline.errors import DataError, ParamsError
from mgd_pipeline.params import ShapesData
from mgd_pipeline.words import counted, first_of, verb
from mgd_stages.doctor.checks import Check, Checks, of_error
from mgd_stages.run.data_notes import (
    DataParams,
    absent_classes,
    copies,
    few_labelled,
    likely_mistakes,
    orientations,
    remedy_of_empty_split,
    unmeasured_classes,
    unused_pictures,
    void_masks,
)
from mgd_stages.run.labels_sheet import applied_turns, misaligned
from mgd_stages.run.progress import progress
from mgd_stages.run.project import Project

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


def recorded(project: Project) -> Checks[Manifest | None]:
    if not is_there(project.manifest / "images.parquet"):
        yield Check("data", "ok", "there is no manifest yet: `mgd-pipeline prepare-data` makes it")
        return None
    return read_manifest(project.manifest, project.base)


def data_set(project: Project, manifest: Manifest | None, *, full: bool, quiet: bool) -> Checks[Sight | None]:
    """Compares the data set with its manifest, where there is one, and reads a sample of its files in full."""
    data, root = project.params.data, project.base / project.params.data.root
    if isinstance(data, ShapesData) and not root.exists():
        scenes = data.train + data.val + data.test
        fact = f"the built-in data set of {scenes} scenes is not there yet: `mgd-pipeline prepare-data` renders it"
        yield Check("data", "ok", fact)
        return None
    index = index_dataset(data, project.base)
    yield from _warnings(index.notes)
    subsets = partition_images(data, index.samples, project.base)
    try:
        check_listening(project.params.losses, subsets)
    except ParamsError as error:
        yield from of_error("data", error)
    if manifest is not None:
        yield from _against(project, manifest, index, subsets)

    left_out = {bad.image_id for bad in manifest.skipped} if manifest else set()
    samples = [sample for sample in index.samples if sample.image_id not in left_out]
    labelled = [sample for sample in samples if subsets.get(sample.image_id) == "labelled"]
    unlabelled = sum(subsets.get(sample.image_id) == "unlabelled" for sample in samples)
    splits = {split: sum(sample.split == split for sample in samples) for split in SPLITS}
    split = project.params.evaluation.split
    train = f"{counted(splits['train'], 'train image')} ({len(labelled)} labelled, {unlabelled} unlabelled)"
    counts = f"{train}, {splits['val']} val, {splits['test']} test{f', {len(left_out)} left out' if left_out else ''}"
    yield Check("data", "ok", f"{project.name}, {counted(len(index.classes), 'class', 'classes')}: {counts}")
    if not splits[split]:
        remedy = remedy_of_empty_split(data, sum(sample.mask is not None for sample in samples))
        yield Check("data", "problem", f"evaluation.split is {split}, which has no images", remedy)
    yield from _warnings([*few_labelled(data, samples, len(labelled)), *unused_pictures(root, data, index)])
    yield from _warnings(misaligned(project.base, data, index))

    chosen = samples if full else _sample(samples, labelled)
    seen, bad = _read_all(places_of(data, project.base, index, write=False), chosen, manifest, quiet)
    rows = {image_id: one.row for image_id, one in seen.items()}
    pixels = {image_id: one.pixels for image_id, one in seen.items() if one.pixels is not None}
    for twin in twins_of_held_out(rows, subsets):
        bad += of_error("data", f"{root / twin.path}: {twin.reason}")
    yield from _bad_files(bad, len(chosen), len(samples))
    yield from _for_dvc(project, root, bad)
    kept = {image_id: subset for image_id, subset in subsets.items() if image_id in rows}
    classes = {image_id: counts[: len(index.classes)] for image_id, counts in pixels.items()}
    settings = Path(data.root), data.long_side, index.classes, index.palette, index.lookup
    read = Manifest(*settings, rows, kept, base=project.base, pixels=classes)
    yield from _sizes(list((manifest or read).rows.values()))
    # Manifests of 0.1.0 have no orientations: what was read just now counts, too.
    decodings = {path: decoding for one in seen.values() for path, decoding in one.decodings.items()}
    noted = {path: value for one in seen.values() for path, value in one.orientations.items()}
    known = {**rows, **(manifest.rows if manifest else {})}
    noted |= dict(manifest.orientations if manifest else {})
    turns = [*applied_turns(project.base, data, index, decodings, rows.values()), *orientations(noted, known.values())]
    yield from _warnings([*copies(read.training), *turns])
    yield from _classes(data, read, split, pixels, len(labelled), len(chosen) == len(samples))
    return Sight(read, len(labelled) + unlabelled)


def _classes(
    data: DataParams, read: Manifest, split: str, pixels: dict[str, np.ndarray], labelled: int, whole: bool
) -> Iterator[Check]:
    """What masks say. `pixels`: of each train id, (256,), by image_id; `whole`: whether all images were read."""
    for rows, what in ((read.labelled, "the labelled images"), (read.split(split), f"the {split} images")):
        try:
            require_classes(read, rows, what if whole else f"{what} that were read")
        except DataError as error:
            yield from of_error("data", error)
    yield from _warnings(void_masks([*read.labelled, *read.split("val"), *read.split("test")], read.pixels))
    if read.labelled:
        total, masks = np.sum([pixels[row.image_id] for row in read.labelled], axis=0), len(read.labelled)
        of = f"all {masks} labelled masks" if masks == labelled else f"{masks} of the {labelled} labelled masks"
        count = max(1, int(total.sum()))
        shares = [f"{name} {100 * part / count:.3g} %" for name, part in zip(read.classes, total.tolist(), strict=False)]
        yield Check("data", "ok", f"pixels of {of}: {first_of(shares)}, no class {100 * int(total[IGNORE]) / count:.3g} %")
        yield from _warnings(absent_classes(read.classes, total, masks, labelled))
        yield from _warnings(unmeasured_classes(data, read) if whole else [])
        yield from _warnings(likely_mistakes(data, read.classes, total, masks))


def _for_dvc(project: Project, root: Path, bad: Sequence[Check]) -> Iterator[Check]:
    """Files at which `dvc repro` stops, whether the pipeline needs them or not; the `bad` files are named already."""
    named = {check.found.partition(": ")[0] for check in bad}
    used = any((folder / ".dvc").is_dir() for folder in (project.base, *project.base.parents))
    for error in what_dvc_cannot_read(root):
        checks = of_error("data", error, "problem" if used and "does not notice" not in str(error) else "warning")
        yield from (check for check in checks if check.found.partition(": ")[0] not in named)


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
        are = verb(len(gone), "image of the manifest is", "images of the manifest are")
        fact = f"{len(gone)} {are} not in the data set, such as {gone[0]!r}"
        yield Check("data", "problem", fact, f"restore {verb(len(gone), 'it', 'them')}, or {again}")
    if new:
        are = verb(len(new), "image of the data set is", "images of the data set are")
        yield Check("data", "warning", f"{len(new)} {are} not in the manifest, such as {new[0]!r}", again)
    drawn = {image_id: subset for image_id, subset in subsets.items() if image_id not in left_out}
    if not gone and not new and drawn != manifest.subsets:
        yield Check("data", "warning", "the manifest has another partition than params.yaml asks for now", again)
    if manifest.declared:
        count = len(manifest.declared)
        fact = f"{counted(count, 'val or test image')} {verb(count, 'trains', 'train')} as unlabelled, as a list declares"
        yield Check("data", "warning", fact, "say so beside every result")


def _sample(samples: list[Sample], labelled: list[Sample]) -> list[Sample]:
    """At most 200 samples, seeded, half of them labelled where there are so many, in the order of their ids."""
    rng, with_labels = np.random.default_rng(0), {sample.image_id for sample in labelled}
    others = [sample for sample in samples if sample.image_id not in with_labels]
    first = [labelled[i] for i in rng.permutation(len(labelled))[: max(_SAMPLE // 2, _SAMPLE - len(others))]]
    second = [others[i] for i in rng.permutation(len(others))[: _SAMPLE - len(first)]]
    return sorted([*first, *second], key=lambda sample: sample.image_id)


def _warnings(notes: Sequence[Note]) -> Iterator[Check]:
    yield from (Check("data", "warning", note.text, note.remedy) for note in notes)


def _read_all(places: Places, chosen: list[Sample], manifest: Manifest | None, quiet: bool) -> tuple[dict[str, Seen], list[Check]]:
    """Reads the chosen files. Returns what was seen, by image_id, and what is wrong or has changed since the manifest."""
    root = places.images
    seen: dict[str, Seen] = {}
    bad: list[Check] = []
    read = partial(check_sample, places)
    shown = contextlib.nullcontext(lambda done, note: None) if quiet else progress("doctor: read", len(chosen), "image")
    with shown as advance, ThreadPoolExecutor(2) as pool, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # what matters of its warnings is one of our errors
        for done, (sample, outcome) in enumerate(zip(chosen, pool.map(read, chosen), strict=True), start=1):
            advance(done, "")
            if isinstance(outcome, Skipped):
                bad += of_error("data", f"{root / outcome.path}: {outcome.reason}")
                continue
            seen[sample.image_id] = outcome
            if manifest and manifest.rows.get(sample.image_id, outcome.row) != outcome.row:
                fact = f"{root / outcome.row.image_path}: image or mask has changed since the manifest was made"
                bad.append(Check("data", "problem", fact, "restore it, or run `mgd-pipeline prepare-data` again"))
    return seen, bad


def _bad_files(bad: list[Check], read: int, there: int) -> Iterator[Check]:
    yield from bad[:_NAMED]
    if len(bad) > _NAMED:
        remedy = "`mgd-pipeline prepare-data --on-error skip` leaves them out"
        yield Check("data", "problem", f"... and {counted(len(bad) - _NAMED, 'more file')}", remedy)
    if not bad:
        how = f"all {read} images" if read == there else f"a sample of {read} of the {there} images"
        more = "" if read == there else " (--full reads all)"
        yield Check("data", "ok", f"{how} and their masks were read in full, nothing is wrong with them{more}")


def _sizes(rows: list[ImageRow]) -> Iterator[Check]:
    if rows:
        heights, widths = [row.height for row in rows], [row.width for row in rows]
        small, large = f"{min(widths)} x {min(heights)}", f"{max(widths)} x {max(heights)}"
        yield Check("data", "ok", f"images of {small}{f' to {large}' if small != large else ''} pixels (width x height)")
