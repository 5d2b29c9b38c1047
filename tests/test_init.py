"""`mgd-pipeline init` and the parameter files of this repository, which the same code writes.

To write params.yaml, dvc.yaml, the presets and docs/parameters.md again after a change of presets or comments:
.venv/bin/python tests/test_init.py
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel
from ruamel.yaml import YAML
from typer.testing import CliRunner

from mgd_pipeline.data.datasets import index_dataset
from mgd_pipeline.data.partition import partition_images
from mgd_pipeline.errors import DataError, ParamsError
from mgd_pipeline.networks import encoders
from mgd_pipeline.networks.segmentation import misfit
from mgd_pipeline.params import FolderData
from mgd_pipeline.params_file import load_params, override_params
from mgd_stages.cli import app
from mgd_stages.projects.dvc_file import disagreements, not_in_a_copy
from mgd_stages.projects.dvc_yaml import CONFUSION, render_dvc
from mgd_stages.projects.init import QUICK, init_project
from mgd_stages.projects.machines import MACHINES, from_random_weights, on_scale
from mgd_stages.projects.presets import preset, preset_heads, preset_names, read_preset, render_params
from mgd_stages.projects.reference import render_reference
from mgd_stages.run.project import Project, networks_of, open_project, settings_of

REPOSITORY = Path(__file__).parents[1]
SHAPES = preset("shapes", "data/raw/shapes", "1/16")
GENERATED = {
    "params.yaml": render_params(SHAPES),
    "dvc.yaml": render_dvc(Project(REPOSITORY, SHAPES)),
    CONFUSION: (files("mgd_stages") / "templates" / CONFUSION).read_text(encoding="utf-8"),
    **{
        f"stages/mgd_stages/presets/{name}.yaml": "\n".join([*head, "#", render_params(params)])
        for name, (head, params) in {name: read_preset(name) for name in preset_names()}.items()
    },
    "docs/parameters.md": render_reference(),
}


def picture(path: Path, *values: int) -> None:
    """A grey image of 8 x 8 pixels that holds the values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.resize(np.array(values, np.uint8), (8, 8))).save(path)


def folder_tree(root: Path, splits: tuple[str, ...], values: tuple[int, ...] = (0, 2, 255)) -> Path:
    for split in splits:
        for name in (f"{split.strip('.')}{index}.png" for index in range(12)):
            picture(root / "images" / split / name, 9)
            picture(root / "masks" / split / name, *values)
    return root


def voc_tree(root: Path) -> Path:
    for split in ("train", "val"):
        names = [f"{split}{index}" for index in range(4)]
        for name in names:
            picture(root / f"JPEGImages/{name}.jpg", 9)
            picture(root / f"SegmentationClass/{name}.png", 0, 20, 255)
        (root / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))
    return root


def cityscapes_tree(root: Path) -> Path:
    for split in ("train", "val"):
        for index in range(4):
            name = f"aachen_{index:06d}_000000"
            picture(root / f"leftImg8bit/{split}/{split}/{split}{name}_leftImg8bit.png", 9)
            picture(root / f"gtFine/{split}/{split}/{split}{name}_gtFine_labelIds.png", 7, 8)
    return root


def tree(dataset: str, root: Path) -> Path:
    made = {"voc": voc_tree, "cityscapes": cityscapes_tree, "folder": lambda path: folder_tree(path, ("train", "val", "test"))}
    return made[dataset](root)


@pytest.fixture
def weights_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ImageNet weights, in the hub's cache of this machine."""
    monkeypatch.setattr(encoders, "resolve_encoder_weights", lambda *_, **__: Path("cached.safetensors"))
    monkeypatch.setattr(encoders, "hub_reached", lambda: pytest.fail("asked the hub for weights that are here"))


