"""The sections of the report with pictures: masks of students and teachers, and where teachers disagree."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from mgd_pipeline.data.images import read_image, read_mask, resize_image
from mgd_pipeline.data.manifest import Manifest
from mgd_pipeline.errors import DataError
from mgd_pipeline.params import STUDENTS
from mgd_pipeline.pictures.overlays import blend
from mgd_stages.reports import figures
from mgd_stages.reports.sections import label_of, plain
from mgd_stages.run.class_tables import read_class_tsv, read_numbers
from mgd_stages.run.pictures import Predicted, extremes, read_masks, to_look_at
from mgd_stages.run.project import Project
from mgd_stages.run.verdicts import LABELS, stored_verdicts

_MOST_PICTURES = 6
"""Of each kind, so that the page stays small enough for a phone."""
_GROUPS = {"worst": "Worst", "best": "Best", "only": "The only image"}


def pictures(project: Project, manifest: Manifest | str) -> dict[str, Any] | str:
    """The worst and best images of the distilled student, or of the only student, with the truth and the masks of all networks."""
    if isinstance(manifest, str):
        return manifest
    count = min(project.params.evaluation.overlays, _MOST_PICTURES)
    path = project.results / "evaluation/masks.parquet"
    predicted = read_masks(path)
    for name in project.params.teachers:
        predicted += read_masks(project.results / f"teachers/{name}-masks.parquet")
    by_image: dict[str, dict[str, Predicted]] = {}
    for one in predicted:
        by_image.setdefault(one.image_id, {})[one.network] = one
    shown_networks = {one.network for one in predicted}
    students = [key for key in STUDENTS if key in shown_networks]
    if not students:
        return f"There are no masks of the student ({path.name}): run `mgd-pipeline evaluate`."
    by = students[0]
    scores = {image_id: masks[by].score for image_id, masks in by_image.items() if by in masks}
    groups, networks = [], [*students, *project.params.teachers]
    for group, chosen in extremes(scores, count, median=False).items():
        try:
            shown = [_picture(project, manifest, image_id, networks, by_image[image_id]) for image_id in chosen]
        except (DataError, KeyError) as error:
            return f"The images do not fit their masks ({plain(project, error)}): run `mgd-pipeline evaluate` again."
        groups.append((_GROUPS[group], shown))
    if not groups:
        return "No image of the split has a pixel of any class, so that none is better than another."
    lacking = [name for name in project.params.teachers if name not in shown_networks]
    return {"student": LABELS[by], "groups": groups, "lacking": lacking}


def _picture(
    project: Project, manifest: Manifest, image_id: str, networks: Sequence[str], said: dict[str, Predicted]
) -> dict[str, Any]:
    row = manifest.rows[image_id]
    assert row.mask_path is not None
    root = project.base / manifest.root
    truth = to_look_at(read_mask(root / row.mask_path, np.asarray(manifest.lookup)))
    image = resize_image(to_look_at(read_image(root / row.image_path)), truth.shape[0], truth.shape[1])
    masks = {"truth": truth} | {label_of(key): said[key].mask for key in networks if key in said}
    scores = {label_of(key): said[key].score for key in networks if key in said}
    return _panels(manifest, image_id, image, masks, scores)


def _panels(
    manifest: Manifest, image_id: str, image: np.ndarray, masks: dict[str, np.ndarray], scores: dict[str, float]
) -> dict[str, Any]:
    """The image, each mask over it, and the classes that occur for a legend."""
    panels = [{"title": "image", "picture": figures.panel(image, f"image {image_id}"), "score": None}]
    for title, mask in masks.items():
        if mask.shape != image.shape[:2]:
            raise DataError(f"{image_id}, {title}: {mask.shape} and not {image.shape[:2]} pixels")
        alternative = f"{image_id}, {title}: {describe(mask, manifest.classes)}"
        picture = figures.panel(blend(image, mask, manifest.palette), alternative, mask)
        panels.append({"title": title, "picture": picture, "score": scores.get(title)})
    present = sorted({int(value) for mask in masks.values() for value in np.unique(mask)} & set(range(len(manifest.classes))))
    legend = [(k, manifest.classes[k], "#{:02x}{:02x}{:02x}".format(*manifest.palette[k])) for k in present]
    return {"image_id": image_id, "panels": panels, "legend": legend}


def describe(mask: np.ndarray, classes: Sequence[str]) -> str:
    """A mask in words: its classes by size, such as 'road 61 %, sky 30 %'."""
    counts = np.bincount(mask.ravel(), minlength=256)[: len(classes)]
    order = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
    return ", ".join(f"{classes[k]} {100 * counts[k] / mask.size:.0f} %" for k in order) or "no class"


def disagreement(project: Project, manifest: Manifest | str) -> dict[str, Any] | str:
    """What `compare-teachers` measured in the teacher caches, with the images on which the teachers differ most."""
    folder = project.results / "compare-teachers"
    measured = read_numbers(folder / "metrics.json")
    if measured is None:
        return "The teachers have not been compared: run `mgd-pipeline compare-teachers`."
    teachers = [name for name in project.params.teachers if name in measured]
    pairs = [" and ".join(pair) for pair in combinations(teachers, 2) if " and ".join(pair) in measured]
    agreement = read_class_tsv(folder / "disagreement/class_agreement.tsv")
    names = list(dict.fromkeys(name for pair in pairs for name in agreement.get(pair, {})))
    by_image: dict[str, list[Predicted]] = {}
    for mask in read_masks(folder / "disagreement/masks.parquet"):
        by_image.setdefault(mask.image_id, []).append(mask)
    shown: list[Any] | str = []
    if isinstance(manifest, str):
        shown = manifest
    elif not by_image:
        again = "There are no masks to show: run `mgd-pipeline compare-teachers` again."
        shown = again if pairs else "Fewer than two teachers name classes, so that there are no differences to show."
    else:
        try:
            shown = [_differing(project, manifest, masks) for masks in list(by_image.values())[:_MOST_PICTURES]]
        except (DataError, KeyError) as error:
            shown = f"The images do not fit their masks ({plain(project, error)}): run `mgd-pipeline compare-teachers` again."
    return {
        "verdicts": stored_verdicts(measured, teachers),
        "teachers": {name: measured[name] for name in teachers},
        "pairs": {pair: measured[pair]["same_class_share"] for pair in pairs},
        "classes": [(name, [agreement[pair].get(name) for pair in pairs]) for name in names],
        "pictures": shown,
    }


def _differing(project: Project, manifest: Manifest, masks: list[Predicted]) -> dict[str, Any]:
    row = manifest.rows[masks[0].image_id]
    image = to_look_at(read_image(project.base / manifest.root / row.image_path, manifest.long_side))
    picture = _panels(manifest, row.image_id, image, {f"teacher {mask.network}": mask.mask for mask in masks}, {})
    return {**picture, "share": masks[0].score}
