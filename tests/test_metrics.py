"""Metrics against torchmetrics and against numbers worked out by hand."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from mgd_pipeline.metrics import class_iou, confusion_matrix, mean_iou, rare_numbers, rare_third
from mgd_pipeline.words import per_cent

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

CLASSES = 6


def maps(seed: int, present: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Truth and prediction of 23 x 17 pixels in which only some classes occur, about a tenth of the truth void."""
    generator = np.random.default_rng(seed)
    truth, prediction = generator.choice(np.array(present, np.uint8), (2, 23, 17))
    truth[generator.random(truth.shape) < 0.1] = 255
    return truth, prediction


@pytest.mark.parametrize("present", [[0, 1, 2, 3, 4, 5], [0, 2, 5], [3]])
def test_as_torchmetrics(present: list[int]) -> None:
    truth, prediction = maps(0, present)
    target, predicted = torch.from_numpy(truth.astype(np.int64)), torch.from_numpy(prediction.astype(np.int64))
    confusion = confusion_matrix(truth, prediction, CLASSES)
    assert np.array_equal(confusion, MulticlassConfusionMatrix(CLASSES, ignore_index=255)(predicted, target).numpy())
    theirs = MulticlassJaccardIndex(CLASSES, average="none", ignore_index=255)(predicted, target).numpy()
    ours = class_iou(confusion)
    assert [i for i in range(CLASSES) if np.isnan(ours[i])] == [i for i in range(CLASSES) if i not in present]
    np.testing.assert_allclose(np.nan_to_num(ours), theirs, atol=1e-6)  # torchmetrics says 0 of a class that does not occur
    assert mean_iou(confusion) == pytest.approx(theirs[present].mean(), abs=1e-6)


def test_worked_out_by_hand() -> None:
    truth = np.array([[0, 0, 1], [1, 2, 255]], np.uint8)
    prediction = np.array([[0, 1, 1], [1, 0, 3]], np.uint8)
    confusion = confusion_matrix(truth, prediction, 4)
    assert confusion.dtype == np.int64
    assert confusion.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    iou = class_iou(confusion)
    assert iou[:3].tolist() == [1 / 3, 2 / 3, 0.0] and np.isnan(iou[3]), "class 3 is predicted in a void pixel only"
    assert mean_iou(confusion) == pytest.approx(1 / 3)
    only_predicted = confusion_matrix(np.array([0, 0], np.uint8), np.array([0, 1], np.uint8), 3)
    assert class_iou(only_predicted)[:2].tolist() == [0.5, 0.0] and mean_iou(only_predicted) == 0.25


def test_void_alone_is_not_a_number() -> None:
    confusion = confusion_matrix(np.full((2, 2), 255, np.uint8), np.zeros((2, 2), np.uint8), 3)
    assert confusion.sum() == 0 and np.isnan(class_iou(confusion)).all()
    assert np.isnan(mean_iou(confusion)) and per_cent(mean_iou(confusion)) == per_cent(None) == "-"


def test_the_rare_third_has_the_fewest_labelled_pixels_of_the_measured_classes() -> None:
    for classes, count in ((2, 1), (3, 1), (9, 3), (11, 4)):
        assert rare_third(np.arange(classes)[::-1], np.ones(classes)) == list(range(classes))[::-1][:count], "rounded up"
    labelled = np.array([50, 0, 7, 7, 3, 0])
    assert rare_third(labelled, np.array([1, 1, 1, 1, 1, 0])) == [1, 4], "class 5 is not measured; no labelled pixel is the rarest"
    assert rare_third(labelled, np.array([1, 0, 1, 1, 0, 0])) == [2], "of equally rare classes the first"
    assert rare_third(labelled, np.zeros(6)) == []


def test_the_iou_of_the_rare_third_by_hand() -> None:
    """The measured images have most pixels of the class that is rare among the labels."""
    confusion = np.array([[1, 1, 0, 0], [0, 2, 2, 0], [0, 0, 90, 10], [0, 0, 0, 0]])
    names = ["sky", "road", "pole", "sign"]
    assert rare_numbers(confusion, np.array([500, 400, 1, 0]), names) == {
        "rare_miou": pytest.approx(90 / 102, abs=1e-6),
        "rare_classes": ["pole"],
    }
    assert mean_iou(confusion, [0, 1]) == pytest.approx((1 / 2 + 2 / 5) / 2) and mean_iou(confusion, [2, 3]) == pytest.approx(
        45 / 102
    )
    assert rare_numbers(np.zeros((4, 4), np.int64), np.ones(4), names) == {"rare_miou": None, "rare_classes": []}
    assert rare_numbers(confusion, None, names) == {}


def test_254_classes_fit() -> None:
    """The most that 8-bit masks can hold; their product does not fit into 8 or 16 bits."""
    values = np.arange(254, dtype=np.uint8)
    assert np.array_equal(confusion_matrix(values, values, 254), np.eye(254, dtype=np.int64))


def test_impossible_maps_are_refused() -> None:
    good = np.zeros((2, 3), np.uint8)
    with pytest.raises(ValueError, match=r"truth \(2, 3\) and prediction \(3, 2\) differ in shape"):
        confusion_matrix(good, good.T, 3)
    with pytest.raises(ValueError, match="truth holds class 3, but there are only 3"):
        confusion_matrix(good + 3, good, 3)
    with pytest.raises(ValueError, match="prediction holds class 255, but there are only 3"):
        confusion_matrix(good, good + 255, 3)
