"""The report as a reader gets it: whole without a network, with the numbers of the metrics files, honest about what is missing."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from dataclasses import replace
from importlib.resources import files
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from conftest import TINY, tiny_student
from mgd_pipeline.data.images import read_mask
from mgd_pipeline.data.manifest import Skipped, read_manifest, write_manifest
from mgd_pipeline.errors import DataError
from mgd_pipeline.exports.web import write_web
from mgd_pipeline.metrics import confusion_matrix, mean_iou
from mgd_pipeline.networks.weights import read_metadata, read_state_dict, save_weights
from mgd_pipeline.students.student import load_student
from mgd_stages.cli import app
from mgd_stages.reports import figures
from mgd_stages.reports.page import report
from mgd_stages.reports.sections import Network, confusion_rows, describe, headline
from mgd_stages.run.class_tables import class_tsv, confusion_csv, read_class_tsv, read_confusion
from mgd_stages.run.pictures import LONG_SIDE, Predicted, read_masks, to_look_at, write_masks
from mgd_stages.run.project import Project, open_project
from pages import Element, Page, contrast, everything, page_of, section, table

TRAININGS = ["train-student-distilled", "train-student-supervised", "train-teacher-deep", "train-teacher-wide"]
STUDENT, TWIN = "distilled student", "student without teachers"


@pytest.fixture(scope="module")
def demo_page(finished_project: Path) -> Element:
    """The page with which the demo ends."""
    return Page((finished_project / "data/results/report.html").read_text(encoding="utf-8")).root


def measured(project: Project, name: str) -> dict:
    return json.loads((project.results / name).read_text())


def mask_files(project: Project) -> list[Path]:
    return [project.results / "evaluation/masks.parquet", *sorted(project.results.glob("teachers/*.parquet"))]


def test_the_demo_ends_with_a_page_that_fetches_nothing(finished_project: Path, demo_page: Element) -> None:
    path = finished_project / "data/results/report.html"
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>") and path.stat().st_size < 5e6
    assert [html.attributes["lang"] for html in demo_page.all("html")] == ["en"]
    assert not any(demo_page.all(tag) for tag in ("script", "link", "iframe", "object", "embed", "base", "form"))
    ids = {value for element in everything(demo_page) if (value := element.attributes.get("id"))}
    for element in everything(demo_page):
        for key, value in element.attributes.items():
            assert not key.startswith("on"), f"{element.tag} {key}"
            if key in ("src", "href", "xlink:href", "srcset", "poster", "action", "data"):
                inside = value.removeprefix("#") in ids if value.startswith("#") else value.startswith("data:image/webp;base64,")
                assert inside or (element.tag, value) == ("a", "https://arxiv.org/abs/2208.10169"), f"{element.tag} {value[:80]}"
            assert key in ("href", "content", "xmlns") or "//" not in value, f"{element.tag} {key}={value[:80]}"
    (style,) = demo_page.all("style")
    assert not re.search(r"url\(|@import|//", style.text)
    (policy,) = demo_page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy.attributes["content"].startswith("default-src 'none'; img-src data:;")


def test_it_is_read_in_order_by_everybody(demo_page: Element) -> None:
    levels = [int(element.tag[1]) for element in everything(demo_page) if re.fullmatch(r"h[1-6]", element.tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), levels
    linked = [link.attributes["href"] for link in demo_page.all("nav")[0].all("a")]
    assert linked == [f"#{part.attributes['id']}" for part in demo_page.all("section")]
    assert all(part.all("p", class_="note")[0].text.endswith(".") for part in demo_page.all("section")), "each says how to read it"
    assert all(figure.all("figcaption") or figure.all("th") for figure in demo_page.all("figure")), "each figure has a title"
    pictures = [svg for svg in demo_page.all("svg") if svg.attributes.get("aria-hidden") != "true"]
    assert len(pictures) > 10 and all(len(svg.all("title")[0].text) > 5 and svg.attributes["role"] == "img" for svg in pictures)
    for figure in section(demo_page, "curves").all("figure"):
        names = [line.all("title")[0].text for line in figure.all("polyline")]
        assert names and names == [item.text for item in figure.all("li")], "the legend names the lines"
        assert re.search(r"nats|cosines|logits|no unit", figure.all("figcaption")[0].text), "each has a unit"
    legend = section(demo_page, "classes").all("ul", class_="legend")[0]
    hatches = [key.attributes["class"] for key in legend.all("span")]
    assert len(set(hatches)) == len(legend.all("li")) == 4, "told apart without colours"
    for values in demo_page.all("dl", class_="bars")[0].all("dd"):
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


def numbers(part: Element, label: str) -> dict[str, dict[str, float | None]]:
    """The exact numbers of a table by row and column."""
    rows = table(part, label)
    return {
        name: {head: cell.number for head, cell in row.items() if cell.all("data") or cell.text == "–"}
        for name, row in rows.items()
    }


def pixels_of(project: Project, name: str) -> tuple[list[str], np.ndarray]:
    confusion = read_confusion(project.results / name)
    assert confusion is not None
    return confusion


def test_the_numbers_are_those_of_the_stages(project: Project) -> None:
    evaluated = measured(project, "evaluation/metrics.json")
    # Results of different sizes, so that no number stands in for another.
    for i, key in enumerate(("distilled", "supervised")):
        evaluated[key] |= {
            "miou": 0.4321 - 0.1 * i,
            "rare_miou": round(0.0321 - 0.01 * i, 4),
            "pixel_accuracy": 0.8 + 0.01 * i,
            "macs": 12_345_678 + i,
        }
    (project.results / "evaluation/metrics.json").write_text(json.dumps(evaluated))
    networks = {STUDENT: evaluated["distilled"], TWIN: evaluated["supervised"]}
    for name in ("wide", "deep"):
        _, counts = pixels_of(project, f"teachers/{name}-confusion.csv")
        networks[f"teacher {name}"] = {
            **measured(project, f"teachers/{name}.json"),
            "pixel_accuracy": pytest.approx(np.trace(counts) / counts.sum(), abs=1e-6),
        }
    times = {"1": {"median_ms": 80.5, "p95_ms": 90.25}}
    form = {
        "form": "onnx",
        "bytes": 4100000,
        "size": [512, 384],
        "times": times,
        "memory_mb": 33.5,
        "miou": 0.4322,
        "seen": "scaled",
        "faults": ["takes images of 512x384 only"],
    }
    on_device = {"machine": {"processor": "Cortex"}, "rounds": 30, "threads": [1, 2], "split": "test", "images": 5, "rows": [form]}
    on_device["student"] = "best.safetensors"
    (project.results / "devices.json").write_text(json.dumps(on_device))
    page = page_of(project)
    assert page.all("h1")[0].text == "shapes: the distilled student reaches 43.2 % mIoU"
    assert "here on the test split (5 images), which nothing was trained on" in page.all("p")[0].text
    facts = {fact.all("dt")[0].text: fact.all("dd")[0] for fact in page.all("dl", class_="facts")[0].all("div")}
    assert facts[STUDENT].number == 0.4321 and facts[f"against {TWIN}"].number == pytest.approx(0.1)
    assert facts[f"against {TWIN}"].text == "+10.0 points"
    assert facts["against teacher wide"].number == pytest.approx(0.4321 - networks["teacher wide"]["miou"])
    size = {"parameters": 1, "macs": 1}
    rows = [
        Network(key, key, "", {"miou": miou, **size}, {}, 0)
        for key, miou in (("distilled", 0.2), ("supervised", 0.3), ("wide", 0.5))
    ]
    better = headline(rows, "supervised")
    assert isinstance(better, dict) and better["student"].key == "supervised"
    assert [(one["network"].key, one["gain"]) for one in better["others"]] == [
        ("distilled", pytest.approx(0.1)),
        ("wide", pytest.approx(-0.2)),
    ]

    columns = {
        "mIoU %": "miou",
        "rare third %": "rare_miou",
        "right pixels %": "pixel_accuracy",
        "calibration error %": "ece",
        "parameters M": "parameters",
    }
    columns["work at 32x32 MMACs"] = "macs"
    assert numbers(section(page, "networks"), "Table of networks") == {
        label: {head: values.get(key) for head, key in columns.items()} for label, values in networks.items()
    }
    row = table(section(page, "networks"), "Table of networks")[STUDENT]
    assert (row["mIoU %"].text, row["work at 32x32 MMACs"].text) == ("43.2", "12.3")

    compared, part = measured(project, "compare-teachers/metrics.json"), section(page, "disagreement")
    stored = {name: row["mIoU, labelled %"] for name, row in numbers(part, "Table of stored targets").items()}
    assert stored == {name: compared[name]["miou_labelled"] for name in ("wide", "deep")}
    rare = {name: row["rare third, labelled %"] for name, row in numbers(part, "Table of stored targets").items()}
    assert rare == {name: compared[name]["rare_miou_labelled"] for name in ("wide", "deep")}
    names = ", ".join(evaluated["distilled"]["rare_classes"])
    assert f"The rare third is {names}: the third of the classes of this split" in section(page, "networks").text
    agreement = read_class_tsv(project.results / "compare-teachers/disagreement/class_agreement.tsv")["wide and deep"]
    assert numbers(part, "Table of agreement") == {name: {"wide and deep IoU, %": share} for name, share in agreement.items()}
    share = compared["wide and deep"]["same_class_share"]
    assert any(f"on {100 * share:.1f} % of the stored cells" in p.text for p in part.all("p"))

    costs = numbers(section(page, "cost"), "Table of trainings")
    for label, folder, steps in zip((STUDENT, TWIN, "teacher deep"), TRAININGS, (4, 4, 3), strict=False):
        speed = measured(project, f"{folder}/speed.json")
        assert costs[label]["a step ms"] == speed["seconds_per_step"] and costs[label]["steps"] == steps
        assert costs[label]["together min"] == pytest.approx(steps * speed["seconds_per_step"] / 60)
        assert costs[label]["memory at most MB"] == speed["peak_memory_mb"]
    files_of = [path for path in project.targets("wide").rglob("*") if path.is_file() and path.name != "commit.json"]
    size = numbers(section(page, "cost"), "Table of files")["targets of wide"]["size MB"]
    assert size == sum(path.stat().st_size for path in files_of)
    forms = numbers(section(page, "cost"), "Table of exported forms")
    assert forms["onnx, 512 x 384 (scaled)"] == {
        **{"file MB": 4100000, "1 thread ms": 80.5, "1 thread, 95 % ms": 90.25, "2 threads ms": None, "2 threads, 95 % ms": None},
        **{"memory MB": 33.5, "mIoU %": 0.4322},
    }
    assert "onnx, 512 x 384 (scaled): takes images of 512x384 only." in section(page, "cost").text


def test_a_teacher_s_origin_names_the_unlabelled_images_if_it_saw_them(project: Project) -> None:
    both, alone = "from the same labelled images and the unlabelled images", "from the same labelled images"
    assert page_of(project).text.count(both) == 2
    supervised = open_project(project.base / "params.yaml", [*TINY, "teacher_training.method=supervised"])
    said = page_of(supervised).text
    assert said.count(alone) == 2 and both not in said


def test_figures_of_another_student_are_said_to_be(project: Project) -> None:
    """benchmark-device may have run before the last training, or with another student file."""
    measured_on = {"machine": {"processor": "Cortex"}, "rounds": 3, "threads": [1], "split": None, "images": None, "rows": []}
    other = "These figures are of another student, or an older one (best.safetensors)."
    for own, sha256 in ((True, load_student(project.best_student).weights_sha256), (False, 64 * "0")):
        about = {"student": "best.safetensors", "weights_sha256": sha256}
        (project.results / "devices.json").write_text(json.dumps({**measured_on, **about}))
        assert (other in section(page_of(project), "cost").text) != own


def test_a_matrix_of_many_classes_shows_the_classes_with_most_mistakes() -> None:
    counts = 9 * np.eye(60, dtype=np.int64)
    counts[20:, 0], counts[5, 50] = 1, 90
    names = [f"class_{place}" for place in range(60)]
    matrix = confusion_rows((names, counts), [Network("distilled", STUDENT, "", {}, {}, 0)])
    assert isinstance(matrix, dict) and matrix["left_out"] == 20
    assert matrix["names"] == [names[0], names[5], *names[20:58]]
    shares = {name: [share for share, *_ in cells] for name, cells in matrix["rows"]}
    assert list(shares) == matrix["names"] and shares["class_5"][1] == 9 / 99
    assert shares["class_5"][matrix["names"].index("class_50")] == 90 / 99


def test_the_classes_are_those_of_the_stages(finished_project: Path, demo_page: Element) -> None:
    """Shares of the confusion matrix, and IoU of each class as numbers and as bars."""
    project = open_project(finished_project / "params.yaml")
    names, counts = pixels_of(project, "evaluation/confusion.csv")
    confusion = numbers(section(demo_page, "confusion"), "Confusion matrix")
    shares = counts / counts.sum(1, keepdims=True)
    assert confusion == {name: dict(zip(names, row, strict=True)) for name, row in zip(names, shares, strict=True)}

    ious = read_class_tsv(project.results / "evaluation/class_iou.tsv")
    labelled = {STUDENT: ious["distilled"], TWIN: ious["supervised"]}
    for name in ("wide", "deep"):
        _, of_teacher = pixels_of(project, f"teachers/{name}-confusion.csv")
        union = of_teacher.sum(0) + of_teacher.sum(1) - np.diag(of_teacher)
        labelled[f"teacher {name}"] = {one: round(of_teacher[i, i] / union[i], 6) for i, one in enumerate(names) if union[i]}
    part = section(demo_page, "classes")
    shown, bars = numbers(part, "Table of classes"), part.all("dl", class_="bars")[0]
    assert [row["id"].text for row in table(part, "Table of classes").values()] == [str(place) for place in range(len(names))]
    assert list(shown) == [name.text for name in bars.all("dt")] == names
    for name, bar, pixels in zip(names, bars.all("dd"), counts.sum(1), strict=True):
        values = {label: of_network.get(name) for label, of_network in labelled.items()}
        gain = None if None in (values[STUDENT], values[TWIN]) else pytest.approx(labelled[STUDENT][name] - labelled[TWIN][name])
        expected = {"true pixels %": pytest.approx(pixels / counts.sum()), "gain points": gain}
        assert shown[name] == expected | {f"{label} IoU, %": value for label, value in values.items()}
        drawn = [one.all("i")[0].attributes["style"].split("--v:")[1] if one.all("i") else None for one in bar.all("div")]
        lengths = [None if value is None else pytest.approx(100 * value, abs=0.051) for value in values.values()]
        assert [length and float(length) for length in drawn] == lengths


def test_pictures_are_the_worst_and_best_with_what_everybody_says(project: Project) -> None:
    manifest = read_manifest(project.manifest, project.base)
    kept = {(mask.network, mask.image_id): mask for path in mask_files(project) for mask in read_masks(path)}
    root, networks = project.base / manifest.root, ("distilled", "supervised", "wide", "deep")
    truth = {row.image_id: read_mask(root / str(row.mask_path), np.asarray(manifest.lookup)) for row in manifest.split("test")}
    for network in networks:
        matrices = {image_id: confusion_matrix(mask, kept[network, image_id].mask, 9) for image_id, mask in truth.items()}
        for image_id, matrix in matrices.items():
            assert kept[network, image_id].score == pytest.approx(mean_iou(matrix))
        name = "evaluation/metrics.json" if network in ("distilled", "supervised") else f"teachers/{network}.json"
        total = measured(project, name).get(network, measured(project, name))["miou"]
        whole = mean_iou(np.sum(list(matrices.values()), 0))
        assert whole == pytest.approx(total, abs=1e-6), "the masks are those that were measured"

    two = open_project(project.base / "params.yaml", [*TINY, "evaluation.overlays=2"])
    shown = section(page_of(two), "pictures").all("figure")
    order = sorted(truth, key=lambda image_id: (kept["distilled", image_id].score, image_id))
    assert [figure.all("figcaption")[0].text for figure in shown] == [order[0], order[1], order[-1], order[-2]]
    for figure, image_id in zip(shown, (order[0], order[1], order[-1], order[-2]), strict=True):
        panels = [panel.text for panel in figure.all("div", class_="panels")[0].all("div")]
        scores = [f"{100 * kept[network, image_id].score:.1f} %" for network in networks]
        assert len(panels) == 6 and [panel.split(": ")[-1] for panel in panels[2:]] == scores
    # Each panel is its mask over the image, pixel by pixel, with the ids of the mask.
    image, *panels = shown[0].all("svg", class_="panel")
    masks = [truth[order[0]], *(kept[network, order[0]].mask for network in networks)]
    assert decoded(image).shape == (48, 72, 3)
    for svg, mask in zip(panels, masks, strict=True):
        colours = np.asarray(manifest.palette, np.float32)[mask]
        assert (decoded(svg) == (decoded(image) * np.float32(0.4) + colours * np.float32(0.6)).round()).all()
        assert {int(mark.text) for mark in svg.all("text")} == {value for value, _, _ in figures.region_marks(mask)}
    legend = {item.all("span")[0].text: item.text for item in shown[0].all("li")}
    assert "0" in legend and all(legend[place] == f"{place} {manifest.classes[int(place)]}" for place in legend)


def decoded(svg: Element) -> np.ndarray:
    data = svg.all("image")[0].attributes["href"].split(",")[1]
    return np.asarray(Image.open(BytesIO(b64decode(data))).convert("RGB"))


NO_DATA, NO_MASKS = "The data set cannot be read", "no masks of the student (masks.parquet): run mgd-pipeline evaluate"
TRAINED = [f"results/{name}/{what}" for name in TRAININGS for what in ("plots", "speed.json")]
MISSING = {
    ("results/compare-teachers", "results/evaluation/masks.parquet", *TRAINED): [
        ("disagreement", "have not been compared: run mgd-pipeline compare-teachers", "table"),
        ("pictures", NO_MASKS, "svg"),
        ("curves", "No training has left curves here", "svg"),
        ("cost", "No training has run in this folder", ""),
    ],
    ("results/evaluation", "results/compare-teachers/disagreement", "results/teachers"): [
        ("pictures", NO_MASKS, "figure"),
        ("confusion", "no confusion matrix: run mgd-pipeline evaluate", "table"),
        ("disagreement", "no masks to show: run mgd-pipeline compare-teachers", "svg"),
        ("networks", "No network has been measured: run mgd-pipeline evaluate", "table"),
    ],
    ("results/evaluation/metrics.json", "results/teachers/deep.json", "results/teachers/deep-masks.parquet", "students"): [
        ("networks", "run mgd-pipeline train-student --supervised-only and mgd-pipeline evaluate", ""),
        ("networks", "Teacher deep has not been measured: run mgd-pipeline precompute-teachers", ""),
        ("pictures", "Teacher deep is not in these pictures", ""),
    ],
    ("raw", "teachers", "targets"): [("pictures", NO_DATA, "figure")],
    ("manifest",): [("disagreement", NO_DATA, "svg")],
}


@pytest.mark.parametrize("removed", MISSING)
def test_what_was_not_made_is_left_out_and_said(project: Project, removed: tuple[str, ...]) -> None:
    for name in removed:
        path = project.base / "data" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = page_of(project)
    assert str(project.base) not in page.text, "a member's folder is nobody else's business"
    for where, sentence, absent in MISSING[removed]:
        assert sentence in missing(page, where), missing(page, where)
        assert not absent or not section(page, where).all(absent)


def missing(page: Element, where: str) -> str:
    """What a section says of what is not there, without the spaces around code."""
    lines = [line.text.replace("` ", "") for line in section(page, where).all("p", class_="missing")]
    return re.sub(r"\s+([,.;:)])", r"\1", "\n".join(lines))


def test_images_that_are_few_or_were_seen_in_training_are_said(project: Project) -> None:
    """Of five images two are the worst and two the best; of one there is neither."""
    manifest = read_manifest(project.manifest, project.base)
    first, *others = manifest.split("test")
    write_manifest(replace(manifest, subsets={**manifest.subsets, first.image_id: "unlabelled"}), project.manifest)
    page = page_of(open_project(project.base / "params.yaml", [*TINY, "evaluation.overlays=3"]))
    assert "the test split (5 images), 1 of which students saw without labels" in page.all("p")[0].text
    shown = [caption.text for caption in section(page, "pictures").all("figcaption")]
    assert len(shown) == len(set(shown)) == 4
    write_manifest(replace(manifest, rows={key: row for key, row in manifest.rows.items() if row not in others}), project.manifest)
    for path in mask_files(project):
        write_masks(path, [mask for mask in read_masks(path) if mask.image_id == first.image_id], manifest.palette)
    shutil.rmtree(project.targets("deep"))  # a teacher from elsewhere may have seen the images
    page = page_of(project)
    measured_on = "the test split (1 image), which no student was trained on; whether teacher deep learnt from them is not recorded"
    assert measured_on in page.all("p")[0].text
    part = section(page, "pictures")
    assert [one.text for tag in ("h3", "figcaption") for one in part.all(tag)] == ["The only image", first.image_id]


def test_caches_of_another_training_are_told(project: Project) -> None:
    shutil.rmtree(project.targets("deep"))

    def state(teacher: str) -> str:
        rows = [row.text for row in section(page_of(project), "provenance").all("tr")]
        assert any("targets of deep not here" in row and "precompute-teachers" in row for row in rows)
        return next(row for row in rows if f"trained from targets of {teacher}" in row)

    path, another = project.student("distilled"), "not the teacher cache that is here now"
    assert state("deep").endswith(another) and state("wide").endswith(": the teacher cache that is here")
    notes = read_metadata(path)
    notes["teachers"]["wide"][1] += 1
    save_weights(path, read_state_dict(path), notes)
    assert state("wide").endswith(another)


def test_without_any_result_it_is_one_line_and_no_page(project: Project) -> None:
    shutil.rmtree(project.results)
    with pytest.raises(DataError, match=r"holds no results yet; run `dvc repro`"):
        report(project)
    done = CliRunner().invoke(app, ["report", "--config", str(project.base / "params.yaml")])
    assert done.exit_code == 1 and len(done.stderr.splitlines()) == 1 and "`mgd-pipeline evaluate`" in done.stderr
    assert not project.results.exists()


DAMAGED = {
    "evaluation/metrics.json": ("[1]", "evaluate"),
    "evaluation/confusion.csv": ("actual,predicted,pixels\na,b,1\n", "evaluate"),
    "evaluation/class_iou.tsv": ("class\tdistilled\nring\tmany\n", "evaluate"),
    "evaluation/masks.parquet": ("PAR1", "evaluate"),
    "teachers/wide-masks.parquet": ("PAR1", "precompute-teachers"),
    "compare-teachers/disagreement/masks.parquet": ("PAR1", "compare-teachers"),
    "train-student-distilled/plots/loss.tsv": ("step\tloss\n10\n", "train-student"),
    "train-student-distilled/speed.json": ("{", "train-student"),
    "train-teacher-deep/plots/loss.tsv": ("step\tloss\n10\n", "train-teacher --teacher deep"),
}


def test_damaged_results_are_named(project: Project) -> None:
    before = (project.results / "report.html").read_bytes()
    for name, (content, command) in DAMAGED.items():
        sound = (project.results / name).read_bytes()
        (project.results / name).write_text(content)
        with pytest.raises(DataError, match=f"{re.escape(name)}.*; remove it, and run `mgd-pipeline {command}`"):
            report(project)
        (project.results / name).write_bytes(sound)
    assert (project.results / "report.html").read_bytes() == before, "and the page is as it was"
    path = project.results / "evaluation/masks.parquet"
    write_masks(path, [mask._replace(mask=mask.mask[:10]) for mask in read_masks(path)], [(0, 0, 0)] * 9)
    assert "do not fit their masks" in missing(page := page_of(project), "pictures") and not section(page, "pictures").all("svg")


ODD = '<script>alert("1")</script> & Möwe, süß'


def test_odd_names_are_text(project: Project) -> None:
    """Of a class and of an image: shown as they are, and no part of the page."""
    manifest = read_manifest(project.manifest, project.base)
    odd_id = 'ä<img src=x onerror="y">&amp;'
    renamed = {row.image_id: f"{odd_id}{i}" for i, row in enumerate(manifest.split("test"))}
    rows = {renamed.get(key, key): replace(row, image_id=renamed.get(key, key)) for key, row in manifest.rows.items()}
    classes = tuple(ODD if name == "ring" else name for name in manifest.classes)
    write_manifest(replace(manifest, classes=classes, rows=rows), project.manifest)
    quoted = '"' + ODD.replace('"', '""') + '"'
    for path in [*project.results.rglob("*.json"), *project.results.rglob("*.csv")]:
        text = path.read_text()
        path.write_text(text.replace('"ring"', json.dumps(ODD)) if path.suffix == ".json" else re.sub(r"\bring\b", quoted, text))
    for path in mask_files(project):
        write_masks(path, [mask._replace(image_id=renamed[mask.image_id]) for mask in read_masks(path)], manifest.palette)
    page = page_of(project)
    assert not page.all("script") and not page.all("img")
    assert ODD in table(section(page, "classes"), "Table of classes")
    assert ODD in table(section(page, "confusion"), "Confusion matrix")[ODD]
    shown = [figure.all("figcaption")[0].text for figure in section(page, "pictures").all("figure")]
    assert len(shown) == 2 and all(re.fullmatch(re.escape(odd_id) + r"\d", caption) for caption in shown)
    titles = [svg.all("title")[0].text for svg in section(page, "pictures").all("svg")]
    assert all(title.startswith((odd_id, f"image {odd_id}")) for title in titles)


def test_same_results_same_bytes(project: Project) -> None:
    """Whatever the clock, the times of the files, the order of sets and the folder from which it is called."""
    before = (project.results / "report.html").read_bytes()
    (project.results / "report.html").unlink()
    for path in project.base.rglob("*"):
        os.utime(path, (1e9, 1e9))
    command = [sys.executable, "-m", "mgd_stages.cli", "report", "--config", str(project.base / "params.yaml")]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    subprocess.run(command, cwd="/", env=environment, check=True, capture_output=True)
    assert (project.results / "report.html").read_bytes() == before, "as the demo made it"


def test_the_page_goes_where_it_is_sent_with_the_commands_that_made_it(project: Project, tmp_path: Path) -> None:
    """And it names the images that were left out."""
    manifest = read_manifest(project.manifest, project.base)
    write_manifest(replace(manifest, skipped=(Skipped("bad_7", "images/train/bad_7.png", "cut off"),)), project.manifest)
    output = tmp_path / "for you/page.html"
    done = CliRunner().invoke(app, ["report", "--config", str(project.base / "params.yaml"), "--output", str(output)])
    assert done.exit_code == 0 and str(output) in done.stdout
    part = section(Page(output.read_text(encoding="utf-8")).root, "provenance")
    first, *_, second_last, last = "".join(map(str, part.all("pre")[0].children)).strip().splitlines()
    assert (first, second_last) == ("mgd-pipeline prepare-data --on-error skip", "mgd-pipeline evaluate")
    assert last == f"mgd-pipeline report --output '{output}'" and "precompute-teachers --on-error" not in part.text
    assert any("left out 1 image: bad_7" in p.text for p in part.all("p"))


def test_it_leads_to_the_page_for_browsers(project: Project, tmp_path: Path) -> None:
    """Where it shows the report's student; else it says how to make it. A folder that is no such page is none."""
    command = "mgd-pipeline export data/students/best.safetensors demo --format web"
    assert command in page_of(project).all("header")[0].text
    demo, best = project.base / "demo", load_student(project.best_student)
    demo.mkdir()
    (demo / "index.html").write_text("")
    assert command in page_of(project).all("header")[0].text and "another student" not in page_of(project).text
    shutil.rmtree(demo)
    other = "The page in demo/ shows another student, or an older one: "
    for student, about in (
        (load_student(tiny_student(tmp_path / "other.safetensors")), None),
        (best, "[1]"),
        (best, "{}"),
        (best, ""),
    ):
        write_web(student, b"", {}, demo)
        if about is not None:  # an older version's, or damaged
            (demo / "student.json").write_text(about)
        header = page_of(project).all("header")[0]
        assert f"{other}{command} makes it anew." in header.text
        assert all(link.attributes["href"].startswith("#") for link in header.all("a"))
        shutil.rmtree(demo)
    write_web(best, b"", {}, demo)
    output = tmp_path / "for you/page.html"
    for place, path in ((project.results / "report.html", report(project)), (output, report(project, output))):
        page = Page(path.read_text(encoding="utf-8")).root
        links = [link.attributes["href"] for link in page.all("header")[0].all("a")]
        (link,) = [link for link in links if not link.startswith("#")]
        assert (place.parent / unquote(link)).samefile(project.base / "demo/index.html") and command not in page.text


# --- what the page is made of


def test_tables_are_written_as_dvc_plots_them() -> None:
    assert confusion_csv(np.array([[8]]), ["e"]) == b"actual,predicted,pixels\ne,e,8\n"
    assert class_tsv({"wide": {"e": 0.5}}, ["e", "f"]) == b"class\twide\ne\t50.0000\nf\t\n"


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
