"""What one teacher says of one image, decoded, for a training loop of your own.

Frames. A *source pixel* is a pixel of the image at its working size: the size at which stage one read the image, which is the
file's own size unless `data.long_side` scales it down. Positions are (x, y) with the centre of the first pixel at (0, 0), so the
image covers -0.5 to width - 0.5. A *matrix* (2, 3) takes a pixel (x, y, 1) of a view to source pixels.

Letters: K classes, D channels, H W pixels of the image, h w cells of the logits or pixels of a view, r c cells of the features.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from mgd_pipeline.caches.encoding import decoded
from mgd_pipeline.caches.format import Layout
from mgd_pipeline.errors import ParamsError
from mgd_pipeline.views import Grid, affine_positions, grid_points, sample_each

_LARGEST = 2.0**31
"""Of a matrix's numbers: far beyond any image, and no product of them overflows."""

_HALF_A_PIXEL = np.array([0, 0, 0.5])


class Sampled(NamedTuple):
    """What `ImageTargets.sample` returns."""

    values: Tensor
    """(K, h, w) or (D, h, w) float32, finite everywhere. Outside the image each value is that of the nearest pixel of the image."""
    inside: Tensor
    """(h, w) bool: True where the view shows the image. Leave the other places out of a loss."""


@dataclass(frozen=True, eq=False)
class ImageTargets:
    """One teacher's targets of one image; `cache[image_id]` makes it. Everything is on the CPU and needs no gradient.

    The object holds its values itself: it stays usable after its cache was closed, and a process can send it to another one.
    """

    size: tuple[int, int]
    """(H, W) of the image at its working size, pixels"""
    frame: tuple[int, int]
    """(height, width) of the padded input that the cells of the logits span, pixels: the image lies at its top left"""
    descriptor: Tensor
    """(K,) float32: logits averaged over the pixels of the image"""
    mirrored: ImageTargets | None
    """What the teacher said of the mirror image, from caches that have it (`targets.mirrored`). `sample` and `sample_features`
    use these targets by themselves wherever the matrix mirrors the image."""
    _logits: Tensor
    """(K, canvas height, canvas width): the record, as training reads it"""
    _features: Tensor
    _logits_grid: Grid
    _features_grid: Grid

    @classmethod
    def decode(cls, records: Mapping[str, np.ndarray], layout: Layout, mirrored: ImageTargets | None = None) -> ImageTargets:
        """From one image's record of each array, as stored."""
        logits = torch.from_numpy(records["logits"].astype(np.float32))
        if layout.classes:
            offset, scale = records["logits_affine"].tolist()
            logits = logits * scale + offset
        height, width, frame_height, frame_width = records["extents"].tolist()
        return cls(
            (height, width),
            (frame_height, frame_width),
            torch.from_numpy(records["global_descriptors"].astype(np.float32)),
            mirrored,
            logits,
            torch.from_numpy(decoded(records["region_embeddings"], records.get("region_affine")).astype(np.float32)),
            *target_grids(records["extents"][None], layout),
        )

    @property
    def logits(self) -> Tensor:
        """(K, h, w) float32 at the cells of `frame`, with the corners aligned: the first and last cell lie on the first and last
        pixel of the frame, not of the image. `at_pixels` is the image alone. K is 0 of a teacher that names no classes.

        They are log-probabilities from a cache of `targets.logits: log-probability`: the same up to a constant for each cell."""
        return _without_canvas(self._logits, self._logits_grid)

    @property
    def features(self) -> Tensor:
        """(D, r, c) float32: means over blocks of pixels, the first at the image's top left; the last row and column of blocks may
        reach over the image's edge. D is 0 of a teacher without features."""
        return _without_canvas(self._features, self._features_grid)

    def at_pixels(self, size: tuple[int, int] | None = None) -> Tensor:
        """(K, H, W) float32 logits at the pixels of the image; `size` (height, width) gives those of the same image at another
        size, such as that of the file."""
        shape = size or self.size
        return self.sample([[1, 0, 0], [0, 1, 0]], shape, source=shape).values

    def sample(self, matrix: ArrayLike | Tensor, shape: tuple[int, int], *, source: tuple[int, int] | None = None) -> Sampled:
        """Logits (K, h, w) at every pixel of a view of `shape` (h, w), bilinear, and where the view shows the image.

        `matrix` (2, 3) takes a pixel (x, y, 1) of the view to source pixels. Where it refers to the image at another size than
        `size`, such as the file's own, `source` (height, width) is that size. Raises ParamsError.
        """
        return self._sampled("_logits", matrix, shape, source)

    def sample_features(
        self, matrix: ArrayLike | Tensor, shape: tuple[int, int], *, source: tuple[int, int] | None = None
    ) -> Sampled:
        """As `sample`, the features (D, h, w). Features are most often wanted at the cells of a network's output:
        `cell_matrix` makes the matrix of those from the matrix of the view."""
        return self._sampled("_features", matrix, shape, source)

    def _sampled(self, which: str, matrix: ArrayLike | Tensor, shape: tuple[int, int], source: tuple[int, int] | None) -> Sampled:
        shape, to_source, targets = _size("shape", shape), _checked(matrix), self
        if source is not None:
            height, width = _size("source", source)
            ratio = np.array([[self.size[1] / width], [self.size[0] / height]])
            to_source = (to_source + _HALF_A_PIXEL) * ratio - _HALF_A_PIXEL
        if self.mirrored is not None and np.linalg.det(to_source[:, :2]) < 0:
            # The mirror image, seen without mirroring, is the same view.
            targets = self.mirrored
            to_source = np.array([[0, 0, self.size[1] - 1], [0, 0, 0]]) + to_source * [[-1], [1]]
        canvas, grid = getattr(targets, which)[None], getattr(targets, f"{which}_grid")
        positions = affine_positions(to_source, shape, self.size)
        values = sample_each(canvas, grid_points((canvas.shape[-2], canvas.shape[-1]), grid, positions), shape)[0]
        return Sampled(values, torch.from_numpy(positions.inside_y & positions.inside_x).view(shape))


