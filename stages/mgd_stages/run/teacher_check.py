"""A teacher on a few labelled images before its targets are made: does it get the input and name the classes as it was trained?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mgd_pipeline.data.manifest import ImageRow, require_classes
from mgd_pipeline.errors import NonFiniteError, WeightsError
from mgd_pipeline.metrics import confusion_matrix, mean_iou
from mgd_pipeline.networks.normalisation import IMAGENET, Normalisation
from mgd_pipeline.words import counted, per_cent
from mgd_stages.run.held_out import best_classes, evaluated_rows, few_with_class
from mgd_stages.run.loaded_head import Loaded, LoadedHead
from mgd_stages.run.loaded_teacher import LoadedTeacher, scores_of
from mgd_stages.run.progress import console, progress
from mgd_stages.run.verdicts import beside_one_class, one_class_everywhere

_LOOKED_AT = 8
"""Labelled images on which a teacher is tried before it sees all of them."""
_GAIN = 0.05
"""mIoU that another reading of a teacher must gain to be taken for the right one. The other reading must also be good: a network
that has not learnt anything says something else to each input, and one of several readings is the best by chance."""
_SWAPPED, _REORDERED = "red and blue exchanged", "its classes in another order"
_OTHER_NORMALISATIONS = {
    "ImageNet's mean and std": IMAGENET,
    "input from -1 to 1": Normalisation((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    "input from 0 to 1": Normalisation((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
    "input from 0 to 255": Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def check_teacher_sees(loaded: Loaded, min_miou: float) -> None:
    """Tries a teacher on a few labelled images, as it is and as it may have been meant, and compares it with the masks. A head gets
    the embeddings and the classes with which it was trained here, so that it is tried as it is.

    Raises WeightsError if another normalisation, order of channels or order of classes is clearly better, and if the teacher is
    below `min_miou` (0 to 1). Says so if the teacher has not learnt anything.
    """
    name, manifest = loaded.name, loaded.manifest
    evaluated_rows(loaded.project, manifest)  # what cannot be measured afterwards is refused before the targets are computed
    require_classes(manifest, manifest.labelled, "the labelled images")
    rows, truths = zip(*few_with_class(manifest, manifest.labelled, _LOOKED_AT), strict=True)
    if isinstance(loaded, LoadedHead):
        own, mious = _of_head(loaded, rows, truths), dict[str, float]()
    else:
        own, mious = _readings(loaded, rows, truths)
        mious[_REORDERED] = mean_iou(own[:, best_order(own)])

    constant = one_class_everywhere(own)
    assert constant is not None  # each of the masks has a class
    reached = mean_iou(own)
    said = f"teacher {name}: {per_cent(reached)} mIoU on {counted(len(rows), 'labelled image')}"
    best = max(mious, key=lambda key: mious[key], default=None)
    if best and mious[best] > reached + _GAIN and mious[best] > min(0.7, max(0.2, 4 * constant)):
        remedy = (
            "it does not get the input that it was trained with; name the encoder that its weights belong to, or wrap it by a "
            "function of your own (import: in params.yaml)"
        )
        if best == _REORDERED:
            names, order = manifest.classes, best_order(own)
            calls = [f"{names[i]} {names[k]!r}" for i, k in enumerate(order) if i != k and own[i, k]]
            remedy = f"it calls {', '.join(calls[:4])}{', ...' if len(calls) > 4 else ''}; write teachers.{name}.class_map"
        raise WeightsError(f"{said}, but {100 * mious[best]:.1f} with {best}: {remedy}")
    if reached < min_miou:
        raise WeightsError(f"{said}, less than --min-miou {min_miou:g}; train it longer, or use another one")
    console.print(said + beside_one_class(reached, constant))


def _of_head(head: LoadedHead, rows: Sequence[ImageRow], truths: Sequence[np.ndarray]) -> np.ndarray:
    """The confusion matrix of a head."""
    options, total = head.project.params.targets, 0
    for row, truth in zip(rows, truths, strict=True):
        total += confusion_matrix(truth, best_classes(head.on(row)(options, False, truth.shape)), len(head.manifest.classes))
    return np.asarray(total)


def _readings(loaded: LoadedTeacher, rows: Sequence[ImageRow], truths: Sequence[np.ndarray]) -> tuple[np.ndarray, dict[str, float]]:
    """The teacher's confusion matrix, and the mIoU of each other reading of its input."""
    own, classes = loaded.teacher.normalisation, len(loaded.manifest.classes)
    others = {
        key: replace(loaded, teacher=replace(loaded.teacher, normalisation=other._replace(channels=own.channels)))
        for key, other in _OTHER_NORMALISATIONS.items()
        if not np.allclose(other[:2], own[:2])
    }
    images = [loaded.image(row) for row in rows]
    swapped = [np.ascontiguousarray(image[..., ::-1]) for image in images]
    once = loaded.project.params.targets.model_copy(update={"tta": None})
    looked_at = f"precompute-teachers {loaded.name}: {counted(len(rows), 'labelled image')}, each read in {len(others) + 2} ways"
    with progress(looked_at, len(rows) * (len(others) + 2), "prediction") as advance:
        looks = 0

        def confusion(reading: LoadedTeacher, shown: list[np.ndarray]) -> np.ndarray:
            nonlocal looks
            total = np.zeros((classes, classes), np.int64)
            for row, image, truth in zip(rows, shown, truths, strict=True):
                scores = scores_of(reading, image, once, truth.shape)
                if reading is loaded and not scores.isfinite().all():
                    raise NonFiniteError(
                        f"teacher {loaded.name}: {loaded.project.teacher(loaded.name)}: its scores of {row.image_path} hold NaN or "
                        "infinity; use other weights, or targets.precision float32"
                    )
                total += confusion_matrix(truth, best_classes(scores), classes)
                looks += 1
                advance(looks, "")
            return total

        plain = confusion(loaded, images)
        mious = {key: mean_iou(confusion(other, images)) for key, other in others.items()}
        return plain, {**mious, _SWAPPED: mean_iou(confusion(loaded, swapped))}


def best_order(confusion: np.ndarray) -> np.ndarray:
    """(K,) for each class of the truth (rows) the predicted class (columns), each once, so that most pixels are right."""
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(confusion, maximize=True)[1]
