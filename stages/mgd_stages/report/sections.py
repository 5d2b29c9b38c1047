"""The sections of the report: what each shows of what the stages wrote, or a text that says why there is nothing to show."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mgd_pipeline.caches.format import count_images
from mgd_pipeline.caches.reader import TargetCache, open_cache
from mgd_pipeline.data.images import read_image, read_mask, resize_image
from mgd_pipeline.data.manifest import Manifest
from mgd_pipeline.errors import AccessError, CacheError, DataError
from mgd_pipeline.metrics import iou_by_class
from mgd_pipeline.params import STUDENTS, SmpTeacher
from mgd_pipeline.pictures.overlays import blend
from mgd_pipeline.words import counted, listed
from mgd_stages.report import figures as report_figures
from mgd_stages.run.class_tables import make_again, read_class_tsv, read_confusion, read_numbers, read_text
from mgd_stages.run.pictures import Predicted, extremes, read_masks, to_look_at
from mgd_stages.run.project import Project, manifest_hash
from mgd_stages.run.verdicts import LABELS, stored_verdicts

_MOST_PICTURES = 6
"""Of each kind: a page for a phone stays a page for a phone."""
_GROUPS = {"worst": "Worst", "best": "Best", "only": "The only image"}
_CURVES = (
    ("Supervised loss", "cross entropy in nats", "supervised", "Against the labels of the labelled views."),
    ("Pixel terms", "cross entropy in nats", "pixel_", "Against what each teacher says of each pixel."),
    (
        "Region term",
        "mean squared difference of cosines",
        "region",
        "Of the student’s and a teacher’s similarities of regions.",
    ),
    ("Image term", "summed difference of logits", "image", "Of the student’s and a teacher’s mean logits of a view."),
    (
        "Cross pseudo supervision of the teachers",
        "cross entropy in nats",
        "cross",
        "Of the two networks of a teacher’s training.",
    ),
    ("Total loss", "weighted sum, no unit", "loss", "What the optimiser sees; runs with other terms are not comparable."),
)
"""Title, unit, what the names of its files begin with, and what is compared."""


class Network(NamedTuple):
    """A student or a teacher that was measured on the evaluation split."""

    key: str
    """distilled, supervised, or the name of a teacher"""
    label: str
    built: str
    measured: dict[str, Any]
    """What its stage wrote: miou (0 to 1), parameters, macs, ..."""
    class_iou: dict[str, float]
    """IoU by class, 0 to 1; empty where it was not measured"""
    series: int
    """Number of its colour, dashes and hatch, on all figures"""


def _label(key: str) -> str:
    """What a reader calls a student, or the teacher of that name."""
    return LABELS.get(key, f"teacher {key}")


def measured_networks(project: Project, evaluation: dict[str, Any], students: dict[str, dict[str, Any]]) -> list[Network]:
    """Students first, then teachers, with what `evaluate` and `precompute-teachers` measured."""
    params = project.params
    class_iou = read_class_tsv(project.results / "evaluation/class_iou.tsv")
    found = []
    for i, key in enumerate(STUDENTS):
        if key in evaluation:
            network = students.get(key, {}).get("network", params.student.network.model_dump())
            built = f"{network['decoder']}, {network['encoder']}"
            found.append(Network(key, LABELS[key], built, evaluation[key], class_iou.get(key, {}), i))
    for i, (name, teacher) in enumerate(params.teachers.items(), len(STUDENTS)):
        measured = read_numbers(project.results / f"teachers/{name}.json")
        if measured is not None:
            classes, confusion = read_confusion(project.results / f"teachers/{name}-confusion.csv") or ([], np.zeros((0, 0)))
            if confusion.sum():
                measured["pixel_accuracy"] = round(float(np.trace(confusion) / confusion.sum()), 6)
            identity = ", ".join(str(value) for value in list(teacher.identity.values())[:2])
            series = i % len(report_figures.DASHES)
            found.append(Network(name, f"teacher {name}", identity, measured, iou_by_class(confusion, classes), series))
    return found


def headline(networks: list[Network]) -> dict[str, Any] | str:
    """The student, and how it stands beside the others: its twin without teachers, and each teacher."""
    student = next((network for network in networks if network.key in STUDENTS), None)
    if student is None:
        return "No student has been evaluated yet: run `mgd-pipeline train-student` and `mgd-pipeline evaluate`."
    own = student.measured
    return {
        "student": student,
        "others": [
            {
                "network": other,
                "gain": _difference(own.get("miou"), other.measured.get("miou")),
                # A teacher of one's own may hide its work from the counter.
                "parameters": own["parameters"] / (other.measured["parameters"] or math.nan),
                "macs": own["macs"] / (other.measured["macs"] or math.nan),
            }
            for other in networks
            if other is not student
        ],
    }


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def measured_on(manifest: Manifest | str, split: str, images: int | None, stores: Mapping[str, TargetCache | str]) -> str:
    """Where mIoU was measured, as half a sentence: the split, on how many images, and who saw these in training.

    `images` is the number on which the students were measured, None where nothing says it. Of a teacher from elsewhere nobody
    here knows what it was trained on.
    """
    if images is None and not isinstance(manifest, str):
        images = sum(row.mask_path is not None for row in manifest.split(split))
    where = f"the {split} split" if images is None else f"the {split} split ({counted(images, 'image')})"
    if isinstance(manifest, str):
        return where
    declared = sum(row.split == split for row in manifest.declared)
    if declared:
        return f"{where}, {declared} of which students saw without labels"
    foreign = [name for name, store in stores.items() if _trained_on(store) != manifest.partition_fingerprint]
    if not foreign:
        return f"{where}, which nothing was trained on"
    who = f"{'teacher' if len(foreign) == 1 else 'teachers'} {listed(foreign)}"
    return f"{where}, which no student was trained on; whether {who} learnt from them is not recorded"


def _trained_on(store: TargetCache | str) -> object:
    """Fingerprint of the labelled images that a store's teacher learnt from; None where that is not known."""
    return None if isinstance(store, str) else store.provenance["teacher"].get("trained_on")


