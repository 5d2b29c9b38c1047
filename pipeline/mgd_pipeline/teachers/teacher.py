"""What a frozen teacher says of whole images.

A teacher is any network that fits `Teacher`: images in, logits or dense features or both out, on whatever grid it has. Here its
outputs are brought to the one grid of the stores, in the image's own frame and in the data set's classes.

Letters: B batch, L the teacher's classes, K the data set's, D channels, h w cells of an output or of a store, r c of the regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mgd_pipeline.caches.encoding import TeacherTargets
from mgd_pipeline.data.images import read_image, resize_image, scaled_size
from mgd_pipeline.networks.inference import to_input, window_starts
from mgd_pipeline.networks.segmentation import MULTIPLE, STRIDE, Normalisation, output_grid, pad_to_multiple
from mgd_pipeline.params import TargetsParams, TtaParams
from mgd_pipeline.views import Grid

_ONE_PASS = TtaParams(scales=[1.0], flip=False)


class TeacherOutputs(NamedTuple):
    """What a teacher says of a batch, each on a grid that covers its padded input."""

    logits: Tensor | None
    """(B, L, h, w); None where it names no classes"""
    features: Tensor | None
    """(B, D, h', w'), best those of which the logits are a 1x1 convolution; None where it has none to give"""


@dataclass(frozen=True)
class Teacher:
    """The contract between a network and stage one; what `import: package.module:function` returns."""

    network: nn.Module
    """(B, 3, H, W) float32, normalised, to an object with `logits` and `features` as in TeacherOutputs. It must be in
    eval mode when it is used, and treat the images of a batch independently."""
    normalisation: Normalisation
    """mean and std for R, G, B in units of 0 to 255: input = (pixel - mean) / std; and the order of the network's channels"""
    align_corners: bool
    """Whether the first and the last cell of an output lie on the first and the last pixel of the padded input (True), or cells
    are areas of equal size, with their values at the centres (False)."""
    multiple: int = 32
    """Sides of the input are padded to multiples of this many pixels, at the bottom and right, with the mean colour."""
    labels: tuple[str, ...] | None = None
    """Names of its L classes in order; None where nobody says, or where it has none."""
    short_side: int | None = None
    """Shorter side at which it sees an image, pixels; None is the image's working size."""
    groups: tuple[tuple[int, ...], ...] | None = None
    """For each of the K classes of the data set the numbers of the teacher's classes, see `data_classes`; None takes them as
    they are."""

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device


