"""Segmentation metrics from one integer confusion matrix over a whole split. Letters: K classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mgd_pipeline.data.images import IGNORE
from mgd_pipeline.words import defined


def confusion_matrix(truth: np.ndarray, prediction: np.ndarray, classes: int) -> np.ndarray:
    """(K, K) int64 counts of pixels, rows = truth, columns = prediction; pixels of truth 255 are left out.

    Raises ValueError if shapes differ or a value is no class.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth {truth.shape} and prediction {prediction.shape} differ in shape")
    kept = truth != IGNORE
    true, predicted = truth[kept].astype(np.int64), prediction[kept].astype(np.int64)
    for name, values in (("truth", true), ("prediction", predicted)):
        if values.size and values.max() >= classes:
            raise ValueError(f"{name} holds class {values.max()}, but there are only {classes}")
    return np.bincount(true * classes + predicted, minlength=classes**2).reshape(classes, classes)


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """(K,) float64 intersection over union; NaN for a class that is neither in the truth nor predicted."""
    intersection = np.diag(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - intersection
    return np.divide(intersection, union, out=np.full(len(confusion), np.nan), where=union > 0)


def iou_by_class(confusion: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """IoU, 0 to 1, by the classes' names; a class that does not occur has no entry."""
    return {name: round(float(v), 6) for name, v in zip(classes, class_iou(confusion), strict=True) if v == v}


def mean_iou(confusion: np.ndarray, classes: Sequence[int] | None = None) -> float:
    """Mean of `class_iou`, 0 to 1, over all classes or over the ids in `classes`, without undefined ones; NaN if none is left."""
    iou = class_iou(confusion) if classes is None else class_iou(confusion)[list(classes)]
    return float(np.nanmean(iou)) if confusion.sum() and not np.isnan(iou).all() else float("nan")


def rare_third(labelled_K: np.ndarray, truth_K: np.ndarray) -> list[int]:
    """The ids of the rare third of the classes, the rarest one first: of the classes that occur in the truth of the measured
    images (`truth_K`, pixels), the third, rounded up, with the fewest pixels in the labelled training images (`labelled_K`).

    The training images decide because a class with few labels is hard to learn, whatever its share of the measured images is;
    their shares are known before anything is measured, and are the same for every split. A class without labelled pixels is among
    the rarest. Of equally rare classes, the first in the order of the classes counts as rarer.
    """
    measured = np.flatnonzero(truth_K)
    rarest_first = measured[np.argsort(np.asarray(labelled_K)[measured], kind="stable")]
    return rarest_first[: -(-len(measured) // 3)].tolist()


def rare_numbers(confusion: np.ndarray, labelled_K: np.ndarray | None, classes: Sequence[str]) -> dict[str, Any]:
    """For JSON: `rare_miou`, the mean IoU of the `rare_third`, 0 to 1, None if undefined; and `rare_classes`, their names. Empty
    where `labelled_K` is not known."""
    if labelled_K is None:
        return {}
    rare = rare_third(labelled_K, confusion.sum(1))
    return {"rare_miou": defined(mean_iou(confusion, rare)), "rare_classes": [classes[k] for k in rare]}


def calibration_bins(truth: np.ndarray, probabilities_KHW: np.ndarray, bins: int = 15) -> np.ndarray:
    """(3, bins) float64 over the pixels whose largest probability lies in each of `bins` equal intervals of 0 to 1: their
    number, the sum of these probabilities, and how many of the pixels are right.

    Pixels of truth 255 are left out; results of several images may be added.
    """
    kept = truth != IGNORE
    confidence = probabilities_KHW.max(0)[kept].astype(np.float64)
    right = probabilities_KHW.argmax(0)[kept] == truth[kept]
    places = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    return np.stack([np.bincount(places, weights, bins) for weights in (np.ones(len(places)), confidence, right)])


def expected_calibration_error(bins: np.ndarray) -> float:
    """Mean of |confidence - accuracy| of `calibration_bins`, weighted by their pixels, 0 to 1 (Naeini et al., AAAI 2015)."""
    count, confidence, right = bins
    return float(np.abs(confidence - right).sum() / count.sum()) if count.sum() else float("nan")