def cell_matrix(matrix: ArrayLike | Tensor, view: tuple[int, int], cells: tuple[int, int], *, align_corners: bool) -> np.ndarray:
    """(2, 3) float64: takes a cell (x, y, 1) of a network's output of `cells` (h, w) to source pixels, where `matrix` takes the
    pixels of the network's input of `view` (height, width) there.

    `align_corners`: True if the first and last cell lie on the first and last pixel of the input, as the networks of this project
    have them; False if cells are areas of equal size. Raises ParamsError.
    """
    pixels = np.eye(3)
    for axis, side, count in zip((1, 0), _size("view", view), _size("cells", cells), strict=True):
        step = (side - 1) / max(count - 1, 1) if align_corners else side / count
        pixels[axis, axis], pixels[axis, 2] = step, 0 if align_corners else 0.5 * step - 0.5
    return _checked(matrix) @ pixels


def target_grids(extents: np.ndarray, layout: Layout) -> tuple[Grid, Grid]:
    """Where the cells of a cache's logits and of its region embeddings lie in images of these `extents` (B, 4)."""
    sizes, frames = extents[:, :2], extents[:, 2:]
    regions = -(-sizes // layout.region_stride)
    return (
        Grid(frames // layout.stride, frames, align_corners=True),
        Grid(regions, regions * layout.region_stride, align_corners=False),
    )


def _without_canvas(canvas_Chw: Tensor, grid: Grid) -> Tensor:
    rows, columns = grid.cells[0].tolist()
    return canvas_Chw[:, :rows, :columns]


def _checked(matrix: ArrayLike | Tensor) -> np.ndarray:
    try:
        array = np.asarray(matrix.detach().double().cpu() if isinstance(matrix, Tensor) else matrix, np.float64)
    except (TypeError, ValueError):
        raise ParamsError(f"matrix: {matrix!r} is not a matrix of numbers; write (2, 3)") from None
    if array.shape != (2, 3):
        raise ParamsError(f"matrix: has the shape {array.shape}; write (2, 3), the first two rows of an affine map")
    if not (np.abs(array) < _LARGEST).all():
        raise ParamsError(f"matrix: {array.tolist()} is not finite, or far beyond any image; write a map to source pixels")
    return array


def _size(name: str, size: Sequence[int]) -> tuple[int, int]:
    try:
        height, width = map(operator.index, size)
    except (TypeError, ValueError):
        height = width = 0
    if min(height, width) < 1:
        raise ParamsError(f"{name}: {size} is not a height and a width in pixels")
    return height, width
