"""Data sets that every reader accepts and that are wrong all the same: one line of init, prepare-data and doctor says so."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mgd_pipeline.data.build import build_manifest
from mgd_pipeline.data.folders import index_folder
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.params import FolderData
from mgd_stages.cli import app
from mgd_stages.projects.init import init_project
from mgd_stages.run.data_notes import grey_levels, missing_values
from test_images import rgb, with_orientation


def picture(path: Path, orientation: int = 1, size: tuple[int, int] = (16, 24), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgb(*size, seed)).save(path, exif=with_orientation(orientation) if orientation > 1 else b"")


def mask(path: Path, *values: int, size: tuple[int, int] = (16, 24), orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = with_orientation(orientation) if orientation > 1 else b""
    Image.fromarray(np.resize(np.array(values, np.uint8), size)).save(path, exif=exif)


def data_set(root: Path, train: int = 6, val: int = 10, *, suffix: str = "jpg", values: tuple[int, ...] = (0, 1)) -> Path:
    """A folder data set of so many labelled images, and two unlabelled ones."""
    for number in range(train + val + 2):
        split, name = ("val" if train <= number < train + val else "train"), f"i{number:02}"
        picture(root / f"images/{split}/{name}.{suffix}", seed=number)
        if number < train + val:
            mask(root / f"masks/{split}/{name}.png", *values)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return data_set(tmp_path / "d")


def made(root: Path, partition: str = "1/1") -> tuple[Path, list[str]]:
    """The folder of a new project, and the warnings of init."""
    base = root.with_name("project")
    said = init_project("folder", root, partition, base, small=True)
    return base, [line.removeprefix("warning: ") for line in said if line.startswith("warning: ")]


def run(base: Path, command: str, *sets: str) -> Any:
    options = [part for text in sets for part in ("--set", text)]
    return CliRunner().invoke(app, [command, "--config", str(base / "params.yaml"), *options])


def warned(base: Path, command: str, *sets: str) -> list[str]:
    """The warnings of prepare-data or doctor about the data."""
    return re.findall(r"^warning(?:: | +data: )(.*)$", run(base, command, *sets).output, re.MULTILINE)


def refused(base: Path, *sets: str) -> str:
    result = run(base, "prepare-data", *sets)
    assert isinstance(result.exception, SystemExit) and result.exit_code, result.output
    assert not (base / "data/manifest").exists()
    (line,) = result.stderr.splitlines()
    return line


def test_a_sound_data_set_is_told_nothing(root: Path) -> None:
    base, notes = made(root)
    assert notes == [] and warned(base, "prepare-data") == [] and warned(base, "doctor") == []
    manifest = read_manifest(base / "data/manifest", base)
    assert manifest.orientations == {} and b"orientations" not in (base / "data/manifest/images.parquet").read_bytes()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_an_orientation_that_a_mask_may_have_followed(tmp_path: Path, suffix: str) -> None:
    """Turned by 180 degrees, both have one size: only a person sees which way the mask lies."""
    root, turned = data_set(tmp_path / "d", suffix=suffix), {f"images/train/i02.{suffix}": 3, f"images/val/i07.{suffix}": 4}
    for name, orientation in turned.items():
        picture(root / name, orientation)
    base, notes = made(root)
    (said,) = warned(base, "prepare-data")
    assert said.startswith(
        f"2 images have an EXIF orientation, such as {next(iter(turned))} (viewers show it turned by 180 degrees)"
    )
    assert "the orientation is ignored, and masks must be drawn on the stored pixels" in said and "exiftran -ai" in said
    assert f"2 masks fit the photo turned or not, such as masks/train/i02.png: look at it over images/train/i02.{suffix}" in said
    assert notes == [said] and warned(base, "doctor") == [said]
    assert read_manifest(base / "data/manifest", base).orientations == turned


def test_what_is_said_of_an_orientation_by_the_shape_and_the_mask(root: Path) -> None:
    """Of 90 degrees the size tells, but for squares; without a mask nothing is at risk; viewers turn a mask that has one too."""
    picture(root / "images/train/i17.jpg", 6, seed=17)  # unlabelled
    picture(root / "images/train/i00.jpg", 6)  # its mask has the stored size
    picture(root / "images/train/i01.jpg", 3, seed=1)
    mask(root / "masks/train/i01.png", 0, 1, orientation=3)
    base, _ = made(root)
    photos, masks = warned(base, "prepare-data")
    assert photos.startswith("3 images have an EXIF orientation") and "fit" not in photos and "before anybody draws" in photos
    assert masks.startswith("1 mask has an EXIF orientation, such as masks/train/i01.png (viewers show it turned by 180 degrees)")
    picture(root / "images/train/i03.jpg", 8, size=(20, 20), seed=3)
    mask(root / "masks/train/i03.png", 0, 1, size=(20, 20))
    assert "; 1 mask fits the photo turned or not, such as masks/train/i03.png" in warned(base, "prepare-data")[0]


def test_doctor_says_it_of_images_that_it_does_not_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest has noted it; a manifest of 0.1.0 has not, and then what doctor reads itself counts."""
    picture(root / "images/train/i02.jpg", 3, seed=2)
    base, _ = made(root)
    run(base, "prepare-data")
    with monkeypatch.context() as patched:
        patched.setattr("mgd_stages.doctor.data._SAMPLE", 0)
        (said,) = [line for line in warned(base, "doctor") if "EXIF" in line]
    assert said.startswith("1 image has")
    with monkeypatch.context() as patched:
        patched.setattr("mgd_pipeline.data.build.ORIENTATIONS", {})  # notes none, as 0.1.0
        run(base, "prepare-data")
    assert read_manifest(base / "data/manifest", base).orientations == {}
    assert [line for line in warned(base, "doctor") if "EXIF" in line] == [said]


