"""Where dvc.yaml and params.yaml disagree: all of it is said before anything is computed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mgd_pipeline.errors import ParamsError
from mgd_stages.cli import app
from mgd_stages.projects.dvc_file import IMAGES, LABELS, disagreements, read_stages
from mgd_stages.projects.dvc_yaml import CONFUSION, render_dvc, write_dvc
from mgd_stages.projects.init import QUICK, init_project
from mgd_stages.projects.presets import preset, render_params
from mgd_stages.run.project import open_project
from test_init import folder_tree


@pytest.fixture
def base(tmp_path: Path) -> Path:
    init_project(
        "folder", folder_tree(tmp_path / "source", ("train", "val", "test")), "1/2", tmp_path / "project", preset_name=QUICK
    )
    return tmp_path / "project"


def differences(base: Path, *overrides: str) -> list[tuple[bool, str, str]]:
    """Whether it fails, what is said after the file's path, and the remedy."""
    return [
        (one.fails, one.said.removeprefix(f"{base / 'dvc.yaml'}: "), one.remedy)
        for one in disagreements(open_project(base / "params.yaml", overrides))
    ]


def change(path: Path, *replacements: tuple[str, str]) -> None:
    text = path.read_text(encoding="utf-8")
    for old, new in replacements:
        changed = re.sub(old, new, text, flags=re.MULTILINE)
        assert changed != text, old
        text = changed
    path.write_text(text, encoding="utf-8")


AGAIN = "run `mgd-pipeline dvc-yaml`"


def rename(base: Path) -> None:
    """deep becomes tief, everywhere in params.yaml."""
    change(base / "params.yaml", (r"\bdeep\b", "tief"))


def mended(base: Path, *overrides: str) -> list[str]:
    """What dvc-yaml says; after it nothing differs, and a second call changes nothing."""
    project = open_project(base / "params.yaml", overrides)
    said = write_dvc(project)
    assert disagreements(project) == []
    once = (base / "dvc.yaml").read_bytes()
    assert write_dvc(project) == [f"{base / 'dvc.yaml'}: nothing to change"] and (base / "dvc.yaml").read_bytes() == once
    return said


def test_a_teacher_with_another_name(base: Path) -> None:
    rename(base)
    ((fails, said, remedy),) = differences(base)
    lines = (base / "dvc.yaml").read_text(encoding="utf-8").splitlines()
    named = [str(number) for number, line in enumerate(lines, 1) if "deep" in line]
    assert fails and said == f"lines {', '.join(named)}: the teacher deep is not in params.yaml (teachers: wide, tief)"
    assert remedy == AGAIN
    said = mended(base)
    assert "removed data/targets/deep.zarr from compare-teachers, train-student and report" in said
    assert "added data/targets/tief.zarr to compare-teachers, train-student and report" in said and len(said) == 10
    assert (base / "dvc.yaml").read_text(encoding="utf-8") == render_dvc(open_project(base / "params.yaml"))


def test_teachers_that_come_and_go(base: Path) -> None:
    wide = "{decoder: fpn, encoder: resnet18, weights: data/teachers/wide.safetensors}"
    losses = ("losses.pixel_teachers=[wide]", "losses.region_teacher=wide", "losses.image_teacher=wide")
    alone = (f"teachers={{wide: {wide}}}", "train_teachers=[wide]", *losses)
    ((fails, said, remedy),) = differences(base, *alone)
    assert fails and "the teacher deep is not in params.yaml (teachers: wide)" in said and remedy == AGAIN

    third = "teachers.third={decoder: fpn, encoder: resnet18, weights: data/teachers/third.safetensors}"
    ((fails, said, _),) = differences(base, third)
    assert not fails and "compare-teachers, evaluate, report must depend on data/targets/third.zarr and data/results" in said
    ((fails, said, _),) = differences(base, third, "losses.region_teacher=third")
    assert not fails and "train-student must depend on data/targets/third.zarr" in said, "its student would be stale"
    whole = (base / "dvc.yaml").read_bytes()
    mended(base, third)
    change(base / "dvc.yaml", (r"^ +- data/results/teachers/third.json\n", ""))
    ((_, said, _),) = differences(base, third)
    assert "evaluate must depend on data/results/teachers/third.json" in said
    mended(base, third)
    mended(base, *alone)
    assert (base / "dvc.yaml").read_text(encoding="utf-8") == render_dvc(open_project(base / "params.yaml", alone))
    mended(base)
    assert (base / "dvc.yaml").read_bytes() == whole


def test_a_file_of_an_earlier_version_gets_the_best_student(base: Path) -> None:
    whole = (base / "dvc.yaml").read_bytes()
    change(base / "dvc.yaml", (r"^ +- data/students/best.safetensors\n", ""))
    assert differences(base) == [], "the student is written all the same"
    assert mended(base) == ["added data/students/best.safetensors to evaluate and report"]
    assert (base / "dvc.yaml").read_bytes() == whole


