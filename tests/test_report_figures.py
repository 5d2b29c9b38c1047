"""What the report is made of: figures drawn to scale, tables and masks that come back as they were."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from mgd_stages.reports import figures
from mgd_stages.reports.sections import describe
from mgd_stages.run.class_tables import class_tsv, confusion_csv, read_class_tsv
from mgd_stages.run.pictures import LONG_SIDE, Predicted, read_masks, to_look_at, write_masks
from pages import Page, contrast


def test_tables_are_written_as_dvc_plots_them() -> None:
    assert confusion_csv(np.array([[8]]), ["e"]) == b"actual,predicted,pixels\ne,e,8\n"
    assert class_tsv({"wide": {"e": 0.5}}, ["e", "f"]) == b"class\twide\ne\t50.0000\nf\t\n"
    assert read_class_tsv(Path("none.tsv")) == {}


def test_thinned_curves_are_means() -> None:
    points = [(float(i), float(i % 2)) for i in range(1, 251)]
    thin = figures.thinned(points, 100)
    assert len(thin) == 84 and thin[0] == (2.0, pytest.approx(2 / 3)) and thin[-1] == (250.0, 0.0)
    assert figures.thinned(points[:7], 100) == points[:7] and figures.thinned([]) == []


def test_a_chart_draws_to_scale() -> None:
    rising = figures.Line("a < b", [(0, 1.0), (50, 2.0), (75, math.nan), (100, 3.0)], 0, 0)
    flat = figures.Line("flat", [(0, 2.0), (100, 2.0)], 1, 1)
    chart = Page(figures.line_chart("Loss & more", "nats", [rising, flat])).root
    assert chart.all("title")[0].text == "Loss & more, nats, over optimiser steps: a < b, flat"
    lines = [[tuple(map(float, point.split(","))) for point in line.attributes["points"].split()] for line in chart.all("polyline")]
    (x0, y0), (x1, y1), (x2, y2) = lines[0]
    assert (x1 - x0, y0 - y1) == pytest.approx((x2 - x1, y1 - y2), abs=0.11) and y2 < y0, "nan is left out, up is more"
    assert [y for _, y in lines[1]] == [y1, y1], "one scale for both"
    ticks = {text.text: float(text.attributes["y"]) for text in chart.all("text") if text.attributes["text-anchor"] == "end"}
    assert ticks["2"] - 4 == pytest.approx(y1, abs=0.11), "and the axis says which"
    one = Page(figures.line_chart("Loss", "nats", [figures.Line("short", [(4, 1.0)], 0, 0)])).root
    assert len(one.all("circle")) == 1 and not chart.all("circle"), "a line through one point has no length"
    dashes = [line.attributes["stroke-dasharray"] for line in chart.all("polyline")]
    assert dashes[0] != dashes[1]
    assert Page(figures.line_chart("empty", "nats", [figures.Line("nothing", [], 0, 0)])).root.all("svg")


def test_numbers_are_read_on_every_colour_of_the_scale() -> None:
    cells = [figures.heat(share) for share in np.linspace(0, 1, 101)]
    assert all(contrast(ink, ground) >= 4.5 for ground, ink in cells)
    assert cells[0][0] == "#440154" and cells[-1][0] == "#fde725"


def test_marks_lie_in_their_regions() -> None:
    """A ring's centre is not in the ring; tiny regions and void have no number."""
    y, x = np.mgrid[:60, :80]
    radius = np.hypot(y - 30, x - 30)
    mask = np.zeros((60, 80), np.uint8)
    mask[(radius > 15) & (radius < 25)] = 3
    mask[5, 70] = 2
    mask[40:, 65:] = 255
    marks = figures.region_marks(mask)
    assert sorted(value for value, _, _ in marks) == [0, 0, 3], "inside the ring, outside of it, and the ring"
    for value, column, row in marks:
        assert mask[int(row), int(column)] == value


def test_large_pictures_are_small_and_keep_their_classes() -> None:
    mask = np.zeros((1000, 2000), np.uint8)
    mask[:, 1000:] = 200
    assert to_look_at(mask).shape == (256, 512) and set(np.unique(to_look_at(mask))) == {0, 200}
    noise = np.random.default_rng(0).integers(0, 255, (1000, 2000, 3), np.uint8)
    assert len(figures.panel(to_look_at(noise), "noise")) < 200_000 and max(to_look_at(noise).shape) == LONG_SIDE
    assert to_look_at(noise[:100, :512]) is not None and to_look_at(noise[:100, :512]).shape == (100, 512, 3)


def test_masks_come_back_as_they_were(tmp_path: Path) -> None:
    masks = [
        Predicted("wide", "ä/1", 0.25, np.array([[0, 1, 255]], np.uint8)),
        Predicted("deep", "2", math.nan, np.zeros((2, 3), np.uint8)),
    ]
    for path in (tmp_path / "a.parquet", tmp_path / "b.parquet"):
        write_masks(path, masks, [(0, 0, 0), (9, 9, 9)])
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    first, second = read_masks(tmp_path / "a.parquet")
    assert first[:3] == ("wide", "ä/1", 0.25) and first.mask.tolist() == [[0, 1, 255]]
    assert second[:2] == ("deep", "2") and math.isnan(second.score) and second.mask.shape == (2, 3)
    assert read_masks(tmp_path / "none.parquet") == []


def test_a_mask_in_words() -> None:
    assert describe(np.array([[1, 1, 0, 255]], np.uint8), ["sky", "road"]) == "road 50 %, sky 25 %"
    assert describe(np.full((2, 2), 255, np.uint8), ["sky", "road"]) == "no class"
