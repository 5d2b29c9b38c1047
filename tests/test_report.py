"""The report as a reader gets it: whole without a network, with the numbers of the metrics files, honest about what is missing."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from importlib.resources import files
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from conftest import TINY
from mgd_pipeline.errors import DataError
from mgd_pipeline.images import read_mask
from mgd_pipeline.manifest import read_manifest, write_manifest
from mgd_pipeline.metrics import confusion_matrix, mean_iou
from mgd_pipeline.weights import read_metadata, read_state_dict, save_weights
from mgd_stages import report_figures as figures
from mgd_stages.class_tables import class_tsv, confusion_csv, read_class_tsv, read_confusion
from mgd_stages.cli import app
from mgd_stages.pictures import LONG_SIDE, Predicted, read_masks, to_look_at, write_masks
from mgd_stages.project import Project, open_project
from mgd_stages.report import describe, report

VOID = {"meta", "br", "img", "link", "input", "hr", "area", "base", "col", "embed", "source", "track", "wbr"}
TRAININGS = ["train-student-distilled", "train-student-supervised", "train-teacher-deep", "train-teacher-wide"]
STUDENT, TWIN = "distilled student", "student without teachers"


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = field(default_factory=list)

    def all(self, tag: str, **wanted: str) -> list[Element]:
        """Elements of a tag below this one, in the order of the page; `class_` names one of several classes."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                has = {**child.attributes, "class_": child.attributes.get("class", "").split()}
                fits = all(value in has["class_"] if key == "class_" else has.get(key) == value for key, value in wanted.items())
                found += [child] * (child.tag == tag and fits) + child.all(tag, **wanted)
        return found

    @property
    def text(self) -> str:
        return " ".join("".join(child if isinstance(child, str) else f"{child.text} " for child in self.children).split())

    @property
    def number(self) -> float | None:
        """The exact value of the one number in it; None where it shows a dash."""
        found = self.all("data")
        assert len(found) == 1 or self.text == "–", self.text
        return float(found[0].attributes["value"]) if found else None


