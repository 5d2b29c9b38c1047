"""Labels do not leak: what is measured on is in no teacher cache and in no batch, for each data set reader, by id and content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import TINY
from mgd_pipeline.data.build import build_manifest
from mgd_pipeline.data.datasets import index_dataset
from mgd_pipeline.data.manifest import Manifest, read_manifest
from mgd_pipeline.errors import DataError
from mgd_pipeline.params_file import override_params
from mgd_stages.projects.presets import preset
from mgd_stages.run.machine import Machine
from mgd_stages.run.project import Project
from mgd_stages.run.teacher_cache import cached_images
from mgd_stages.stages.prepare_data import prepare_data
from mgd_stages.stages.train_student import train_student
from mgd_stages.stages.train_teacher import train_teacher

CPU = torch.device("cpu")


def save(path: Path, seed: int, mask: bool = False, first: int = 0) -> None:
    """An image of noise, which only its seed decides, or a mask of two values from `first` on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    values = rng.integers(first, first + 2, (16, 24), dtype=np.uint8) if mask else rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


def write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def shapes(root: Path) -> list[str]:
    return ["data.height=32", "data.width=32", "data.train=5", "data.val=2", "data.test=2"]


def voc(root: Path, masks: str = "SegmentationClass") -> list[str]:
    names = [f"2007_{number:06d}" for number in range(7)]
    for seed, name in enumerate(names):
        save(root / f"JPEGImages/{name}.jpg", seed)
        save(root / f"SegmentationClass/{name}.png", seed, mask=True)
        save(root / f"{masks}/{name}.png", seed, mask=True)
    if masks == "SegmentationClass":
        write_lines(root / "ImageSets/Segmentation/train.txt", names[:5])
    write_lines(root / "ImageSets/Segmentation/val.txt", names[5:])
    return []


def voc_with_sbd(root: Path) -> list[str]:
    """SBD's masks are of val images, too: only the list of val keeps those out."""
    return voc(root, "SegmentationClassAug")