def test_another_choice_of_what_teachers_are_trained_again_for(base: Path) -> None:
    whole, images = (base / "dvc.yaml").read_bytes(), "retrain_teachers=new-images"
    ((fails, said, remedy),) = differences(base, images)
    assert not fails and remedy == AGAIN
    assert said == "retrain_teachers is new-images, but train-teacher@wide depends on labels only: DVC does not notice new images"
    assert len(mended(base, images)) == 3
    assert (base / "dvc.yaml").read_text() == render_dvc(open_project(base / "params.yaml", [images]))
    ((_, said, _),) = differences(base)
    assert "but train-teacher@wide depends on all images: DVC trains it again after every new image" in said
    (base / "data/teachers").mkdir()
    for file in ("dvc.lock", "data/teachers/deep.safetensors"):
        (base / file).touch()
    assert "`mgd-pipeline prepare-data`, then `dvc commit --force prepare-data train-teacher@deep`" in mended(base)[-1]
    assert (base / "dvc.yaml").read_bytes() == whole
    change(base / "dvc.yaml", (r"^ {6}- data/manifest/labelled.json\n", ""))
    ((_, said, _),) = differences(base)
    assert "prepare-data must make, and train-teacher@wide depend on, data/manifest/labelled.json" in said
    mended(base)
    assert (base / "dvc.yaml").read_bytes() == whole


def test_a_file_of_an_earlier_version_gets_the_names_of_classes(base: Path) -> None:
    """They are an input of what shows classes, and of no training; parameters of the data set are one of prepare-data alone."""
    whole = (base / "dvc.yaml").read_bytes()
    stages = read_stages(whole.decode(), open_project(base / "params.yaml"))
    assert [stage.name for stage in stages if "data/manifest/classes.json" in stage.dependencies] == ["evaluate", "report"]
    assert [stage.name for stage in stages if any(key.split(".")[0] == "data" for key in stage.params)] == ["prepare-data"]
    change(base / "dvc.yaml", (r"^ +- data/manifest/classes.json\n", ""))
    said = "the stage prepare-data must make data/manifest/classes.json: DVC neither shares it nor notices other names"
    assert differences(base) == [(False, said, AGAIN)]
    added = "added data/manifest/classes.json to prepare-data, evaluate and report"
    assert mended(base) == [added] and (base / "dvc.yaml").read_bytes() == whole


OWN_STAGE = "  # My own stage.\n  plot:\n    cmd: python plot.py\n    deps:\n      - data/targets/wide.zarr\n\n"


def test_what_a_user_added_stays(base: Path) -> None:
    """Own stages, entries, options and comments, at the very places where lists change."""
    change(
        base / "dvc.yaml",
        (r"^( +- data/targets/)deep\.zarr$", r"\1deep.zarr  # the deep one\n      - my/own.txt  # mine"),
        (r"^  train-student:$", OWN_STAGE + "  train-student:"),
        (r"cmd: mgd-pipeline train-student$", "cmd: mgd-pipeline train-student --num-workers 4"),
        (r"^# What is made from what", "# Our lab's pipeline.\n# What is made from what"),
    )
    before = (base / "dvc.yaml").read_text(encoding="utf-8").splitlines()
    rename(base)
    mended(base)
    after = (base / "dvc.yaml").read_text(encoding="utf-8").splitlines()
    assert [line for line in before if "deep" not in line] == [line for line in after if "tief" not in line]
    assert len(before) == len(after)
    assert differences(base) == []


def test_lists_that_stages_share_by_an_anchor(base: Path) -> None:
    """And a blank line among options, and the line endings of another system."""
    targets = "      - data/targets/wide.zarr\n      - data/targets/deep.zarr\n"
    lists = f"    deps:\n      - data/manifest/images.parquet\n      - data/manifest/partition.parquet\n{targets}"
    change(
        base / "dvc.yaml",
        (r"(cmd: mgd-pipeline compare-teachers\n)    deps:\n((.*\n){4})", r"\1    deps: &lists\n\2"),
        (rf"(cmd: mgd-pipeline train-student\n){lists}", r"\1    deps: *lists\n"),
        (r"(compare-teachers/deep-confusion.csv:\n.*\n)", r"\1\n"),
    )
    (base / "dvc.yaml").write_bytes((base / "dvc.yaml").read_bytes().replace(b"\n", b"\r\n"))
    rename(base)
    mended(base)
    assert (base / "dvc.yaml").read_bytes().count(b"data/targets/tief.zarr\r\n") == 2  # one of the two is the report's
    assert b"deep" not in (base / "dvc.yaml").read_bytes()


