"""The manifest: what is written is read back, all bad files are named before anything starts, damage is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mgd_pipeline.data.build import build_manifest
from mgd_pipeline.data.classes import compare_names, current_names
from mgd_pipeline.data.datasets import names_of
from mgd_pipeline.data.images import sha256_of
from mgd_pipeline.data.manifest import Manifest, read_manifest, write_manifest
from mgd_pipeline.data.partition import partition_fingerprint
from mgd_pipeline.errors import DataError
from mgd_pipeline.params import FolderData
from test_images import rgb, with_orientation

FILES = ("images.parquet", "partition.parquet", "classes.json", "labelled.json")


def exif(orientation: int) -> bytes:
    return with_orientation(orientation) if orientation > 1 else b""


def save_image(path: Path, height: int = 6, width: int = 8, seed: int = 0, orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgb(height, width, seed)).save(path, exif=exif(orientation))


def save_mask(path: Path, height: int = 6, width: int = 8, values: tuple[int, ...] = (0, 1, 255), orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.resize(np.array(values, np.uint8), (height, width)))
    picture.putpalette([90] * 768)
    picture.save(path, exif=exif(orientation))


def folder_params(**changes: Any) -> FolderData:
    return FolderData(**{"dataset": "folder", "root": "data/raw/mine", "partition": "1/2", "classes": ["a", "b"], **changes})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder data set of 6 train images (one without a mask; JPEG and PNG; umlauts, spaces), 1 val and 1 test image."""
    root = tmp_path / "data/raw/mine"
    for number, name in enumerate(["a.png", "b.jpg", "Straße 1.jpg", "sub/c.png", "d.png", "unlabelled.png"]):
        save_image(root / "images/train" / name, width=8 + number, seed=number)
        if name != "unlabelled.png":
            save_mask((root / "masks/train" / name).with_suffix(".png"), width=8 + number)
    for split in ("val", "test"):
        save_image(root / f"images/{split}/{split}.png", height=20, width=30)
        save_mask(root / f"masks/{split}/{split}.png", height=20, width=30)
    return tmp_path


@pytest.fixture
def built(base: Path) -> Manifest:
    return build_manifest(folder_params(long_side=10), base)


def test_rows_and_subsets(base: Path, built: Manifest) -> None:
    assert list(built.rows) == sorted(["a", "b", "Straße 1", "sub/c", "d", "unlabelled", "val", "test"])
    row, unlabelled = built.rows["Straße 1"], built.rows["unlabelled"]
    assert (row.height, row.width, row.split) == (6, 10, "train")
    assert row.image_path == "images/train/Straße 1.jpg" and row.mask_path == "masks/train/Straße 1.png"
    assert row.image_sha256 == sha256_of(base / "data/raw/mine" / row.image_path)
    assert row.mask_sha256 == sha256_of(base / "data/raw/mine" / row.mask_path)
    assert unlabelled.mask_path is None and unlabelled.mask_sha256 is None
    with pytest.raises(DataError, match=r"unlabelled\.png: has no mask in the manifest; run `mgd-pipeline prepare-data`"):
        built.mask(unlabelled)
    assert set(built.pixels) == built.rows.keys() - {"unlabelled"}
    assert all(counts.tolist() == np.bincount(built.mask(built.rows[i]).flat)[:2].tolist() for i, counts in built.pixels.items())

    assert [row.image_id for row in built.split("val")] == ["val"]
    assert [row.image_id for row in built.training] == ["Straße 1", "a", "b", "d", "sub/c", "unlabelled"]
    assert len(built.labelled) == 2 and len(built.unlabelled) == 4 and unlabelled in built.unlabelled
    assert sorted(built.labelled + built.unlabelled, key=lambda row: row.image_id) == built.training
    assert built.partition_fingerprint == partition_fingerprint(row.image_id for row in built.labelled)
    for row in built.rows.values():
        assert built.image(row).shape[:2] == built.size(row)
    assert built.size(built.rows["val"]) == (7, 10)


def test_a_round_trip_keeps_everything(base: Path, built: Manifest) -> None:
    for manifest in (built, replace(built, long_side=None), replace(built, orientations={"images/train/a.png": 3})):
        write_manifest(manifest, base / "m")
        assert read_manifest(base / "m", base) == manifest
        assert (b"orientations" in (base / "m/images.parquet").read_bytes()) == bool(manifest.orientations)
    assert {path.name for path in (base / "m").iterdir()} == {*FILES}