class Page(HTMLParser):
    """A parser that forgives nothing: every element is closed, in order, and no attribute is there twice."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(text)
        self.close()
        assert len(self.open) == 1, f"never closed: {self.open[-1].tag}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({key for key, _ in attrs}) == len(attrs), f"{tag}: {attrs}"
        element = Element(tag, {key: value or "" for key, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def page_of(project: Project) -> Element:
    return Page(report(project).read_text(encoding="utf-8")).root


def section(page: Element, name: str) -> Element:
    (found,) = page.all("section", id=name)
    return found


def table(part: Element, label: str) -> dict[str, dict[str, Element]]:
    """The rows of a table by their first cell, and their cells by the text at the head of the column."""
    (region,) = part.all("div", **{"aria-label": label})
    heads = [head.text for head in region.all("thead")[0].all("th")]
    rows = {}
    for row in region.all("tbody")[0].all("tr"):
        cells = [child for child in row.children if isinstance(child, Element)]
        rows["".join(child for child in cells[0].children if isinstance(child, str)).strip()] = dict(zip(heads, cells, strict=True))
    return rows


def measured(project: Project, name: str) -> dict:
    return json.loads((project.results / name).read_text())


# --- the page itself --------------------------------------------------------------------------------------------------


def test_the_demo_ends_with_a_page_that_fetches_nothing(finished_project: Path) -> None:
    path = finished_project / "data/results/report.html"
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and path.stat().st_size < 5e6
    page = Page(text).root
    (html,) = page.all("html")
    assert html.attributes["lang"] == "en"
    for tag in ("script", "link", "iframe", "object", "embed", "base", "form"):
        assert not page.all(tag), tag
    ids = {value for element in everything(page) if (value := element.attributes.get("id"))}
    for element in everything(page):
        for key, value in element.attributes.items():
            assert not key.startswith("on"), f"{element.tag} {key}"
            if key in ("src", "href", "xlink:href", "srcset", "poster", "action", "data"):
                inside = value.removeprefix("#") in ids if value.startswith("#") else value.startswith("data:image/webp;base64,")
                assert inside or (element.tag, value) == ("a", "https://arxiv.org/abs/2208.10169"), f"{element.tag} {value[:80]}"
            assert key in ("href", "content", "xmlns") or "//" not in value, f"{element.tag} {key}={value[:80]}"
    (style,) = page.all("style")
    assert not re.search(r"url\(|@import|//", style.text)
    policy = next(meta for meta in page.all("meta") if meta.attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy.attributes["content"].startswith("default-src 'none'; img-src data:;")


def everything(element: Element) -> list[Element]:
    found = []
    for child in element.children:
        if isinstance(child, Element):
            found += [child, *everything(child)]
    return found


def test_it_is_read_in_order_by_everybody(finished_project: Path) -> None:
    page = Page((finished_project / "data/results/report.html").read_text(encoding="utf-8")).root
    levels = [int(element.tag[1]) for element in everything(page) if re.fullmatch(r"h[1-6]", element.tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), levels
    assert [link.attributes["href"] for link in page.all("nav")[0].all("a")] == [
        f"#{part.attributes['id']}" for part in page.all("section")
    ]
    for part in page.all("section"):
        heading, note = part.all("h2")[0], part.all("p", class_="note")[0]
        assert heading.text and note.text.endswith("."), "each section says how to read it"
    for figure in page.all("figure"):
        assert figure.all("figcaption") or figure.all("th"), "each figure has a title"
    pictures = [svg for svg in page.all("svg") if svg.attributes.get("aria-hidden") != "true"]
    assert len(pictures) > 10
    for svg in pictures:
        first = svg.children[0]
        assert svg.attributes["role"] == "img" and isinstance(first, Element) and first.tag == "title" and len(first.text) > 5
    for chart in page.all("svg", class_="chart"):
        assert "optimiser step" in chart.text
    for figure in page.all("section", id="curves")[0].all("figure"):
        names = [line.all("title")[0].text for line in figure.all("polyline")]
        assert names and names == [item.text for item in figure.all("li")], "the legend names the lines"
        assert re.search(r"nats|cosines|logits|no unit", figure.all("figcaption")[0].text), "each has a unit"
    for figure in page.all("section", id="pictures")[0].all("figure"):
        places = {item.all("span", class_="chip")[0].text for item in figure.all("li")}
        assert {number.text for number in figure.all("text")} <= places, "each number in a picture is in its legend"
        assert [panel.text for panel in figure.all("div") if "class" not in panel.attributes]
    (bars,) = page.all("dl", class_="bars")
    legend = section(page, "classes").all("ul", class_="legend")[0]
    hatches = [key.attributes["class"] for key in legend.all("span")]
    assert len(set(hatches)) == len(legend.all("li")) == 4, "told apart without colours"
    for values in bars.all("dd"):
        assert [bar.attributes["title"].split(", ")[-1] for bar in values.all("div")] == [item.text for item in legend.all("li")]


def test_both_modes_can_be_read() -> None:
    """Text has a contrast of 4.5 on paper and cards, and lines and bars of 3 (WCAG 2.2, AA)."""
    style = (files("mgd_stages") / "templates/report.css").read_text()
    first, second, *_ = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    light, dark = (dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", part)) for part in (first, second))
    assert light.keys() == dark.keys()
    for mode in (light, dark):
        for ground in ("paper", "card"):
            assert all(contrast(mode[text], mode[ground]) >= 4.5 for text in ("ink", "soft", "link")), ground
        series = [mode[f"s{i}"] for i in range(len(figures.DASHES))]
        assert len(set(series)) == len(series) and all(contrast(colour, mode["paper"]) >= 3 for colour in series)


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


# --- its numbers ------------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_stages(project: Project) -> None:
    found = measured(project, "evaluation/metrics.json")
    # Results of different sizes, so that no number stands in for another.
    for i, key in enumerate(("distilled", "supervised")):
        found[key] |= {"miou": 0.4321 - 0.1 * i, "pixel_accuracy": 0.8 + 0.01 * i, "macs": 12_345_678 + i}
    (project.results / "evaluation/metrics.json").write_text(json.dumps(found))
    teachers = {name: measured(project, f"teachers/{name}.json") for name in ("wide", "deep")}
    page = page_of(project)
    assert page.all("h1")[0].text == "shapes: the distilled student reaches 43.2 % mIoU"
    facts = {fact.all("dt")[0].text: fact.all("dd")[0] for fact in page.all("dl", class_="facts")[0].all("div")}
    assert facts[STUDENT].number == 0.4321 and facts[f"against {TWIN}"].number == pytest.approx(0.1)
    assert facts[f"against {TWIN}"].text == "+10.0 points"
    assert facts["against teacher wide"].number == pytest.approx(0.4321 - teachers["wide"]["miou"])

    rows = table(section(page, "networks"), "Table of networks")
    for label, values in ((STUDENT, found["distilled"]), (TWIN, found["supervised"])):
        assert rows[label]["mIoU %"].number == values["miou"] and rows[label]["right pixels %"].number == values["pixel_accuracy"]
        assert rows[label]["mIoU %"].text == f"{100 * values['miou']:.1f}"
        assert rows[label]["parameters M"].number == values["parameters"] and rows[label]["calibration error %"].number is None
        assert rows[label]["work at 32x32 MMACs"].number == values["macs"] and rows[label]["work at 32x32 MMACs"].text == "12.3"
    for name, values in teachers.items():
        row = rows[f"teacher {name}"]
        assert row["mIoU %"].number == values["miou"] and row["calibration error %"].number == values["ece"]
        counts = read_confusion(project.results / f"teachers/{name}-confusion.csv")
        assert counts is not None
        assert row["right pixels %"].number == pytest.approx(np.trace(counts[1]) / counts[1].sum(), abs=1e-6)

    cells = list(csv.DictReader((project.results / "evaluation/confusion.csv").read_text().splitlines()))
    total: dict[str, int] = {}
    for cell in cells:
        total[cell["actual"]] = total.get(cell["actual"], 0) + int(cell["pixels"])
    confusion = table(section(page, "confusion"), "Confusion matrix")
    assert list(confusion) == list(total)
    for cell in cells:
        shown = confusion[cell["actual"]][cell["predicted"]].number
        assert shown == (pytest.approx(int(cell["pixels"]) / total[cell["actual"]]) if total[cell["actual"]] else None)

    classes = table(section(page, "classes"), "Table of classes")
    assert list(classes) == list(total)
    bars = section(page, "classes").all("dl", class_="bars")[0]
    lengths = dict(zip([name.text for name in bars.all("dt")], bars.all("dd"), strict=True))
    students = read_class_tsv(project.results / "evaluation/class_iou.tsv")
    labelled = {STUDENT: students["distilled"], TWIN: students["supervised"]}
    for name in teachers:
        counts = read_confusion(project.results / f"teachers/{name}-confusion.csv")
        assert counts is not None
        labelled[f"teacher {name}"] = {
            label: round(float(counts[1][i, i] / (counts[1][i].sum() + counts[1][:, i].sum() - counts[1][i, i])), 6)
            for i, label in enumerate(counts[0])
            if counts[1][i].sum() + counts[1][:, i].sum()
        }
    assert all(labelled.values()) and labelled[STUDENT] != labelled[TWIN]
    for name, row in classes.items():
        assert row["true pixels %"].number == pytest.approx(total[name] / sum(total.values()))
        ious = [values.get(name) for values in labelled.values()]
        student, twin = ious[:2]
        assert [row[f"{label} IoU, %"].number for label in labelled] == ious
        assert row["gain points"].number == (None if student is None or twin is None else pytest.approx(student - twin))
        drawn = [bar.all("i")[0].attributes["style"] if bar.all("i") else None for bar in lengths[name].all("div")]
        assert [style and float(style.split("--v:")[1].strip(";")) for style in drawn] == [
            None if iou is None else pytest.approx(100 * iou, abs=0.051) for iou in ious
        ]

    compared = measured(project, "compare-teachers/metrics.json")
    part = section(page, "disagreement")
    stored = table(part, "Table of stored targets")
    assert {name: row["mIoU, labelled %"].number for name, row in stored.items()} == {
        name: compared[name]["miou_labelled"] for name in ("wide", "deep")
    }
    pair = compared["wide and deep"]
    agreement = {name: row["wide and deep IoU, %"].number for name, row in table(part, "Table of agreement").items()}
    differing = project.results / "compare-teachers/disagreement/class_agreement.tsv"
    assert agreement and agreement == read_class_tsv(differing)["wide and deep"]
    assert any(f"on {100 * pair['same_class_share']:.1f} % of the stored cells" in p.text for p in part.all("p"))

    costs = table(section(page, "cost"), "Table of trainings")
    for label, folder, steps in zip((STUDENT, TWIN, "teacher deep"), TRAININGS, (4, 4, 3), strict=False):
        speed = measured(project, f"{folder}/speed.json")
        assert costs[label]["a step ms"].number == speed["seconds_per_step"] and costs[label]["steps"].number == steps
        assert costs[label]["together min"].number == pytest.approx(steps * speed["seconds_per_step"] / 60)
        assert costs[label]["memory at most MB"].number == speed["peak_memory_mb"]
    size = table(section(page, "cost"), "Table of files")["targets of wide"]["size MB"].number
    files_of = [path for path in project.targets("wide").rglob("*") if path.is_file() and path.name != "commit.json"]
    assert size == sum(path.stat().st_size for path in files_of)


def test_pictures_are_the_worst_and_best_with_what_everybody_says(project: Project) -> None:
    manifest = read_manifest(project.manifest, project.base)
    kept = read_masks(project.results / "evaluation/masks.parquet")
    for name in ("wide", "deep"):
        kept += read_masks(project.results / f"teachers/{name}-masks.parquet")
    root, held_out = project.base / manifest.root, manifest.split("test")
    truth = {row.image_id: read_mask(root / str(row.mask_path), np.asarray(manifest.lookup)) for row in held_out}
    score: dict[str, dict[str, float]] = {}
    for network in ("distilled", "supervised", "wide", "deep"):
        of_network = [found for found in kept if found.network == network]
        matrices = {found.image_id: confusion_matrix(truth[found.image_id], found.mask, 9) for found in of_network}
        assert matrices.keys() == truth.keys()
        assert {found.image_id: found.score for found in of_network} == pytest.approx({k: mean_iou(m) for k, m in matrices.items()})
        score[network] = {image_id: mean_iou(matrix) for image_id, matrix in matrices.items()}
        name = "evaluation/metrics.json" if network in ("distilled", "supervised") else f"teachers/{network}.json"
        total = measured(project, name).get(network, measured(project, name))["miou"]
        assert mean_iou(np.sum(list(matrices.values()), 0)) == pytest.approx(total, abs=1e-6), (
            "the masks are those that were measured"
        )

    two = open_project(project.base / "params.yaml", [*TINY, "evaluation.overlays=2"])
    part = section(page_of(two), "pictures")
    order = sorted(truth, key=lambda image_id: (score["distilled"][image_id], image_id))
    shown = part.all("figure")
    assert [figure.all("figcaption")[0].text for figure in shown] == [order[0], order[1], order[-1], order[-2]]
    for figure, image_id in zip(shown, [order[0], order[1], order[-1], order[-2]], strict=True):
        panels = figure.all("div", class_="panels")[0].children
        texts = [panel.text.split(": ", 2) for panel in panels if isinstance(panel, Element)]
        said = [(parts[-2].split()[-1] if len(parts) > 1 else parts[0], parts[-1]) for parts in texts]
        assert len(said) == 5
        for (_, value), network in zip(said[2:], ("distilled", "wide", "deep"), strict=True):
            assert value == f"{100 * score[network][image_id]:.1f} %"
    # Each panel is its mask over the image, pixel by pixel.
    (first, *_), by = shown, {found.network: found for found in kept if found.image_id == order[0]}
    pixels = [decoded(svg) for svg in first.all("svg", class_="panel")]
    assert all(picture.shape == (48, 72, 3) for picture in pixels)
    for picture, mask in zip(pixels[1:], [truth[order[0]], by["distilled"].mask, by["wide"].mask, by["deep"].mask], strict=True):
        assert (picture == figures_blend(pixels[0], mask, manifest.palette)).all()


def decoded(svg: Element) -> np.ndarray:
    data = svg.all("image")[0].attributes["href"].split(",")[1]
    return np.asarray(Image.open(BytesIO(b64decode(data))).convert("RGB"))


def figures_blend(image: np.ndarray, mask: np.ndarray, palette: tuple) -> np.ndarray:
    colours = np.asarray(palette, np.float32)[mask]
    return (image * np.float32(0.4) + colours * np.float32(0.6)).round().astype(np.uint8)


# --- what is not there ------------------------------------------------------------------------------------------------


def gone(*names: str) -> Callable[[Project], None]:
    def remove(project: Project) -> None:
        for name in names:
            path = project.base / "data" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def cut_masks(project: Project) -> None:
    path = project.results / "evaluation/masks.parquet"
    write_masks(path, [found._replace(mask=found.mask[:10]) for found in read_masks(path)], [(0, 0, 0)] * 9)


def without_twin(project: Project) -> None:
    metrics = measured(project, "evaluation/metrics.json")
    del metrics["supervised"]
    (project.results / "evaluation/metrics.json").write_text(json.dumps(metrics))
    project.student("supervised").unlink()


EVALUATION = "results/evaluation"
CURVES, SPEEDS = ([f"results/{name}/{what}" for name in TRAININGS] for what in ("plots", "speed.json"))


@pytest.mark.parametrize(
    ("change", "where", "sentence", "absent"),
    [
        (gone("results/compare-teachers"), "disagreement", "have not been compared: run mgd-pipeline compare-teachers", "table"),
        (
            gone("results/compare-teachers/disagreement"),
            "disagreement",
            "no masks to show: run mgd-pipeline compare-teachers",
            "svg",
        ),
        (gone(EVALUATION), "pictures", "no masks of the student (masks.parquet): run mgd-pipeline evaluate", "figure"),
        (gone(EVALUATION), "confusion", "no confusion matrix: run mgd-pipeline evaluate", "table"),
        (gone(f"{EVALUATION}/masks.parquet"), "pictures", "run mgd-pipeline evaluate", "svg"),
        (cut_masks, "pictures", "do not fit their masks", "svg"),
        (gone(*CURVES), "curves", "No training has left curves here", "svg"),
        (gone(*SPEEDS), "cost", "No training has run in this folder", ""),
        (gone("results/teachers"), "networks", "Teacher wide has not been measured: run mgd-pipeline precompute-teachers", ""),
        (gone("results/teachers/deep-masks.parquet"), "pictures", "Teacher deep is not in these pictures", ""),
        (gone("raw"), "pictures", "The data set cannot be read", "figure"),
        (gone("manifest"), "disagreement", "The data set cannot be read", "svg"),
        (gone("targets", "teachers", "students"), "provenance", "", ""),
        (
            without_twin,
            "networks",
            "run mgd-pipeline train-student --supervised-only",
            "",
        ),
    ],
)
def test_what_was_not_made_is_left_out_and_said(
    project: Project, change: Callable[[Project], None], where: str, sentence: str, absent: str
) -> None:
    change(project)
    page = page_of(project)
    assert str(project.base) not in page.text, "a member's folder is nobody else's business"
    part = section(page, where)
    said = [line.text.replace("` ", "") for line in part.all("p", class_="missing")]
    assert not sentence or any(sentence in re.sub(r"\s+([,.;:)])", r"\1", line) for line in said), said
    assert not absent or not part.all(absent)


def test_stores_of_another_training_are_told(project: Project) -> None:
    shutil.rmtree(project.targets("deep"))
    rows = [row.text for row in section(page_of(project), "provenance").all("tr")]
    assert any("targets of deep not here" in row and "precompute-teachers" in row for row in rows)
    assert any("trained from targets of deep" in row and "not the store that is here now" in row for row in rows)
    assert any("trained from targets of wide" in row and row.endswith("the store that is here") for row in rows)
    path = project.student("distilled")
    notes = read_metadata(path)
    notes["teachers"]["wide"][1] += 1
    save_weights(path, read_state_dict(path), notes)
    rows = [row.text for row in section(page_of(project), "provenance").all("tr")]
    assert any("trained from targets of wide" in row and "not the store that is here now" in row for row in rows)


def test_without_any_result_it_is_one_line_and_no_page(project: Project) -> None:
    shutil.rmtree(project.results)
    with pytest.raises(DataError, match=r"holds no results yet; run `dvc repro`"):
        report(project)
    done = CliRunner().invoke(app, ["report", "--config", str(project.base / "params.yaml")])
    assert done.exit_code == 1 and len(done.stderr.splitlines()) == 1 and "`mgd-pipeline evaluate`" in done.stderr
    assert not project.results.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("evaluation/metrics.json", "{"),
        ("evaluation/metrics.json", "[1]"),
        ("evaluation/confusion.csv", "actual,predicted,pixels\na,b,1\n"),
        ("evaluation/class_iou.tsv", "class\tdistilled\nring\tmany\n"),
        ("teachers/wide-masks.parquet", "PAR1"),
        ("train-student-distilled/plots/loss.tsv", "step\tloss\n10\n"),
    ],
)
def test_damaged_results_are_named(project: Project, name: str, content: str) -> None:
    (project.results / name).write_text(content)
    before = (project.results / "report.html").read_bytes()
    with pytest.raises(DataError, match=re.escape(name)):
        report(project)
    assert (project.results / "report.html").read_bytes() == before, "and the page is as it was"


# --- names and bytes --------------------------------------------------------------------------------------------------

ODD = '<script>alert("1")</script> & Möwe, süß'


def test_odd_names_are_text(project: Project) -> None:
    """Of a class and of an image: shown as they are, and no part of the page."""
    manifest = read_manifest(project.manifest, project.base)
    ring = manifest.classes.index("ring")
    odd_id = 'ä<img src=x onerror="y">&amp;'
    chosen = manifest.split("test")
    renamed = {row.image_id: f"{odd_id}{i}" for i, row in enumerate(chosen)}
    rows = {renamed.get(key, key): replace(row, image_id=renamed.get(key, key)) for key, row in manifest.rows.items()}
    classes = (*manifest.classes[:ring], ODD, *manifest.classes[ring + 1 :])
    write_manifest(replace(manifest, classes=classes, rows=rows), project.manifest)
    for path in [*project.results.rglob("*.json"), *project.results.rglob("*.csv")]:
        text = path.read_text()
        quoted = '"' + ODD.replace('"', '""') + '"'
        path.write_text(text.replace('"ring"', json.dumps(ODD)) if path.suffix == ".json" else re.sub(r"\bring\b", quoted, text))
    for path in [project.results / "evaluation/masks.parquet", *project.results.glob("teachers/*.parquet")]:
        masks = [found._replace(image_id=renamed[found.image_id]) for found in read_masks(path)]
        write_masks(path, masks, manifest.palette)
    page = page_of(project)
    assert not page.all("script") and not page.all("img")
    assert ODD in table(section(page, "classes"), "Table of classes")
    assert ODD in table(section(page, "confusion"), "Confusion matrix")[ODD]
    captions = [figure.all("figcaption")[0].text for figure in section(page, "pictures").all("figure")]
    assert len(captions) == 2 and all(re.fullmatch(re.escape(odd_id) + r"\d", caption) for caption in captions)
    titles = [svg.all("title")[0].text for svg in section(page, "pictures").all("svg")]
    assert all(title.startswith((odd_id, f"image {odd_id}")) for title in titles)


def test_a_confusion_matrix_comes_back_whatever_its_classes_are_called(tmp_path: Path) -> None:
    names, counts = ["a,b", 'c "d"', "e"], np.arange(9).reshape(3, 3)
    (tmp_path / "confusion.csv").write_bytes(confusion_csv(counts, names))
    found = read_confusion(tmp_path / "confusion.csv")
    assert found is not None and found[0] == names and (found[1] == counts).all()
    assert confusion_csv(counts[2:, 2:], ["e"]) == b"actual,predicted,pixels\ne,e,8\n", "as DVC plots it"


def test_a_table_of_classes_comes_back_whatever_they_are_called(tmp_path: Path) -> None:
    columns = {"distilled": {"a\tb": 0.123456, 'c "d"': 0.0}, "supervised": {'c "d"': 1.0}}
    (tmp_path / "class_iou.tsv").write_bytes(class_tsv(columns, ["a\tb", 'c "d"', "absent"]))
    assert read_class_tsv(tmp_path / "class_iou.tsv") == columns
    assert class_tsv({"wide": {"e": 0.5}}, ["e", "f"]) == b"class\twide\ne\t50.0000\nf\t\n", "as DVC plots it"
    assert read_class_tsv(tmp_path / "none.tsv") == {}


def test_same_results_same_bytes(project: Project) -> None:
    """Whatever the clock, the times of the files, the order of sets and the folder from which it is called."""
    before = (project.results / "report.html").read_bytes()
    assert report(project).read_bytes() == before, "as the demo made it"
    (project.results / "report.html").unlink()
    for path in project.base.rglob("*"):
        os.utime(path, (1e9, 1e9))
    command = [sys.executable, "-m", "mgd_stages.cli", "report", "--config", str(project.base / "params.yaml")]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    subprocess.run(command, cwd="/", env=environment, check=True, capture_output=True)
    assert (project.results / "report.html").read_bytes() == before


def test_the_page_goes_where_it_is_sent(project: Project, tmp_path: Path) -> None:
    output = tmp_path / "for you/page.html"
    done = CliRunner().invoke(app, ["report", "--config", str(project.base / "params.yaml"), "--output", str(output)])
    assert done.exit_code == 0 and str(output) in done.stdout
    page = Page(output.read_text(encoding="utf-8")).root
    commands = section(page, "provenance").all("pre")[0]
    lines = "".join(child for child in commands.children if isinstance(child, str)).strip().splitlines()
    assert lines[0] == "mgd-pipeline prepare-data" and lines[-1] == f"mgd-pipeline report --output '{output}'"
    assert lines[-2] == "mgd-pipeline evaluate"


# --- figures ----------------------------------------------------------------------------------------------------------


def test_thinned_curves_are_means() -> None:
    points = [(float(i), float(i % 2)) for i in range(1, 251)]
    found = figures.thinned(points, 100)
    assert len(found) == 84 and found[0] == (2.0, pytest.approx(2 / 3)) and found[-1] == (250.0, 0.0)
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
    dashes = [line.attributes["stroke-dasharray"] for line in chart.all("polyline")]
    assert dashes[0] != dashes[1]
    assert Page(figures.line_chart("empty", "nats", [figures.Line("nothing", [], 0, 0)])).root.all("svg")


def test_numbers_are_read_on_every_colour_of_the_scale() -> None:
    found = [figures.heat(share) for share in np.linspace(0, 1, 101)]
    assert all(contrast(ink, ground) >= 4.5 for ground, ink in found)
    assert found[0][0] == "#440154" and found[-1][0] == "#fde725"


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
