"""Whether a network can be a teacher: which inputs it takes, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mgd_pipeline.errors import ParamsError, WeightsError
from mgd_pipeline.networks.segmentation import MULTIPLE, REFUSALS, Fault, find_fault
from mgd_pipeline.params import FixedSize
from mgd_pipeline.teachers.teacher import Teacher, TeacherOutputs

Sizes = Callable[[int], Sequence[tuple[int, int]]]
"""Height and width of the inputs that a network will get if their sides must be multiples of so many pixels."""


def no_sizes(multiple: int) -> Sequence[tuple[int, int]]:
    """For callers that do not know the images yet."""
    return []


@torch.inference_mode()
def output_channels(name: str, teacher: Teacher) -> tuple[int, int]:
    """(classes, channels of the features) that the network really gives, 0 for an output that it does not give.

    Raises WeightsError for a network that gives something else, or that takes neither a small input nor one of its own size.
    """
    outputs = _probe(name, teacher)
    channels = []
    for what, values in (("logits", outputs.logits), ("features", outputs.features)):
        if values is not None and (values.dim() != 4 or len(values) != 1 or not values.is_floating_point()):
            shape = tuple(values.shape)
            raise WeightsError(f"teachers.{name}: its {what} are {shape} {values.dtype}, not (B, channels, h, w) floats")
        channels.append(0 if values is None else int(values.shape[1]))
    if not any(channels):
        raise WeightsError(f"teachers.{name}: gives neither logits nor features")
    return channels[0], channels[1]


def _probe(name: str, teacher: Teacher) -> TeacherOutputs:
    size = teacher.size or small_input(teacher.multiple)
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(teacher.device)
    try:
        return teacher.network(image)
    except REFUSALS as error:
        raise _cannot_see(name, Fault(size, f"{type(error).__name__}: {error}")) from error


@torch.inference_mode()
def check_repeats(name: str, teacher: Teacher) -> None:
    """Raises WeightsError for a network in eval mode that draws random numbers: nobody could make its teacher cache again."""
    for first, second in zip(_probe(name, teacher), _probe(name, teacher), strict=True):
        if first is not None and second is not None and float((first - second).abs().max()) > 0.01 * float(first.std()):
            raise WeightsError(
                f"teachers.{name}: gives other outputs for the same image, so it draws random numbers in eval mode; switch its "
                "dropout off, or name another network"
            )


def check_sees(
    name: str, build: Callable[[], nn.Module], multiple: int, sizes: Sequence[tuple[int, int]], *, fixed_size: bool = False
) -> None:
    """Raises WeightsError for a network that does not take inputs of these sizes (height, width), or a small one.

    `fixed_size` says whether the teacher may have one size only; the remedy names the key.
    """
    small = small_input(multiple)
    if fault := find_fault(lambda: _InProportion(build()), [small, *sizes]):
        raise _cannot_see(name, fault, fixed_size=fixed_size and fault.size not in (None, small))


@torch.inference_mode()
def fault_of(network: nn.Module, size: tuple[int, int]) -> Fault | None:
    """Why a network in eval mode on the CPU cannot take an input of this size (height, width); None if it can."""
    try:
        _InProportion(network)(torch.zeros(1, 3, *size))
    except REFUSALS as error:
        return Fault(size, f"{type(error).__name__}: {error}")
    return None


def only_size(
    name: str,
    takes: Callable[[tuple[int, int]], Fault | None],
    multiple: int,
    published: tuple[int, int] | None,
    asked: FixedSize | None,
) -> tuple[int, int] | None:
    """Height and width, pixels, of all inputs of a network that takes one size only; None for a network that takes other sizes.

    `takes` tries the network on an input; `published` is the size that its publishers name, `asked` the fixed_size in params.yaml.
    A network that takes small squares but no other shapes has the published size if a fixed_size is asked for. Raises ParamsError
    if it is asked of a network that takes every size, WeightsError for a network that takes neither.
    """
    side, _ = small_input(multiple)
    if (side, side) == published:
        side *= 2
    fault = takes((side, side))
    if fault is not None and fault.size is None:
        raise _cannot_see(name, fault)
    if fault is None and asked is None:
        return None
    if fault is None and takes((side, side + multiple)) is None:
        raise ParamsError(
            f"teachers.{name}.fixed_size: {asked} is for networks of one input size, and this one takes every size; leave it out"
        )
    if published is None or (fault := takes(published)):
        raise _cannot_see(name, fault or Fault((side, side + multiple), "and no size of its input is published"))
    return published


def check_size(
    name: str,
    build: Callable[[], nn.Module],
    multiple: int,
    published: tuple[int, int] | None,
    asked: FixedSize | None,
    sizes: Sizes,
) -> tuple[int, int] | None:
    """`only_size` of a network whose weights are not here. Raises what `only_size` and `check_sees` raise."""

    def takes(size: tuple[int, int]) -> Fault | None:
        return find_fault(lambda: _InProportion(build()), [size])

    if (size := only_size(name, takes, multiple, published, asked)) is None:
        check_sees(name, build, multiple, sizes(multiple), fixed_size=published is not None)
    return size


class _InProportion(nn.Module):
    """A network that raises ValueError if an output has other proportions than its input: some networks take the number of
    patches to be that of a square, and mix up the rows of other images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_B3HW: Tensor) -> TeacherOutputs:
        outputs: TeacherOutputs = self.network(images_B3HW)
        height, width = images_B3HW.shape[-2:]
        for values in (outputs.logits, outputs.features):
            if values is not None and abs(values.shape[-2] * width / height - values.shape[-1]) > 1:
                raise ValueError(f"its outputs are {values.shape[-2]} x {values.shape[-1]} cells")
        return outputs


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


def small_input(multiple: int) -> tuple[int, int]:
    """Height and width of a small input whose sides are multiples of so many pixels."""
    side = 2 * max(MULTIPLE, multiple)
    side += -side % multiple
    return side, side


def _cannot_see(name: str, fault: Fault, *, fixed_size: bool = False) -> WeightsError:
    shown = "cannot be built" if fault.size is None else f"cannot see images of {fault.size[0]} x {fault.size[1]} pixels"
    remedy = (
        f"set teachers.{name}.fixed_size, which shows it squares of its published size, or name another network"
        if fixed_size
        else "a teacher must take images of every size, or of its published size: name another network, or wrap this one by a "
        "function that knows its size (import:)"
    )
    return WeightsError(f"teachers.{name}: {shown} ({' '.join(fault.said.split())[:160]}); {remedy}")