def origins(
    project: Project, manifest: Manifest | str, stores: dict[str, TargetCache | str], students: dict[str, dict[str, Any]]
) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """What was made from what: (heading, [(thing, lines)]) in the order in which things were made."""
    params = project.params
    share = params.data.partition if isinstance(params.data.partition, str) else "by id lists"
    if isinstance(manifest, str):
        images = [manifest]
    else:
        held_out = ", ".join(f"{len(manifest.split(split))} {split}" for split in ("val", "test"))
        images = [
            f"{len(manifest.labelled)} labelled, {len(manifest.unlabelled)} unlabelled (partition {share})",
            f"held out: {held_out}",
            counted(len(manifest.classes), "class", "classes"),
        ]
    teachers = []
    for name, teacher in params.teachers.items():
        lines = [", ".join(str(value) for value in list(teacher.identity.values())[:2])]
        store = stores[name]
        trained_on = _trained_on(store)
        if name in params.train_teachers and not isinstance(teacher, SmpTeacher):
            lines.append("fetched as it was published")
        elif name in params.train_teachers:
            lines.append(f"trained here for {counted(steps_of(project, name), 'step')}")
        if trained_on is None and not isinstance(store, str):
            lines.append("what it was trained on is not recorded")
        elif trained_on is not None and not isinstance(manifest, str):
            same = trained_on == manifest.partition_fingerprint
            lines.append("from the same labelled images" if same else "from labelled images of another partition")
        teachers.append((f"teacher {name}", lines))
    targets = [
        (
            f"targets of {name}",
            [store]
            if isinstance(store, str)
            else [counted(count_images(store.index.place), "training image"), store.fingerprint[:12]],
        )
        for name, store in stores.items()
    ]
    made = []
    for name, notes in students.items():
        built = notes.get("network", {})
        lines = [f"{built.get('decoder')}, {built.get('encoder')}"]
        labelled = notes.get("labelled_images")
        labels = "labelled images not recorded" if labelled is None else counted(labelled, "labelled image")
        lines.append(f"{counted(steps_of(project, name), 'step')}, {labels}")
        used = notes.get("teachers", {})
        lines.append(f"and the targets of {' and '.join(used)}" if used else "and nothing else")
        made.append((LABELS[name], lines))
    return [
        ("Images", [(params.data.dataset, images)]),
        ("Teachers", teachers),
        ("Stored targets", targets),
        ("Students", made or [("none", ["run mgd-pipeline train-student"])]),
    ]