def test_names_and_colours_are_in_a_file_of_their_own(base: Path, built: Manifest) -> None:
    """Version 0.1.0 wrote them into images.parquet; and DVC may fetch the manifest without them."""
    write_manifest(built, base / "m")
    before = [(base / "m" / name).read_bytes() for name in FILES]
    shown = {"classes": ["Straße", "b"], "colours": [[1, 2, 3], [4, 5, 6]]}
    renamed = build_manifest(folder_params(long_side=10, **shown), base)
    write_manifest(renamed, base / "m")
    assert [data == (base / "m" / name).read_bytes() for data, name in zip(before, FILES, strict=True)] == [True, True, False, True]
    assert read_manifest(base / "m", base) == renamed and renamed.palette == ((1, 2, 3), (4, 5, 6))
    write_manifest(build_manifest(folder_params(long_side=10, values=[1, 0]), base), base / "m")
    assert before[0] != (base / "m/images.parquet").read_bytes(), "another id is no name"

    write_manifest(built, base / "m")
    (base / "m/classes.json").unlink()
    known = names_of(folder_params(**shown))
    assert read_manifest(base / "m", base, known) == renamed
    with pytest.raises(DataError, match=r"classes\.json: no such file; run `mgd-pipeline prepare-data`"):
        read_manifest(base / "m", base, names_of(folder_params(classes=["a", "b", "c"])))
    table = pq.read_table(base / "m/images.parquet")
    meta = json.loads(table.schema.metadata[b"mgd"]) | {"classes": built.classes, "palette": built.palette}
    del meta["class_count"]
    pq.write_table(table.replace_schema_metadata({b"mgd": json.dumps(meta).encode()}), base / "m/images.parquet")
    assert read_manifest(base / "m", base, known) == built


def test_bytes_repeat_and_hold_no_path_of_this_machine(base: Path, built: Manifest) -> None:
    write_manifest(built, base / "one")
    backwards = replace(built, rows=dict(reversed(built.rows.items())), subsets=dict(reversed(built.subsets.items())))
    write_manifest(backwards, base / "two")
    shutil.copytree(base / "data", base / "elsewhere/data")
    calls: list[tuple[int, int]] = []
    moved = build_manifest(folder_params(long_side=10), base / "elsewhere", lambda done, total: calls.append((done, total)))
    assert calls == [(done, 8) for done in range(1, 9)]
    write_manifest(moved, base / "three")
    for name in FILES:
        content = (base / "one" / name).read_bytes()
        assert content == (base / "two" / name).read_bytes() == (base / "three" / name).read_bytes()
        assert str(base).encode() not in content
    write_manifest(build_manifest(folder_params(long_side=10, partition="1/5"), base), base / "four")
    same = [(base / "one" / name).read_bytes() == (base / "four" / name).read_bytes() for name in FILES]
    assert same == [True, False, True, False]
    table = pq.read_table(base / "one/images.parquet")
    assert table.schema.field("height").type == pa.int32() and table.num_rows == 8, "as plain pyarrow reads it"
    assert json.loads(table.schema.metadata[b"mgd"])["manifest_version"] == 1


def _another_photo(root: Path) -> None:
    save_image(root / "images/train/e.png", seed=9)


def _another_labelled_photo(root: Path) -> None:
    _another_photo(root)
    save_mask(root / "masks/train/e.png")


def _another_mask(root: Path) -> None:
    save_mask(root / "masks/train/a.png", width=8, values=(1, 0))


def _a_first_mask_moves_a_photo_to_val(root: Path) -> None:
    for kind in ("images", "masks"):
        (root / kind / "val/unlabelled.png").write_bytes((root / "images/train/unlabelled.png").read_bytes())
    save_mask(root / "masks/val/unlabelled.png", width=13)
    (root / "images/train/unlabelled.png").unlink()


@pytest.mark.parametrize(
    ("change", "params", "same"),
    [
        (_another_photo, {}, True),
        (_another_photo, {"partition": "1/2"}, True),
        (lambda root: (root / "images/train/unlabelled.png").unlink(), {}, True),
        (lambda root: save_mask(root / "masks/val/val.png", height=20, width=30, values=(1, 0)), {}, True),
        (_another_labelled_photo, {}, False),
        (_another_mask, {}, False),
        (lambda root: save_image(root / "images/train/a.png", width=8, seed=8), {}, False),
        (lambda root: save_image(root / "images/val/val.png", height=20, width=30, seed=7), {}, False),
        (_a_first_mask_moves_a_photo_to_val, {}, False),
        (_another_photo, {"values": [1, 0]}, False),
        (_another_photo, {"classes": ["a", "b", "c"]}, False),
        (_another_photo, {"long_side": 9}, False),
    ],
)
def test_the_labels_that_teachers_know(base: Path, change: Callable[[Path], object], params: dict[str, Any], same: bool) -> None:
    """labelled.json has the same bytes unless labels, what they mean, or the images of val and test have changed."""
    partition = params.get("partition", "1/1")
    write_manifest(build_manifest(folder_params(partition=partition), base), base / "before")
    change(base / "data/raw/mine")
    write_manifest(build_manifest(folder_params(**{"partition": partition, **params}), base), base / "after")
    before, after = ((base / folder / "labelled.json").read_bytes() for folder in ("before", "after"))
    assert (before == after) == same