@pytest.mark.parametrize("dataset", ["shapes", "voc", "cityscapes", "folder"])
@pytest.mark.usefixtures("weights_are_here")
def test_a_new_project_is_ready_to_run(tmp_path: Path, dataset: str) -> None:
    root = None if dataset == "shapes" else tree(dataset, tmp_path / "source")
    init_project(dataset, root, "1/2", tmp_path / "project")
    project = open_project(tmp_path / "project/params.yaml")
    params, data = project.params, {"classes": ["class_0", "class_1", "class_2"]} if dataset == "folder" else {}
    usual = preset(dataset, f"data/raw/{dataset}", "1/2", data)
    assert params == (usual.model_copy(update={"retrain_teachers": "new-labels"}) if dataset == "folder" else usual)
    assert disagreements(project) == [] and not_in_a_copy(project) == ([] if root is None else ["data/raw"])
    assert {"/data/raw/", "/data/targets/", "/.mgd/", "/demo/"} <= set((tmp_path / "project/.gitignore").read_text().split())
    assert (tmp_path / "project/.dvcignore").read_text() == "/.mgd/\n"
    if root is None:
        with pytest.raises(ParamsError, match="--quick: the built-in data set is made for that"):
            init_project(dataset, None, "1/2", tmp_path / "quick", preset_name=QUICK)
        return
    index = index_dataset(params.data, tmp_path / "project")
    assert set(partition_images(params.data, index.samples, tmp_path / "project").values()) == {"labelled", "unlabelled"}
    assert any(sample.split == params.evaluation.split and sample.mask for sample in index.samples)

    said = init_project(dataset, root, "1/2", tmp_path / "quick", preset_name=QUICK)
    assert any(line.startswith("--quick: toy networks") for line in said), "no download, and little time"
    small = load_params(tmp_path / "quick/params.yaml")
    assert small.data == params.data.model_copy(update={"long_side": 160})
    assert all(getattr(network, "encoder_weights", "") == "none" for network in (*small.teachers.values(), small.student.network))
    assert small.student.steps * small.views.crop[0] ** 2 <= 800 * 96**2, "minutes on two cores"
    assert small.evaluation.split == params.evaluation.split


def descriptions(section: BaseModel) -> Iterator[str | None]:
    """What the models say of each key of a section and of the sections below it."""
    for name, field in type(section).model_fields.items():
        yield field.description
        value = getattr(section, name)
        for member in value.values() if isinstance(value, dict) else [value]:
            if isinstance(member, BaseModel):
                yield from descriptions(member)


@pytest.mark.parametrize("dataset", ["shapes", "voc", "cityscapes", "folder"])
def test_the_file_is_complete_and_every_key_explained(dataset: str) -> None:
    params = preset(dataset, "data/raw/x", "1/8", {"classes": ["a", "b"]} if dataset == "folder" else {})
    text = render_params(params)
    assert YAML(typ="safe", pure=True).load(text) == params.model_dump(by_alias=True)
    assert all(len(line) <= 120 for line in text.splitlines())
    comments = " ".join(line.strip(" #") for line in text.splitlines() if line.strip().startswith("#"))
    for description in descriptions(params):
        assert description and " ".join(description.split()) in comments
    assert f"  # Kind of optimiser; MGD uses SGD. [sgd | adamw]\n  optimizer: {params.student.optimizer}\n" in text


