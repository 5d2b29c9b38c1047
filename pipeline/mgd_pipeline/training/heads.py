"""Training of a head on cached embeddings, in seconds: whole images, and the network behind the embeddings is not needed.

Letters: B batch, D channels, K classes, r c cells of the regions, h w drawn rows and columns of pixels.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mgd_pipeline.caches.reader import TargetCache
from mgd_pipeline.caches.statistics import statistics_of_rows
from mgd_pipeline.data.images import IGNORE
from mgd_pipeline.data.manifest import ImageRow, Manifest
from mgd_pipeline.errors import NonFiniteError
from mgd_pipeline.params import HeadTeacher
from mgd_pipeline.teachers.heads import Head
from mgd_pipeline.teachers.looks import region_values_at
from mgd_pipeline.training.dataset import CheckedFiles, cached_embeddings, check_rows

_PIXELS = 2**14
"""Of an image with more pixels, random rows and columns that cross in about this many count in one step."""
_KEPT_BYTES = 512 * 2**20
"""Of decoded masks; further masks are decoded each time."""


@dataclass
class _Images:
    cache: TargetCache
    manifest: Manifest
    device: torch.device
    _masks: dict[str, np.ndarray] = field(default_factory=dict)
    _bytes: int = 0

    def __post_init__(self) -> None:
        self._files = CheckedFiles(self.manifest)

    def embeddings(self, rows: Sequence[ImageRow], flips: Sequence[bool]) -> Tensor:
        """(B, D, r, c) float32 of images of one size."""
        read = [cached_embeddings(self.cache, self.manifest, row, mirrored=flip) for row, flip in zip(rows, flips, strict=True)]
        return torch.from_numpy(np.stack(read)).to(self.device).float()

    def mask(self, row: ImageRow) -> np.ndarray:
        """(H, W) uint8 at the working size."""
        if (mask := self._masks.get(row.image_id)) is None:
            mask = self._files.mask(row, self.manifest.size(row))
            if self._bytes + mask.nbytes <= _KEPT_BYTES:
                self._masks[row.image_id], self._bytes = mask, self._bytes + mask.nbytes
        return mask

    def labels(self, rows: Sequence[ImageRow], flips: Sequence[bool], drawn: tuple[np.ndarray, np.ndarray]) -> Tensor:
        """(B, h, w) int64 classes at the drawn rows and columns."""
        whole = [self.mask(row)[:, ::-1] if flip else self.mask(row) for row, flip in zip(rows, flips, strict=True)]
        return torch.from_numpy(np.stack([mask[np.ix_(*drawn)] for mask in whole])).to(self.device).long()

    def fit_standardisation(self, head: Head) -> None:
        """Gives the head mean and standard deviation of the labelled images' embeddings."""
        mean, deviation = statistics_of_rows(self.cache, [self.cache.row(self.manifest.key(row)) for row in self.manifest.labelled])
        head.mean[:] = torch.from_numpy(mean)[:, None, None]
        head.std[:] = torch.from_numpy(np.where(deviation > 0, deviation, 1))[:, None, None]


class HeadLosses(NamedTuple):
    """Of one step."""

    labelled: float
    unlabelled: float | None
    """None before self-training begins, and without it"""


def train_head(
    params: HeadTeacher,
    cache: TargetCache,
    manifest: Manifest,
    *,
    seed: int,
    device: torch.device,
    advance: Callable[[int, HeadLosses], None] = lambda done, losses: None,
) -> Head:
    """A head in eval mode, trained on the embeddings and masks of the labelled images; a function of the arguments alone.

    With `params.self_training`, the head of the first half of the steps labels unlabelled images for the second half, where it is
    confident enough. Raises CacheIncomplete or StaleTarget for an image that the cache lacks, NonFiniteError for a loss that is not
    finite.
    """
    threshold = (params.self_training or 0.0) if manifest.unlabelled else 0.0
    check_rows([cache], manifest, [*manifest.labelled, *(manifest.unlabelled if threshold else ())])
    torch.manual_seed(seed)
    head = Head(params, cache.layout.features, len(manifest.classes)).to(device)
    images, stride = _Images(cache, manifest, device), cache.layout.region_stride
    images.fit_standardisation(head)
    biases = [value for value in head.parameters() if value.ndim == 1]
    weights = [value for value in head.parameters() if value.ndim > 1]
    groups = [{"params": weights, "weight_decay": params.weight_decay}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=params.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, params.steps)
    rng, guide = np.random.default_rng([seed, 1]), None
    order = _order(rng, len(manifest.labelled), params.steps * params.batch)
    # From a generator of its own: a head that reads no unlabelled image does not change when some are added.
    further = _order(np.random.default_rng([seed, 2]), len(manifest.unlabelled), params.steps * params.batch)

    def loss_of(rows: list[ImageRow], guide: Head | None) -> Tensor:
        """The mean over pixels with a class; with a guide, over all drawn pixels, of which the guide labels some."""
        summed, count = torch.zeros((), device=device), 0
        for group in _of_one_size(rows, manifest):
            flips = [cache.mirrored and bool(rng.integers(2)) for _ in group]
            drawn = _drawn(rng, manifest.size(group[0]))
            embeddings = images.embeddings(group, flips)
            logits = region_values_at(head(embeddings), *drawn, stride)
            if guide is None:
                labels = images.labels(group, flips, drawn)
                count += int((labels != IGNORE).sum())
            else:
                with torch.no_grad():
                    confidence, labels = region_values_at(guide(embeddings), *drawn, stride).softmax(1).max(1)
                labels = labels.masked_fill(confidence < threshold, IGNORE)
                count += labels.numel()
            summed = summed + F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        return summed / max(count, 1)

    for step in range(params.steps):
        here = slice(step * params.batch, (step + 1) * params.batch)
        loss = labelled = loss_of([manifest.labelled[i] for i in order[here]], None)
        unlabelled = None
        if threshold and step >= params.steps // 2:
            guide = guide or copy.deepcopy(head)
            unlabelled = loss_of([manifest.unlabelled[i] for i in further[here]], guide)
            loss = labelled + unlabelled
        if not loss.isfinite():
            raise NonFiniteError(f"the loss is not finite at step {step + 1}; lower learning_rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        advance(step + 1, HeadLosses(labelled.item(), None if unlabelled is None else unlabelled.item()))
    return head.eval().requires_grad_(False)


def _order(rng: np.random.Generator, count: int, wanted: int) -> np.ndarray:
    """(wanted,) numbers below `count`: one shuffled epoch after the other."""
    if count == 0:
        return np.empty(0, np.int64)
    return np.concatenate([rng.permutation(count) for _ in range(-(-wanted // count))])[:wanted]


def _of_one_size(rows: Sequence[ImageRow], manifest: Manifest) -> list[list[ImageRow]]:
    groups = defaultdict(list)
    for row in rows:
        groups[manifest.size(row)].append(row)
    return list(groups.values())


def _drawn(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Ascending rows and columns of pixels of an image of `size`, all of a small one."""
    share = min(1.0, (_PIXELS / (size[0] * size[1])) ** 0.5)
    rows, columns = (np.sort(rng.choice(side, max(1, round(side * share)), replace=False)) for side in size)
    return rows, columns
