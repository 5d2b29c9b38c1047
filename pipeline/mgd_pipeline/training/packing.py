"""Batches as one buffer each, which is what travels from workers to the device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from mgd_pipeline.errors import LoaderError, MGDError
from mgd_pipeline.training.batches import Batch
from mgd_pipeline.training.dataset import TrainingSet
from mgd_pipeline.training.shared_memory import no_room


@dataclass(frozen=True)
class _Piece:
    """Where one tensor lies in a packed batch."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class PackedBatch:
    """A batch in one buffer: one piece of shared memory from a worker, one pinned copy, one transfer to the device."""

    skeleton: Any
    """the batch, with a _Piece for each tensor"""
    buffer: Tensor

    def pin_memory(self) -> PackedBatch:
        return PackedBatch(self.skeleton, self.buffer.pin_memory())

    def on(self, device: torch.device) -> Batch:
        buffer = self.buffer.to(device, non_blocking=True)

        def unpack(place: _Piece) -> Tensor:
            end = place.offset + math.prod(place.shape) * place.dtype.itemsize
            return buffer[place.offset : end].view(place.dtype).view(place.shape)

        return _mapped(self.skeleton, _Piece, unpack)


class PackedSet(Dataset["PackedBatch | MGDError | OSError"]):
    """A training set whose items are packed. Errors with a message for the user are items as well: DataLoader would wrap them, and
    disk errors would lose their number and their file."""

    def __init__(self, dataset: TrainingSet) -> None:
        self.dataset = dataset

    def __getitem__(self, step: int) -> PackedBatch | MGDError | OSError:
        try:
            batch = self.dataset[step]
        except (MGDError, OSError) as error:
            return error
        tensors: dict[int, tuple[Tensor, _Piece]] = {}
        end = 0

        def place(tensor: Tensor) -> _Piece:
            nonlocal end
            # A partner's images may be the very tensors of its first image: they travel once.
            if id(tensor) not in tensors:
                start = -(-end // 64) * 64
                end = start + tensor.numel() * tensor.dtype.itemsize
                tensors[id(tensor)] = tensor, _Piece(start, tuple(tensor.shape), tensor.dtype)
            return tensors[id(tensor)][1]

        skeleton = _mapped(batch, Tensor, place)
        buffer = torch.empty(end, dtype=torch.uint8)
        if get_worker_info() is not None:
            # Shared here and not on the way: torch would lose the error in a thread, and the training would wait for ever.
            try:
                buffer = buffer.share_memory_()
            except (OSError, RuntimeError) as error:
                return LoaderError(f"a batch found no shared memory: {' '.join(str(error).split())}: {no_room()}")
        for tensor, where in tensors.values():
            stop = where.offset + tensor.numel() * tensor.dtype.itemsize
            buffer[where.offset : stop].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return PackedBatch(skeleton, buffer)


def _mapped(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """`value` with everything of a kind replaced, in nested dataclasses, named tuples and dictionaries."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(item, kind, function) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(item, kind, function) for item in value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _mapped(getattr(value, f.name), kind, function) for f in dataclasses.fields(value)}
        return type(value)(**fields)
    return value
