"""The report as a reader gets it: whole without a network, with the numbers of the metrics files, honest about what is missing."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from conftest import TINY
from mgd_pipeline.data.images import read_mask
from mgd_pipeline.data.manifest import Skipped, read_manifest, write_manifest
from mgd_pipeline.errors import DataError
from mgd_pipeline.metrics import confusion_matrix, mean_iou
from mgd_pipeline.networks.weights import read_metadata, read_state_dict, save_weights
from mgd_stages.cli import app
from mgd_stages.reports import figures
from mgd_stages.reports.page import report
from mgd_stages.run.class_tables import read_class_tsv, read_confusion
from mgd_stages.run.pictures import read_masks, write_masks
from mgd_stages.run.project import Project, open_project
from pages import Element, Page, contrast, everything, page_of, section, table

TRAININGS = ["train-student-distilled", "train-student-supervised", "train-teacher-deep", "train-teacher-wide"]
STUDENT, TWIN = "distilled student", "student without teachers"


def measured(project: Project, name: str) -> dict:
    return json.loads((project.results / name).read_text())


def confusion_of(project: Project, teacher: str) -> tuple[list[str], np.ndarray]:
    confusion = read_confusion(project.results / f"teachers/{teacher}-confusion.csv")
    assert confusion is not None
    return confusion


def lead(project: Project) -> str:
    return page_of(project).all("p")[0].text


def captions(project: Project) -> list[str]:
    """The images in the section of pictures, in its order."""
    return [figure.all("figcaption")[0].text for figure in section(page_of(project), "pictures").all("figure")]


def keep_masks(project: Project, image_id: str) -> None:
    """Leaves only the masks of one image."""
    for path in [project.results / "evaluation/masks.parquet", *project.results.glob("teachers/*.parquet")]:
        masks = [mask for mask in read_masks(path) if mask.image_id == image_id]
        write_masks(path, masks, read_manifest(project.manifest, project.base).palette)


def test_the_demo_ends_with_a_page_that_fetches_nothing(finished_project: Path) -> None:
    path = finished_project / "data/results/report.html"
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and path.stat().st_size < 5e6
    page = Page(text).root
    assert [html.attributes["lang"] for html in page.all("html")] == ["en"]
    assert not any(page.all(tag) for tag in ("script", "link", "iframe", "object", "embed", "base", "form"))
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
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy.attributes["content"].startswith("default-src 'none'; img-src data:;")


def test_it_is_read_in_order_by_everybody(finished_project: Path) -> None:
    page = Page((finished_project / "data/results/report.html").read_text(encoding="utf-8")).root
    levels = [int(element.tag[1]) for element in everything(page) if re.fullmatch(r"h[1-6]", element.tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), levels
    linked = [link.attributes["href"] for link in page.all("nav")[0].all("a")]
    assert linked == [f"#{part.attributes['id']}" for part in page.all("section")]
    for part in page.all("section"):
        assert part.all("h2")[0].text and part.all("p", class_="note")[0].text.endswith("."), "each section says how to read it"
    assert all(figure.all("figcaption") or figure.all("th") for figure in page.all("figure")), "each figure has a title"
    pictures = [svg for svg in page.all("svg") if svg.attributes.get("aria-hidden") != "true"]
    assert len(pictures) > 10
    for svg in pictures:
        first = svg.children[0]
        assert svg.attributes["role"] == "img" and isinstance(first, Element) and first.tag == "title" and len(first.text) > 5
    assert all("optimiser step" in chart.text for chart in page.all("svg", class_="chart"))
    for figure in section(page, "curves").all("figure"):
        names = [line.all("title")[0].text for line in figure.all("polyline")]
        assert names and names == [item.text for item in figure.all("li")], "the legend names the lines"
        assert re.search(r"nats|cosines|logits|no unit", figure.all("figcaption")[0].text), "each has a unit"
    for figure in section(page, "pictures").all("figure"):
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


def test_the_numbers_are_those_of_the_stages(project: Project) -> None:  # noqa: PLR0915 - one page, read section by section
    evaluated = measured(project, "evaluation/metrics.json")
    # Results of different sizes, so that no number stands in for another.
    for i, key in enumerate(("distilled", "supervised")):
        evaluated[key] |= {"miou": 0.4321 - 0.1 * i, "pixel_accuracy": 0.8 + 0.01 * i, "macs": 12_345_678 + i}
    (project.results / "evaluation/metrics.json").write_text(json.dumps(evaluated))
    teachers = {name: measured(project, f"teachers/{name}.json") for name in ("wide", "deep")}
    page = page_of(project)
    assert page.all("h1")[0].text == "shapes: the distilled student reaches 43.2 % mIoU"
    facts = {fact.all("dt")[0].text: fact.all("dd")[0] for fact in page.all("dl", class_="facts")[0].all("div")}
    assert "here on the test split (5 images), which nothing was trained on" in lead(project)
    assert facts[STUDENT].number == 0.4321 and facts[f"against {TWIN}"].number == pytest.approx(0.1)
    assert facts[f"against {TWIN}"].text == "+10.0 points"
    assert facts["against teacher wide"].number == pytest.approx(0.4321 - teachers["wide"]["miou"])

    rows = table(section(page, "networks"), "Table of networks")
    for label, values in ((STUDENT, evaluated["distilled"]), (TWIN, evaluated["supervised"])):
        assert rows[label]["mIoU %"].number == values["miou"] and rows[label]["right pixels %"].number == values["pixel_accuracy"]
        assert rows[label]["mIoU %"].text == f"{100 * values['miou']:.1f}"
        assert rows[label]["parameters M"].number == values["parameters"] and rows[label]["calibration error %"].number is None
        assert rows[label]["work at 32x32 MMACs"].number == values["macs"] and rows[label]["work at 32x32 MMACs"].text == "12.3"
    for name, values in teachers.items():
        row = rows[f"teacher {name}"]
        assert row["mIoU %"].number == values["miou"] and row["calibration error %"].number == values["ece"]
        counts = confusion_of(project, name)[1]
        assert row["right pixels %"].number == pytest.approx(np.trace(counts) / counts.sum(), abs=1e-6)

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
        names, counts = confusion_of(project, name)
        hits, union = np.diag(counts), counts.sum(0) + counts.sum(1) - np.diag(counts)
        labelled[f"teacher {name}"] = {label: round(float(hits[i] / union[i]), 6) for i, label in enumerate(names) if union[i]}
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
    files = ["evaluation/masks.parquet", "teachers/wide-masks.parquet", "teachers/deep-masks.parquet"]
    kept = [mask for name in files for mask in read_masks(project.results / name)]
    root, held_out = project.base / manifest.root, manifest.split("test")
    truth = {row.image_id: read_mask(root / str(row.mask_path), np.asarray(manifest.lookup)) for row in held_out}
    score: dict[str, dict[str, float]] = {}
    for network in ("distilled", "supervised", "wide", "deep"):
        of_network = [one for one in kept if one.network == network]
        matrices = {one.image_id: confusion_matrix(truth[one.image_id], one.mask, 9) for one in of_network}
        assert matrices.keys() == truth.keys()
        score[network] = {image_id: mean_iou(matrix) for image_id, matrix in matrices.items()}
        assert {one.image_id: one.score for one in of_network} == pytest.approx(score[network])
        name = "evaluation/metrics.json" if network in ("distilled", "supervised") else f"teachers/{network}.json"
        total = measured(project, name).get(network, measured(project, name))["miou"]
        whole = mean_iou(np.sum(list(matrices.values()), 0))
        assert whole == pytest.approx(total, abs=1e-6), "the masks are those that were measured"

    two = open_project(project.base / "params.yaml", [*TINY, "evaluation.overlays=2"])
    part = section(page_of(two), "pictures")
    order = sorted(truth, key=lambda image_id: (score["distilled"][image_id], image_id))
    shown = part.all("figure")
    assert captions(two) == [order[0], order[1], order[-1], order[-2]]
    for figure, image_id in zip(shown, captions(two), strict=True):
        panels = figure.all("div", class_="panels")[0].children
        texts = [panel.text.split(": ", 2) for panel in panels if isinstance(panel, Element)]
        said = [(parts[-2].split()[-1] if len(parts) > 1 else parts[0], parts[-1]) for parts in texts]
        assert len(said) == 6
        for (_, value), network in zip(said[2:], ("distilled", "supervised", "wide", "deep"), strict=True):
            assert value == f"{100 * score[network][image_id]:.1f} %"
    # Each panel is its mask over the image, pixel by pixel.
    first, by = shown[0], {one.network: one.mask for one in kept if one.image_id == order[0]}
    image, *panels = (decoded(svg) for svg in first.all("svg", class_="panel"))
    assert image.shape == (48, 72, 3)
    masks = [truth[order[0]], *(by[key] for key in ("distilled", "supervised", "wide", "deep"))]
    for picture, mask in zip(panels, masks, strict=True):
        colours = np.asarray(manifest.palette, np.float32)[mask]
        assert (picture == (image * np.float32(0.4) + colours * np.float32(0.6)).round()).all()
    # Ids of the masks, in the pictures, the legend and the table.
    for svg, mask in zip(first.all("svg", class_="panel")[1:3], masks, strict=False):
        assert {int(mark.text) for mark in svg.all("text")} == {value for value, _, _ in figures.region_marks(mask)}
    legend = {item.all("span")[0].text: item.text for item in first.all("li")}
    assert "0" in legend and all(legend[place] == f"{place} {manifest.classes[int(place)]}" for place in legend)
    ids = {name: row["id"].text for name, row in table(section(page_of(two), "classes"), "Table of classes").items()}
    assert ids == {name: str(place) for place, name in enumerate(manifest.classes)}


def test_few_images_are_shown_once(project: Project) -> None:
    """Of five images two are the worst and two the best; of one there is neither."""
    many = open_project(project.base / "params.yaml", [*TINY, "evaluation.overlays=3"])
    shown = captions(many)
    assert len(shown) == len(set(shown)) == 4
    keep_masks(project, shown[0])
    assert captions(many) == shown[:1]
    assert [heading.text for heading in section(page_of(many), "pictures").all("h3")] == ["The only image"]


def decoded(svg: Element) -> np.ndarray:
    data = svg.all("image")[0].attributes["href"].split(",")[1]
    return np.asarray(Image.open(BytesIO(b64decode(data))).convert("RGB"))


def gone(*names: str) -> Callable[[Project], None]:
    def remove(project: Project) -> None:
        for name in names:
            path = project.base / "data" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def cut_masks(project: Project) -> None:
    path = project.results / "evaluation/masks.parquet"
    write_masks(path, [mask._replace(mask=mask.mask[:10]) for mask in read_masks(path)], [(0, 0, 0)] * 9)


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
        (without_twin, "networks", "run mgd-pipeline train-student --supervised-only", ""),
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


def test_images_that_are_few_or_were_seen_in_training_are_said(project: Project) -> None:
    manifest = read_manifest(project.manifest, project.base)
    first, *others = manifest.split("test")
    write_manifest(replace(manifest, subsets={**manifest.subsets, first.image_id: "unlabelled"}), project.manifest)
    assert "the test split (5 images), 1 of which students saw without labels" in lead(project)
    kept = {key: row for key, row in manifest.rows.items() if row not in others}
    write_manifest(replace(manifest, rows=kept), project.manifest)
    keep_masks(project, first.image_id)
    assert "the test split (1 image), which nothing was trained on" in lead(project)
    shutil.rmtree(project.targets("deep"))  # a teacher from elsewhere may have seen the images
    assert "which no student was trained on; whether teacher deep learnt from them is not recorded" in lead(project)


def test_caches_of_another_training_are_told(project: Project) -> None:
    shutil.rmtree(project.targets("deep"))
    rows = [row.text for row in section(page_of(project), "provenance").all("tr")]
    assert any("targets of deep not here" in row and "precompute-teachers" in row for row in rows)
    assert any("trained from targets of deep" in row and "not the teacher cache that is here now" in row for row in rows)
    assert any("trained from targets of wide" in row and row.endswith("the teacher cache that is here") for row in rows)
    path = project.student("distilled")
    notes = read_metadata(path)
    notes["teachers"]["wide"][1] += 1
    save_weights(path, read_state_dict(path), notes)
    rows = [row.text for row in section(page_of(project), "provenance").all("tr")]
    assert any("trained from targets of wide" in row and "not the teacher cache that is here now" in row for row in rows)


def test_without_any_result_it_is_one_line_and_no_page(project: Project) -> None:
    shutil.rmtree(project.results)
    with pytest.raises(DataError, match=r"holds no results yet; run `dvc repro`"):
        report(project)
    done = CliRunner().invoke(app, ["report", "--config", str(project.base / "params.yaml")])
    assert done.exit_code == 1 and len(done.stderr.splitlines()) == 1 and "`mgd-pipeline evaluate`" in done.stderr
    assert not project.results.exists()


@pytest.mark.parametrize(
    ("name", "content", "command"),
    [
        ("evaluation/metrics.json", "{", "evaluate"),
        ("evaluation/metrics.json", "[1]", "evaluate"),
        ("evaluation/confusion.csv", "actual,predicted,pixels\na,b,1\n", "evaluate"),
        ("evaluation/class_iou.tsv", "class\tdistilled\nring\tmany\n", "evaluate"),
        ("evaluation/masks.parquet", "PAR1", "evaluate"),
        ("teachers/wide-masks.parquet", "PAR1", "precompute-teachers"),
        ("compare-teachers/disagreement/masks.parquet", "PAR1", "compare-teachers"),
        ("train-student-distilled/plots/loss.tsv", "step\tloss\n10\n", "train-student"),
        ("train-teacher-deep/plots/loss.tsv", "step\tloss\n10\n", "train-teacher --teacher deep"),
    ],
)
def test_damaged_results_are_named(project: Project, name: str, content: str, command: str) -> None:
    (project.results / name).write_text(content)
    before = (project.results / "report.html").read_bytes()
    with pytest.raises(DataError, match=f"{re.escape(name)}.*; remove it, and run `mgd-pipeline {command}`"):
        report(project)
    assert (project.results / "report.html").read_bytes() == before, "and the page is as it was"


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
        masks = [mask._replace(image_id=renamed[mask.image_id]) for mask in read_masks(path)]
        write_masks(path, masks, manifest.palette)
    page = page_of(project)
    assert not page.all("script") and not page.all("img")
    assert ODD in table(section(page, "classes"), "Table of classes")
    assert ODD in table(section(page, "confusion"), "Confusion matrix")[ODD]
    assert len(captions(project)) == 2
    assert all(re.fullmatch(re.escape(odd_id) + r"\d", caption) for caption in captions(project))
    titles = [svg.all("title")[0].text for svg in section(page, "pictures").all("svg")]
    assert all(title.startswith((odd_id, f"image {odd_id}")) for title in titles)


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


def test_images_that_were_left_out_are_named(project: Project) -> None:
    manifest = read_manifest(project.manifest, project.base)
    write_manifest(replace(manifest, skipped=(Skipped("bad_7", "images/train/bad_7.png", "cut off"),)), project.manifest)
    part = section(page_of(project), "provenance")
    assert "prepare-data --on-error skip" in part.all("pre")[0].text and "precompute-teachers --on-error" not in part.text
    assert any("left out 1 image: bad_7" in p.text for p in part.all("p"))