def test_a_mask_of_the_turned_size_is_refused_and_says_why(root: Path) -> None:
    picture(root / "images/train/i02.jpg", 6, seed=2)
    mask(root / "masks/train/i02.png", 0, 1, size=(24, 16))
    line = refused(made(root)[0])
    assert "i02.png: mask of 16 x 24 pixels, but its image images/train/i02.jpg has 24 x 16: it was drawn on the photo" in line
    assert "turned by 90 degrees clockwise; turn the photo for good by `exiftran -ai`" in line


@pytest.mark.parametrize(
    ("split", "where"),
    [("train", "nor does any other of the 6 masks of the labelled images"), ("val", "of the 10 masks of the val images, on which")],
)
def test_masks_that_say_nothing_are_refused_at_once(root: Path, split: str, where: str) -> None:
    base, _ = made(root)
    for path in (root / "masks" / split).iterdir():
        mask(path, 255)
    line = refused(base)
    assert f"masks/{split}/" in line and "holds no class" in line and where in line
    assert 'every pixel has value 255, which means "no class"; draw classes into the masks' in line
    assert re.search(rf"problem +data: .*masks/{split}/.*holds no class, nor does any other", run(base, "doctor").output)


def test_a_few_masks_without_a_class_are_told_of(root: Path) -> None:
    base, _ = made(root)
    mask(root / "masks/train/i03.png", 255)
    mask(root / "masks/val/i08.png", 255)
    said = (
        "2 of the 16 labelled, val and test masks hold no class at all, such as masks/train/i03.png; draw classes into these masks"
    )
    assert warned(base, "prepare-data") == [said] and warned(base, "doctor") == [said]


def test_a_copied_configuration_that_labels_one_image_is_told_of(tmp_path: Path) -> None:
    """1/30 of 40 masks, for 11 classes of which the masks hold two."""
    base, _ = made(data_set(tmp_path / "d", train=40))
    sets = ("data.partition=1/30", f"data.classes=[{', '.join(f'c{number}' for number in range(11))}]")
    few, absent = warned(base, "prepare-data", *sets)
    assert few.startswith("only 1 image is labelled: data.partition is 1/30, and of the masks train has 40, val 10, test 0; take a")
    assert absent.startswith("none of the 1 labelled masks holds the 9 classes c2, c3, c4, c5, c6, c7, c8, c9, c10; label images")
    assert set(warned(base, "doctor", *sets)) == {few, absent}
    assert f"warning: {few}" in init_project("folder", tmp_path / "d", "1/30", tmp_path / "again", small=True)


