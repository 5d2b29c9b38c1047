"""What a training knows of its teachers before its first step: classes that they lack, and what the labelled images show of them.

Letters: K classes, D channels, h w cells of the logits, r c cells of the embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mgd_pipeline.caches.reader import TargetCache
from mgd_pipeline.caches.statistics import FeatureStatistics, compute_statistics, stored_statistics, training_keys
from mgd_pipeline.data.images import IGNORE
from mgd_pipeline.data.manifest import Manifest
from mgd_pipeline.distillation import class_prototypes
from mgd_pipeline.errors import ParamsError
from mgd_pipeline.metrics import class_iou, confusion_matrix
from mgd_pipeline.params import LossesParams, Params
from mgd_pipeline.training.dataset import CheckedFiles, cached_embeddings
from mgd_pipeline.training.priors import labelled_pixels, log_prior


@dataclass(frozen=True)
class Knowledge:
    """Everything lies on the student's device. What the losses do not read is not measured."""

    known: Mapping[str, Tensor] = field(default_factory=dict)
    """The ids of the known classes, int64, for each pixel teacher that lacks one (`class_map: {animal: []}`)"""
    iou: Mapping[str, Tensor] = field(default_factory=dict)
    """(K,) float32 for each pixel teacher, on the labelled images; 0 for a class that does not occur"""
    prototypes: Tensor | None = None
    """(K, D) float32, from `distillation.class_prototypes`"""
    pixels: Tensor | None = None
    """(K,) float32 labelled pixels of each class"""
    offsets: Tensor | None = None
    """(K, 1, 1) float32, what `losses.prior_adjustment` takes off the logits of teachers on unlabelled images"""
    bounded: str | None = None
    """A line for the user if the caches bound these offsets"""
    features: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """(D,) float32 mean and standard deviation of the embeddings of each feature teacher, over the training images"""
    known_of_image: Tensor | None = None
    """The ids of the classes that the image teacher knows, int64; None if it knows all of them"""


def knowledge_of(
    params: Params,
    manifest: Manifest,
    caches: Mapping[str, TargetCache],
    device: torch.device,
    *,
    labelled: Mapping[str, TargetCache] | None = None,
) -> Knowledge:
    """Reads at most the labelled images' masks and targets, once, and the same on every rank; their targets from `labelled`, where
    other objects read them.

    Raises DataError for masks that have changed, and if fewer than two classes have a prototype.
    """
    losses, labelled = params.losses, caches if labelled is None else labelled
    lacked = {name: _lacked(params, name) for name in losses.pixel_teachers}
    by_all = set.intersection(*lacked.values()) if lacked else set()
    if losses.pixel_choice != "each":  # together they know what any of them knows
        lacked = {losses.pixel_choice: by_all}
    known = {name: _known(manifest, lacks).to(device) for name, lacks in lacked.items() if lacks}
    of_image = None
    if losses.image and "unlabelled" in losses.images and (lacks := _lacked(params, losses.image_teacher)):
        of_image = _known(manifest, lacks).to(device)
    _check_known(losses, known, of_image)
    iou, prototypes = {}, None
    if losses.pixel_choice == "by-class" and (losses.pixel or losses.channel):
        iou = {name: labelled_iou(labelled[name], manifest).to(device) for name in losses.pixel_teachers}
    if losses.pixel and "margin" in losses.pixel_weights:
        pairs = _cells_and_labels(labelled[losses.region_teacher[0]], manifest)
        prototypes = class_prototypes(pairs, len(manifest.classes)).to(device)
    pixels = None
    if losses.pixel and "balance" in losses.pixel_weights:
        pixels = torch.from_numpy(labelled_pixels(manifest)).float().to(device)
    offsets = bounded = None
    if losses.prior_adjustment:
        offsets = losses.prior_adjustment * log_prior(labelled_pixels(manifest)).to(device)[:, None, None]
        for number in (number for number, name in enumerate(manifest.classes) if name in by_all):
            offsets[number] = offsets.max()  # nobody names this class, however rare it is
        lift, most = float(offsets.max() - offsets.min()), _largest_lift(params, len(manifest.classes))
        if lift > most:
            offsets = offsets.clamp(min=float(offsets.max()) - most)
            bounded = (
                f"losses.prior_adjustment = {losses.prior_adjustment:g}: lifts the rarest class by {most:.1f} nats, not by "
                f"{lift:.1f}, because targets.logits log-probability has cut off unlikely classes at "
                f"{params.targets.floor_of(len(manifest.classes)):.1f} nats; targets.logits uint8 has no such bound"
            )
    features = {name: feature_statistics(caches[name], manifest) for key, name, _ in losses.needed if key == "feature_teachers"}
    features = {
        name: (torch.tensor(of.mean).float().to(device), torch.tensor(of.std).float().to(device)) for name, of in features.items()
    }
    return Knowledge(known, iou, prototypes, pixels, offsets, bounded, features, of_image)