def class_rows(networks: list[Network], confusion: tuple[list[str], np.ndarray] | None) -> dict[str, Any] | str:
    """IoU of each class and network, in the data set's order, with the share that the class has of the true pixels."""
    shown = [network for network in networks if network.class_iou]
    if not shown:
        return "No IoU of classes has been measured: run `mgd-pipeline evaluate`."
    names = confusion[0] if confusion else list(dict.fromkeys(name for n in shown for name in n.class_iou))
    truth = confusion[1].sum(1) / max(confusion[1].sum(), 1) if confusion else [None] * len(names)
    by_key = {network.key: network.class_iou for network in shown}
    rows = []
    for place, (name, share) in enumerate(zip(names, truth, strict=True)):
        ious = {key: found.get(name) for key, found in by_key.items()}
        student, twin = (ious.get(key) for key in STUDENTS)
        gain = None if student is None or twin is None else student - twin
        rows.append({"id": place, "name": name, "share": None if share is None else float(share), "ious": ious, "gain": gain})
    return {"networks": shown, "rows": rows}


def confusion_rows(confusion: tuple[list[str], np.ndarray] | None, networks: list[Network]) -> dict[str, Any] | str:
    """Of the true pixels of each class the shares that are predicted as each class."""
    if confusion is None or not networks or networks[0].key not in STUDENTS:
        return "There is no confusion matrix: run `mgd-pipeline evaluate`."
    names, counts = confusion
    rows = []
    for name, row in zip(names, counts, strict=True):
        shares = [float(count / row.sum()) if row.sum() else None for count in row]
        rows.append((name, [(share, *report_figures.heat(share or 0.0)) for share in shares]))
    return {"network": networks[0], "names": names, "rows": rows, "scale": [report_figures.heat(i / 10)[0] for i in range(11)]}


def curves_of(project: Project) -> list[dict[str, Any]] | str:
    """A chart for each kind of loss, with a line for each network, or for each term, that has it."""
    series = {key: i % len(report_figures.DASHES) for i, key in enumerate([*STUDENTS, *project.params.teachers])}
    charts = []
    for title, unit, prefix, note in _CURVES:
        lines = []
        for key, colour in series.items():
            for path in sorted((_training(project, key) / "plots").glob(f"{prefix}*.tsv")):
                label, dash = _label(key), colour
                if prefix == "pixel_":
                    # A colour for each teacher, dashes for the images.
                    images, teacher = path.stem.removeprefix(prefix).split("_", 1)
                    label, dash = f"{teacher} on {images} views", int(images == "unlabelled")
                    colour = series.get(teacher, 0)
                lines.append(report_figures.Line(label, read_curve(path), colour, dash))
        if lines:
            chart = report_figures.line_chart(title, unit, lines)
            charts.append({"title": title, "unit": unit, "note": note, "lines": lines, "chart": chart})
    return charts or "No training has left curves here: run `mgd-pipeline train-student`."


def pictures(project: Project, manifest: Manifest | str) -> dict[str, Any] | str:
    """The worst and best images of the distilled student, or of the only one, each with the truth and what both students and each
    teacher say."""
    if isinstance(manifest, str):
        return manifest
    count = min(project.params.evaluation.overlays, _MOST_PICTURES)
    path = project.results / "evaluation/masks.parquet"
    said = read_masks(path)
    for name in project.params.teachers:
        said += read_masks(project.results / f"teachers/{name}-masks.parquet")
    by_image: dict[str, dict[str, Predicted]] = {}
    for found in said:
        by_image.setdefault(found.image_id, {})[found.network] = found
    students = [key for key in STUDENTS if any(key in found for found in by_image.values())]
    if not students:
        return f"There are no masks of the student ({path.name}): run `mgd-pipeline evaluate`."
    by = students[0]
    scores = {image_id: found[by].score for image_id, found in by_image.items() if by in found}
    groups, networks = [], [*students, *project.params.teachers]
    for group, chosen in extremes(scores, count, median=False).items():
        try:
            shown = [_picture(project, manifest, image_id, networks, by_image[image_id]) for image_id in chosen]
        except (DataError, KeyError) as error:
            return f"The images do not fit their masks ({plain(project, error)}): run `mgd-pipeline evaluate` again."
        groups.append((_GROUPS[group], shown))
    if not groups:
        return "No image of the split has a pixel of any class, so that none is better than another."
    lacking = [name for name in project.params.teachers if not any(name in found for found in by_image.values())]
    return {"student": LABELS[by], "groups": groups, "lacking": lacking}