def test_pictures_that_are_in_no_split_are_told_of(root: Path) -> None:
    """A split folder called validation, unlabelled photos beside images/, globs that stop at the first folder."""
    for place in ("images/validation/a.jpg", "unlabelled/b.jpg"):
        picture(root / place)
    mask(root / "masks/validation/a.png", 0, 1)
    base, notes = made(root)
    (said,) = warned(base, "prepare-data")
    assert re.match(
        r"3 of the 37 pictures below .* are not used, such as images/validation/a\.jpg; move them into images/ and", said
    )
    assert len(notes) == 1 and notes[0].startswith("3 of the 37 pictures below ") and warned(base, "doctor") == [said]
    first = warned(base, "prepare-data", "data.images=images/train/*.jpg", "data.masks=masks/train/*.png")[0]
    assert re.match("23 of the 37 pictures below .* are not used", first)
    assert "data.images is images/train/*.jpg and data.masks masks/train/*.png" in first


def test_one_fact_is_told_once(root: Path) -> None:
    """Pictures that another note tells of, and pictures that are used by way of a link, are not "not used"."""
    for path in ("images/train/phone.heic", "images/extra/y.tif", "masks/extra/y.png"):
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_bytes(b"")
    picture(root / "elsewhere/more/z.jpg", seed=90)
    (root / "images/train/more").symlink_to(root / "elsewhere/more")
    base, notes = made(root)
    unread, *unused = [note for note in notes if "dvc" not in note]
    assert unread.startswith("1 picture is left out, such as phone.heic")
    assert len(unused) == 1 and unused[0].startswith("2 of the 38 pictures below ") and "such as images/extra/y.tif" in unused[0]
    for command in ("prepare-data", "doctor"):
        assert [note[:27] for note in warned(base, command) if "dvc" not in note] == [unread[:27], unused[0][:27]]


def test_pictures_in_hidden_folders_are_told_of(root: Path) -> None:
    picture(root / ".dvc/cache/x.jpg", seed=90)
    base, notes = made(root)
    assert notes == [] and warned(base, "prepare-data") == []
    picture(root / "images/train/.ipynb_checkpoints/i00-checkpoint.jpg", seed=91)
    (said,) = warned(base, "prepare-data")
    assert said.startswith("pictures in hidden folders are not used, such as images/train/.ipynb_checkpoints/i00-checkpoint.jpg")
    assert warned(base, "doctor") == [said]


def test_a_file_that_stops_all_is_named_once(root: Path) -> None:
    """Not as what DVC cannot read as well."""
    (root / "images/train/i00.jpg").unlink()
    (root / "images/train/i00.jpg").symlink_to(root / "away.jpg")
    base, _ = made(root)
    assert run(base, "doctor").output.count("i00.jpg: is a link that leads to no file") == 1
    assert "is a link that leads to no file" in refused(base) and warned(base, "prepare-data") == []


def test_copies_are_told_of_and_those_of_held_out_images_found_by_doctor(root: Path) -> None:
    (root / "images/train/copy.jpg").write_bytes((root / "images/train/i00.jpg").read_bytes())
    base, _ = made(root)
    (said,) = warned(base, "prepare-data")
    assert said.startswith("1 training image is byte for byte another training image, such as images/train/i00.jpg and images/tra")
    assert warned(base, "doctor") == [said] and "problems: 0" in run(base, "doctor").output
    (root / "images/train/copy.jpg").write_bytes((root / "images/val/i10.jpg").read_bytes())
    leak, seen = "images/train/copy.jpg: is byte for byte the val image images/val/i10.jpg, so training", run(base, "doctor").output
    assert leak in seen and "problems: 0" not in seen and leak in run(base, "prepare-data").output


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_handful_of_masks_trains_before_anything_is_measured(tmp_path: Path, count: int) -> None:
    for number in range(count + 3):
        picture(tmp_path / f"d/images/i{number}.jpg", seed=number)
        if number < count:
            mask(tmp_path / f"d/masks/i{number}.png", 0, 1)
    base, notes = made(tmp_path / "d")
    shares = f"of the masks train has 1, val {min(1, count - 1)}, test {max(0, count - 2)}; draw masks for more images"
    assert any(shares in note for note in notes)
    if count > 1:
        assert any(shares in line for line in warned(base, "prepare-data"))
    else:
        needed = "val has no images; only 1 image has a mask, and train takes the first, val the second, test the third"
        assert needed in refused(base)


