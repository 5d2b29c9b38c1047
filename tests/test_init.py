"""`mgd-pipeline init` and the parameter files of this repository, which the same code writes.

To write params.yaml, dvc.yaml, the presets and docs/parameters.md again after a change of presets or comments:
.venv/bin/python tests/test_init.py
"""

from __future__ import annotations

import shutil
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
from mgd_pipeline.params import FolderData, Params, SmpTeacher
from mgd_pipeline.params_file import load_params, override_params, parse_params
from mgd_stages.cli import app
from mgd_stages.projects.dvc_yaml import CONFUSION, render_dvc
from mgd_stages.projects.init import init_project
from mgd_stages.projects.presets import preset, preset_names, read_preset, render_params, render_presets
from mgd_stages.projects.reference import render_reference
from mgd_stages.run.project import Project

REPOSITORY = Path(__file__).parents[1]
GENERATED = {
    "params.yaml": render_params(preset("shapes", "data/raw/shapes", "1/16")),
    "dvc.yaml": render_dvc(Project(REPOSITORY, preset("shapes", "data/raw/shapes", "1/16"))),
    CONFUSION: (files("mgd_stages") / "templates" / CONFUSION).read_text(encoding="utf-8"),
    **{f"stages/mgd_stages/presets/{name}": text for name, text in render_presets().items()},
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


def tree(dataset: str, root: Path) -> Path | None:
    made = {"voc": voc_tree, "cityscapes": cityscapes_tree, "folder": lambda path: folder_tree(path, ("train", "val", "test"))}
    return made[dataset](root) if dataset in made else None


DATASETS = ["shapes", "voc", "cityscapes", "folder"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_new_project_is_ready_to_run(tmp_path: Path, dataset: str) -> None:
    root = tree(dataset, tmp_path / "source")
    init_project(dataset, root, "1/2", tmp_path / "project")
    params = load_params(tmp_path / "project/params.yaml")
    data = {"classes": ["class_0", "class_1", "class_2"]} if dataset == "folder" else {}
    assert params == preset(dataset, f"data/raw/{dataset}", "1/2", data)
    if root is not None:
        index = index_dataset(params.data, tmp_path / "project")
        subsets = partition_images(params.data, index.samples, tmp_path / "project")
        assert set(subsets.values()) == {"labelled", "unlabelled"}
        assert any(sample.split == params.evaluation.split and sample.mask for sample in index.samples)
    ignored = (tmp_path / "project/.gitignore").read_text().split()
    assert {"/data/raw/", "/data/targets/", "/.mgd/"} <= set(ignored)
    assert (tmp_path / "project/.dvcignore").read_text() == "/.mgd/\n"


@pytest.mark.parametrize("dataset", ["voc", "cityscapes", "folder"])
def test_a_first_try_needs_no_download_and_little_time(tmp_path: Path, dataset: str) -> None:
    said = init_project(dataset, tree(dataset, tmp_path / "source"), "1/2", tmp_path / "project", small=True)
    assert any(line.startswith("--quick: toy networks") for line in said)
    params = load_params(tmp_path / "project/params.yaml")
    usual = preset(dataset, f"data/raw/{dataset}", "1/2", {"classes": ["a", "b", "c"]} if dataset == "folder" else {})
    others = {"long_side", "classes"}
    assert params.data.model_dump(exclude=others) == usual.data.model_dump(exclude=others)
    networks = [*params.teachers.values(), params.student.network]
    assert all(getattr(network, "encoder_weights", None) == "none" for network in networks)
    assert params.data.long_side == 256 and params.student.steps <= 300 and params.evaluation.split == usual.evaluation.split
    with pytest.raises(ParamsError, match="--quick: the built-in data set is made for that"):
        init_project("shapes", None, "1/2", tmp_path / "shapes", small=True)


def keys_of(section: BaseModel, prefix: str = "") -> list[tuple[str, str | None]]:
    """All dotted keys below a section, with the description that the models give them."""
    keys = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        keys.append((prefix + name, field.description))
        members = value.items() if isinstance(value, dict) else [("", value)]
        for member, content in members:
            if isinstance(content, BaseModel):
                keys += keys_of(content, f"{prefix}{name}.{member}." if member else f"{prefix}{name}.")
    return keys


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_file_is_complete_and_every_key_explained(dataset: str) -> None:
    params = preset(dataset, "data/raw/x", "1/8", {"classes": ["a", "b"]} if dataset == "folder" else {})
    text = render_params(params)
    assert parse_params(YAML(typ="safe", pure=True).load(text)) == params
    keys, comments, path = [], [], []
    comment: list[str] = []
    for line in text.splitlines():
        assert len(line) <= 120
        if line.strip().startswith("#"):
            comment.append(line.strip(" #"))
        elif line.strip():
            depth = (len(line) - len(line.lstrip())) // 2
            path = [*path[:depth], line.split(":")[0].strip()]
            keys.append(".".join(path))
            comments.append(" ".join(comment))
            comment = []
        else:
            comment = []
    wanted = keys_of(params)
    assert sorted(set(keys) - {f"teachers.{name}" for name in params.teachers}) == sorted(key for key, _ in wanted)
    for key, description in wanted:
        assert description, f"{key} has no description"
        assert comments[keys.index(key)].startswith(" ".join(description.split())), key
    if dataset == "shapes":
        optimizer = comments[keys.index("student.optimizer")]
        assert optimizer.endswith("[sgd | adamw]"), "choices are listed"


def test_nothing_that_exists_is_overwritten(tmp_path: Path) -> None:
    for name in ("params.yaml", "dvc.yaml"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(ParamsError, match=rf"{name}: exists already; remove it, or choose another folder with --output"):
            init_project("shapes", None, "1/8", folder)
        assert {path.name: path.read_text() for path in folder.iterdir()} == {name: "mine"}


def test_a_drawing_of_ones_own_is_kept(tmp_path: Path) -> None:
    (tmp_path / CONFUSION).write_text("mine")
    init_project("shapes", None, "1/8", tmp_path)
    assert (tmp_path / CONFUSION).read_text() == "mine"


def test_lists_of_ignored_files_are_completed(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("*.log\n/data/raw/\n")
    init_project("shapes", None, "1/8", tmp_path)
    lines = (tmp_path / ".gitignore").read_text().splitlines()
    assert lines[:2] == ["*.log", "/data/raw/"] and len(lines) == len(set(lines)) and "/data/targets/" in lines


def test_the_link_to_the_data_set(tmp_path: Path) -> None:
    source, project = voc_tree(tmp_path / "source"), tmp_path / "project"
    init_project("voc", source, "1/2", project)
    assert (project / "data/raw/voc").is_symlink() and (project / "data/raw/voc").resolve() == source.resolve()
    for name in ("params.yaml", "dvc.yaml"):
        (project / name).unlink()
    init_project("voc", project / "data/raw/voc", "1/2", project)
    assert (project / "data/raw/voc").resolve() == source.resolve(), "it may be there already"
    for name in ("params.yaml", "dvc.yaml"):
        (project / name).unlink()
    with pytest.raises(ParamsError, match=r"data/raw/voc: is a link to .*source already; remove it"):
        init_project("voc", voc_tree(tmp_path / "other"), "1/2", project)
    assert not (project / "params.yaml").exists()


def test_a_data_set_that_lies_in_the_project_needs_no_link(tmp_path: Path) -> None:
    voc_tree(tmp_path / "data/raw/voc")
    init_project("voc", tmp_path / "data/raw/voc", "1/2", tmp_path)
    assert not (tmp_path / "data/raw/voc").is_symlink()


@pytest.mark.parametrize(
    ("dataset", "root", "partition", "message"),
    [
        ("voc", None, "1/8", r"--root: name the folder of the voc data set, such as --root /path/to/voc"),
        ("voc", "gone", "1/8", r"--root .*gone: no such folder"),
        ("shapes", "here", "1/8", r"--root .*here: the built-in data set is rendered, not read"),
        ("voc", "here", "1-8", r"--partition 1-8: data\.partition = '1-8': write a share such as 1/8"),
        (
            "coco",
            "here",
            "1/8",
            "--dataset coco: unknown; there are shapes, voc, cityscapes and folder; folder is for data sets of any",
        ),
        ("Cityscape", "here", "1/8", "--dataset Cityscape: unknown; nearest is cityscapes"),
        ("folder", "here", "1/8", r"--root .*here: holds no folder images/; expected images/<split>/ and masks/<split>/"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(
    tmp_path: Path, dataset: str, root: str | None, partition: str, message: str
) -> None:
    (tmp_path / "here").mkdir()
    with pytest.raises(ParamsError, match=message):
        init_project(dataset, None if root is None else tmp_path / root, partition, tmp_path / "project")
    assert not (tmp_path / "project").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ParamsError, match=r"--output .*file: is a file"):
        init_project("shapes", None, "1/8", tmp_path / "file")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 255), 'the masks hold only the values 0, 255, and 255 means "no class"; save class ids, such as 0'),
        ((255,), "the masks hold only the values 255"),
        ((0, 254), "a mask holds the value 254; class ids must be 0 to 253"),
    ],
)
def test_masks_that_cannot_be_class_ids(tmp_path: Path, values: tuple[int, ...], message: str) -> None:
    root = folder_tree(tmp_path / "source", ("train",), values)
    with pytest.raises(ParamsError, match=message):
        init_project("folder", root, "1/8", tmp_path / "project")
    assert not (tmp_path / "project").exists()


@pytest.mark.parametrize("splits", [("train", "val"), (".",)])
def test_init_refuses_what_prepare_data_would_refuse(tmp_path: Path, splits: tuple[str, ...]) -> None:
    root = folder_tree(tmp_path / "source", splits)
    mask = root / "masks" / splits[0] / f"{splits[0].strip('.')}3.png"
    mask.rename(mask.with_suffix(".tif"))
    with pytest.raises(DataError, match=r"3\.tif: would be the mask of .*3\.png, but the format \.tif is not read"):
        init_project("folder", root, "1/8", tmp_path / "project")
    assert not (tmp_path / "project").exists()
    mask.with_suffix(".tif").rename(mask)
    (root / "images" / splits[0] / "scan.tif").touch()
    (root / ".lock").symlink_to("gone")
    said = init_project("folder", root, "1/8", tmp_path / "project")
    assert "warning: 1 picture is left out, such as scan.tif: .tif is not read; save them as PNG or JPEG" in said
    assert any(line.startswith(f"warning: {root}/.lock: is a link that leads to no file, and DVC") for line in said)


@pytest.mark.parametrize(
    ("dataset", "gone", "message"),
    [
        ("voc", "JPEGImages", "no JPEGImages/ here"),
        ("voc", "ImageSets", "ImageSets/Segmentation"),
        ("cityscapes", "leftImg8bit/val", "leftImg8bit/val: "),
    ],
)
def test_another_layout_than_the_data_sets_own_is_refused(tmp_path: Path, dataset: str, gone: str, message: str) -> None:
    root = tree(dataset, tmp_path / "source")
    assert root is not None
    shutil.rmtree(root / gone)
    with pytest.raises(DataError, match=message):
        init_project(dataset, root, "1/2", tmp_path / "project")
    assert not (tmp_path / "project").exists()


def test_a_folder_without_any_mask(tmp_path: Path) -> None:
    picture(tmp_path / "source/images/train/a.png", 3)
    with pytest.raises(ParamsError, match="holds no folder masks/"):
        init_project("folder", tmp_path / "source", "1/8", tmp_path)
    (tmp_path / "source/masks").mkdir()
    with pytest.raises(DataError, match="no mask found"):
        init_project("folder", tmp_path / "source", "1/8", tmp_path)


@pytest.mark.parametrize("splits", [("train",), (".",)])
def test_a_folder_without_val_and_test_is_split_by_itself(tmp_path: Path, splits: tuple[str, ...]) -> None:
    """images/train alone, or images/ without any split folder."""
    root = folder_tree(tmp_path / "source", splits)
    said = init_project("folder", root, "1/2", tmp_path / "project")
    assert any("no masks/val/" in line and "val_fraction" in line for line in said)
    params = load_params(tmp_path / "project/params.yaml")
    samples = index_dataset(params.data, tmp_path / "project").samples
    assert {sample.split for sample in samples} == {"train", "val", "test"}
    assert len(samples) == 12 and all(sample.mask for sample in samples)


def test_folders_that_look_like_splits_are_no_splits_in_silence(tmp_path: Path) -> None:
    """Roboflow writes valid/, others Val/: without masks/val/ held-out images would be drawn into train."""
    root = folder_tree(tmp_path / "source", ("train", "valid", "Test"))
    said = init_project("folder", root, "1/2", tmp_path / "project")
    assert any("the folders Test, train, valid do not count as splits" in line for line in said)
    said = init_project("folder", folder_tree(tmp_path / "plain", ("site_a", "site_b")), "1/2", tmp_path / "other")
    assert not any("do not count as splits" in line for line in said)


@pytest.mark.parametrize("inside", [".", "project"])
def test_a_project_inside_its_data_set_is_told_of(tmp_path: Path, inside: str) -> None:
    root = folder_tree(tmp_path / "source", ("train", "val"))
    said = init_project("folder", root, "1/2", root / inside)
    assert len([line for line in said if "lies inside the data set" in line and "an --output outside" in line]) == 1


def test_folders_in_other_capitals_are_named(tmp_path: Path) -> None:
    root = folder_tree(tmp_path / "source", ("train", "val"))
    (root / "images").rename(root / "Images")
    with pytest.raises(ParamsError, match=r"Images must be called images; rename it: mv "):
        init_project("folder", root, "1/2", tmp_path / "project")


def test_the_next_commands_are_those_that_are_missing(tmp_path: Path) -> None:
    def commands(folder: Path) -> list[str]:
        return [line.strip() for line in init_project("shapes", None, "1/8", folder) if line.startswith("  ")]

    fresh = commands(tmp_path / "a b")
    assert fresh[:4] == [f"cd '{tmp_path}/a b'", "git init", "dvc init", "dvc repro"]
    assert fresh[5:] == [
        "mgd-pipeline prepare-data",
        "mgd-pipeline train-teacher --teacher wide",
        "mgd-pipeline train-teacher --teacher deep",
        "mgd-pipeline precompute-teachers",
        "mgd-pipeline compare-teachers",
        "mgd-pipeline train-student",
        "mgd-pipeline train-student --supervised-only",
        "mgd-pipeline evaluate",
        "mgd-pipeline report",
    ]
    (tmp_path / "b/.git").mkdir(parents=True)
    assert commands(tmp_path / "b")[1:3] == ["dvc init", "dvc repro"]
    assert commands(tmp_path / "b/inner")[1:3] == ["dvc init --subdir", "dvc repro"]
    (tmp_path / "c/.git").mkdir(parents=True)
    (tmp_path / "c/.dvc").mkdir()
    assert commands(tmp_path / "c")[1:2] == ["dvc repro"]


@pytest.mark.parametrize("name", GENERATED)
def test_files_of_the_repository_are_what_init_writes(name: str) -> None:
    path = REPOSITORY / name
    assert path.exists() and path.read_text() == GENERATED[name], f"{name} is not up to date: run `python tests/test_init.py`"
    if name.endswith("params.yaml") or "/presets/" in name:
        load_params(path)


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_makes_a_project(tmp_path: Path, name: str) -> None:
    head, params = read_preset(name)
    for key in ("Command: mgd-pipeline init --preset", "Needs: ", "Time: ", "Score: "):
        assert any(line.startswith(f"# {key}") for line in head), key
    root = tree(params.data.dataset, tmp_path / "source")
    said = init_project(None, root, "1/4", tmp_path / "project", preset_name=name)
    assert any(line.endswith("mgd-pipeline report") for line in said)
    assert (tmp_path / "project" / params.data.root).resolve() == tmp_path / "source"
    text = (tmp_path / "project/params.yaml").read_text()
    assert text.startswith("\n".join(head)) and load_params(tmp_path / "project/params.yaml") == override_params(
        params, ["data.partition=1/4"]
    )


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_serves_another_data_set(tmp_path: Path, name: str) -> None:
    """The classes are those of the masks; the preset's score is not claimed."""
    init_project("folder", tree("folder", tmp_path / "source"), "1/2", tmp_path / "project", preset_name=name)
    params, usual = load_params(tmp_path / "project/params.yaml"), read_preset(name)[1]
    assert isinstance(params.data, FolderData) and params.data.classes == ["class_0", "class_1", "class_2"]
    assert params.model_dump(exclude={"data"}) == usual.model_dump(exclude={"data"})
    assert "Score" not in (tmp_path / "project/params.yaml").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--preset", "voc"),
            "--preset voc: must be one of camvid-lite0, cityscapes-resnet18, voc-mobilenetv2, voc-resnet18; `mgd",
        ),
        (("--preset", "voc-resnet18"), "--root: name the folder of the voc data set"),
        (("--preset", "voc-resnet18", "--dataset", "folder"), "--root: name the folder of the folder data set"),
        (("--preset", "voc-resnet18", "--quick"), "--quick --preset voc-resnet18: choose one"),
    ],
)
def test_presets_that_do_not_fit(tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    result = CliRunner().invoke(app, ["init", *options, "--output", str(tmp_path / "project")])
    assert result.exit_code == 2 and result.stderr.startswith(f"error: {said}") and not (tmp_path / "project").exists()


def test_presets_are_listed_with_command_time_and_score() -> None:
    said = CliRunner().invoke(app, ["init", "--preset", "list"]).stdout
    assert [line for line in said.splitlines() if not line.startswith(" ")] == preset_names()
    assert said.count("Command: ") == said.count("Time: ") == said.count("Score: ") == len(preset_names())


def experiment(name: str) -> Params:
    return read_preset(name)[1]


def numbers(params: Params) -> dict[str, Any]:
    student = params.student
    return {
        "crop": params.views.crop,
        "encoder": student.network.encoder,
        "steps": student.steps,
        "batch": (student.labelled_batch, student.unlabelled_batch),
        "learning_rate": student.learning_rate,
        "weight_decay": student.weight_decay,
        "ohem": student.ohem and (student.ohem.threshold, student.ohem.min_kept),
        "pixel": params.losses.pixel,
        "region": params.losses.region,
        "image": params.losses.image,
        "cps": params.teacher_training.cps,
        "window": params.evaluation.window,
    }


def test_configs_carry_the_numbers_of_mgd() -> None:
    """Official code and scripts: lambda_1, lambda_2, crops, iterations at 1/8; learning rates and decay as its gradients see them.

    The image term is summed over the two images of each GPU there and a mean over images here, hence 2 x lambda_1. Gradients are
    divided by the number of GPUs once too often, hence the lower learning rate and the weight decay times 4 (VOC), 8 (Cityscapes).
    """
    voc = {
        "crop": [512, 512],
        "encoder": "resnet18",
        "steps": 34 * ((10582 - 1323) // 8),
        "batch": (8, 8),
        "learning_rate": 0.0025,
        "weight_decay": 4e-4,
        "ohem": None,
        "pixel": 1.0,
        "region": 100.0,
        "image": 2 * 0.002,
        "cps": 1.0,
        "window": None,
    }
    assert voc["steps"] == 39338
    assert numbers(experiment("voc-resnet18")) == voc
    mobile = {"encoder": "mobilenet_v2", "learning_rate": 0.0035, "region": 50.0, "image": 2 * 0.0005}
    assert numbers(experiment("voc-mobilenetv2")) == {**voc, **mobile}
    assert numbers(experiment("cityscapes-resnet18")) == {
        **voc,
        "crop": [800, 800],
        "steps": 22194,
        "batch": (16, 16),
        "weight_decay": 8e-4,
        "ohem": (0.7, 50_000 * 16),
        "image": 2 * 0.001,
        "cps": 5.0,
        "window": [800, 800],
    }


@pytest.mark.parametrize("name", ["voc-resnet18", "voc-mobilenetv2", "cityscapes-resnet18"])
def test_configs_share_what_mgd_never_changes(name: str) -> None:
    params = experiment(name)
    assert (
        params.data.partition == "1/8" and params.data.root == f"data/raw/{params.data.dataset}" and params.data.long_side is None
    )
    assert params.views.scales == [0.5, 0.75, 1.0, 1.5, 1.75, 2.0] and params.views.flip == 0.5 and params.views.colour_jitter == 0
    assert (params.cutmix.boxes, params.cutmix.area, params.cutmix.partner) == (3, [0.25, 0.5], "same")
    for training in (params.student, params.teacher_training):
        assert (training.optimizer, training.momentum, training.poly_power, training.ema) == ("sgd", 0.9, 0.9, 0.0)
    teachers = {name: teacher for name, teacher in params.teachers.items() if isinstance(teacher, SmpTeacher)}
    assert {name: teacher.encoder for name, teacher in teachers.items()} == {
        "wide": "tu-wide_resnet50_2",  # what MGD calls wide_resnet34_2
        "deep": "resnet101",
    }
    networks = [params.student.network, *teachers.values()]
    assert {network.decoder for network in networks} == {"deeplabv3plus"} and {n.decoder_channels for n in networks} == {256}
    assert (params.losses.pixel_teachers, params.losses.region_teacher, params.losses.image_teacher) == (
        ["wide", "deep"],
        "wide",
        "deep",
    )
    assert params.evaluation.split == "val" and params.evaluation.overlap == pytest.approx(1 / 3)


def test_cityscapes_teachers_train_on_batches_of_8_for_as_many_passes() -> None:
    training = experiment("cityscapes-resnet18").teacher_training
    assert (training.labelled_batch, training.unlabelled_batch) == (8, 8)
    assert training.steps == 137 * ((2975 - 372) // 8)
    assert training.ohem is not None and training.ohem.min_kept == 50_000 * 8


if __name__ == "__main__":
    for name, text in GENERATED.items():
        (REPOSITORY / name).parent.mkdir(exist_ok=True)
        (REPOSITORY / name).write_text(text)
        print(f"wrote {name}")