def test_what_exists_is_kept(tmp_path: Path) -> None:
    for name in ("params.yaml", "dvc.yaml"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(ParamsError, match=rf"{name}: exists already; remove it, or choose another folder with --output"):
            init_project("shapes", None, "1/8", folder)
        assert {path.name: path.read_text() for path in folder.iterdir()} == {name: "mine"}
    (tmp_path / CONFUSION).write_text("mine")
    (tmp_path / ".gitignore").write_text("*.log\n/data/raw/\n")
    init_project("shapes", None, "1/8", tmp_path)
    assert (tmp_path / CONFUSION).read_text() == "mine"
    lines = (tmp_path / ".gitignore").read_text().splitlines()
    assert lines[:2] == ["*.log", "/data/raw/"] and len(lines) == len(set(lines)) and "/data/targets/" in lines


def test_the_link_to_the_data_set(tmp_path: Path) -> None:
    source, project = voc_tree(tmp_path / "source"), tmp_path / "project"
    link = project / "data/raw/voc"
    for root in (source, link):  # it may be there already
        init_project("voc", root, "1/2", project)
        assert link.is_symlink() and link.resolve() == source.resolve()
        for name in ("params.yaml", "dvc.yaml"):
            (project / name).unlink()
    with pytest.raises(ParamsError, match=r"data/raw/voc: is a link to .*source already; remove it"):
        init_project("voc", voc_tree(tmp_path / "other"), "1/2", project)
    assert not (project / "params.yaml").exists()
    init_project("voc", voc_tree(tmp_path / "own/data/raw/voc"), "1/2", tmp_path / "own")
    assert not (tmp_path / "own/data/raw/voc").is_symlink(), "it lies in the project"


def without(root: Path, gone: str) -> Path:
    shutil.rmtree(root / gone)
    return root


def masks_of(*values: int) -> Callable[[Path], Path]:
    return lambda root: folder_tree(root, ("train",), values)


def mask_as_gif(root: Path) -> Path:
    mask = folder_tree(root, ("train", "val")) / "masks/train/train3.png"
    mask.rename(mask.with_suffix(".gif"))
    return root


def picture_alone(root: Path) -> Path:
    picture(root / "images/train/a.png", 3)
    return root


@pytest.mark.parametrize(
    ("dataset", "make", "message"),
    [
        ("voc", None, r"--root: name the folder of the voc data set, such as --root /path/to/voc"),
        ("voc", lambda root: root / "gone", r"--root .*gone: no such folder"),
        ("voc", lambda root: without(voc_tree(root), "JPEGImages"), "no JPEGImages/ here"),
        ("shapes", lambda root: root, r"--root .*source: the built-in data set is rendered, not read"),
        ("coco", lambda root: root, "--dataset coco: unknown; there are shapes, voc, cityscapes and folder; folder is for data"),
        ("Cityscape", lambda root: root, "--dataset Cityscape: unknown; nearest is cityscapes"),
        ("folder", lambda root: root, "--root .*source: holds no photo; readable suffixes are .jpg"),
        ("folder", picture_alone, "has 1 image and no labels; put the export of your annotation tool here"),
        ("folder", lambda root: without(folder_tree(root, ("train",)), "masks/train"), "no mask found"),
        ("folder", masks_of(255), "the masks hold the values 255 alone; a class needs a value of its own"),
        ("folder", mask_as_gif, r"3\.gif: would be the mask of .*3\.png, but the format \.gif is not read"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(
    tmp_path: Path, dataset: str, make: Callable[[Path], Path] | None, message: str
) -> None:
    """What prepare-data would refuse, too."""
    (tmp_path / "source").mkdir()
    with pytest.raises((ParamsError, DataError), match=message):
        init_project(dataset, make and make(tmp_path / "source"), "1/2", tmp_path / "project")
    assert not (tmp_path / "project").exists()


def test_options_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"--partition 1-8: data\.partition = '1-8': write a share such as 1/8"):
        init_project("shapes", None, "1-8", tmp_path / "project")
    (tmp_path / "file").touch()
    with pytest.raises(ParamsError, match=r"--output .*file: is a file"):
        init_project("shapes", None, "1/8", tmp_path / "file")
    assert not (tmp_path / "project").exists()


def plain(root: Path) -> None:
    pass


def unread(root: Path) -> None:
    """What is not read, beside an image that is read though its name ends in capitals."""
    (root / "images/train/train0.png").rename(root / "images/train/train0.PNG")
    (root / "images/train/scan.gif").touch()
    (root / ".lock").symlink_to("gone")


NO_SPLITS = "a tenth each of the labelled images, at least five of twenty, is drawn for validation and test (data.val_fraction)"
FEW = "warning: networks will be compared on {} (val), which says little; raise data.val_fraction or give masks to more images"
INSIDE = "warning: the project {root}/{output} lies inside the data set {root}, which everything that the project writes changes"
LEFT_OUT = "warning: 1 picture is left out, such as scan.gif: .gif is not read; save them as PNG or JPEG"


@pytest.mark.parametrize(
    ("splits", "change", "output", "lines"),
    [
        (("train", "val"), plain, "../project", []),
        (("train", "val"), unread, "../project", [LEFT_OUT, "warning: {root}/.lock: is a link that leads to no file, and DVC"]),
        (("train", "val"), plain, "project", [INSIDE]),
        (("train", "valid", "Test"), plain, "../project", []),  # as Roboflow writes them
        (("site_a", "site_b"), plain, "../project", [NO_SPLITS, FEW.format("5 images")]),
        ((".",), plain, "../project", [NO_SPLITS, FEW.format("1 image")]),
    ],
)
def test_what_init_says_of_a_folder(
    tmp_path: Path, splits: tuple[str, ...], change: Callable[[Path], None], output: str, lines: list[str]
) -> None:
    root = folder_tree(tmp_path / "source", splits, (0, 1, 255))
    change(root)
    notes = [one for one in init_project("folder", root, "1/2", root / output) if one.startswith(("warning", "a tenth"))]
    for note, line in zip(notes, lines, strict=True):
        assert note.startswith(line.format(root=root, output=output))
    params = load_params(root / output / "params.yaml")
    samples = index_dataset(params.data, root / output).samples
    with_test = NO_SPLITS in lines or "Test" in splits
    assert {sample.split for sample in samples} == ({"train", "val", "test"} if with_test else {"train", "val"})
    assert len(samples) == 12 * len(splits) and all(sample.mask for sample in samples)


def test_the_next_commands_are_those_that_are_missing(tmp_path: Path) -> None:
    def commands(folder: Path) -> list[str]:
        return [line.strip() for line in init_project("shapes", None, "1/8", folder) if line.startswith("  ")]

    enter = f"cd '{tmp_path}/a b'"
    assert commands(tmp_path / "a b") == [enter, "mgd-pipeline run", enter, "git init", "dvc init", "dvc repro"]
    (tmp_path / "b/.git").mkdir(parents=True)
    assert commands(tmp_path / "b")[3:] == ["dvc init", "dvc repro"]
    assert commands(tmp_path / "b/inner")[3:] == ["dvc init --subdir", "dvc repro"]
    (tmp_path / "c/.git").mkdir(parents=True)
    (tmp_path / "c/.dvc").mkdir()
    assert commands(tmp_path / "c")[3:] == ["dvc repro"]


@pytest.mark.parametrize("name", GENERATED)
def test_files_of_the_repository_are_what_init_writes(name: str) -> None:
    assert (REPOSITORY / name).read_text() == GENERATED[name], f"{name} is not up to date: run `python tests/test_init.py`"


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_makes_a_project(tmp_path: Path, name: str) -> None:
    head, params = read_preset(name)
    for key in ("Command: mgd-pipeline init --preset", "Needs: ", "Time: ", "Score: "):
        assert any(line.startswith(f"# {key}") for line in head), key
    source = tree(params.data.dataset, tmp_path / "source")
    if isinstance(params.data, FolderData):
        folder_tree(source, ("train",), (*range(len(params.data.classes)), 255))
    said = init_project(None, source, "1/4", tmp_path / "project", preset_name=name)
    assert any(line.endswith("mgd-pipeline run") for line in said)
    assert (tmp_path / "project" / params.data.root).resolve() == tmp_path / "source"
    project = open_project(tmp_path / "project/params.yaml")
    assert (tmp_path / "project/params.yaml").read_text().startswith("\n".join(head))
    assert project.params == override_params(params, ["data.partition=1/4"]) and disagreements(project) == []


@pytest.mark.parametrize(
    ("dataset", "classes"), [("folder", None), (None, None), (None, "a,b,c,d,e,f,g,h,i,j,k")], ids=["named", "seen", "classes"]
)
def test_a_preset_serves_another_data_set(tmp_path: Path, dataset: str | None, classes: str | None) -> None:
    """The classes are those of the masks or of the user; the preset's score is not claimed."""
    name, source = "camvid-lite0", tree("folder", tmp_path / "source")
    said = init_project(dataset, source, "1/2", tmp_path / "project", preset_name=name, classes=classes)
    assert dataset or (f"--preset {name}: " in said[1] and "so this is another data set; it gets the preset's settings" in said[1])
    params, usual = load_params(tmp_path / "project/params.yaml"), read_preset(name)[1]
    expected = classes.split(",") if classes else ["class_0", "class_1", "class_2"]
    assert isinstance(params.data, FolderData) and params.data.classes == expected
    assert params.retrain_teachers == "new-labels" and usual.retrain_teachers == "new-images"
    assert params.model_dump(exclude={"data", "retrain_teachers"}) == usual.model_dump(exclude={"data", "retrain_teachers"})
    assert "Score" not in (tmp_path / "project/params.yaml").read_text()


def test_a_preset_that_takes_a_folder_for_its_own_says_so(tmp_path: Path) -> None:
    source = folder_tree(tmp_path / "source", ("train", "val"), (*range(11), 255))
    said = init_project(None, source, None, tmp_path / "project", preset_name="camvid-lite0")
    assert "read as the data set of --preset camvid-lite0; if it is another one, add --dataset folder" in said


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.usefixtures("weights_are_here")
def test_settings_for_a_machine(tmp_path: Path, name: str) -> None:
    """For the user's own folder, all of whose labels count, or for another data set by its name."""
    scale, head = MACHINES[name], preset_heads()[name]
    said = init_project(None, tree("folder", tmp_path / "source"), None, tmp_path / "project", preset_name=name)
    project = open_project(tmp_path / "project/params.yaml")
    data = project.params.data
    assert isinstance(data, FolderData) and data.partition == "1/1" and data.classes == ["class_0", "class_1", "class_2"]
    assert data.long_side == scale.long_side and project.params.student.steps == scale.student_steps
    assert all(network.encoder_weights == "imagenet" for network in networks_of(project.params).values())
    assert (project.base / "params.yaml").read_text().startswith("".join(f"# {line}\n" for line in head)) and not disagreements(
        project
    )
    assert not any(word in line for line in said for word in ("random weights", "meant for a GPU"))
    for network in networks_of(project.params).values():
        assert misfit(network, [(scale.crop, scale.crop)]) is None
    init_project("voc", tree("voc", tmp_path / "voc"), None, tmp_path / "other", preset_name=name)
    other = load_params(tmp_path / "other/params.yaml")
    assert other.data.dataset == "voc" and other.data.partition == "1/8" and other.student == project.params.student


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ((None, None), False),
        ((None, "cpu"), False),
        ((None, "modern"), False),
        (("voc", None), True),
        (("folder", "voc-mobilenetv2"), True),
    ],
)
def test_weights_that_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str | None, str | None], kept: bool
) -> None:
    """Settings for a machine begin from random weights; those of MGD's experiments stay, and say what they need."""
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    dataset, name = options
    source = tree(dataset or "folder", tmp_path / "source")
    made = {}
    for reached in (True, False):
        monkeypatch.setattr(encoders, "hub_reached", lambda reached=reached: reached)
        said = init_project(dataset, source, "1/2", tmp_path / str(reached), preset_name=name)
        made[reached] = load_params(tmp_path / str(reached) / "params.yaml")
        about = [line for line in said if line.startswith("ImageNet weights of ")]
        commands = [line.strip() for line in said if line.startswith("  hf download ")]
        assert (about, commands) == ([], []) if reached else len(about) == 1
        if not reached:
            wanted = networks_of(made[True])
            assert all(f"{key} ({network.encoder})" in about[0] for key, network in wanted.items())
            assert set(commands) == {encoders.fetch_command(network.encoder) for network in wanted.values()}
    there, without = made[True], made[False]
    assert all(network.encoder_weights == "imagenet" for network in networks_of(there).values())
    if kept:
        assert without == there and "training stops without them" in about[0]
        return
    assert all(network.encoder_weights == "none" for network in networks_of(without).values())
    assert not {"resnet101", "tu-wide_resnet50_2"} & {network.encoder for network in networks_of(without).values()}
    assert without.teacher_training.method == "supervised"
    assert without.student.learning_rate == without.teacher_training.learning_rate > there.student.learning_rate
    assert without.views == there.views and without.data == there.data