def _picture(
    project: Project, manifest: Manifest, image_id: str, networks: Sequence[str], said: dict[str, Predicted]
) -> dict[str, Any]:
    row = manifest.rows[image_id]
    assert row.mask_path is not None
    root = project.base / manifest.root
    truth = to_look_at(read_mask(root / row.mask_path, np.asarray(manifest.lookup)))
    image = resize_image(to_look_at(read_image(root / row.image_path)), truth.shape[0], truth.shape[1])
    masks = {"truth": truth} | {_label(key): said[key].mask for key in networks if key in said}
    scores = {_label(key): said[key].score for key in networks if key in said}
    return _panels(manifest, image_id, image, masks, scores)


def _panels(
    manifest: Manifest, image_id: str, image: np.ndarray, masks: dict[str, np.ndarray], scores: dict[str, float]
) -> dict[str, Any]:
    """The image, each mask over it, and the classes that occur for a legend."""
    panels = [{"title": "image", "picture": report_figures.panel(image, f"image {image_id}"), "score": None}]
    for title, mask in masks.items():
        if mask.shape != image.shape[:2]:
            raise DataError(f"{image_id}, {title}: {mask.shape} and not {image.shape[:2]} pixels")
        alternative = f"{image_id}, {title}: {describe(mask, manifest.classes)}"
        picture = report_figures.panel(blend(image, mask, manifest.palette), alternative, mask)
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
    """What `compare-teachers` found in the stores, with the images on which the teachers differ most."""
    folder = project.results / "compare-teachers"
    found = read_numbers(folder / "metrics.json")
    if found is None:
        return "The teachers have not been compared: run `mgd-pipeline compare-teachers`."
    teachers = [name for name in project.params.teachers if name in found]
    pairs = [" and ".join(pair) for pair in combinations(teachers, 2) if " and ".join(pair) in found]
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
        "verdicts": stored_verdicts(found, teachers),
        "teachers": {name: found[name] for name in teachers},
        "pairs": {pair: found[pair]["same_class_share"] for pair in pairs},
        "classes": [(name, [agreement[pair].get(name) for pair in pairs]) for name in names],
        "pictures": shown,
    }


def _differing(project: Project, manifest: Manifest, masks: list[Predicted]) -> dict[str, Any]:
    row = manifest.rows[masks[0].image_id]
    image = to_look_at(read_image(project.base / manifest.root / row.image_path, manifest.long_side))
    picture = _panels(manifest, row.image_id, image, {f"teacher {mask.network}": mask.mask for mask in masks}, {})
    return {**picture, "share": masks[0].score}


def cost(project: Project) -> list[dict[str, Any]] | str:
    """What each training took where it ran, from its speed.json: seconds, waiting, memory."""
    rows = []
    for key in [*project.params.train_teachers, *reversed(STUDENTS)]:
        speed = read_numbers(_training(project, key) / "speed.json")
        if speed is not None:
            steps, seconds = steps_of(project, key), speed.get("seconds_per_step")
            rows.append({"label": _label(key), "steps": steps, **speed, "minutes": seconds and steps * seconds / 60})
    return rows or "No training has run in this folder, and its measurements (speed.json) stay on the machine that made them."


