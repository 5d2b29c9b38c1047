"""The losses of a step of semi-supervised training: cross pseudo supervision and mean teacher.

Both learn from hard pseudo labels. The network that gives them sees the unmixed views without colour jitter, and its logits are
mixed by the masks of CutMix, as in MGD's code. The network that learns sees the mixed views with colour jitter.
Letters: B labelled views, U unlabelled views, K classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mgd_pipeline.data.manifest import Manifest
from mgd_pipeline.distillation import Ohem, confidence_weight, pixel_consistency_loss, supervised_loss
from mgd_pipeline.networks.normalisation import Normalisation
from mgd_pipeline.networks.segmentation import DenseOutputs, run_branches
from mgd_pipeline.params import StudentParams, TeacherTrainingParams
from mgd_pipeline.training.batches import Batch, mixed_valid, mixed_views, view_images, view_labels
from mgd_pipeline.training.priors import labelled_pixels, log_prior

Forward = Callable[[Tensor], DenseOutputs]


class Settings(NamedTuple):
    """How networks see views, and how they learn from them."""

    normalise: Normalisation
    jitter: float
    """Strength of the colour jitter"""
    bfloat16: bool
    ohem: Ohem | None
    confidence: float
    """Least probability of a pseudo label that counts"""
    class_offsets: Tensor | None = None
    """(K,) taken off the logits before a pseudo label is read; the confidence is read before"""


def settings(
    params: TeacherTrainingParams | StudentParams, normalise: Normalisation, jitter: float, manifest: Manifest, device: torch.device
) -> Settings:
    """The settings of a training; the labelled pixels of `manifest` are counted if the classes' shares are needed."""
    ohem = None if params.ohem is None else Ohem(params.ohem.threshold, params.ohem.min_kept)
    method = params.without_teachers if isinstance(params, StudentParams) else params
    tau = method.prior_adjustment
    offsets = tau * log_prior(labelled_pixels(manifest)).to(device) if tau and method.uses_unlabelled else None
    return Settings(normalise, jitter, params.precision == "bfloat16", ohem, method.confidence, offsets)


def cross_pseudo_supervision(branches: Sequence[Forward], batch: Batch, how: Settings) -> tuple[Tensor, Tensor]:
    """Supervised and unsupervised terms of one step, each summed over the branches; the latter is 0 without unlabelled images.

    Two branches teach each other (Chen et al., CVPR 2021). One branch alone learns from labels.
    """
    if batch.unlabelled is None:
        return _supervised(branches, batch, how), torch.zeros((), device=batch.labelled.images.device)
    # Logits of the unmixed views are mixed, then argmax: as MGD, not the logits of the mixed image.
    return _both_terms(branches, _pseudo_labels(branches, batch, how)[::-1], batch, how)


def mean_teacher(network: Forward, average: Forward, batch: Batch, how: Settings) -> tuple[Tensor, Tensor]:
    """Supervised and unsupervised terms of one step: the moving average of the network, in eval mode, gives the pseudo labels.

    Sources: Tarvainen and Valpola, Mean teachers are better role models, NeurIPS 2017; weak and strong views and the threshold of
    FixMatch (Sohn et al., NeurIPS 2020).
    """
    return _both_terms([network], _pseudo_labels([average], batch, how), batch, how)


def _both_terms(learners: Sequence[Forward], guides: Sequence[Tensor], batch: Batch, how: Settings) -> tuple[Tensor, Tensor]:
    labels, count, valid = view_labels(batch.labelled), len(batch.labelled.rows), mixed_valid(batch)
    strong = [view_images(source, how.normalise, how.jitter) for source in batch.mixed]
    inputs = torch.cat([view_images(batch.labelled, how.normalise, how.jitter), mixed_views(batch, strong)])
    outputs = _logits(learners, inputs, how)
    supervised = [supervised_loss(output[:count], labels, ohem=how.ohem) for output in outputs]
    unsupervised = [_consistency(output[count:], guide, valid, how) for output, guide in zip(outputs, guides, strict=True)]
    return torch.stack(supervised).sum(), torch.stack(unsupervised).sum()


def _consistency(output: Tensor, guide: Tensor, valid: Tensor, how: Settings) -> Tensor:
    """Cross entropy of (U, K, H, W) logits against the pseudo labels of a guide, the mean over all valid pixels."""
    if how.class_offsets is None:
        return pixel_consistency_loss(output, guide, valid=valid, confidence=how.confidence, of_all=True)
    # Confidence is read before the adjustment: an adjusted probability is no probability of being right.
    confident = confidence_weight(guide, how.confidence).float()
    return pixel_consistency_loss(output, guide - how.class_offsets[:, None, None], valid=valid, weight=confident)


def _supervised(learners: Sequence[Forward], batch: Batch, how: Settings) -> Tensor:
    labels, inputs = view_labels(batch.labelled), view_images(batch.labelled, how.normalise, how.jitter)
    return torch.stack([supervised_loss(output, labels, ohem=how.ohem) for output in _logits(learners, inputs, how)]).sum()


@torch.no_grad()
def _pseudo_labels(guides: Sequence[Forward], batch: Batch, how: Settings) -> list[Tensor]:
    """Of each guide (U, K, H, W) logits of the unmixed views, mixed."""
    plain = [view_images(source, how.normalise, 0) for source in batch.mixed]
    return [mixed_views(batch, seen.chunk(len(plain))) for seen in _logits(guides, torch.cat(plain), how)]


def _logits(networks: Sequence[Forward], images_B3HW: Tensor, how: Settings) -> list[Tensor]:
    """Of each network (B, K, H, W) float32"""
    with torch.autocast(images_B3HW.device.type, dtype=torch.bfloat16, enabled=how.bfloat16):
        return run_branches(networks, images_B3HW.contiguous(memory_format=torch.channels_last))
