"""Encodes targets as few even levels, on the device that made them: few bytes leave a GPU, and fewer are stored.

Letters: B images, K classes, D channels, h w cells of the logits, r c cells of the regions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mgd_pipeline.caches.encoding import Fidelity, TeacherTargets
from mgd_pipeline.params import TargetsParams

_GAP = 2.0
"""Nats. Log-probabilities less than this above the floor fall to the floor. That makes records a quarter smaller and halves the KL
divergence: the classes which are cut off have smaller probabilities than where they are cut, and more of them than not."""
_EVERY = 4
"""One of so many rows and columns of the logits' cells is in the sample of `Fidelity`."""
_ALONG = 8
"""Rows and columns of the regions' cells in that sample, at most."""


def as_targets(logits_BKhw: Tensor, features_BDrc: Tensor, descriptors_BK: Tensor, options: TargetsParams) -> list[TeacherTargets]:
    """The targets of each image from what a teacher says of a batch, float32, encoded as `options` say.

    Logits of the encodings uint8 and float16 stay float32: whoever writes the cache encodes them. The targets of an image with NaN
    or infinity are not encoded, so that whoever writes them notices.
    """
    images, logits, features, affine, affines = len(descriptors_BK), logits_BKhw, features_BDrc, None, None
    finite = torch.ones(images, dtype=torch.bool, device=descriptors_BK.device)
    of_logits, of_regions = torch.zeros(images, 3), torch.zeros(images, 2)
    if options.logits == "log-probability" and logits_BKhw.shape[1]:
        floor = options.floor_of(logits_BKhw.shape[1])
        affine = -floor, level_step(floor, options.levels)
        logits = log_probability_levels(logits_BKhw, floor, options.levels)
        of_logits = _logits_fidelity(logits_BKhw, logits, affine[1]).cpu()
        finite &= logits_BKhw.isfinite().flatten(1).all(1)
    if options.region_embeddings == "uint8" and features_BDrc.shape[1]:
        features, affines = region_levels(features_BDrc, options.region_levels)
        of_regions = _regions_fidelity(features_BDrc, features, affines).cpu()
        finite &= affines.isfinite().flatten(1).all(1)
    else:
        features = features.half()
    stored = [values.cpu().numpy() for values in (logits, features, descriptors_BK)]
    targets = [TeacherTargets(*values) for values in zip(*stored, strict=True)]
    if affine is None and affines is None:
        return targets
    kept = [None] * images if affines is None else list(affines.cpu().numpy())
    changed = [Fidelity(*sums) for sums in torch.cat([of_logits, of_regions], 1).tolist()]
    for i, is_finite in enumerate(finite.tolist()):
        if is_finite:
            targets[i] = targets[i]._replace(logits_affine=affine, region_affine=kept[i], fidelity=changed[i])
        else:
            raw, embeddings = logits_BKhw[i].cpu().numpy(), features_BDrc[i].half().cpu().numpy()
            targets[i] = TeacherTargets(raw, embeddings, targets[i].global_descriptor)
    return targets


def log_probability_levels(logits_BKhw: Tensor, floor: float, levels: int) -> Tensor:
    """Log-probabilities of logits in even levels: (B, K, h, w) uint8, where level n is -floor + n * `level_step`.

    The most likely class of a cell keeps the highest level alone: a class that would share it gets one level less. Where all are
    cut off, the most likely class gets level 1.
    """
    said = logits_BKhw.float().log_softmax(1)
    stored = torch.where(said < _GAP - floor, 0, (said + floor) / level_step(floor, levels)).round()
    first, highest = said.max(1, keepdim=True).indices, stored.amax(1, keepdim=True).clamp(min=1)
    return (stored - (stored == highest).float()).scatter(1, first, highest).to(torch.uint8)


def level_step(floor: float, levels: int) -> float:
    """Nats between two levels: the highest one is 0, a probability of 1."""
    return floor / (levels - 1)


def region_levels(features_BDrc: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Region embeddings in even levels between the smallest and the largest value of each channel and image: (B, D, r, c) uint8,
    and (B, D, 2) float32 offsets and scales, where a value is offset + scale * level."""
    features = features_BDrc.float()
    low, high = features.amin((2, 3), keepdim=True), features.amax((2, 3), keepdim=True)
    scale = (high - low) / (levels - 1)
    scale = torch.where(scale > 0, scale, 1)  # a constant channel has no range
    stored = ((features - low) / scale).round().clamp(0, levels - 1).to(torch.uint8)
    return stored, torch.cat([low, scale], 3)[:, :, 0]


def _logits_fidelity(logits_BKhw: Tensor, stored_BKhw: Tensor, step: float) -> Tensor:
    """Cells in the sample, their KL divergence and how many of them have the same class: (B, 3) float64."""
    said, kept = (values[..., ::_EVERY, ::_EVERY].float() for values in (logits_BKhw, stored_BKhw))
    said, kept = said.log_softmax(1), (kept * step).log_softmax(1)
    divergence = (said.exp() * (said - kept)).sum(1)
    same = said.argmax(1) == kept.argmax(1)
    return torch.stack([torch.ones_like(divergence), divergence, same], 1).double().sum((2, 3))


def _regions_fidelity(features_BDrc: Tensor, stored_BDrc: Tensor, affine_BD2: Tensor) -> Tensor:
    """Pairs of different cells in the sample, and the squared error of their cosine similarity: (B, 2) float64."""
    offset, scale = affine_BD2[..., None, None].unbind(2)
    rows, columns = (_spread(cells, features_BDrc.device) for cells in features_BDrc.shape[2:])
    both = (features_BDrc.float(), offset + scale * stored_BDrc)
    said, kept = (F.normalize(values[:, :, rows][..., columns].flatten(2), dim=1, eps=1e-6) for values in both)
    error = (said.mT @ said - kept.mT @ kept).square().double().sum((1, 2))
    cells = said.shape[2]
    return torch.stack([torch.full_like(error, cells * (cells - 1)), error], 1)


def _spread(cells: int, device: torch.device) -> Tensor:
    count = min(cells, _ALONG)
    return torch.linspace(0, cells - 1, count, device=device).round().long()
