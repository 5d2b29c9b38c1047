"""Scaling images down inside a network's graph, to the same pixels as Pillow, which training and `predict` use.

Every step is arithmetic on whole numbers for all sizes, so eager torch, a traced graph and ONNX Runtime give the same bits.

Letters: B batch, H W pixels of the image, h w pixels of the scaled one, T taps: source pixels that one target pixel looks at.
"""

from __future__ import annotations

import PIL
import torch
from torch import Tensor

_SHIFT = 2**22
"""Pillow's weights are whole multiples of 1 / 2**22."""
_DIGIT = 2**6
"""Weights are split into four digits of this base, so that float32 and TF32 hold the sums of each digit exactly: those of up
to 1,000 taps, where a side shrinks to a five-hundredth."""

_COLUMNS_OF_TALL_IMAGES_FIRST = int(PIL.__version__.split(".")[0]) >= 13
"""Pillow scales rows first, rounds, and scales columns. Since version 13 it scales columns first if an image loses more than twice
as many rows as columns: every eighth value differs by 1, and 0.2 % of a mask."""


def scale_down(images_B3HW: Tensor, long_side: int) -> Tensor:
    """(B, 3, H, W) float32 whole numbers in 0 to 255 to (B, 3, h, w), the size by `images.scaled_size`.

    Bilinear, antialiased and rounded, like `images.resize_image` with the installed Pillow. Images that are not larger pass
    through. Gradients ignore the rounding. Sizes may be symbolic: no step branches on them or divides a negative number.
    """
    return resample(images_B3HW, *scaled_lines(images_B3HW, long_side))


def scaled_lines(images_B3HW: Tensor, long_side: int) -> tuple[Tensor, Tensor]:
    """(h,) 0 to h - 1 and (w,) 0 to w - 1, int64: the rows and columns of the scaled image."""
    height, width = scaled_lengths(images_B3HW, long_side)
    return torch.arange(height, device=images_B3HW.device), torch.arange(width, device=images_B3HW.device)


def scaled_lengths(images_B3HW: Tensor, long_side: int) -> tuple[int, int]:
    """h and w, the height and width of the scaled image."""
    height, width = images_B3HW.shape[-2:]
    longest = _larger(height, width)
    kept = _smaller(longest, long_side)
    new_height, new_width = (_larger(1, (2 * side * kept + longest) // (2 * longest)) for side in (height, width))
    return new_height, new_width


def resample(images_B3HW: Tensor, rows_h: Tensor, columns_w: Tensor) -> Tensor:
    """(B, 3, H, W) to (B, 3, h, w), where h <= H and w <= W."""
    rows_first = _rows_first(images_B3HW, rows_h, columns_w)
    if not _COLUMNS_OF_TALL_IMAGES_FIRST:
        return rows_first
    columns_first = _rows_first(images_B3HW.transpose(2, 3), columns_w, rows_h).transpose(2, 3)
    (height, width), (new_height, new_width) = images_B3HW.shape[-2:], (rows_h.shape[0], columns_w.shape[0])
    more = torch.zeros(1, dtype=torch.int64, device=images_B3HW.device) + height - new_height - 2 * (width - new_width)
    return torch.where(more > 0, columns_first, rows_first)


def _rows_first(images_B3HW: Tensor, rows_h: Tensor, columns_w: Tensor) -> Tensor:
    """Like `resample`, always in this order: each row is scaled to w pixels, then each column to h."""
    batch, channels, height, width = images_B3HW.shape
    columns = _shrink(images_B3HW.permute(3, 0, 1, 2).reshape(width, -1), columns_w)
    rows = columns.reshape(-1, batch, channels, height).permute(3, 1, 2, 0).reshape(height, -1)
    return _shrink(rows, rows_h).reshape(-1, batch, channels, columns_w.shape[0]).permute(1, 2, 0, 3)


def _shrink(lines_LN: Tensor, places_l: Tensor) -> Tensor:
    """(L, N) to (l, N): weighted means of neighbouring lines, by a triangle as wide as two target lines."""
    source, target, place = lines_LN.shape[0], places_l.shape[0], places_l[:, None]
    # The triangle's left end; one `source` is added before the division and taken away after it.
    first = ((2 * place - 1) * source + target + 2 * source * target) // (2 * target) - source
    taps = first + torch.arange(2 * ((source + target - 1) // target) + 1, device=lines_LN.device)
    inside = (taps >= 0) & (taps < source)
    weights = (2 * source - ((2 * taps + 1) * target - (2 * place + 1) * source).abs()).clamp(min=0) * inside
    total = weights.sum(1, keepdim=True)
    carried, *larger = (_digits(weights, total) @ lines_LN[taps * inside]).unbind(1)
    mean = carried / _SHIFT
    for n, digit in enumerate(larger, 1):
        mean = mean + digit * (_DIGIT**n / _SHIFT)
        carried = digit + (carried / _DIGIT).floor()
    whole = _SHIFT // _DIGIT**3
    rounded = ((carried + whole // 2) / whole).floor()
    return mean + _smaller(1, source - target) * (rounded - mean).detach()


def _digits(weights_lT: Tensor, total_l1: Tensor) -> Tensor:
    """(l, 4, T) float32: the digits of _SHIFT * weights / total, halves rounded up, the smallest digit first.

    By long division, because OpenVINO computes whole numbers in 32 bits. The smallest digit may be a whole _DIGIT.
    """
    digits, rest = [], weights_lT
    for base in (_SHIFT // _DIGIT**3, _DIGIT, _DIGIT, _DIGIT):
        digits.append(base * rest // total_l1)
        rest = base * rest - digits[-1] * total_l1
    digits[-1] = digits[-1] + (2 * rest >= total_l1)
    return torch.stack(digits[::-1], 1).float()


def _larger(a: int, b: int) -> int:
    """max(a, b) that exporters can follow."""
    return torch.sym_max(a, b)  # pyright: ignore[reportReturnType]


def _smaller(a: int, b: int) -> int:
    """min(a, b) that exporters can follow."""
    return torch.sym_min(a, b)  # pyright: ignore[reportReturnType]
