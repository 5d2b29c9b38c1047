"""What the numbers say, in words: more, less, nothing, undefined; one and several; and no nan anywhere."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from mgd_pipeline.data.manifest import read_manifest, write_manifest
from mgd_pipeline.words import counted, defined, listed, per_cent, signed, verb
from mgd_stages.cli import app
from mgd_stages.reports.page import number, percent, points, report
from mgd_stages.run.class_tables import class_tsv, confusion_csv, read_numbers
from mgd_stages.run.pictures import extremes
from mgd_stages.run.project import Project
from mgd_stages.run.verdicts import (
    Findings,
    beside_one_class,
    better_student,
    findings,
    one_class_everywhere,
    stored_verdicts,
    verdicts,
)
from pages import Page, section, table

BOTH = {"distilled": 0.5, "supervised": 0.4}
BASE = Findings("val", mious=BOTH, steps=dict.fromkeys(BOTH, 900), trained_on=dict.fromkeys(BOTH, 1))
GAINS = "distillation gains 10.0 mIoU points over the labelled images alone, at the same number of steps"


def test_numbers_as_words() -> None:
    assert [counted(n, "image") for n in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert [counted(n, "class", "classes") for n in (0, 1, 2)] == ["0 classes", "1 class", "2 classes"]
    assert [verb(n, "is", "are") for n in (0, 1, 2)] == ["are", "is", "are"]
    assert [listed(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
    assert listed(list("abcdefg")) == "a, b, c, d, e and 2 more"


def test_what_is_undefined_is_a_dash_and_what_is_nothing_has_no_sign(tmp_path: Path) -> None:
    for nothing in (None, math.nan, math.inf):
        assert defined(nothing) is None and per_cent(nothing) == signed(nothing) == "-"
    assert percent(math.nan) == points(None) == number(math.nan) == "–"
    assert [signed(value) for value in (4.24, -11.56, 0.04, -0.04, 0.0)] == ["+4.2", "-11.6", "0.0", "0.0", "0.0"]
    assert [points(value).striptags() for value in (0.042, -0.116, 0.0004, -0.0004)] == ["+4.2", "−11.6", "0.0", "0.0"]
    assert [per_cent(value) for value in (0.0, 1.0, -1e-6, 0.12345)] == ["0.0", "100.0", "0.0", "12.3"]
    of_0_1_0 = tmp_path / "metrics.json"
    of_0_1_0.write_text('{"a": NaN, "b": {"miou": Infinity}, "c": null, "d": 0.5}')
    assert read_numbers(of_0_1_0) == {"a": None, "b": {"miou": None}, "c": None, "d": 0.5}
    assert read_numbers(tmp_path / "none.json") is None


EVEN = "distillation makes no difference: 40.0 mIoU with teachers, 40.0 from the labelled images alone"


@pytest.mark.parametrize(
    ("distilled", "twin", "sentence"),
    [
        (0.452, 0.41, "distillation gains 4.2 mIoU points over the labelled images alone, at the same number of steps"),
        (0.129, 0.245, "warning: distillation costs 11.6 mIoU points: the student without teachers is the better one (24.5 aga"),
        (0.4, 0.4, EVEN),
        (0.4, 0.4004, EVEN),
        (None, None, "warning: the mIoU of the distilled student is undefined: no pixel of the val split has a class"),
    ],
)
def test_distillation_gains_costs_or_makes_no_difference(distilled: float | None, twin: float | None, sentence: str) -> None:
    text = verdicts(replace(BASE, mious={"distilled": distilled, "supervised": twin}))[0]
    assert text.startswith(sentence)
    assert distilled is None or text.endswith(", at the same number of steps")
    assert "-" not in text and "nan" not in text.lower()


def scene(right: int, of: int = 10) -> np.ndarray:
    """(2, 2) pixels of an image with two classes, so many of them right."""
    return np.array([[right, of - right], [of - right, right]])


@pytest.mark.parametrize(
    ("distilled", "twin", "few", "better"),
    [
        ([5] * 12, [5] * 12, False, "distilled"),
        ([5] * 12, [*[5] * 11, 6], False, "supervised"),  # many images: every difference that is printed
        ([5000] * 12, [*[5000] * 11, 5001], False, "distilled"),  # less than is printed
        ([5] * 4, [5, 5, 5, 9], True, "distilled"),  # one scene is the whole difference
        ([5] * 4, [5, 5, 9, 9], True, "supervised"),
        ([5, 5, 9, 9], [5] * 4, True, "distilled"),
        ([5], [9], True, "distilled"),  # of one image nothing remains
    ],
)
def test_which_student_is_the_better_one(distilled: list[int], twin: list[int], few: bool, better: str) -> None:
    of_images = {
        key: [scene(right, max(10, 2 * max(distilled))) for right in rights]
        for key, rights in zip(BOTH, (distilled, twin), strict=True)
    }
    totals = {key: np.sum(counts, 0) for key, counts in of_images.items()}
    assert better_student(totals, of_images if few else dict.fromkeys(BOTH, ())) == better
    assert better_student({"supervised": totals["supervised"]}, {"supervised": ()}) == "supervised"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"best": "distilled"}, "the distilled student: 50.0 mIoU on 30 val images, and the student without teachers has 40.0"),
        (
            {"best": "supervised", "mious": {"distilled": 0.3, "supervised": 0.4}},
            "the student without teachers: 40.0 mIoU on 30 val images, and the distilled student has 30.0",
        ),
        (
            {"best": "distilled", "mious": {"distilled": 0.3, "supervised": 0.4}, "images": 3},
            "30.0 mIoU on 3 val images, and the student without teachers has 40.0, which is no difference on so few images",
        ),
        ({"best": "distilled", "mious": dict.fromkeys(BOTH, 0.4)}, "the student without teachers has 40.0, which is no difference"),
        ({"best": "distilled", "mious": {"distilled": 0.4}}, "no other student was evaluated (40.0 mIoU on 30 val images)"),
    ],
)
def test_why_a_student_is_the_best_one(changes: dict[str, Any], says: str) -> None:
    lines = verdicts(replace(BASE, **{"images": 30, **changes}))
    (line,) = [line for line in lines if line.startswith("`data/students/best.safetensors` is ")]
    assert line.endswith(says)
    if "so few" in says:
        both = "30.0 mIoU with teachers, 40.0 from the labelled images alone, at the same number of steps"
        assert lines[0] == f"distillation makes no clear difference on so few images: {both}"


def test_one_student_alone_is_compared_with_nobody() -> None:
    assert verdicts(replace(BASE, mious={"distilled": 0.5, "wide": 0.4}, steps={})) == []
    assert verdicts(replace(BASE, mious={"wide": 0.4})) == []
    alone = verdicts(replace(BASE, mious={"supervised": None}))[0]
    assert alone == "warning: the mIoU of the student without teachers is undefined: no pixel of the val split has a class"


WEAK = {"distilled": 0.3, "supervised": 0.4, "wide": 0.35, "deep": 0.38}
CLASSES = ["sky", "road", "pole"]
ABSENT, TWO_ABSENT = (CLASSES, np.diag([5, 5, 0])), (CLASSES, np.diag([5, 0, 0]))
SEES_NOTHING_THERE = {"distilled": {"sky": 1.0, "road": 0.9, "pole": 0.0}, "supervised": {"sky": 1.0, "road": 0.9}}
ONCE = dict.fromkeys(BOTH, 1)


@pytest.mark.parametrize(
    ("changes", "says", "never"),
    [
        # --- twins that are none
        ({"steps": {"distilled": 900, "supervised": 700}}, ["were trained with 900 and 700 steps"], ["at the same number of"]),
        ({"steps": {"distilled": 900}}, [], ["at the same number of steps"]),  # nobody knows
        ({"trained_on": {"distilled": 1, "supervised": 2}}, ["different labelled images"], []),
        # --- teachers that know less or were measured elsewhere
        ({"mious": WEAK}, ["warning: even teacher deep (38.0) is worse than the student without teachers (40.0)"], []),
        ({"mious": {**WEAK, "deep": 0.4}}, [], ["teacher deep"]),  # as good is not worse
        ({"mious": {**BOTH, "wide": 0.35}}, ["warning: teacher wide (35.0) is worse"], []),
        ({"mious": {**WEAK, "wide": None, "deep": None}}, [], ["is worse"]),
        ({"mious": WEAK, "elsewhere": ("deep",)}, ["warning: teacher deep was measured on other images"], ["even"]),
        ({"mious": WEAK, "elsewhere": ("wide", "deep")}, ["teachers wide and deep were measured"], ["is worse"]),
        # --- splits that say little
        ({"images": 1}, ["compared on 1 image (val), which says little"], []),
        ({"images": 9}, ["compared on 9 images (val)"], []),
        ({"images": 10}, [], ["says little"]),
        (
            {"confusion": ABSENT},
            ["no pixel of the val split is pole: no network is measured on this class; mIoU is the mean over the other 2 classes"],
            ["IoU of 0", "everywhere"],
        ),
        ({"confusion": TWO_ABSENT}, ["on these classes; mIoU is the mean over the other 1 class"], []),
        (
            {"confusion": ABSENT, "class_ious": SEES_NOTHING_THERE},
            [", and over this class with an IoU of 0 for the distilled student, which sees it where nothing is"],
            [],
        ),
        (
            {"confusion": TWO_ABSENT, "class_ious": {**SEES_NOTHING_THERE, "supervised": {"road": 0.0}}},
            ["over some of these classes with an IoU of 0 for the distilled student and the student without teachers, which see"],
            [],
        ),
        (
            {"confusion": (CLASSES, np.array([[5, 0, 0], [4, 0, 0], [3, 0, 0]]))},
            ["the distilled student says sky everywhere: it has learnt nothing yet"],
            [],
        ),
        ({"mious": dict.fromkeys(BOTH), "confusion": (CLASSES, np.zeros((3, 3), np.int64))}, ["is undefined"], ["\n"]),
        # --- quick runs
        ({"steps": dict.fromkeys(BOTH, 499)}, ["a quick run, with 499 steps of training"], []),
        ({"steps": dict.fromkeys(BOTH, 500)}, [], ["quick run"]),
        ({"steps": ONCE}, ["1 step of training"], []),
        ({"toys": ("tu-test_resnet",)}, ["networks made for tests (tu-test_resnet)"], []),
        ({}, [GAINS], ["\n"]),
        # --- the rare third
        (
            {"rare": ("pole", "sign"), "rare_mious": {"distilled": 0.028, "supervised": 0.078}},
            [f"{GAINS}\nwarning: mIoU rises, but the rare third of the classes (pole and sign) loses 5.0 points: 2.8 mIoU with"],
            [],
        ),
        ({"rare": ("pole",), "rare_mious": {"distilled": 0.0779, "supervised": 0.078}}, [GAINS], ["rare"]),
        ({"rare": ("pole",), "rare_mious": {"distilled": None, "supervised": 0.078}}, [GAINS], ["rare"]),
        ({"mious": dict.fromkeys(BOTH, 0.4), "rare_mious": {"distilled": 0.1, "supervised": 0.2}}, [EVEN], ["rare"]),
    ],
)
def test_what_is_said_and_what_is_not(changes: dict[str, Any], says: list[str], never: list[str]) -> None:
    text = "\n".join(verdicts(replace(BASE, **changes)))
    assert all(part in text for part in says), text
    assert not any(part in text for part in never), text


def test_what_says_how_to_read_all_others_comes_first() -> None:
    quick = verdicts(replace(BASE, steps=ONCE, replaced=("distilled",), images=1))
    assert len(quick) > 2 and "a quick run" in quick[0]


def test_less_as_much_hardly_more_and_more_than_one_class_everywhere() -> None:
    for reached, words in ((0.011, "less than"), (0.032, "as much as"), (0.034, "hardly more than")):
        assert beside_one_class(reached, 0.032).startswith(f", {words} one class everywhere would have (3.2)")
    assert beside_one_class(0.5, 0.032) == ""
    assert one_class_everywhere(np.array([[6, 0, 0], [1, 1, 0], [0, 0, 0]])) == pytest.approx(6 / 8 / 2)
    assert one_class_everywhere(np.zeros((3, 3), np.int64)) is None


def test_what_caches_cannot_say() -> None:
    measured = {"wide": {"miou_labelled": 0.5}, "deep": {"miou_labelled": None}}
    assert stored_verdicts(measured, ["wide"]) == ["teacher wide is the only one that names classes, and cannot disagree"]
    assert "labelled images is undefined" in stored_verdicts(measured, ["wide", "deep"])[0]
    assert "nothing to compare" in stored_verdicts({}, [])[0]


def test_no_image_is_worst_and_best() -> None:
    for count in (1, 2, 3):
        for images in range(12):
            scores = {str(i): i / 100 for i in range(images)}
            for median in (True, False):
                groups = extremes(scores, count, median=median)
                shown = [image_id for chosen in groups.values() for image_id in chosen]
                assert len(shown) == len(set(shown)), (count, images, median)
                assert all(0 < len(chosen) <= count for chosen in groups.values())
                if images > 1:
                    assert groups["worst"][0] == "0" and groups["best"][0] == str(images - 1)
                if median and images <= 3 * count:
                    assert len(shown) == images, "few images are all shown"
    assert extremes({"a": 0.5}, 3, median=True) == {"only": ["a"]}
    assert extremes({"a": math.nan, "b": 0.1, "c": 0.2}, 3, median=False) == {"worst": ["b"], "best": ["c"]}
    many = extremes({f"{i:02d}": i / 100 for i in range(20)}, 3, median=True)
    assert many == {"worst": ["00", "01", "02"], "median": ["09", "10", "11"], "best": ["19", "18", "17"]}, "as ever"


def test_a_split_without_classes_is_said_by_every_command(project: Project) -> None:
    """All masks are void, and 0.1.0 measured on them: what shows results has a dash and the reason."""
    manifest = read_manifest(project.manifest, project.base)
    write_manifest(replace(manifest, lookup=tuple([255] * len(manifest.lookup))), project.manifest)
    config = ["--config", str(project.base / "params.yaml")]
    reason = "no pixel of the test split has a class"
    for path in (project.results / "evaluation/metrics.json", *(project.results / "teachers").glob("*.json")):
        path.write_text(re.sub(r'"(miou|pixel_accuracy|ece)": [\d.e-]+', r'"\1": NaN', path.read_text()))
    confusion = confusion_csv(np.zeros((len(manifest.classes),) * 2, np.int64), manifest.classes)
    for path in project.results.rglob("*confusion.csv"):
        path.write_bytes(confusion)
    (project.results / "evaluation/class_iou.tsv").write_bytes(class_tsv({"distilled": {}, "supervised": {}}, manifest.classes))

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, [*arguments, *config])
        assert done.exit_code == 0, done.output
        assert not re.search(r"\bnan\b", done.output.lower()), done.output
        return done.output

    stored = run("compare-teachers")
    assert "no pixel of the labelled images in the teacher caches has a class" in stored and "the same class on" in stored
    assert f"the mIoU of the distilled student is undefined: {reason}" in run("evaluate", "--last")
    run("report")
    assert "no pixel of" in run("cache", "info", str(project.targets("wide")))

    page = Page((project.results / "report.html").read_text(encoding="utf-8")).root
    assert page.all("h1")[0].text == "shapes: the mIoU of the distilled student is undefined"
    assert reason in page.all("ul", class_="verdicts")[0].text and not re.search(r"\bnan\b", page.text.lower())
    assert table(section(page, "networks"), "Table of networks")["distilled student"]["mIoU %"].text == "–"


def test_the_report_begins_with_what_evaluate_prints(project: Project) -> None:
    path = project.results / "evaluation/metrics.json"
    measured = json.loads(path.read_text())
    measured["supervised"]["miou"], measured["distilled"]["miou"] = 0.5, 0.384
    path.write_text(json.dumps(measured))
    printed = CliRunner().invoke(app, ["evaluate", "--last", "--config", str(project.base / "params.yaml")]).output
    lines = verdicts(findings(project))
    assert any(line.startswith("warning: distillation costs 11.6 mIoU points") for line in lines)
    for part in ("5 images (test), which says little", "4 steps of training"):
        assert any(part in line for line in lines), part
    page = Page(report(project).read_text(encoding="utf-8")).root
    (verdict_list,) = page.all("header")[0].all("ul", class_="verdicts")
    shown = [item.text.lower().rstrip(".") for item in verdict_list.all("li")]
    assert shown == [line.removeprefix("warning: ").replace("`", "").lower() for line in lines]
    assert all(line in printed for line in lines) and "distillation gains" not in printed
    warnings = [item.attributes.get("class") == "warning" for item in verdict_list.all("li")]
    assert warnings == [line.startswith("warning: ") for line in lines]


def test_a_teacher_measured_on_another_split_is_not_compared(project: Project) -> None:
    config = ["--config", str(project.base / "params.yaml"), "--set", "evaluation.split=val"]
    printed = CliRunner().invoke(app, ["evaluate", "--device", "cpu", *config]).output
    assert "warning: teachers wide and deep were measured on other images, masks or classes than the students" in printed
    assert "is worse than the student without teachers" not in printed