def data_classes(logits_BLhw: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """The teacher's logits as logits of the data set's classes: (B, K, h, w).

    A class that has several of the teacher's gets their probability together. One that has none is never the most likely: it
    gets the smallest logit of the others, less 1. Classes of the teacher that no group names are as if it did not know them.
    """
    found = {k: torch.logsumexp(logits_BLhw[:, list(group)], 1) for k, group in enumerate(groups) if group}
    missing = torch.stack(list(found.values())).amin(0) - 1
    return torch.stack([found.get(k, missing) for k in range(len(groups))], 1)


def read_for(teacher: Teacher, path: Path, long_side: int | None) -> np.ndarray:
    """(H, W, 3) uint8: the pixels from which this teacher's input is made.

    The image at its working size; the whole file where the teacher has a shorter side of its own: it may see more than students do.
    """
    return read_image(path, long_side if teacher.short_side is None else None)


@torch.inference_mode()
def dense_targets(
    teacher: Teacher, images: list[np.ndarray], options: TargetsParams, long_side: int | None = None
) -> list[TeacherTargets]:
    """Runs a teacher over whole images of one size, each (H, W, 3) uint8: once un-augmented, or as `options` say.

    Larger images than `long_side` get the targets of their working size. Raises ValueError if the network is not in eval mode:
    batch statistics would let an image's targets depend on its neighbours in the batch.
    """
    size = scaled_size(images[0].shape[0], images[0].shape[1], long_side)
    logits, features = look(teacher, images, options, long_side)
    descriptors = pixel_means(logits, size)
    logits = at_cells(logits, size, options.stride)
    if options.top_k is not None:
        logits = largest_logits(logits, options.top_k)
    kept = [values.cpu().numpy() for values in (logits, features.half(), descriptors)]
    return [TeacherTargets(*values) for values in zip(*kept, strict=True)]


class Looks(NamedTuple):
    """The mean of all looks of a teacher at images of one size, in the frame of the image at its working size."""

    logits: Tensor
    """(B, K, h, w) at cells 4 pixels apart, 2 where the store's are (`networks.output_grid`); K is 0 where it names no classes"""
    features: Tensor
    """(B, D, r, c) averaged over blocks of `region_stride` pixels; D is 0 where it has none"""


@torch.inference_mode()
def look(teacher: Teacher, images: list[np.ndarray], options: TargetsParams, long_side: int | None = None) -> Looks:
    """Shows a teacher images of one size, each (H, W, 3) uint8, as often and in the way that `options` say.

    Where images are larger than `long_side`, their working size follows from it, and the teacher sees them scaled to that or to
    its own short side.
    """
    if teacher.network.training:
        raise ValueError("a teacher must be in eval mode")
    size = scaled_size(images[0].shape[0], images[0].shape[1], long_side)
    # Where logits and features are wanted, in pixels of the image, rows and columns. Cells of 2 pixels are asked of the teacher
    # itself, which may see more than the working size; coarser ones than its own 4 are made of those afterwards.
    cells = [_cell_pixels(size, axis, min(options.stride, STRIDE)) for axis in (0, 1)]
    blocks = [_block_pixels(size[axis], options.region_stride) for axis in (0, 1)]
    passes = _passes(teacher.short_side, size, options)
    logits = torch.zeros(len(images), 0, len(cells[0]), len(cells[1]), device=teacher.device)
    features = torch.zeros(len(images), 0, *(len(pixels) // options.region_stride for pixels in blocks), device=teacher.device)
    for seen, flip in passes:
        inputs = torch.cat([to_input(resize_image(image, *seen), teacher.normalisation, teacher.device) for image in images])
        window = _window(seen, options)
        starts = tuple(window_starts(seen[axis], window[axis], options.overlap) for axis in (0, 1))
        for number in np.ndindex(len(starts[0]), len(starts[1])):
            top, left = starts[0][number[0]], starts[1][number[1]]
            outputs, padded = _run(teacher, inputs[..., top : top + window[0], left : left + window[1]], flip, options.precision)
            shown = [_Window(size[axis], seen[axis], starts[axis], window[axis], number[axis], padded[axis]) for axis in (0, 1)]
            if outputs.logits is not None:
                found = outputs.logits
                if not (seen == size == window and _at_home(teacher, found, cells)):
                    rows, columns = _weights(shown, cells, found, teacher.align_corners)
                    found = rows @ found @ columns.T
                logits = found / len(passes) + (logits if logits.shape[1] else 0)
            if outputs.features is not None:
                pixels = _weights(shown, blocks, outputs.features, teacher.align_corners)
                rows, columns = (matrix.view(-1, options.region_stride, matrix.shape[1]).mean(1) for matrix in pixels)
                features = rows @ outputs.features @ columns.T / len(passes) + (features if features.shape[1] else 0)
    return Looks(logits, features)


def shown_sizes(
    sizes: Sequence[tuple[int, int]], short_side: int | None, multiple: int, options: TargetsParams
) -> list[tuple[int, int]]:
    """Height and width of the padded inputs that a network is given of images of these working sizes, each once, pixels."""
    windows = [_window(seen, options) for size in sizes for seen, _ in _passes(short_side, size, options)]
    return list(dict.fromkeys((-(-height // multiple) * multiple, -(-width // multiple) * multiple) for height, width in windows))


def _window(seen: tuple[int, int], options: TargetsParams) -> tuple[int, int]:
    """Height and width of what is shown at once of an image of the size `seen`."""
    return seen if options.window is None else (min(seen[0], options.window[0]), min(seen[1], options.window[1]))


def _passes(short_side: int | None, size: tuple[int, int], options: TargetsParams) -> list[tuple[tuple[int, int], bool]]:
    """Size at which the image is seen, and whether mirrored, of each pass."""
    own = 1.0 if short_side is None else short_side / min(size)
    tta = options.tta or _ONE_PASS
    return [
        ((max(1, round(size[0] * scale * own)), max(1, round(size[1] * scale * own))), flip)
        for scale in tta.scales
        for flip in ([False, True] if tta.flip else [False])
    ]


def _run(teacher: Teacher, inputs_B3HW: Tensor, flip: bool, precision: str) -> tuple[TeacherOutputs, tuple[int, int]]:
    """Logits of the data set's classes and features, float32, not mirrored any more; and the size of the padded input."""
    padded = pad_to_multiple(inputs_B3HW, teacher.multiple)
    # The padded input is mirrored as a whole, so that its cells lie where those of the mirrored output lie.
    shown = (padded.flip(-1) if flip else padded).contiguous(memory_format=torch.channels_last)
    with torch.autocast(shown.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        outputs = teacher.network(shown)
    logits, features = (
        None if values is None else (values.flip(-1) if flip else values).float() for values in (outputs.logits, outputs.features)
    )
    if logits is not None and teacher.groups is not None:
        logits = data_classes(logits, teacher.groups)
    return TeacherOutputs(logits, features), (padded.shape[-2], padded.shape[-1])


def _at_home(teacher: Teacher, logits_BKhw: Tensor, cells: list[np.ndarray]) -> bool:
    """Whether the cells of an output are those of the stores, as with this project's own networks."""
    own = teacher.align_corners and teacher.multiple == MULTIPLE
    return own and tuple(logits_BKhw.shape[-2:]) == (len(cells[0]), len(cells[1]))


def _block_pixels(side: int, stride: int) -> np.ndarray:
    """The pixels of blocks of `stride` along one side. Those that reach over the image's border repeat its border pixel, so
    that block i is centred at pixel stride * (i + 1/2) - 1/2 of any image."""
    return np.minimum(np.arange(-(-side // stride) * stride), side - 1).astype(np.float64)


class _Window(NamedTuple):
    """What one window of a pass shows of the image along one axis, pixels."""

    size: int
    """of the image"""
    seen: int
    """of the image as it was scaled for this pass"""
    starts: list[int]
    """of all windows, on the scaled image"""
    length: int
    """of a window"""
    number: int
    """of this one"""
    padded: int
    """of the network's input"""


def _weights(shown: list[_Window], places: list[np.ndarray], values_BChw: Tensor, align_corners: bool) -> list[Tensor]:
    """For rows and columns (n, cells) weights that interpolate a window's output at places of the image, in its pixels.

    Of several windows that show a place, the one counts whose centre is nearest: it shows most of what is around. The
    weights of the others are 0 there.
    """
    found = []
    for axis, (window, pixels) in enumerate(zip(shown, places, strict=True)):
        cells, starts = values_BChw.shape[2 + axis], window.starts
        scaled = (pixels + 0.5) * (window.seen / window.size) - 0.5
        centres = np.array(starts) + (window.length - 1) / 2
        chosen = np.abs(scaled - centres[:, None]).argmin(0) == window.number
        grid = Grid(np.array([[cells]]), np.array([[window.padded]]), align_corners)
        matrix = interpolation_matrix(grid.positions((scaled - starts[window.number])[None], 0)[0], cells)
        found.append((matrix * torch.from_numpy(chosen)[:, None]).to(values_BChw.device))
    return found


def class_scores(logits_BKhw: Tensor, size: tuple[int, int]) -> Tensor:
    """The logits of `look` at every pixel of images of `size`: (B, K, H, W) float32."""
    rows, columns = (_pixel_weights(size, axis, logits_BKhw) for axis in (0, 1))
    return rows @ logits_BKhw @ columns.T


def largest_logits(logits_BKhw: Tensor, count: int) -> Tensor:
    """Keeps the `count` largest logits of each cell and sets the others to their mean: marginal smoothing, on logits.

    Source: Shen and Xing, A Fast Knowledge Distillation Framework for Visual Recognition, ECCV 2022.
    """
    others = logits_BKhw.shape[1] - count
    if others <= 0:
        return logits_BKhw
    kept = logits_BKhw.topk(count, dim=1)
    mean = (logits_BKhw.sum(1, keepdim=True) - kept.values.sum(1, keepdim=True)) / others
    return mean.expand_as(logits_BKhw).scatter(1, kept.indices, kept.values)


def interpolation_matrix(positions: np.ndarray, cells: int) -> Tensor:
    """(n, cells) float32 weights of linear interpolation at n cell coordinates in [0, cells - 1]."""
    low = np.minimum(np.floor(positions).astype(np.int64), max(cells - 2, 0))
    weight = positions - low
    matrix = np.zeros((len(positions), cells), dtype=np.float32)
    rows = np.arange(len(positions))
    np.add.at(matrix, (rows, low), 1 - weight)
    np.add.at(matrix, (rows, np.minimum(low + 1, cells - 1)), weight)
    return torch.from_numpy(matrix)


def at_cells(logits_BKhw: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """The logits of `look` at the cells of an image of `size` that lie `stride` pixels apart: (B, K, h', w'), bilinear."""
    if stride <= STRIDE:
        return logits_BKhw
    rows, columns = (_pixel_weights(size, axis, logits_BKhw, _cell_pixels(size, axis, stride)) for axis in (0, 1))
    return rows @ logits_BKhw @ columns.T


def pixel_means(logits_BKhw: Tensor, size: tuple[int, int]) -> Tensor:
    """Means of the upsampled logits over the pixels of the image, without its padding: (B, K)."""
    rows, columns = (_pixel_weights(size, axis, logits_BKhw).mean(0) for axis in (0, 1))
    return torch.einsum("bkhw,h,w->bk", logits_BKhw, rows, columns)


def _cell_pixels(size: tuple[int, int], axis: int, stride: int) -> np.ndarray:
    """The pixels, on one axis of an image of `size`, at which the stores' cells of `stride` pixels lie."""
    grid = output_grid([size], stride)
    return np.linspace(0, grid.frames[0, axis] - 1, grid.cells[0, axis])


def _pixel_weights(size: tuple[int, int], axis: int, logits_BKhw: Tensor, pixels: np.ndarray | None = None) -> Tensor:
    """(n, cells) weights that interpolate logits at the stores' cells of an image of `size` at these pixels, or at all."""
    cells = logits_BKhw.shape[2 + axis]
    grid = Grid(np.array([[cells]]), output_grid([size]).frames[:, [axis]], align_corners=True)
    places = np.arange(size[axis], dtype=np.float64) if pixels is None else pixels
    return interpolation_matrix(grid.positions(places[None], 0)[0], cells).to(logits_BKhw.device)


def teacher_provenance(expected: dict[str, Any], teacher: Teacher, weights_sha256: str, trained_on: str | None) -> dict[str, Any]:
    """The whole provenance of a store: `provenance.expected_provenance`, what the teacher asks of its input, the hash of its
    weights, and the fingerprint of the labelled ids that it was trained on (None where its weights do not say)."""
    mean, std, channels = teacher.normalisation
    asked = {"mean": list(mean), "std": list(std), "pad_multiple": teacher.multiple, "align_corners": teacher.align_corners}
    if channels != "RGB":  # stores of RGB are what they were before there was anything else
        asked["channels"] = channels
    return {
        **expected,
        "teacher": {**expected["teacher"], "weights_sha256": weights_sha256, "trained_on": trained_on},
        "preprocessing": {**expected["preprocessing"], **asked},
    }
