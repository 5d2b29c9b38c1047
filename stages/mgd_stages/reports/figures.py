"""Figures of the report as pure functions from numbers to SVG. Text is escaped; colours are the page's CSS variables.

No figure depends on colour alone: lines have dashes, bars hatches, pictures class ids, and cells of a matrix their value.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import numpy as np
from markupsafe import Markup
from PIL import Image

from mgd_pipeline.data.images import IGNORE
from mgd_pipeline.pictures.drawing import load_matplotlib

DASHES = ("none", "7 3", "2 2.5", "9 3 2 3", "1 4", "4 2 1 2 1 2")
"""Dashes of lines by the number of the series; its colours are `--s0` ... of the page."""
_WIDTH, _HEIGHT = 400, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 20, 10, 40
_SMALLEST_REGION = 0.01
"""Least share of a picture for a region to get the id of its class."""


class Line(NamedTuple):
    label: str
    points: list[tuple[float, float]]
    """(step, value)"""
    series: int
    """Number of its colour."""
    dash: int
    """Number of its dashes."""


def _tags(form: str, rows: Iterable[Sequence[object]]) -> Markup:
    """The elements that one form makes of rows of values."""
    return Markup("").join(Markup(form).format(*row) for row in rows)


def thinned(points: Sequence[tuple[float, float]], limit: int = 100) -> list[tuple[float, float]]:
    """At most `limit` points, each the mean of equally many neighbours; the last one may have fewer."""
    size = -(-len(points) // limit) or 1
    values = np.asarray(points, np.float64).reshape(-1, 2)
    return [tuple(values[start : start + size].mean(0).tolist()) for start in range(0, len(values), size)]


def line_chart(title: str, unit: str, lines: Sequence[Line]) -> Markup:
    """Curves over optimiser steps from 0; points that are not finite are left out."""
    load_matplotlib()
    from matplotlib.ticker import MaxNLocator

    drawn = [line._replace(points=[point for point in thinned(line.points) if np.isfinite(point).all()]) for line in lines]
    steps_of, values_of = zip(*[point for line in drawn for point in line.points] or [(1.0, 1.0)], strict=True)
    steps = MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]).tick_values(0, max(steps_of))
    values = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(min(0.0, *values_of), max(values_of))

    def x(step: float) -> float:
        return round(_LEFT + (step - steps[0]) / ((steps[-1] - steps[0]) or 1) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(value: float) -> float:
        return round(_TOP + (values[-1] - value) / ((values[-1] - values[0]) or 1) * (_HEIGHT - _TOP - _BOTTOM), 1)

    grid = '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/><text x="{}" y="{}" text-anchor="end">{:g}</text>'
    axis = '<text x="{}" y="{}" text-anchor="middle">{:g}</text>'
    curve = '<polyline class="line" style="stroke:var(--s{})" stroke-dasharray="{}" points="{}"><title>{}</title></polyline>'
    dot = '<circle class="dot" style="fill:var(--s{})" cx="{}" cy="{}" r="3"/>'  # a line through one point has no length
    places = [(line, [(x(step), y(value)) for step, value in line.points]) for line in drawn]
    levels = [(y(tick), float(tick)) for tick in values]
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img"><title>{}</title>{}{}'
        '<text x="{}" y="{}" text-anchor="middle">optimiser step</text>{}{}</svg>'
    ).format(
        *(_WIDTH, _HEIGHT, f"{title}, {unit}, over optimiser steps: {', '.join(line.label for line in lines)}"),
        _tags(grid, ((_LEFT, _WIDTH - _RIGHT, at, at, _LEFT - 6, round(at + 4, 1), round(tick, 9)) for at, tick in levels)),
        _tags(axis, ((x(tick), _HEIGHT - _BOTTOM + 16, float(tick)) for tick in steps)),
        *((_LEFT + _WIDTH - _RIGHT) // 2, _HEIGHT - 6),
        _tags(curve, ((one.series, DASHES[one.dash], " ".join(f"{a},{b}" for a, b in at), one.label) for one, at in places)),
        _tags(dot, ((one.series, *at[0]) for one, at in places if len(at) == 1)),
    )


def line_swatch(series: int, dash: int) -> Markup:
    """A piece of a line, for legends."""
    return Markup(
        '<svg class="swatch" viewBox="0 0 30 10" aria-hidden="true">'
        '<line class="line" x1="1" x2="29" y1="5" y2="5" style="stroke:var(--s{})" stroke-dasharray="{}"/></svg>'
    ).format(series, DASHES[dash])


def heat(share: float) -> tuple[str, str]:
    """CSS colours of a cell, viridis over 0 to 1, and of text on it."""
    load_matplotlib()
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    colour = colormaps["viridis"](float(np.clip(share, 0, 1)))
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # Black or white, whichever has the larger contrast (WCAG 2).
    return to_hex(colour), "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"


def region_marks(mask: np.ndarray) -> list[tuple[int, float, float]]:
    """(class, x, y) of each region of one class that is not tiny: its class and its innermost pixel."""
    from scipy.ndimage import distance_transform_edt, label

    marks = []
    for value in np.unique(mask):
        regions, count = cast("tuple[np.ndarray, int]", label(mask == value))
        sizes = np.bincount(regions.ravel(), minlength=count + 1)
        for number in range(1, count + 1):
            if value != IGNORE and sizes[number] >= _SMALLEST_REGION * mask.size:
                inside = np.asarray(distance_transform_edt(np.pad(regions == number, 1)))
                row, column = np.unravel_index(int(np.argmax(inside)), inside.shape)
                marks.append((int(value), float(column) - 0.5, float(row) - 0.5))
    return marks


def panel(pixels: np.ndarray, alternative: str, mask: np.ndarray | None = None) -> Markup:
    """An (H, W, 3) uint8 picture as SVG with the ids of the classes of its mask, (H, W) uint8; nothing is fetched."""
    height, width = pixels.shape[:2]
    buffer = io.BytesIO()
    # Small pictures are stored exactly, large ones as photos.
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=height * width < 200 * 200, quality=82)
    size = width / 15
    marks = [] if mask is None else region_marks(mask)
    numbers = _tags('<text x="{:.1f}" y="{:.1f}">{}</text>', ((x, y + 0.36 * size, value) for value, x, y in marks))
    return Markup(
        '<svg class="panel" viewBox="0 0 {} {}" role="img" font-size="{:.1f}" stroke-width="{:.1f}"><title>{}</title>'
        '<image width="{}" height="{}" href="data:image/webp;base64,{}"/>{}</svg>'
    ).format(width, height, size, size / 4, alternative, width, height, base64.b64encode(buffer.getvalue()).decode(), numbers)
