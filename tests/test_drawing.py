"""Pictures take any name as plain text, need no screen, cover nothing with their legends, and have no boxes for letters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager, get_font
from PIL import Image

from mgd_pipeline.pictures import drawing, overlays
from mgd_pipeline.pictures.drawing import Lettering, plain_style
from mgd_pipeline.pictures.overlays import save_overlay

NAMES = [
    "$a$ and $b_$",
    "$\\frac_",
    "_background_",
    "100 % \\n",
    "line\nbreak\tand tab",
    "<b>&amp;\"'",
    "n" * 300,
    "مرحبا",
    "Größe",
]
FOREIGN = ["背景", "道路", "車", "क्षेत्र", "🚗", "\u0007bell"]


def draw(path: Path, names: list[str], mask: np.ndarray | None = None, title: str = "worst 1", panel: str = "truth") -> Figure:
    """Draws a mask, by default one with every class of `names`, and returns the figure as it was written."""
    made: list[Figure] = []
    write = overlays.png_of_figure

    def seen(figure: Figure) -> bytes:
        made.append(figure)
        return write(figure)

    mask = np.resize(np.arange(len(names), dtype=np.uint8), (60, 90)) if mask is None else mask
    palette = [[(37 * i) % 256, (91 * i) % 256, (53 * i) % 256] for i in range(len(names))]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(overlays, "png_of_figure", seen)
        save_overlay(path, np.zeros((*mask.shape, 3), np.uint8), {panel: mask}, names, palette, title=title)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
    return made[0]


def labels_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_names_are_plain_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Warnings are errors in all tests; matplotlib logs what it misses in fonts."""
    figure = draw(tmp_path / "a.png", NAMES, title="im_$A_$B/_100 %\\frac{", panel="teacher $x_$")
    labels = labels_of(figure)
    assert labels[:4] == NAMES[:4] and labels[4] == "line break and tab" and labels[5] == NAMES[5] and labels[7:] == NAMES[7:]
    assert labels[6].startswith("nnn") and "…" in labels[6] and len(labels[6]) <= 40
    assert figure.get_suptitle() == "im_$A_$B/_100 %\\frac{" and figure.axes[1].get_title() == "teacher $x_$"
    assert not caplog.records


def test_letters_that_no_font_has_are_told_by_the_id(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [*FOREIGN, "road"]
    known = Lettering("".join(names))
    figure = draw(tmp_path / "a.png", names, title="背景/im001")
    expected = [known.name(name, f"class {i}") for i, name in enumerate(names)]
    assert labels_of(figure) == expected and expected[-1] == "road" and expected[-2] == "class 5"
    assert not caplog.records


def test_an_installed_font_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A letter of a font that comes with matplotlib, in the private area, which its first font does not have."""
    first, other = (fontManager.findfont(FontProperties(family=name)) for name in ("DejaVu Sans", "STIXNonUnicode"))
    letter = chr(max(set(get_font(other).get_charmap()) - set(get_font(first).get_charmap())))
    with monkeypatch.context() as patched:
        patched.setattr(fontManager, "ttflist", [font for font in fontManager.ttflist if font.name == "DejaVu Sans"])
        drawing._fonts.cache_clear()
        patched.setattr(font_manager, "findSystemFonts", lambda: [])
        assert labels_of(draw(tmp_path / "before.png", [letter, "road"])) == ["class 0", "road"]
        # --- installed after matplotlib has made its list, among files that are no fonts
        (tmp_path / "no.ttf").write_bytes(b"nothing")
        patched.setattr(font_manager, "findSystemFonts", lambda: [other, str(tmp_path / "no.ttf"), str(tmp_path / "gone.ttf")])
        drawing._fonts.cache_clear()
        assert labels_of(draw(tmp_path / "new.png", [letter, "road"])) == [letter, "road"]
    drawing._fonts.cache_clear()
    assert labels_of(draw(tmp_path / "after.png", [letter, "road"])) == [letter, "road"]
    with plain_style([letter]) as lettering:
        assert lettering.families[0] == "DejaVu Sans" and len(lettering.families) == 2
    assert not caplog.records


@pytest.mark.parametrize(
    ("count", "name"),
    [(2, "class {}"), (21, "class {}"), (254, "class {}"), (60, "a name of more than forty letters which somebody chose, {}")],
)
def test_a_legend_covers_no_picture(tmp_path: Path, count: int, name: str) -> None:
    figure = draw(tmp_path / "a.png", [name.format(i) for i in range(count)])
    renderer = figure.canvas.get_renderer()  # pyright: ignore[reportAttributeAccessIssue]
    legend, whole = figure.legends[0].get_window_extent(renderer), figure.bbox
    assert legend.x0 >= whole.x0 and legend.x1 <= whole.x1 and legend.y0 >= whole.y0
    for axes in figure.axes:
        place = axes.get_window_extent(renderer)
        assert place.y0 >= legend.y1 and place.width > 250
    assert len(labels_of(figure)) == count


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (100, 1), (3, 200)])
def test_pictures_of_strips_single_pixels_and_void(tmp_path: Path, size: tuple[int, int]) -> None:
    draw(tmp_path / "a.png", ["sea", "land"], np.resize(np.arange(2, dtype=np.uint8), size))
    assert labels_of(draw(tmp_path / "b.png", ["sea", "land"], np.full(size, 255, np.uint8))) == ["void"]


@pytest.mark.parametrize("backend", ["TkAgg", "nonsense"])
def test_the_backend_of_a_notebook_decides_nothing(tmp_path: Path, backend: str) -> None:
    """Overlays, the study's plot and the report's figures; a matplotlibrc does not decide either."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.family: Nowhere\naxes.formatter.use_mathtext: True\n")
    script = (
        "import numpy as np, pyarrow as pa; from pathlib import Path; from mgd_pipeline.pictures.overlays import save_overlay\n"
        "from mgd_stages.study.results import plot, _SCHEMA; from mgd_stages.reports.figures import heat, line_chart\n"
        "heat(0.5); line_chart('loss', '', [])\n"
        "mask = np.zeros((4, 4), np.uint8)\n"
        "save_overlay(Path('a.png'), np.zeros((4, 4, 3), np.uint8), {'truth': mask}, ['$a_$'], [[1, 2, 3]], title='t')\n"
        "row = {'partition': '1/2', 'seed': 0, 'split': 'val', 'metric': 'miou', 'class': None, 'value': 0.5}\n"
        "plot(pa.Table.from_pylist([{**row, 'variant': v} for v in ('mgd', 'teacher wide')], schema=_SCHEMA), Path('b.png'))\n"
    )
    environment = {**{k: v for k, v in os.environ.items() if k != "DISPLAY"}, "MPLBACKEND": backend}
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert (tmp_path / "a.png").exists() and (tmp_path / "b.png").exists()
