"""What the numbers say, in words: more, less, nothing, undefined; one and several; and no nan anywhere."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

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
from mgd_stages.run.verdicts import Findings, beside_one_class, compared, findings, one_class_everywhere, stored_verdicts, verdicts
from pages import Page, section, table


def said(measured: Findings) -> str:
    return "\n".join(verdicts(measured))


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_numbers_as_words() -> None:
    assert [counted(n, "image") for n in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert [counted(n, "class", "classes") for n in (0, 1, 2)] == ["0 classes", "1 class", "2 classes"]
    assert [verb(n, "is", "are") for n in (0, 1, 2)] == ["are", "is", "are"]
    assert [listed(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
    assert listed(list("abcdefg")) == "a, b, c, d, e and 2 more"


def test_what_is_undefined_is_a_dash_and_what_is_nothing_has_no_sign() -> None:
    for nothing in (None, math.nan, math.inf):
        assert defined(nothing) is None and per_cent(nothing) == signed(nothing) == "-"
    assert percent(math.nan) == points(None) == number(math.nan) == "–"
    assert [signed(value) for value in (4.24, -11.56, 0.04, -0.04, 0.0)] == ["+4.2", "-11.6", "0.0", "0.0", "0.0"]
    assert [points(value).striptags() for value in (0.042, -0.116, 0.0004, -0.0004)] == ["+4.2", "−11.6", "0.0", "0.0"]
    assert [per_cent(value) for value in (0.0, 1.0, -1e-6, 0.12345)] == ["0.0", "100.0", "0.0", "12.3"]


def test_json_of_0_1_0_with_nan_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text('{"a": NaN, "b": {"miou": Infinity}, "c": null, "d": 0.5}')
    assert read_numbers(path) == {"a": None, "b": {"miou": None}, "c": None, "d": 0.5}
    assert read_numbers(tmp_path / "none.json") is None


# --- what distillation brought ----------------------------------------------------------------------------------------


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
    measured = Findings("val", mious={"distilled": distilled, "supervised": twin}, steps={"distilled": 900, "supervised": 900})
    text = compared(measured)
    assert text is not None and text.startswith(sentence) and verdicts(measured)[0] == text
    assert distilled is None or text.endswith(", at the same number of steps")
    assert "-" not in text and "nan" not in text.lower()


def test_one_student_alone_is_compared_with_nobody() -> None:
    assert compared(Findings("val", mious={"distilled": 0.5, "wide": 0.4})) is None
    assert verdicts(Findings("val", mious={"wide": 0.4})) == []
    alone = compared(Findings("val", mious={"supervised": None}))
    assert alone == "warning: the mIoU of the student without teachers is undefined: no pixel of the val split has a class"


def test_twins_that_are_none_are_named() -> None:
    mious = {"distilled": 0.5, "supervised": 0.4}
    alike = Findings("val", mious=mious, steps={"distilled": 900, "supervised": 900}, trained_on={"distilled": 1, "supervised": 1})
    assert verdicts(alike) == ["distillation gains 10.0 mIoU points over the labelled images alone, at the same number of steps"]
    longer = said(replace(alike, steps={"distilled": 900, "supervised": 700}))
    assert "at the same number of steps" not in longer and "were trained with 900 and 700 steps" in longer
    assert "at the same number of steps" not in said(replace(alike, steps={"distilled": 900})), "nobody knows"
    assert "different labelled images" in said(replace(alike, trained_on={"distilled": 1, "supervised": 2}))


def test_teachers_that_know_less_or_were_measured_elsewhere() -> None:
    base = Findings("val", mious={"distilled": 0.3, "supervised": 0.4, "wide": 0.35, "deep": 0.38})
    assert "warning: even teacher deep (38.0) is worse than the student without teachers (40.0)" in said(base)
    assert "teacher deep" not in said(replace(base, mious={**base.mious, "deep": 0.4})), "as good is not worse"
    one = {key: value for key, value in base.mious.items() if key != "deep"}
    assert "warning: teacher wide (35.0) is worse" in said(replace(base, mious=one))
    assert "is worse" not in said(replace(base, mious={**base.mious, "wide": None, "deep": None}))
    elsewhere = said(replace(base, elsewhere=("deep",)))
    assert "even" not in elsewhere and "warning: teacher deep was measured on other images" in elsewhere
    assert "teachers wide and deep were measured" in said(replace(base, elsewhere=("wide", "deep")))


def test_splits_that_say_little() -> None:
    base = Findings("val", mious={"distilled": 0.5, "supervised": 0.4})
    assert "compared on 1 image (val), which says little" in said(replace(base, images=1))
    assert "compared on 9 images (val)" in said(replace(base, images=9))
    assert "says little" not in said(replace(base, images=10)) + said(base)

    def of(counts: np.ndarray, **ious: dict[str, float]) -> str:
        return said(replace(base, confusion=(["sky", "road", "pole"], counts), class_ious=ious))

    absent, two = np.diag([5, 5, 0]), np.diag([5, 0, 0])
    line = "no pixel of the val split is pole: no network is measured on this class; mIoU is the mean over the other 2 classes"
    assert line in of(absent) and "IoU of 0" not in of(absent) and "everywhere" not in of(absent)
    assert "no network is measured on these classes; mIoU is the mean over the other 1 class" in of(two)
    distilled, twin = {"sky": 1.0, "road": 0.9, "pole": 0.0}, {"sky": 1.0, "road": 0.9}
    wrong = ", and over this class with an IoU of 0 for the distilled student, which sees it where nothing is"
    assert wrong in of(absent, distilled=distilled, supervised=twin)
    both = "over some of these classes with an IoU of 0 for the distilled student and the student without teachers, which see"
    assert both in of(two, distilled=distilled, supervised={"road": 0.0})
    everywhere = np.array([[5, 0, 0], [4, 0, 0], [3, 0, 0]])
    assert "the distilled student says sky everywhere: it has learnt nothing yet" in of(everywhere)
    nothing = Findings("val", mious=dict.fromkeys(base.mious), confusion=(["sky", "road"], np.zeros((2, 2), np.int64)))
    assert said(nothing).count("\n") == 0, "one reason is enough"


def test_quick_runs_are_no_judgement() -> None:
    base = Findings("val", mious={"distilled": 0.5, "supervised": 0.4}, steps={"distilled": 500, "supervised": 500})
    assert "quick run" not in said(base)
    assert "a quick run, with 499 steps of training" in said(replace(base, steps={"distilled": 499, "supervised": 499}))
    quick = verdicts(replace(base, steps={"distilled": 1, "supervised": 1}, replaced=("distilled",), images=1))
    assert len(quick) > 2 and "a quick run" in quick[0], "what says how to read all others comes first"
    assert "1 step of training" in said(replace(base, steps={"distilled": 1, "supervised": 1}))
    assert "networks made for tests (tu-test_resnet)" in said(replace(base, toys=("tu-test_resnet",)))


# --- beside one class everywhere --------------------------------------------------------------------------------------


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


# --- few images -------------------------------------------------------------------------------------------------------


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


# --- through the commands ---------------------------------------------------------------------------------------------


def test_a_split_without_classes_is_said_by_every_command(project: Project) -> None:
    """All masks are void, and 0.1.0 measured on them: no stage measures again, and what shows results has a dash and the reason."""
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

    for command in ("precompute-teachers", "evaluate"):
        refused = CliRunner().invoke(app, [command, *config])
        assert refused.exit_code == 1 and "holds no class, nor does any other of the 5 masks" in refused.stderr

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, [*arguments, *config])
        assert done.exit_code == 0, done.output
        assert not re.search(r"\bnan\b", done.output.lower()), done.output
        return done.output

    compared_with = run("compare-teachers")
    assert (
        "no pixel of the labelled images in the teacher caches has a class" in compared_with
        and "the same class on" in compared_with
    )
    assert f"the mIoU of the distilled student is undefined: {reason}" in run("evaluate", "--last")
    run("report")
    assert "no pixel of" in run("cache", "info", str(project.targets("wide")))

    def constant(name: str) -> object:
        raise AssertionError(f"{name} is no JSON")

    json.loads((project.results / "compare-teachers/metrics.json").read_text(), parse_constant=constant)
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
    assert any("5 images (test), which says little" in line for line in lines) and any(
        "4 steps of training" in line for line in lines
    )
    page = Page(report(project).read_text(encoding="utf-8")).root
    (verdict_list,) = page.all("header")[0].all("ul", class_="verdicts")
    shown = [item.text.lower().rstrip(".") for item in verdict_list.all("li")]
    assert shown == [line.removeprefix("warning: ").lower() for line in lines]
    assert all(line in printed for line in lines) and "distillation gains" not in printed
    assert [item.attributes.get("class") == "warning" for item in verdict_list.all("li")] == [
        line.startswith("warning: ") for line in lines
    ]


def test_a_teacher_measured_on_another_split_is_not_compared(project: Project) -> None:
    config = ["--config", str(project.base / "params.yaml"), "--set", "evaluation.split=val"]
    printed = CliRunner().invoke(app, ["evaluate", "--device", "cpu", *config]).output
    assert "warning: teachers wide and deep were measured on other images, masks or classes than the students" in printed
    assert "is worse than the student without teachers" not in printed


def test_metrics_of_0_1_0_with_nan_are_shown(project: Project) -> None:
    for name in ("evaluation/metrics.json", "teachers/wide.json", "compare-teachers/metrics.json"):
        path = project.results / name
        text = json.loads(path.read_text())
        for part in (text, *[value for value in text.values() if isinstance(value, dict)]):
            part |= {key: math.nan for key in part if key in ("miou", "miou_labelled", "ece", "ece_labelled")}
        path.write_text(json.dumps(text))
        assert "NaN" in path.read_text()
    done = CliRunner().invoke(app, ["evaluate", "--last", "--config", str(project.base / "params.yaml")])
    assert (
        done.exit_code == 0 and not re.search(r"\bnan\b", done.output) and "is undefined: no pixel of the test split" in done.output
    )
    page = report(project).read_text(encoding="utf-8")
    assert ">nan<" not in page and 'value="nan"' not in page