def test_own_stages_are_left_to_their_owner(base: Path) -> None:
    change(base / "dvc.yaml", (r"^  train-student:$", OWN_STAGE.replace("wide", "deep") + "  train-student:"))
    rename(base)
    said = write_dvc(open_project(base / "params.yaml"))
    assert said[-1].startswith("warning: ") and "the teacher deep is not in params.yaml" in said[-1]
    assert said[-1].endswith("; correct it by hand") and "- data/targets/deep.zarr" in (base / "dvc.yaml").read_text()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (r"^      - data/targets/wide.zarr\n      - data/targets/deep.zarr\n", "", "added data/targets/wide.zarr to"),
        (r"^    deps:\n(      - .*\n)+(    outs:\n      - data/results/report)", r"\2", "to report"),
    ],
)
def test_lists_that_are_shorter_or_gone(base: Path, old: str, new: str, said: str) -> None:
    change(base / "dvc.yaml", (old, new))
    assert any(said in line for line in mended(base))


def test_the_command(base: Path) -> None:
    """A project without the file gets one; lists in brackets are refused."""
    command, whole = ["dvc-yaml", "--config", str(base / "params.yaml")], (base / "dvc.yaml").read_text(encoding="utf-8")
    for name in ("dvc.yaml", CONFUSION):
        (base / name).unlink()
    result = CliRunner().invoke(app, command)
    assert result.stdout == f"wrote {base / 'dvc.yaml'}\n" and (base / CONFUSION).is_file()
    assert (base / "dvc.yaml").read_text(encoding="utf-8") == whole
    change(base / "dvc.yaml", (r"    deps:\n(      - .*\n)+(    params:\n      - teachers)", r"    deps: [params.yaml]\n\2"))
    text = (base / "dvc.yaml").read_text(encoding="utf-8")
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and "stages.compare-teachers.deps: write one entry a line" in result.stderr
    assert (base / "dvc.yaml").read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.partition={labelled: lists/a.txt}", "prepare-data must depend on lists/a.txt (data.partition.labelled)"),
        ("teachers.deep.encoder_weights=lists/a.txt", "train-teacher@deep must depend on lists/a.txt (teachers.deep.encoder_w"),
        (
            "teachers.deep={transformers: lists, weights: data/teachers/deep.safetensors}",
            "train-teacher@deep must depend on lists (teachers.deep.transformers)",
        ),
        ("student.network.encoder_weights=lists/a.txt", "train-student must depend on lists/a.txt (student.network."),
    ],
)
def test_files_that_are_elsewhere(base: Path, override: str, said: str) -> None:
    (base / "lists").mkdir()
    (base / "lists/a.txt").write_text("train0\n")
    seen = differences(base, override)
    assert not seen[0][0] and said in seen[0][1] and seen[0][2] == AGAIN
    mended(base, override)


def test_weights_that_the_file_cannot_follow(base: Path) -> None:
    ((fails, said, remedy),) = differences(base, "teachers.wide.weights=data/teachers/w.safetensors")
    assert fails and "train-teacher@wide makes data/teachers/wide.safetensors, and teachers.wide.weights is data/teachers/w" in said
    assert remedy == "write weights: data/teachers/wide.safetensors in params.yaml"


def test_dvc_would_remove_a_data_set_that_it_believes_to_make(tmp_path: Path) -> None:
    """A params.yaml of VOC in a project of the built-in data set, whose dvc.yaml of 0.1.0 had ${data.root} as an output."""
    init_project("shapes", None, "1/2", tmp_path)
    config = render_params(preset("voc", "data/raw/voc", "1/8"))
    shapes = (tmp_path / "params.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(config, encoding="utf-8")
    ((fails, said, _),) = differences(tmp_path)
    assert not fails and said.startswith("prepare-data must depend on data/raw/voc"), "DVC removes nothing"
    change(tmp_path / "dvc.yaml", (r"- data/raw/shapes$", "- ${data.root}"))
    ((fails, said, remedy),) = differences(tmp_path)
    assert fails and "the stage prepare-data makes data/raw/voc, and DVC removes" in said and "before the next" in remedy
    (tmp_path / "params.yaml").write_text(shapes, encoding="utf-8")
    assert differences(tmp_path) == [], "0.1.0's file is right for its own data set"
    for params in (config, shapes):
        (tmp_path / "params.yaml").write_text(params, encoding="utf-8")
        mended(tmp_path)
        assert (tmp_path / "dvc.yaml").read_text(encoding="utf-8") == render_dvc(open_project(tmp_path / "params.yaml"))
    init_project("folder", folder_tree(tmp_path / "source", ("train", "val")), "1/2", tmp_path / "linked")
    (tmp_path / "linked/params.yaml").write_text(shapes, encoding="utf-8")
    (fails, said, remedy), _ = differences(tmp_path / "linked")
    assert fails and "does not make data/raw/shapes" in said and remedy == AGAIN


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("<<<<<<< HEAD\nstages: {}\n=======\nstages: {a: 1}\n>>>>>>> b\n", "a merge left <<<<<<< in line 1, ======= in line 3"),
        ("stages: {a: [}\n", "not valid YAML"),
        ("stages:\n\ta: 1\n", "not valid YAML"),
    ],
)
def test_a_dvc_file_that_cannot_be_read(base: Path, content: str, said: str) -> None:
    (base / "dvc.yaml").write_text(content)
    ((fails, what, _),) = differences(base)
    assert fails and said in what
    with pytest.raises(ParamsError, match=re.escape(said)):
        write_dvc(open_project(base / "params.yaml"))
    assert (base / "dvc.yaml").read_text() == content