def test_only_what_lacks_weights_begins_from_random_ones() -> None:
    params = on_scale(preset("folder", "x", "1/1", {"classes": ["a", "b"]}), MACHINES["cpu"])
    changed = from_random_weights(params, ["student.network"])
    assert changed.student.network.encoder_weights == "none" and changed.student.steps == params.student.steps
    assert changed.teachers == params.teachers and changed.teacher_training == params.teacher_training
    assert from_random_weights(params, []) == params


@pytest.mark.usefixtures("weights_are_here")
def test_general_settings_say_that_they_are_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for gpu in (True, False):
        monkeypatch.setattr("torch.cuda.is_available", lambda gpu=gpu: gpu)
        said = init_project("folder", tree("folder", tmp_path / "source"), "1/2", tmp_path / str(gpu))
        assert any("meant for a GPU" in line and "--preset cpu" in line for line in said) is not gpu


@pytest.mark.parametrize(
    ("dataset", "given", "choice", "is_said"),
    [
        ("folder", None, "new-labels", True),
        ("folder", lambda: "new-images", "new-images", False),
        ("folder", "new-images", "new-images", False),
        ("voc", None, "new-images", False),
        ("voc", lambda: pytest.fail("asked"), "new-images", False),
        ("voc", "new-labels", "new-labels", False),
    ],
)
def test_what_teachers_are_trained_again_for(tmp_path: Path, dataset: str, given: Any, choice: str, is_said: bool) -> None:
    """Asked for a data set of one's own, which has new photos; said where nobody is there to answer."""
    root, base = tree(dataset, tmp_path / "source"), tmp_path / "project"
    said = init_project(dataset, root, "1/2", base, retrain_teachers=given)
    project = open_project(base / "params.yaml")
    assert project.params.retrain_teachers == choice and disagreements(project) == []
    assert any("teachers are kept when you add photos without labels" in line for line in said) == is_said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("voc",),
            "--preset voc: must be one of cpu, small-gpu, large-gpu, modern, camvid-lite0, cityscapes-resnet18, voc-mobilenetv2, "
            "voc-resnet18; `mgd",
        ),
        (("voc-resnet18",), "--root: name the folder of the voc data set"),
        (("voc-resnet18", "--dataset", "folder"), "--root: name the folder of the folder data set"),
        (("voc-resnet18", "--quick"), "--quick --preset voc-resnet18: choose one"),
        (("cpu", "--hours", "1"), "--preset cpu --hours: choose one"),
        (("cpu",), "--root: name the folder of the folder data set"),
        (("cpu", "--dataset", "shapes"), "--dataset shapes: the built-in data set has settings of its own"),
    ],
)
def test_presets_that_do_not_fit(tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    result = CliRunner().invoke(app, ["init", "--preset", *options, "--output", str(tmp_path / "project")])
    assert result.exit_code == 2 and result.stderr.startswith(f"error: {said}") and not (tmp_path / "project").exists()


def test_presets_are_listed_with_command_time_and_score() -> None:
    said = CliRunner().invoke(app, ["init", "--preset", "list"]).stdout
    names = [*MACHINES, *preset_names()]
    assert [line for line in said.splitlines() if not line.startswith(" ")] == names
    assert said.count("Command: ") == said.count("Time: ") == said.count("Score: ") == len(names)


SGD = {"optimizer": "sgd", "momentum": 0.9, "poly_power": 0.9, "ema": 0.0, "ohem": None}
VOC = {
    "steps": 34 * ((10582 - 1323) // 8),
    "learning_rate": 0.0025,
    "weight_decay": 4e-4,
    "labelled_batch": 8,
    "unlabelled_batch": 8,
}
ENCODERS = {"teachers.wide": "tu-wide_resnet50_2", "teachers.deep": "resnet101", "student.network": "resnet18"}
MGD: dict[str, Any] = {
    **{"data.partition": "1/8", "data.long_side": None, "views.crop": [512, 512], "views.flip": 0.5, "views.colour_jitter": 0},
    **{"views.scales": [0.5, 0.75, 1.0, 1.5, 1.75, 2.0], "cutmix.boxes": 3, "cutmix.area": [0.25, 0.5], "cutmix.partner": "same"},
    **{f"{key}.encoder": encoder for key, encoder in ENCODERS.items()},
    **{f"{key}.{name}": value for key in ENCODERS for name, value in (("decoder", "deeplabv3plus"), ("decoder_channels", 256))},
    **{f"{key}.{name}": value for key in ("teacher_training", "student") for name, value in (SGD | VOC).items()},
    **{"teacher_training.method": "cps", "teacher_training.consistency": 1.0},
    **{"losses.pixel": 1.0, "losses.region": 100.0, "losses.image": 2 * 0.002},
    **{"losses.pixel_teachers": ["wide", "deep"], "losses.region_teacher": "wide", "losses.image_teacher": "deep"},
    **{"evaluation.split": "val", "evaluation.window": None, "evaluation.overlap": 1 / 3},
}
"""Official code and scripts on VOC: lambda_1, lambda_2, crops, iterations at 1/8; rates and decay as its gradients see them.

The image term is summed over the two images of each GPU there and a mean over images here, hence 2 x lambda_1. Gradients are
divided by the number of GPUs once too often, hence the lower learning rate and the weight decay times 4 (VOC), 8 (Cityscapes).
MGD calls the wide teacher wide_resnet34_2.
"""
LIGHTER = {
    "student.network.encoder": "mobilenet_v2",
    "student.learning_rate": 0.0035,
    "losses.region": 50.0,
    "losses.image": 2 * 0.0005,
}
ON_CITYSCAPES = {
    **{"views.crop": [800, 800], "evaluation.window": [800, 800], "losses.image": 2 * 0.001, "teacher_training.consistency": 5.0},
    **{"teacher_training.steps": 137 * ((2975 - 372) // 8), "teacher_training.weight_decay": 8e-4},
    **{"student.steps": 22194, "student.weight_decay": 8e-4, "student.labelled_batch": 16, "student.unlabelled_batch": 16},
    **{"teacher_training.ohem.threshold": 0.7, "teacher_training.ohem.min_kept": 50_000 * 8},
    **{"student.ohem.threshold": 0.7, "student.ohem.min_kept": 50_000 * 16},
}


@pytest.mark.parametrize(
    ("name", "changes"), [("voc-resnet18", {}), ("voc-mobilenetv2", LIGHTER), ("cityscapes-resnet18", ON_CITYSCAPES)]
)
def test_presets_carry_the_numbers_of_mgd(name: str, changes: dict[str, Any]) -> None:
    params, expected = read_preset(name)[1], {**MGD, **changes, "data.root": f"data/raw/{name.partition('-')[0]}"}
    settings = settings_of(**params.model_dump())
    assert {key: settings.get(key) for key in expected} == expected and expected["student.steps"] in (39338, 22194)


if __name__ == "__main__":
    for name, text in GENERATED.items():
        (REPOSITORY / name).parent.mkdir(exist_ok=True)
        (REPOSITORY / name).write_text(text)
        print(f"wrote {name}")