@pytest.mark.parametrize(
    ("theirs", "ours", "fault", "renamed"),
    [
        ("abc", "abc", "", ""),
        ("abc", "xbc", "", "it calls class 0 'a', the project calls it 'x'"),
        ("abc", "Abc", "", "it calls class 0 'a', the project calls it 'A'"),
        (["Car", "CAR"], ["car", "CAR"], "", "it calls class 0 'Car', the project calls it 'car'"),
        ("aAc", "aAx", "", "it calls class 2 'c', the project calls it 'x'"),
        (
            "abcde",
            "vwxyz",
            "",
            "it calls class 0 'a', the project calls it 'v'; class 1 'b', the project calls it 'w'; "
            "class 2 'c', the project calls it 'x'; 2 more are renamed",
        ),
        ("abc", "ab", "it has 3 classes, the project has 2", ""),
        ("abc", "bac", "it calls class 0 'a', which is class 1 of the project", ""),
        ("abc", "axb", "it calls class 1 'b', which is class 2 of the project", ""),
        (["car", "Car"], ["Car", "car"], "it calls class 0 'car', which is class 1 of the project", ""),
        ("abc", "acB", "it calls class 1 'b', which is class 2 of the project", ""),
        (["a", "Stra\u00dfe"], ["Stra\u00dfe", "b"], "it calls class 1 'Stra\u00dfe', which is class 0 of the project", ""),
    ],
)
def test_another_name_in_the_same_place_is_a_renaming(theirs: Sequence[str], ours: Sequence[str], fault: str, renamed: str) -> None:
    assert compare_names("it", theirs, ours) == (fault, renamed)
    assert current_names(theirs, ours) == list(theirs if fault else ours)


def test_many_bad_files_are_summed_up(base: Path) -> None:
    for number in range(15):
        (base / f"data/raw/mine/images/train/bad{number:02d}.png").write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        build_manifest(folder_params(), base)
    *lines, last = str(caught.value).splitlines()
    assert len(lines) == 10 and "bad09.png: not a readable image" in lines[9]
    assert last == "... and 5 more files that cannot be used; or leave them out with `mgd-pipeline prepare-data --on-error skip`"


