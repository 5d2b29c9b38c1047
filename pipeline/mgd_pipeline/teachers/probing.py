"""Whether a network can be a teacher: which inputs it takes, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mgd_pipeline.errors import WeightsError
from mgd_pipeline.networks.segmentation import MULTIPLE, REFUSALS, Fault, find_fault
from mgd_pipeline.teachers.teacher import Teacher, TeacherOutputs

Sizes = Callable[[int], Sequence[tuple[int, int]]]
"""Height and width of the inputs that a network will get if their sides must be multiples of so many pixels."""


def no_sizes(multiple: int) -> Sequence[tuple[int, int]]:
    """For callers that do not know the images yet."""
    return []


@torch.inference_mode()
def output_channels(name: str, teacher: Teacher) -> tuple[int, int]:
    """(classes, channels of the features) that the network really gives, 0 for an output that it does not give.

    Raises WeightsError for a network that gives something else, or that does not take a small input.
    """
    size = _small(teacher.multiple)
    try:
        outputs = teacher.network(torch.zeros(1, 3, *size, device=teacher.device))
    except REFUSALS as error:
        raise _cannot_see(name, Fault(size, f"{type(error).__name__}: {error}")) from error
    channels = []
    for what, values in (("logits", outputs.logits), ("features", outputs.features)):
        if values is not None and (values.dim() != 4 or len(values) != 1 or not values.is_floating_point()):
            shape = tuple(values.shape)
            raise WeightsError(f"teachers.{name}: its {what} are {shape} {values.dtype}, not (B, channels, h, w) floats")
        channels.append(0 if values is None else int(values.shape[1]))
    if not any(channels):
        raise WeightsError(f"teachers.{name}: gives neither logits nor features")
    return channels[0], channels[1]


def check_sees(name: str, build: Callable[[], nn.Module], multiple: int, sizes: Sequence[tuple[int, int]]) -> None:
    """Raises WeightsError for a network that does not take inputs of these sizes (height, width), or a small one."""
    if fault := find_fault(build, [_small(multiple), *sizes]):
        raise _cannot_see(name, fault)


def on_meta(network: nn.Module) -> nn.Module:
    """The same network on the meta device: its outputs have shapes but no values, and it needs no memory."""
    values = {key: value.to("meta") for key, value in (*network.named_parameters(), *network.named_buffers())}
    return _Valueless(network, values)


class _Valueless(nn.Module):
    def __init__(self, network: nn.Module, values: dict[str, Tensor]) -> None:
        super().__init__()
        self._network, self._values = [network], values  # in a list, where eval() does not find it

    def forward(self, images_B3HW: Tensor) -> TeacherOutputs:
        return torch.func.functional_call(self._network[0], self._values, (images_B3HW.to("meta"),))


def _small(multiple: int) -> tuple[int, int]:
    side = 2 * max(MULTIPLE, multiple)
    side += -side % multiple
    return side, side


def _cannot_see(name: str, fault: Fault) -> WeightsError:
    shown = "cannot be built" if fault.size is None else f"cannot see images of {fault.size[0]} x {fault.size[1]} pixels"
    return WeightsError(
        f"teachers.{name}: {shown} ({' '.join(fault.said.split())[:160]}); a teacher must take images of every size: name another "
        f"network, or wrap this one by a function that brings images to its size (import:)"
    )
