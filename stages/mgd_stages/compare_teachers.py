"""Know your teacher before you trust it: a look at a few labelled images before its targets are made, its quality on held-out
images after that, and what the stored targets of several teachers agree on."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from rich.table import Table

from mgd_pipeline.caches.decoding import class_cells, stored_scores
from mgd_pipeline.caches.format import ImageKey
from mgd_pipeline.caches.provenance import expected_provenance
from mgd_pipeline.caches.reader import TargetCache, open_cache
from mgd_pipeline.data.images import IGNORE, read_image, scaled_size
from mgd_pipeline.data.manifest import ImageRow, Manifest, read_manifest, require_classes
from mgd_pipeline.durable import renew_folder, replace_file
from mgd_pipeline.errors import CacheIncomplete, WeightsError
from mgd_pipeline.metrics import calibration_bins, confusion_matrix, expected_calibration_error, iou_by_class, mean_iou
from mgd_pipeline.networks.counting import multiply_accumulates, parameter_count
from mgd_pipeline.networks.inference import resize_logits
from mgd_pipeline.networks.normalisation import IMAGENET, Normalisation
from mgd_pipeline.params import TargetsParams
from mgd_pipeline.pictures.overlays import save_overlay
from mgd_pipeline.teachers.looks import class_scores, look
from mgd_pipeline.teachers.probing import output_channels
from mgd_pipeline.teachers.teacher import Teacher, read_for
from mgd_pipeline.words import counted, defined, per_cent
from mgd_stages.evaluate import evaluated_rows, read_truth
from mgd_stages.run.class_tables import class_tsv, confusion_csv
from mgd_stages.run.machine import require_writable
from mgd_stages.run.pictures import Predicted, to_look_at, write_masks
from mgd_stages.run.progress import console, progress, write_json
from mgd_stages.run.project import Project
from mgd_stages.run.verdicts import beside_one_class, one_class_everywhere, stored_verdicts, why_undefined

_LOOKED_AT = 8
"""Labelled images on which a teacher is tried before it sees all of them."""
_GAIN = 0.05
"""mIoU that another reading of a teacher must gain to be taken for the right one. It must also be a good one: a network that has
not learnt anything says something else to each input, and one of several is the best of them by chance."""
_CONFIDENT = 0.95
"""Probability from which on a pixel counts as confident, FixMatch's threshold (Sohn et al., 2020)."""
_PICTURES = 10
_OTHER_LOOKS = {"one_look": "with one plain look", "mirrored": "on mirror images", "float32": "in float32"}
"""How the teacher's quality with other ways of looking is told of, by the ending of its key in the teacher's metrics."""
_OTHER_NORMALISATIONS = {
    "ImageNet's mean and std": IMAGENET,
    "input from -1 to 1": Normalisation((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    "input from 0 to 1": Normalisation((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
    "input from 0 to 255": Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


# --- before: is it what it seems to be? -------------------------------------------------------------------------------


def check_teacher_sees(project: Project, name: str, manifest: Manifest, teacher: Teacher, min_miou: float) -> None:
    """Tries a teacher on a few labelled images, as it is and as it might have been meant, and compares with the masks.

    Raises WeightsError that says what is wrong where another normalisation, order of channels or order of classes is clearly
    better, and where the teacher is below `min_miou` (0 to 1). One that has not learnt anything is told of.
    """
    evaluated_rows(project, manifest)  # what cannot be measured afterwards is refused before the targets are computed
    rows, truths = _looked_at(project, manifest)
    images = [read_for(teacher, project.base / manifest.root / row.image_path, manifest.long_side) for row in rows]
    once = project.params.targets.model_copy(update={"tta": None})
    others = {
        key: other._replace(channels=teacher.normalisation.channels)
        for key, other in _OTHER_NORMALISATIONS.items()
        if not np.allclose(other[:2], teacher.normalisation[:2])
    }
    with progress(f"precompute-teachers {name}: labelled images", len(rows) * (len(others) + 2), "looks") as advance:
        looks = 0

        def confusion(seen_by: Teacher, swapped: bool = False) -> np.ndarray:
            nonlocal looks
            total = np.zeros((len(manifest.classes),) * 2, np.int64)
            for image, truth in zip(images, truths, strict=True):
                pixels = np.ascontiguousarray(image[..., ::-1]) if swapped else image
                scores = _scores(seen_by, pixels, once, truth, manifest.long_side)
                total += confusion_matrix(truth, _prediction(scores), len(manifest.classes))
                looks += 1
                advance(looks, "")
            return total

        own = confusion(teacher)
        found = {key: mean_iou(confusion(replace(teacher, normalisation=other))) for key, other in others.items()}
        found["red and blue exchanged"] = mean_iou(confusion(teacher, swapped=True))

    constant = one_class_everywhere(own)
    if constant is None:
        unseen = f"teacher {name}: no pixel of {counted(len(manifest.labelled), 'labelled image')} has a class"
        if min_miou:
            raise WeightsError(
                f"{unseen}: nothing says whether it reaches --min-miou {min_miou:g}; label more images, or leave out --min-miou"
            )
        console.print(f"warning: {unseen}: nothing says whether it is what it seems to be")
        return
    order = best_order(own)
    found["its classes in another order"] = mean_iou(own[:, order])
    reached = mean_iou(own)
    said = f"teacher {name}: {per_cent(reached)} mIoU on {counted(len(rows), 'labelled image')}"
    best = max(found, key=lambda key: found[key])
    if found[best] > reached + _GAIN and found[best] > min(0.7, max(0.2, 4 * constant)):
        remedy = (
            "it does not get the input that it was trained with; name the encoder that its weights belong to, or wrap it by a "
            "function of your own (import: in params.yaml)"
        )
        if "classes" in best:
            names = manifest.classes
            calls = [f"{names[i]} {names[k]!r}" for i, k in enumerate(order) if i != k and own[i, k]]
            remedy = f"it calls {', '.join(calls[:4])}{', ...' if len(calls) > 4 else ''}; write teachers.{name}.class_map"
        raise WeightsError(f"{said}, but {100 * found[best]:.1f} with {best}: {remedy}")
    if reached < min_miou:
        raise WeightsError(f"{said}, less than --min-miou {min_miou:g}; train it longer, or use another one")
    console.print(said + beside_one_class(reached, constant))


def _looked_at(project: Project, manifest: Manifest) -> tuple[list[ImageRow], list[np.ndarray]]:
    """A few labelled images whose masks say something, spread over all of them, and these masks. Raises DataError without any."""
    labelled = manifest.labelled
    require_classes(manifest, project.base, labelled, "the labelled images")
    spread = np.unique(np.linspace(0, len(labelled) - 1, _LOOKED_AT).astype(int)).tolist()
    rows, truths = [], []
    for place in dict.fromkeys([*spread, *range(len(labelled))]):
        truth = read_truth(project, manifest, labelled[place])
        if (truth != IGNORE).any():
            rows.append(labelled[place])
            truths.append(truth)
        if len(rows) == len(spread):
            break
    return rows, truths


def best_order(confusion: np.ndarray) -> np.ndarray:
    """(K,) for each class of the truth (rows) the predicted one (columns), each once, that fits best: most pixels right."""
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(confusion, maximize=True)[1]


# --- after: how good is it on held-out images? ------------------------------------------------------------------------


def evaluate_teacher(project: Project, name: str, manifest: Manifest, teacher: Teacher) -> None:
    """Measures a teacher on the evaluation split, seen as for its targets, and writes data/results/teachers/<name>.json,
    <name>-confusion.csv and <name>-masks.parquet. What `targets` asks for beyond one plain look in float32 is measured beside what
    it replaces: mIoU, and the share of pixels of the same class."""
    folder, params = project.results / "teachers", project.params
    crop = params.views.crop
    summary: dict[str, Any] = {
        "parameters": parameter_count(teacher.network),
        "macs": multiply_accumulates(teacher.network, crop[0], crop[1], teacher.multiple),
    }
    classes = len(manifest.classes)
    masks: list[Predicted] = []
    if output_channels(name, teacher)[0]:
        others = _other_looks(params.targets)
        total, bins = np.zeros((classes, classes), np.int64), np.zeros((3, 15))
        other_totals = {key: np.zeros((classes, classes), np.int64) for key in others}
        same, pixels = dict.fromkeys(others, 0), 0
        rows = evaluated_rows(project, manifest)
        with progress(f"precompute-teachers {name}: evaluate", len(rows), "images") as advance:
            for done, row in enumerate(rows, 1):
                image = read_for(teacher, project.base / manifest.root / row.image_path, manifest.long_side)
                truth = read_truth(project, manifest, row)
                scores = _scores(teacher, image, params.targets, truth, manifest.long_side)
                prediction = _prediction(scores)
                confusion = confusion_matrix(truth, prediction, classes)
                total += confusion
                masks.append(Predicted(name, row.image_id, mean_iou(confusion), to_look_at(prediction)))
                bins += calibration_bins(truth, scores.softmax(0).cpu().numpy())
                pixels += prediction.size
                for key, (options, mirrored) in others.items():
                    shown = np.ascontiguousarray(image[:, ::-1]) if mirrored else image
                    other = _scores(teacher, shown, options, truth, manifest.long_side)
                    found = _prediction(other.flip(-1) if mirrored else other)
                    other_totals[key] += confusion_matrix(truth, found, classes)
                    same[key] += int((found == prediction).sum())
                advance(done, f"mIoU {per_cent(mean_iou(total))}")
        summary |= {"miou": defined(mean_iou(total)), "ece": defined(expected_calibration_error(bins))}
        for key, confusion in other_totals.items():
            summary |= {f"miou_{key}": defined(mean_iou(confusion)), f"agreement_{key}": round(same[key] / pixels, 6)}
        replace_file(folder / f"{name}-confusion.csv", confusion_csv(total, manifest.classes))
        said = f"{per_cent(summary['miou'])} mIoU on {params.evaluation.split}"
        for key, what in _OTHER_LOOKS.items():
            if key in others:
                alike = f"{100 * summary[f'agreement_{key}']:.2f} % of the pixels alike"
                said += f", {per_cent(summary[f'miou_{key}'])} {what} ({alike})"
        if total.sum():
            console.print(f"teacher {name}: {said}; calibration error {summary['ece']:.3f}")
        else:
            console.print(f"warning: teacher {name}: {said}: {why_undefined(params.evaluation.split)}")
    else:
        # DVC expects the file of every teacher.
        replace_file(folder / f"{name}-confusion.csv", confusion_csv(np.zeros((classes, classes), np.int64), manifest.classes))
        console.print(f"teacher {name}: gives embeddings only, which no label measures")
    write_json(folder / f"{name}.json", summary)  # numbers before pictures
    write_masks(folder / f"{name}-masks.parquet", masks, manifest.palette)


def _other_looks(options: TargetsParams) -> dict[str, tuple[TargetsParams, bool]]:
    """What the targets' way of looking is compared with: options, and whether the mirror image is looked at."""
    found = {}
    if options.tta is not None or options.window is not None:
        found["one_look"] = TargetsParams(precision=options.precision), False
    if options.mirrored:
        found["mirrored"] = options, True
    if options.precision != "float32":
        found["float32"] = options.model_copy(update={"precision": "float32"}), False
    return found


@torch.inference_mode()
def _scores(teacher: Teacher, image: np.ndarray, options: TargetsParams, truth: np.ndarray, long_side: int | None) -> torch.Tensor:
    """(K, H, W) logits of an image at the size of its mask, as `options` let the teacher see it."""
    size = scaled_size(image.shape[0], image.shape[1], long_side)
    scores = class_scores(look(teacher, [image], options, long_side).logits, size)[0]
    return resize_logits(scores, (truth.shape[0], truth.shape[1]))


def _prediction(scores_KHW: torch.Tensor) -> np.ndarray:
    return scores_KHW.max(0).indices.to(torch.uint8).cpu().numpy()


# --- together: what do the stores say? --------------------------------------------------------------------------------


def compare_teachers(project: Project) -> None:
    """Measures the stored targets on the labelled images, and where teachers disagree on all; no teacher is loaded.

    Writes data/results/compare-teachers/: metrics.json, a confusion matrix for each teacher, and in disagreement/ on which classes
    they agree, and pictures of the images on which they do least.
    """
    manifest = read_manifest(project.manifest, project.base)
    params, folder = project.params, project.results / "compare-teachers"
    require_writable(
        [folder / "disagreement"], [folder / "metrics.json", *(folder / f"{name}-confusion.csv" for name in params.teachers)]
    )
    caches: dict[str, TargetCache] = {}
    for name, teacher in params.teachers.items():
        cache = open_cache(
            project.targets(name), expected_provenance(teacher, params.targets, manifest.classes, manifest.long_side)
        )
        if cache.layout.classes:
            caches[name] = cache
    pairs = list(combinations(caches, 2))
    confusions = {name: np.zeros((len(manifest.classes),) * 2, np.int64) for name in caches}
    bins = {name: np.zeros((3, 15)) for name in caches}
    confident, seen = dict.fromkeys(caches, 0), dict.fromkeys(caches, 0)
    together = {pair: np.zeros((len(manifest.classes),) * 2, np.int64) for pair in pairs}
    disagreement: dict[str, float] = {}
    labelled = {row.image_id for row in manifest.labelled}

    rows = [row for row in manifest.training if all(_key(row) in cache.index.place for cache in caches.values())]
    if not rows:
        raise CacheIncomplete("the stores have none of the training images; run `mgd-pipeline precompute-teachers`")
    with progress("compare-teachers", len(rows), "images") as advance:
        for done, row in enumerate(rows, 1):
            cells = {}
            for name, cache in caches.items():
                cells[name], probability = class_cells(cache, row.image_id)
                confident[name] += int((probability >= _CONFIDENT).sum())
                seen[name] += probability.size
                if row.image_id in labelled:
                    truth = read_truth(project, manifest, row)
                    scores = resize_logits(stored_scores(cache, row.image_id), (truth.shape[0], truth.shape[1]))
                    confusions[name] += confusion_matrix(truth, _prediction(scores), len(manifest.classes))
                    bins[name] += calibration_bins(truth, scores.softmax(0).numpy())
            for pair in pairs:
                together[pair] += confusion_matrix(cells[pair[0]], cells[pair[1]], len(manifest.classes))
            if pairs:
                disagreement[row.image_id] = float(np.mean([(cells[a] != cells[b]).mean() for a, b in pairs]))
            advance(done, "")

    summary: dict[str, Any] = {
        name: {
            "miou_labelled": defined(mean_iou(confusions[name])),
            "ece_labelled": defined(expected_calibration_error(bins[name])),
            "confident_share": round(confident[name] / seen[name], 6),
        }
        for name in caches
    }
    for pair in pairs:
        found = together[pair]
        summary[" and ".join(pair)] = {"same_class_share": round(float(np.trace(found) / found.sum()), 6)}
    agreement = {" and ".join(pair): iou_by_class(found, manifest.classes) for pair, found in together.items()}
    nothing = np.zeros((len(manifest.classes),) * 2, np.int64)
    for name in params.teachers:  # DVC expects the file of every teacher, also of one that gives embeddings only
        replace_file(folder / f"{name}-confusion.csv", confusion_csv(confusions.get(name, nothing), manifest.classes))
    write_json(folder / "metrics.json", summary)
    renew_folder(folder / "disagreement")
    replace_file(folder / "disagreement/class_agreement.tsv", class_tsv(agreement, manifest.classes))
    _show(summary, list(caches), agreement)
    # After the numbers: whatever fails at a picture leaves them whole.
    most = sorted(disagreement, key=lambda image_id: -disagreement[image_id])[:_PICTURES]
    masks: list[Predicted] = []
    for place, image_id in enumerate(most, 1):
        share = disagreement[image_id]
        differing = _save_disagreement(project, manifest, caches, image_id, place, share)
        masks += [Predicted(name, image_id, share, to_look_at(mask)) for name, mask in differing.items()]
    write_masks(folder / "disagreement/masks.parquet", masks, manifest.palette)
    console.print(f"pictures and numbers: {folder}")


def _key(row: ImageRow) -> ImageKey:
    return ImageKey(row.image_id, row.image_sha256)


def _save_disagreement(
    project: Project, manifest: Manifest, caches: dict[str, TargetCache], image_id: str, place: int, share: float
) -> dict[str, np.ndarray]:
    """Writes the picture, and returns what it shows: each teacher's mask, (H, W) uint8, void where the teachers agree."""
    row = manifest.rows[image_id]
    masks = {name: _prediction(stored_scores(cache, image_id)) for name, cache in caches.items()}
    first, *others = masks.values()
    differ = np.any([other != first for other in others], axis=0)
    masks = {name: np.where(differ, mask, IGNORE).astype(np.uint8) for name, mask in masks.items()}
    save_overlay(
        project.results / f"compare-teachers/disagreement/{place:02d}.png",
        read_image(project.base / manifest.root / row.image_path, manifest.long_side),
        {f"teacher {name}": mask for name, mask in masks.items()},
        manifest.classes,
        manifest.palette,
        title=f"{image_id}: the teachers differ on {100 * share:.1f} %; void where they agree",
    )
    return masks


def _show(summary: dict[str, Any], teachers: list[str], agreement: dict[str, dict[str, float]]) -> None:
    table = Table(title="stored targets")
    table.add_column("teacher")
    for column in ("mIoU on labelled images, %", "calibration error", f"cells above {_CONFIDENT:g}, %"):
        table.add_column(column, justify="right")
    for name in teachers:
        row = summary[name]
        error = "-" if row["ece_labelled"] is None else f"{row['ece_labelled']:.3f}"
        table.add_row(name, per_cent(row["miou_labelled"]), error, per_cent(row["confident_share"]))
    console.print(table)
    for line in stored_verdicts(summary, teachers):
        console.print(line)
    for pair, of_classes in agreement.items():
        least = sorted(of_classes.items(), key=lambda item: item[1])[:3]
        console.print(
            f"{pair}: the same class on {per_cent(summary[pair]['same_class_share'])} % of the cells; least agreed on (IoU): "
            + ", ".join(f"{name} {100 * value:.0f} %" for name, value in least)
        )