def test_manifests_that_are_missing_or_damaged(base: Path, built: Manifest) -> None:
    folder = base / "m"
    write_manifest(built, folder)
    whole = (folder / "images.parquet").read_bytes()
    for name in FILES[:3]:  # nothing here reads labelled.json
        (folder / name).unlink()
        with pytest.raises(DataError, match=rf"{name}: no such file; run `mgd-pipeline prepare-data`"):
            read_manifest(folder, base)
        damage = "is not JSON; run `mgd-pipeline prepare-data`" if name == "classes.json" else "not a readable manifest"
        for content in (b"", whole[: len(whole) // 2], whole[:-4] + b"XXXX", b"PAR1" + bytes(100) + b"PAR1"):
            (folder / name).write_bytes(content)
            with pytest.raises(DataError, match=rf"{name}: {damage}") as caught:
                read_manifest(folder, base)
            assert "\n" not in str(caught.value)
        write_manifest(built, folder)
    shutil.rmtree(base / "data/raw/mine")
    with pytest.raises(DataError, match=r"data/raw/mine: the data set of .* is not here; link it again"):
        read_manifest(folder, base)


Change = Callable[[Any], object]
WRONG = {
    **{"lookup": [0, 1], "class_count": 1, "root": 3, "long_side": 0, "skipped": ["x"]},
    **{"orientations": [{"images/train/a.png": value} for value in (1, [3], "3", True)]},
}
OF_META: list[tuple[str, Change, str]] = [
    ("images", lambda meta: meta.update(manifest_version=2), r"images\.parquet: manifest version 2, this program reads 1"),
    ("images", lambda meta: meta.pop("manifest_version"), r"images\.parquet: manifest version None"),
    ("images", lambda meta: meta.pop("lookup"), "metadata lacks 'lookup'"),
    *(
        ("images", lambda meta, change={key: value}: meta.update(change), f"metadata {key!r} is not what prepare-data writes")
        for key, values in WRONG.items()
        for value in (values if key == "orientations" else [values])
    ),
    ("partition", lambda meta: meta.update(declared_unlabelled="val"), "'declared_unlabelled' is not what prepare-data writes"),
    # 0.1.0 wrote it; a stage that reads it would mix the numbers of two classes, though params.yaml is right by now.
    ("images", lambda meta: meta.update(classes=["a", "a"], palette=[[0, 0, 0], [9, 9, 9]]), "two classes are called 'a'; correct"),
    ("images", lambda meta: meta.update(classes="a b"), "'classes' is not what prepare-data writes"),
]
OF_ROWS: list[tuple[str, Change, str]] = [
    ("images", lambda rows: rows.append(rows[0]), r"images\.parquet: image_id 'Straße 1' stands twice"),
    ("images", lambda rows: rows[0].update(split="dev"), "'Straße 1' has split 'dev'"),
    ("images", lambda rows: rows[0].update(height=0), "'Straße 1' has a size of 10 x 0"),
    ("images", lambda rows: rows.pop(0), r"partition\.parquet: 'Straße 1' is not in "),
    ("partition", lambda rows: rows.append(rows[0]), "'Straße 1' is there twice"),
    (
        "partition",
        lambda rows: rows.append({**rows[0], "subset": {"labelled", "unlabelled"}.difference({rows[0]["subset"]}).pop()}),
        "'Straße 1' is both labelled and unlabelled",
    ),
    ("partition", lambda rows: rows[0].update(subset="some"), "has subset 'some', not labelled or unlabelled"),
    (
        "partition",
        lambda rows: rows.append({"image_id": "val", "subset": "unlabelled"}),
        "'val' is in the val split, but only train",
    ),
    ("partition", lambda rows: rows[-1].update(subset="labelled"), "labelled image 'unlabelled' has no mask"),
    ("partition", lambda rows: [row.update(subset="unlabelled") for row in rows], "no image is labelled"),
]
OF_COLUMNS: list[tuple[str, Change, str]] = [
    ("images", lambda table: table.drop_columns(["image_sha256"]), r"images\.parquet: column 'image_sha256' is missing"),
    ("partition", lambda table: table.drop_columns(["subset"]), r"partition\.parquet: column 'subset' is missing"),
    ("images", lambda table: table.set_column(3, "height", pa.array([1.0] * 8)), "column 'height' is double, not int32"),
    ("partition", lambda table: table.set_column(1, "subset", pa.nulls(6, pa.string())), "column 'subset' has empty cells"),
]


def test_manifests_that_somebody_edited(base: Path, built: Manifest) -> None:
    for kind, cases in (("meta", OF_META), ("rows", OF_ROWS), ("columns", OF_COLUMNS)):
        for name, change, words in cases:
            write_manifest(built, base / "m")
            assert read_manifest(base / "m", base) == built
            path = base / f"m/{name}.parquet"
            table = pq.read_table(path)
            if kind == "meta":
                change(meta := json.loads(table.schema.metadata[b"mgd"]))
                table = table.replace_schema_metadata({b"mgd": json.dumps(meta).encode()})
            elif kind == "rows":
                change(rows := table.to_pylist())
                table = pa.Table.from_pylist(rows, schema=table.schema)
            else:
                table = change(table)
            pq.write_table(table, path)
            with pytest.raises(DataError, match=f"{words}.*`mgd-pipeline prepare-data`"):
                read_manifest(base / "m", base)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": "a b"}, "'classes' is not what prepare-data writes"),
        ({"palette": [[0, 0], [9, 9]]}, "'palette' is not what prepare-data writes"),
        ({"palette": [[0, 0, 0]]}, "'palette' is not what prepare-data writes"),
        ({"classes": ["a", "a"]}, "two classes are called 'a'; correct data.classes"),
        ({"classes": ["a", "b", "c"], "palette": [[0, 0, 0]] * 3}, "names 3 classes, images.parquet has 2"),
    ],
)
def test_names_that_somebody_edited(base: Path, built: Manifest, change: dict[str, Any], words: str) -> None:
    write_manifest(built, base / "m")
    path = base / "m/classes.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    with pytest.raises(DataError, match=f"classes.json: {words}.*`mgd-pipeline prepare-data`"):
        read_manifest(base / "m", base)