def test_masks_in_val_alone_are_named(tmp_path: Path) -> None:
    base, notes = made(data_set(tmp_path / "d", train=0))
    line = refused(base)
    assert "data.partition: no train image has a mask (val has 10); move images with their masks to train" in line
    assert notes == ["prepare-data will refuse this data set: " + line.removeprefix("error: ")]


@pytest.mark.parametrize("values", [(0, 75, 150), (0, 128, 255), (75, 150), (0, 85, 170, 255), (0, 10, 20), (0, 38, 75, 113)])
def test_grey_levels_are_no_class_ids(tmp_path: Path, values: tuple[int, ...]) -> None:
    root = data_set(tmp_path / "d", values=values)
    levels = [value for value in values if value != 255]
    with pytest.raises(ValueError, match=f"would make {max(levels) + 1} classes.*; save 0 to {len(levels) - 1} in their place"):
        made(root)
    assert not (tmp_path / "project").exists()


def test_grey_levels_and_sparse_class_ids() -> None:
    assert all(grey_levels(values) for values in ((0, 100), (0, 1, 200)))
    sparse = ((0, 1), (0, 1, 2, 255), (1, 2, 3), (0, 3), (0, 15), (0, 7, 15), tuple(range(0, 150, 2)), (1, 255))
    assert not any(grey_levels(values) for values in sparse)


def test_values_that_no_mask_holds_are_told_of(tmp_path: Path) -> None:
    _, notes = made(data_set(tmp_path / "d", values=(1, 2, 3)))
    assert notes[0].startswith("no mask holds the value 0, which is the first class; where your ids begin at 1, save each less 1")
    (inner,) = missing_values([0, 3, 255])
    assert inner.text == "no mask holds the values 1, 2, and each is a class without a pixel"
    assert missing_values([0, 1, 2, 255]) == []


GLOBS = FolderData(dataset="folder", root=".", partition="1/1", classes=["a", "b"], images="images/*", masks="masks/*")


def drawn(root: Path, **changes: Any) -> dict[str, str]:
    """The split of each image below images/, every one of which has a mask."""
    return {sample.image_id: sample.split for sample in index_folder(root, GLOBS.model_copy(update=changes)).samples}


def test_labels_always_reach_train_and_larger_sets_are_drawn_as_before(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for count in range(1, 41):
        for folder in ("images", "masks"):
            (tmp_path / f"{folder}/i{count:02}.png").touch()
        for seed in range(10):
            splits = drawn(tmp_path, partition_seed=seed)
            counts = [list(splits.values()).count(split) for split in ("train", "val", "test")]
            assert counts[0] > 0 and counts[1] >= (count > 1) and counts[2] >= (count > 2), (count, seed, counts)
            if "train" in (before := drawn_by_0_1_0(sorted(splits), seed)).values():
                assert splits == before, "a set that 0.1.0 could train on is drawn as it drew it"
    for path in [*tmp_path.glob("*/i0[4-9].png"), *tmp_path.glob("*/i[1-4]*.png")]:
        path.unlink()
    # With val_fraction 0.9 the hash of every id lies in val.
    assert set(drawn_by_0_1_0(["i01", "i02", "i03"], 2, 0.9, 0.05).values()) == {"val"}
    assert sorted(drawn(tmp_path, partition_seed=2, val_fraction=0.9, test_fraction=0.05).values()) == ["test", "train", "val"]


def drawn_by_0_1_0(ids: list[str], seed: int, val_share: float = 0.1, test_share: float = 0.1) -> dict[str, str]:
    """The rule of 0.1.0, written down again."""
    key = {i: int.from_bytes(hashlib.sha256(f"{seed}:{i}".encode()).digest()[:6], "big") / 2**48 for i in ids}
    order = sorted(ids, key=lambda i: key[i])
    val = [i for i in order if key[i] < val_share] or order[:1]
    test = [i for i in order if val_share <= key[i] < val_share + test_share and i not in val]
    test = test or [i for i in order if i not in val][:1]
    return {i: "val" if i in val else "test" if i in test else "train" for i in ids}


def test_pixels_are_counted_while_masks_are_read(root: Path) -> None:
    manifest = build_manifest(FolderData(dataset="folder", root="d", partition="1/1", classes=["a", "b"]), root.parent)
    assert set(manifest.pixels) == {row.image_id for row in manifest.rows.values() if row.mask_path}
    assert all(counts.tolist() == [192, 192] for counts in manifest.pixels.values())