def cityscapes(root: Path) -> list[str]:
    for seed, (split, city) in enumerate([*[("train", "ulm")] * 5, *[("val", "bonn")] * 2]):
        name = f"{city}_{seed:06d}_000019"
        save(root / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png", seed)
        save(root / f"gtFine/{split}/{city}/{name}_gtFine_labelIds.png", seed, mask=True, first=7)  # road and sidewalk
    save(root / "leftImg8bit/test/rome/rome_000000_000019_leftImg8bit.png", 9)
    return []


def folders(root: Path) -> list[str]:
    for seed, split in enumerate(["train"] * 5 + ["val"] * 2 + ["test"] * 2):
        save(root / f"images/{split}/{split}{seed}.png", seed)
        save(root / f"masks/{split}/{split}{seed}.png", seed, mask=True)
    return ["data.classes=[a, b]"]


def globs(root: Path) -> list[str]:
    for seed in range(24):
        save(root / f"photos/p{seed:02d}.png", seed)
        save(root / f"labels/p{seed:02d}.png", seed, mask=True)
    return ["data.classes=[a, b]", "data.images=photos/*.png", "data.masks=labels/*.png"]


READERS: dict[str, Callable[[Path], list[str]]] = {
    reader.__name__: reader for reader in (shapes, voc, voc_with_sbd, cityscapes, folders, globs)
}
DATASETS = {"voc_with_sbd": "voc", "folders": "folder", "globs": "folder"}
IN_TRAIN = {  # as each layout says it, whatever the reader makes of it; globs are drawn, so only the manifest can say
    "shapes": lambda path: "/train/" in path,
    "voc": lambda path: path < "JPEGImages/2007_000005",
    "voc_with_sbd": lambda path: path < "JPEGImages/2007_000005",
    "cityscapes": lambda path: path.startswith("leftImg8bit/train/"),
    "folders": lambda path: path.startswith("images/train/"),
}


def project_of(base: Path, reader: str) -> Project:
    """A small data set as it is published, and a project that reads it with half of the masks."""
    dataset = DATASETS.get(reader, reader)
    set_ = READERS[reader](base / "raw")
    networks = [key for key in TINY if "encoder=" in key or "decoder_channels=" in key]  # prepare-data builds them
    common = ["data.long_side=null", "evaluation.split=val", *networks, *set_]
    data: dict[str, Any] = {"classes": ["a", "b"]} if dataset == "folder" else {}
    return Project(base, override_params(preset(dataset, "raw", "1/2", data), common))


def prepared(project: Project) -> Manifest:
    prepare_data(project)
    return read_manifest(project.manifest, project.base)


def lists(project: Project, labelled: list[str], unlabelled: list[str]) -> Project:
    """The same project with id lists of these lines."""
    write_lines(project.base / "labelled.txt", labelled)
    write_lines(project.base / "unlabelled.txt", unlabelled)
    partition = "data.partition={labelled: labelled.txt, unlabelled: unlabelled.txt}"
    return Project(project.base, override_params(project.params, [partition]))


def stored(project: Project, manifest: Manifest) -> set[str]:
    """The ids of the images that precompute-teachers would put into a teacher cache."""
    return {image.key.image_id for image in cached_images(project, "wide", manifest)}


@pytest.mark.parametrize("reader", READERS)
def test_only_images_of_train_enter_a_cache_under_whatever_name(tmp_path: Path, reader: str) -> None:
    project = project_of(tmp_path, reader)
    manifest, root = prepared(project), tmp_path / "raw"
    held_out = [row for row in manifest.rows.values() if row.split != "train"]
    if reader in IN_TRAIN:
        assert all(IN_TRAIN[reader](row.image_path) == (row.split == "train") for row in manifest.rows.values())
    assert len(held_out) >= 2 and len(manifest.training) >= 5 and manifest.declared == []
    assert stored(project, manifest) == {row.image_id for row in manifest.training}
    assert not {row.image_sha256 for row in manifest.training} & {row.image_sha256 for row in held_out}
    assert not {row.mask_path for row in manifest.labelled} & {row.mask_path for row in held_out}

    for subset in ("labelled", "unlabelled"):  # a held-out image under a second name
        twin = getattr(manifest, subset)[0]
        file, before = root / twin.image_path, (root / twin.image_path).read_bytes()
        file.write_bytes((root / held_out[0].image_path).read_bytes())
        with pytest.raises(DataError) as caught:
            build_manifest(project.params.data, tmp_path)
        (line,) = str(caught.value).splitlines()
        assert line.startswith(f"{file}: is byte for byte the {held_out[0].split} image {held_out[0].image_path},")
        assert "remove one of the two, or leave this one out with `mgd-pipeline prepare-data --on-error skip`" in line
        if sum(value == subset for value in manifest.subsets.values()) > 1:
            without = build_manifest(project.params.data, tmp_path, on_error="skip")
            assert [bad.image_id for bad in without.skipped] == [twin.image_id] and held_out[0].image_id in without.rows
            assert without.subsets == {key: value for key, value in manifest.subsets.items() if key != twin.image_id}
        file.write_bytes(before)


@pytest.mark.parametrize("by", ["id", "path"])
@pytest.mark.parametrize("reader", READERS)
def test_a_list_may_declare_held_out_images_unlabelled_and_never_labelled(
    tmp_path: Path, reader: str, by: str, capsys: pytest.CaptureFixture[str]
) -> None:
    project = project_of(tmp_path, reader)
    rows = prepared(project).rows
    lines = {row.image_id: row.image_id if by == "id" else f"{row.image_path}\t{row.mask_path}" for row in rows.values()}
    train = [lines[row.image_id] for row in rows.values() if row.split == "train"]
    declared, *others = (row.image_id for row in rows.values() if row.split == "val")
    with pytest.raises(DataError, match=f"{declared!r} is in the val split; labels of val and test never enter"):
        build_manifest(lists(project, [*train[:2], lines[declared]], train[2:]).params.data, tmp_path)
    assert build_manifest(lists(project, train[:2], train[2:]).params.data, tmp_path).declared == []

    declaring = lists(project, train[:2], [*train[2:], lines[declared]])
    manifest = prepared(declaring)
    said = f"warning: 1 of the {1 + len(others)} val images trains as unlabelled, such as {declared!r}"
    assert said in capsys.readouterr().out
    assert [row.image_id for row in manifest.declared] == [declared] and manifest.subsets[declared] == "unlabelled"
    assert rows[declared] in manifest.split("val"), "it is measured on all the same"
    assert stored(declaring, manifest) == {declared, *(row.image_id for row in rows.values() if row.split == "train")}


def test_a_declared_image_must_not_be_another_held_out_one(tmp_path: Path) -> None:
    project = project_of(tmp_path, "folders")
    (tmp_path / "raw/images/val/val5.png").write_bytes((tmp_path / "raw/images/test/test7.png").read_bytes())
    assert len(prepared(project).training) == 5, "twins that stay out of training harm nobody"
    declaring = lists(project, ["train0", "train1"], ["train2", "val5"])
    with pytest.raises(DataError, match=r"val5\.png: is byte for byte the test image images/test/test7\.png"):
        prepare_data(declaring)
    assert len(prepared(lists(project, ["train0", "train1"], ["train2", "val5", "test7"])).declared) == 2


def test_sbd_with_a_list_of_its_own_that_names_a_val_image(tmp_path: Path) -> None:
    """trainaug.txt is a file of the user's; one that overlaps with val.txt would train on what is measured."""
    project = project_of(tmp_path, "voc_with_sbd")
    write_lines(tmp_path / "raw/ImageSets/Segmentation/trainaug.txt", ["2007_000000", "2007_000001", "2007_000006"])
    with pytest.raises(DataError, match="both have the image_id '2007_000006'"):
        index_dataset(project.params.data, tmp_path)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_training_never_looks_at_a_mask_that_the_partition_does_not_give(project: Project, who: str) -> None:
    manifest = read_manifest(project.manifest, project.base)
    file = project.student("distilled") if who == "student" else project.teacher("wide")
    before = file.read_bytes()
    labelled = {row.mask_path for row in manifest.labelled}
    hidden = [row for row in manifest.rows.values() if row.mask_path not in labelled]
    assert len(labelled) == 6 and {row.split for row in hidden} == {"train", "val", "test"}
    for number, row in enumerate(hidden):
        path = manifest.mask_file(row)
        path.unlink()
        if number % 2:  # one that could be read, and would teach something else
            Image.fromarray(np.full((row.height, row.width), number % 9, np.uint8)).save(path)
        else:
            path.write_bytes(b"garbage")
    file.unlink()
    if who == "student":
        train_student(project, Machine(CPU))
    else:
        train_teacher(project, "wide", Machine(CPU))
    assert file.read_bytes() == before
