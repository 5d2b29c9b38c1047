"""A frozen teacher over many images: read ahead, in batches that fit the memory, one line for what goes wrong."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from mgd_pipeline.ahead import ahead, iterate_ahead
from mgd_pipeline.caches.encoding import TeacherTargets
from mgd_pipeline.caches.shards import Compute, Skipped
from mgd_pipeline.data.manifest import ImageKey
from mgd_pipeline.errors import CacheIncomplete, DataError, MemoryShortage, NonFiniteError, StaleTarget
from mgd_pipeline.teachers.looks import dense_targets
from mgd_stages.run.loaded_head import Loaded, LoadedHead
from mgd_stages.run.project import short_of_memory
from mgd_stages.run.teacher_cache import Shown, shown_images

OnError = Literal["stop", "skip"]
_FIRST_BATCH = {"cpu": 8, "cuda": 64}
"""Images of the first forward pass if no batch size is given. On a CPU larger batches are no faster."""
_ASIDE = ("cuda",)
"""Devices that compute while the targets of the batch before are encoded and written; a CPU would have to do both."""
_DECODERS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
"""Threads that read and decode images while a batch is computed."""


@dataclass(frozen=True)
class Batching:
    """How a teacher runs over images; of its targets only the last bits depend on it."""

    device: torch.device
    batch_size: int = 0
    """Images of one forward pass; 0: as many as the memory allows"""
    on_error: OnError = "stop"
    """skip leaves out images that cannot be read"""

    def made_by(self) -> dict[str, Any]:
        """What is noted with each shard of how it was made."""
        return {
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "batch_size": self.batch_size or f"up to {_FIRST_BATCH[self.device.type]}",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }


def teacher_compute(loaded: Loaded, batching: Batching) -> Compute:
    """What fills shards with the targets of a teacher, which is on the device of `batching`."""
    options, device = loaded.project.params.targets, batching.device
    shown = shown_images(loaded.project, loaded.name, loaded.manifest)
    if isinstance(loaded, LoadedHead):
        return lambda keys: (_of_head(loaded, shown[key], batching.on_error) for key in keys)
    fitting = batching.batch_size or _FIRST_BATCH[device.type]

    def targets_of(images: list[np.ndarray]) -> Iterator[TeacherTargets]:
        """Of images of one size. If they do not fit the memory and no batch size is given, batches are halved from then on."""
        nonlocal fitting
        while images:
            try:
                made = dense_targets(loaded.teacher, images[:fitting], options, loaded.manifest.long_side)
            except RuntimeError as error:
                if batching.batch_size or fitting == 1 or not short_of_memory(error):
                    raise
                made = []
            if made:
                yield from made
                images = images[len(made) :]
            else:
                fitting = min(fitting, len(images)) // 2 or 1
                if device.type == "cuda":
                    torch.cuda.empty_cache()

    def read(image: Shown) -> np.ndarray | Skipped:
        try:
            return image.pixels(loaded)
        except DataError as error:
            if batching.on_error == "stop":
                raise DataError(f"{error}; or leave it out with `mgd-pipeline precompute-teachers --on-error skip`") from None
            return Skipped(str(error))

    def targets(keys: Sequence[ImageKey]) -> Iterator[TeacherTargets | Skipped]:
        images = ahead((partial(read, shown[key]) for key in keys), _DECODERS, fitting)
        for batch in _batches(images, fitting):
            if isinstance(batch, Skipped):
                yield batch
            else:
                yield from targets_of(batch)

    def compute(keys: Sequence[ImageKey]) -> Iterator[TeacherTargets | Skipped]:
        return iterate_ahead(targets(keys), fitting) if device.type in _ASIDE else targets(keys)

    return compute


def _of_head(head: LoadedHead, image: Shown, on_error: OnError) -> TeacherTargets | Skipped:
    """An image that is not in the cache behind a head is an image that cannot be read."""
    try:
        return head.targets(image.row, mirrored=image.mirrored)
    except (CacheIncomplete, StaleTarget) as error:
        if on_error == "stop":
            raise
        return Skipped(str(error))


def _batches(images: Iterable[np.ndarray | Skipped], batch_size: int) -> Iterator[list[np.ndarray] | Skipped]:
    """Images of one size together, at most `batch_size` of them, in their order; each skipped image alone."""
    batch: list[np.ndarray] = []
    for image in images:
        if batch and (isinstance(image, Skipped) or len(batch) == batch_size or batch[0].shape != image.shape):
            yield batch
            batch = []
        if isinstance(image, Skipped):
            yield image
        else:
            batch.append(image)
    if batch:
        yield batch


@contextmanager
def named_errors(name: str, batching: Batching) -> Iterator[None]:
    """What goes wrong while a teacher computes, as one line that names the teacher and the remedy."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"teacher {name}: {error}; use other weights or precision") from None
    except RuntimeError as error:
        if not short_of_memory(error):
            raise
        size = batching.batch_size
        remedy = f"lower it, such as --batch-size {size // 2}" if size > 1 else "take smaller images or another device"
        raise MemoryShortage(
            f"teacher {name}: {batching.device} is out of memory with --batch-size {size or 1}; {remedy}"
        ) from None
