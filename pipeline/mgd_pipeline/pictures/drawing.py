"""matplotlib as every picture uses it: without a screen, without the user's matplotlibrc, with names as plain text."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OWN_FONT = "DejaVu Sans"
"""Comes with matplotlib; has Latin, Greek, Cyrillic, Hebrew and Arabic letters."""
_LEGEND_POINTS = 8
_LEGEND_COLUMNS = 6
_LONGEST_LABEL = 40
_ROW_INCHES = 0.17


def load_matplotlib() -> Any:
    """The module. Notebooks set `MPLBACKEND`; it is ignored while importing, because no picture here is shown."""
    wanted = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if wanted is not None:
            os.environ["MPLBACKEND"] = wanted
    if wanted is not None:
        with contextlib.suppress(ValueError):  # a backend that is not installed
            matplotlib.rcParams["backend"] = wanted
    return matplotlib


@contextlib.contextmanager
def plain_style(texts: Sequence[str]) -> Iterator[Lettering]:
    """A context in which matplotlib has its own defaults, reads no text as mathematics, and uses fonts that can write `texts`."""
    load_matplotlib()
    from matplotlib import style

    lettering = Lettering("".join(texts))
    with style.context(["default", {"text.parse_math": False, "text.usetex": False, "font.family": lettering.families}]):
        yield lettering


class Lettering:
    """The fonts of a picture, and the letters that they have."""

    def __init__(self, text: str) -> None:
        self.families, self._letters = _fonts(frozenset(text))

    def line(self, text: str, limit: int = _LONGEST_LABEL) -> str:
        """A text in one line, at most `limit` letters wide; ? stands for letters that no font has."""
        return _shortened("".join(letter if letter in self._letters else "?" for letter in " ".join(text.split())), limit)

    def name(self, text: str, instead: str) -> str:
        """A name, or `instead` if no font has all of its letters."""
        line = " ".join(text.split())
        return _shortened(line, _LONGEST_LABEL) if line and self._letters.issuperset(line) else instead


def add_legend(figure: Figure, colours: Sequence[Sequence[int]], labels: Sequence[str]) -> None:
    """A legend below everything else; the figure grows by the legend's rows beyond the first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import Patch

    if not labels:
        return
    measure = FigureCanvasAgg(figure).get_renderer().get_text_width_height_descent
    widest = max(measure(label, FontProperties(size=_LEGEND_POINTS), False)[0] for label in labels) / figure.dpi
    width, height = figure.get_size_inches()
    around = 5 * _LEGEND_POINTS / 72  # patch, gap, and space between columns
    columns = min(len(labels), _LEGEND_COLUMNS, max(1, int(width / (widest + around))))
    figure.set_size_inches(width, height + (-(-len(labels) // columns) - 1) * _ROW_INCHES)
    handles = [Patch(color="#{:02x}{:02x}{:02x}".format(*colour)) for colour in colours]
    legend = figure.legend(
        handles, ["-"] * len(labels), loc="outside lower center", ncols=columns, fontsize=_LEGEND_POINTS, frameon=False
    )
    # Given as labels, names with a leading underscore would be left out.
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)


def png_of_figure(figure: Figure, **options: Any) -> bytes:
    """A figure as PNG; `options` go to `Figure.savefig`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **options)
    return buffer.getvalue()


def _shortened(text: str, limit: int) -> str:
    """At most `limit` letters wide, without the middle; East Asian letters count as two."""
    if sum(map(_width, text)) <= limit:
        return text
    return f"{_start(text, limit // 2)}…{_start(text[::-1], (limit - 1) // 2)[::-1]}"


def _start(text: str, limit: int) -> str:
    return "".join(letter for letter, end in zip(text, accumulate(map(_width, text)), strict=True) if end <= limit)


def _width(letter: str) -> int:
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def _new_fonts() -> Iterator[Any]:
    """The fonts of this machine that matplotlib's list lacks, as entries of that list."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    for path in sorted({*findSystemFonts()} - {font.fname for font in fontManager.ttflist}):
        count = len(fontManager.ttflist)
        with contextlib.suppress(OSError, RuntimeError, NotImplementedError):  # no font, or one of bitmaps
            fontManager.addfont(path)
        yield from fontManager.ttflist[count:]


@functools.lru_cache(maxsize=64)
def _fonts(wanted: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    """Families of fonts, matplotlib's own and as few more as needed, and which of the `wanted` letters they have.

    matplotlib keeps a list of the fonts that it once found; fonts that were installed later are added here.
    """
    from matplotlib import __version_info__ as version
    from matplotlib.font_manager import FontProperties, fontManager, get_font

    def letters(path: str) -> frozenset[str]:
        return frozenset(letter for letter in wanted if ord(letter) in get_font(path).get_charmap())

    if version < (3, 11):  # it neither joins letters nor writes from right to left
        wanted = frozenset(letter for letter in wanted if unicodedata.bidirectional(letter) not in ("R", "AL"))
    families, covered = [_OWN_FONT], letters(fontManager.findfont(FontProperties(family=_OWN_FONT)))
    for font in chain(sorted(fontManager.ttflist, key=lambda font: (font.name, font.fname)), _new_fonts()):
        if wanted <= covered:
            break
        upright = font.style == "normal" and font.weight in (400, "normal", "regular") and font.stretch == "normal"
        # Apple's and matplotlib's Last Resort fonts have a box for every letter.
        if upright and "lastresort" not in font.name.replace(" ", "").lower() and (more := letters(font.fname) - covered):
            families.append(font.name)
            covered |= more
    return families, covered