def _lacked(params: Params, teacher: str) -> set[str]:
    """The classes of the data set that a teacher does not know."""
    return {of_data for of_data, own in (params.teachers[teacher].class_map or {}).items() if not own}


def _known(manifest: Manifest, lacked: set[str]) -> Tensor:
    return torch.tensor([k for k, name in enumerate(manifest.classes) if name not in lacked])


def _check_known(losses: LossesParams, known: Mapping[str, Tensor], of_image: Tensor | None) -> None:
    """Probabilities among classes need two of them."""
    terms = {f"losses.pixel_teachers: {name}": ids for name, ids in known.items() if losses.pixel}
    if of_image is not None and losses.image_distance != "l1":
        terms[f"losses.image_teacher: {losses.image_teacher}"] = of_image
    for term, ids in terms.items():
        if len(ids) < 2:
            raise ParamsError(
                f"{term} knows one class of the data set only (class_map), and the student learns how classes compare that a "
                "teacher knows; name another teacher there, or set the weight of that term to 0"
            )


def _largest_lift(params: Params, classes: int) -> float:
    """How many nats `prior_adjustment` may lift a class against the most frequent one.

    Log-probabilities below a floor are stored as the floor. A class that was cut off must not win by the lift: halfway between a
    cell that is sure of one class and a cell that is sure of another, both have half the floor. Among probabilities it must stay
    next to nothing: at the default floor and this bound, all such classes together have at most 2 per cent.
    """
    losses, targets = params.losses, params.targets
    if targets.logits != "log-probability" or not (losses.pixel or losses.channel):
        return math.inf
    floor = targets.floor_of(classes)
    named_only = losses.pixel_distance == "cross-entropy" and losses.pixel_labels == "hard"
    return floor / 2 if named_only else max(0.0, floor - math.log(classes) - 4)


def feature_statistics(cache: TargetCache, manifest: Manifest) -> FeatureStatistics:
    """Those that stage one keeps with the cache; computed now if it keeps none of these training images."""
    keys = training_keys(manifest, mirrored=cache.mirrored)
    return stored_statistics(cache, keys) or compute_statistics(cache, keys)


def labelled_iou(cache: TargetCache, manifest: Manifest) -> Tensor:
    """(K,) float32 IoU of a teacher on the labelled images, at the cells of its cache; 0 for a class that does not occur."""
    files, counts = CheckedFiles(manifest), np.zeros((len(manifest.classes),) * 2, np.int64)
    for row in manifest.labelled:
        targets = cache[manifest.key(row)]
        named, mask = targets.logits.argmax(0).numpy(), files.mask(row, targets.size)
        places = [
            np.rint(np.linspace(0, side - 1, cells)).astype(int) for side, cells in zip(targets.frame, named.shape, strict=True)
        ]
        rows, columns = (at[at < side] for at, side in zip(places, targets.size, strict=True))
        counts += confusion_matrix(mask[np.ix_(rows, columns)], named[: len(rows), : len(columns)], len(counts))
    return torch.from_numpy(np.nan_to_num(class_iou(counts))).float()


def _cells_and_labels(cache: TargetCache, manifest: Manifest) -> Iterator[tuple[Tensor, Tensor]]:
    """(1, D, r, c) float32 embeddings and (1, H, W) int64 labels of the area that these cells cover, of each labelled image."""
    files, stride = CheckedFiles(manifest), cache.layout.region_stride
    for row in manifest.labelled:
        size = manifest.size(row)
        mask = torch.from_numpy(files.mask(row, size)).long()
        outside = (0, -size[1] % stride, 0, -size[0] % stride)
        embeddings = torch.from_numpy(cached_embeddings(cache, manifest, row).astype(np.float32))
        yield embeddings[None], F.pad(mask, outside, value=IGNORE)[None]
