"""Networks on held-out images: which images they are measured on, and the measurement of a student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mgd_pipeline.data.images import IGNORE
from mgd_pipeline.data.manifest import ImageRow, Manifest, require_classes
from mgd_pipeline.errors import DataError
from mgd_pipeline.metrics import confusion_matrix, mean_iou
from mgd_pipeline.networks.counting import multiply_accumulates, parameter_count
from mgd_pipeline.networks.inference import predict_logits, resize_logits
from mgd_pipeline.networks.normalisation import Normalisation
from mgd_pipeline.networks.segmentation import SegmentationNetwork
from mgd_pipeline.training.priors import labelled_pixels
from mgd_pipeline.words import defined, per_cent
from mgd_stages.run.data_notes import FEW_IMAGES
from mgd_stages.run.pictures import to_look_at
from mgd_stages.run.progress import console, progress
from mgd_stages.run.project import Project


def evaluated_rows(project: Project, manifest: Manifest) -> list[ImageRow]:
    """The images of `evaluation.split` that have a mask. Raises DataError if there are none, or if no mask has a class."""
    split = project.params.evaluation.split
    rows = [row for row in manifest.split(split) if row.mask_path is not None]
    if not rows:
        raise DataError(f"evaluation.split: {split} has no images with a mask; choose the other split, or add some")
    require_classes(manifest, rows, f"the {split} images")
    return rows


def few_with_class(manifest: Manifest, rows: Sequence[ImageRow], count: int) -> list[tuple[ImageRow, np.ndarray]]:
    """At most `count` rows whose masks have a class, spread over all rows if their masks have one, with the masks: (H, W) uint8."""
    spread = np.unique(np.linspace(0, len(rows) - 1, count).astype(int)).tolist()
    few = []
    for place in dict.fromkeys([*spread, *range(len(rows))]):
        mask = manifest.mask(rows[place])
        if (mask != IGNORE).any():
            few.append((rows[place], mask))
        if len(few) == len(spread):
            break
    return few


def labelled_counts(manifest: Manifest) -> np.ndarray | None:
    """How many labelled pixels each class has, (K,) int64, by which a class is rare; None, with a line that says why, where a mask
    of the labelled images is not here: a machine that only measures networks may lack these masks."""
    try:
        return labelled_pixels(manifest)
    except DataError as error:
        console.print(f"the rare third of the classes is not known, because a mask of the labelled images cannot be read: {error}")
        return None


@dataclass(frozen=True)
class Evaluation:
    """One network on one split."""

    confusion: np.ndarray
    """(K, K) int64 pixels, rows = truth"""
    image_miou: dict[str, float]
    """mIoU of each image alone, over the classes that occur in it; for choosing pictures only"""
    image_confusions: tuple[np.ndarray, ...]
    """Of each image its share of `confusion`, of fewer than `FEW_IMAGES` images; empty for more, which take much memory"""
    masks: dict[str, np.ndarray]
    """Predicted class ids of each image, (H, W) uint8, small enough to look at"""
    parameters: int
    macs: int
    """Multiply-accumulates of one training crop"""

    @property
    def miou(self) -> float:
        return mean_iou(self.confusion)

    def summary(self) -> dict[str, object]:
        """Plain numbers for JSON; None if undefined, because no pixel has a class."""
        pixels = self.confusion.sum()
        return {
            "miou": defined(self.miou),
            "pixel_accuracy": defined(np.diag(self.confusion).sum() / pixels) if pixels else None,
            "parameters": self.parameters,
            "macs": self.macs,
        }


def evaluate_network(
    project: Project, manifest: Manifest, network: SegmentationNetwork, normalise: Normalisation, title: str
) -> Evaluation:
    """Measures a network on `evaluation.split` at the images' own size, through windows if the parameters ask for them."""
    rows = evaluated_rows(project, manifest)
    total = np.zeros((len(manifest.classes),) * 2, np.int64)
    image_miou, masks, confusions = {}, {}, list[np.ndarray]()
    with progress(title, len(rows), "image") as advance:
        for done, row in enumerate(rows, 1):
            truth = manifest.mask(row)
            prediction = predict_row(project, manifest, network, normalise, row)
            confusion = confusion_matrix(truth, prediction, len(manifest.classes))
            total += confusion
            confusions += [confusion] if len(rows) < FEW_IMAGES else []
            image_miou[row.image_id] = mean_iou(confusion)
            masks[row.image_id] = to_look_at(prediction)
            advance(done, f"mIoU {per_cent(mean_iou(total))}")
    crop = project.params.views.crop
    macs = multiply_accumulates(network, crop[0], crop[1])
    return Evaluation(total, image_miou, tuple(confusions), masks, parameter_count(network), macs)


def predict_row(
    project: Project, manifest: Manifest, network: SegmentationNetwork, normalise: Normalisation, row: ImageRow
) -> np.ndarray:
    """(H, W) uint8 class ids of an image at its own size, seen as `evaluation` says."""
    settings = project.params.evaluation
    window = None if settings.window is None else (settings.window[0], settings.window[1])
    logits = predict_logits(network, manifest.image(row), normalise, window=window, overlap=settings.overlap)
    return best_classes(resize_logits(logits, (row.height, row.width)))


def best_classes(scores_KHW: torch.Tensor) -> np.ndarray:
    """(H, W) uint8 the class of the largest score."""
    return scores_KHW.max(0).indices.to(torch.uint8).cpu().numpy()