@pytest.mark.parametrize(
    "content",
    ["", "stages:\n", "[]\n", "stages: {a: 1, b: {cmd: ls}, c: {foreach: '${x}', do: {cmd: x}}, d: {foreach: [1], do: 2}}\n"],
)
def test_a_dvc_file_of_somebody_elses(base: Path, content: str) -> None:
    (base / "dvc.yaml").write_text(content)
    assert differences(base) == []
    assert write_dvc(open_project(base / "params.yaml")) == [f"{base / 'dvc.yaml'}: nothing to change"]
    assert (base / "dvc.yaml").read_text() == content


@pytest.mark.parametrize("choice", ["new-labels", "new-images"])
def test_what_makes_dvc_train_and_compute_again(base: Path, choice: str) -> None:
    """As the guide and docs/sharing.md say: the manifest is an input of every training, and weights of every teacher cache."""
    project = open_project(base / "params.yaml", [f"retrain_teachers={choice}"])
    write_dvc(project)
    stages = {stage.name: stage for stage in read_stages((base / "dvc.yaml").read_text(), project)}
    for name in ("wide", "deep"):
        dependencies = stages[f"train-teacher@{name}"].dependencies
        assert dependencies == ({LABELS} if choice == "new-labels" else set(IMAGES))
        assert (LABELS in stages["prepare-data"].outputs) == (choice == "new-labels")
        assert f"data/teachers/{name}.safetensors" in stages[f"precompute-teachers@{name}"].dependencies
        assert f"data/targets/{name}.zarr" in stages[f"precompute-teachers@{name}"].outputs & stages["train-student"].dependencies


@pytest.mark.parametrize(
    "stage",
    [
        ["prepare-data"],
        ["train-teacher", "--teacher", "wide"],
        ["precompute-teachers", "--teacher", "wide"],
        ["train-student"],
        ["train-student", "--supervised-only"],
    ],
    ids=" ".join,
)
def test_the_first_stage_that_dvc_runs_refuses(base: Path, stage: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rename(base)
    monkeypatch.chdir(base)
    monkeypatch.setenv("DVC_STAGE", "any")
    result = CliRunner().invoke(app, stage)
    assert result.exit_code == 2 and "the teacher deep is not in params.yaml" in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not (base / "data/manifest").exists() and not (base / ".mgd").exists()


def test_without_dvc_it_is_a_warning_in_one_line(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename(base)
    (base / "start.safetensors").touch()
    options = ["--config", str(base / "params.yaml"), "--set", "student.network.encoder_weights=start.safetensors"]
    monkeypatch.setenv("DVC_STAGE", "of another project")
    result = CliRunner().invoke(app, ["prepare-data", *options])
    (warning,) = [line for line in result.output.splitlines() if "dvc.yaml" in line]
    # The stage goes on, and stumbles over the pictures of `folder_tree`, which are all alike.
    assert "byte for byte" in result.output
    assert warning.startswith("warning: ") and warning.endswith(f"{AGAIN} (and 2 more: `mgd-pipeline doctor`)")
    (base / "dvc.yaml").unlink()
    assert "warning: " not in CliRunner().invoke(app, ["prepare-data", *options]).output


def test_a_student_without_teachers_that_mixes_images_depends_on_cutmix(tmp_path: Path) -> None:
    params, path = tmp_path / "params.yaml", tmp_path / "dvc.yaml"
    params.write_text(render_params(preset("shapes", "data/raw/shapes", "1/16")))
    write_dvc(open_project(params, ["student.without_teachers.method=supervised"]))
    mixing = open_project(params, ["student.without_teachers.method=mean-teacher"])
    (one,) = disagreements(mixing)
    assert one.said == f"{path}: train-student-supervised must have cutmix among its params: DVC does not notice a change otherwise"
    assert write_dvc(mixing) == ["added cutmix to train-student-supervised"] and disagreements(mixing) == []
    assert path.read_text() == render_dvc(mixing)