def left_out(manifest: Manifest | str, stores: Mapping[str, TargetCache | str]) -> dict[str, list[str]]:
    """Ids of the images that each stage left out, by the name of the stage."""
    skipped = [] if isinstance(manifest, str) else [bad.image_id for bad in manifest.skipped]
    lacking = [
        key.image_id
        for store in stores.values()
        if not isinstance(store, str)
        for key, problem in zip(store.index.keys, store.index.problems, strict=True)
        if problem and key not in store.index.place
    ]
    return {"prepare-data": sorted(skipped), "precompute-teachers": sorted(set(lacking))}


def storage(project: Project, stores: dict[str, TargetCache | str]) -> list[dict[str, Any]]:
    """Bytes of what was made, of the stores by image."""
    rows = []
    for name, store in stores.items():
        if not isinstance(store, str):
            size = sum(file["size"] for file in store.commit["files"].values())
            images = count_images(store.index.place)
            rows.append({"label": f"targets of {name}", "bytes": size, "images": images, "each": size / max(images, 1)})
    files = [(f"teacher {name}", project.teacher(name)) for name in project.params.teachers]
    files += [(LABELS[key], project.student(key)) for key in STUDENTS]
    rows += [
        {"label": label, "bytes": path.stat().st_size, "images": None, "each": None} for label, path in files if path.is_file()
    ]
    return rows


def provenance(
    project: Project, manifest: Manifest | str, stores: dict[str, TargetCache | str], students: dict[str, dict[str, Any]]
) -> list[tuple[str, str, str]]:
    """(thing, kind of identity, identity): what a colleague compares to know whether it is the same."""
    rows = []
    if not isinstance(manifest, str):
        rows.append(("manifest", "SHA-256 of its two files", manifest_hash(project)))
        rows.append(("partition", "SHA-256 of the labelled ids", manifest.partition_fingerprint))
    for name, store in stores.items():
        if isinstance(store, str):
            rows.append((f"targets of {name}", "not here", store))
            continue
        machines = {
            ", ".join(f"{key} {value}" for key, value in sorted(shard["made_by"].items())) for shard in store.commit["shards"]
        }
        rows.append((f"teacher {name}", "SHA-256 of its weights", str(store.provenance["teacher"].get("weights_sha256"))))
        rows.append((f"targets of {name}", f"fingerprint, generation {store.generation}", store.fingerprint))
        rows.append((f"targets of {name}", "made by", "; ".join(sorted(machines))))
    for key, notes in students.items():
        rows.append((LABELS[key], "SHA-256 of the file", hashlib.sha256(project.student(key).read_bytes()).hexdigest()))
        for name, (fingerprint, generation) in notes.get("teachers", {}).items():
            store = stores.get(name, "")
            here = not isinstance(store, str) and [store.fingerprint, store.generation] == [fingerprint, generation]
            state = "the store that is here" if here else "not the store that is here now"
            rows.append((LABELS[key], f"trained from targets of {name}", f"{fingerprint}, generation {generation}: {state}"))
    return rows


# --- what the stages wrote --------------------------------------------------------------------------------------------


def steps_of(project: Project, key: str) -> int:
    """How long a student or teacher was trained: its last noted step, or what params.yaml says where no curve is left."""
    curve = read_curve(_training(project, key) / "plots/loss.tsv")
    asked = project.params.student if key in STUDENTS else project.params.teacher_training
    return int(curve[-1][0]) if curve else asked.steps


def read_curve(path: Path) -> list[tuple[float, float]]:
    """(step, value) of what MetricsLog wrote."""
    rows = (read_text(path) or "").splitlines()[1:]
    try:
        return [(float(step), float(value)) for step, value in (row.split("\t") for row in rows)]
    except ValueError:
        raise DataError(f"{path}: is not a curve any more; {make_again(path)}") from None


def _training(project: Project, key: str) -> Path:
    """Folder of the results of a student's or teacher's training."""
    return project.results / (f"train-student-{key}" if key in STUDENTS else f"train-teacher-{key}")


def open_store(project: Project, name: str) -> TargetCache | str:
    """A teacher's store, or why it cannot be described."""
    try:
        return open_cache(project.targets(name))
    except (AccessError, CacheError) as error:
        return plain(project, error)


def plain(project: Project, error: Exception) -> str:
    """An error as it reads on a page that others get, too: paths from the project's folder on."""
    return str(error).replace(f"{project.base}{os.sep}", "")
