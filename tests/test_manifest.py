"""The manifest: what is written is read back, every bad file is named before anything starts, damage is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mgd_pipeline.data.build import build_manifest
from mgd_pipeline.data.images import read_image, sha256_of
from mgd_pipeline.data.manifest import Manifest, read_manifest, write_manifest
from mgd_pipeline.data.partition import partition_fingerprint
from mgd_pipeline.errors import DataError
from mgd_pipeline.params import FolderData

CAMVID = Path(__file__).parents[2] / "shared" / "datasets" / "camvid"


def save_image(path: Path, height: int = 6, width: int = 8, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


def save_mask(path: Path, height: int = 6, width: int = 8, values: tuple[int, ...] = (0, 1, 255), palette: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.resize(np.array(values, np.uint8), (height, width)))
    if palette:
        picture.putpalette([90] * 768)
    picture.save(path)


def folder_params(**changes: Any) -> FolderData:
    return FolderData(**{"dataset": "folder", "root": "data/raw/mine", "partition": "1/2", "classes": ["a", "b"], **changes})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder data set of 6 train images (one without a mask; JPEG and PNG; umlauts, spaces), 1 val and 1 test image."""
    root = tmp_path / "data/raw/mine"
    for number, name in enumerate(["a.png", "b.jpg", "Straße 1.jpg", "sub/c.png", "d.png", "unlabelled.png"]):
        save_image(root / "images/train" / name, width=8 + number, seed=number)
        if name != "unlabelled.png":
            save_mask((root / "masks/train" / name).with_suffix(".png"), width=8 + number, palette=number % 2 == 0)
    for split in ("val", "test"):
        save_image(root / f"images/{split}/{split}.png", height=20, width=30)
        save_mask(root / f"masks/{split}/{split}.png", height=20, width=30)
    return tmp_path


@pytest.fixture
def built(base: Path) -> Manifest:
    return build_manifest(folder_params(long_side=10), base)


def test_rows(base: Path, built: Manifest) -> None:
    assert list(built.rows) == sorted(["a", "b", "Straße 1", "sub/c", "d", "unlabelled", "val", "test"])
    row = built.rows["Straße 1"]
    assert (row.height, row.width, row.split) == (6, 10, "train")
    assert row.image_path == "images/train/Straße 1.jpg" and row.mask_path == "masks/train/Straße 1.png"
    assert row.image_sha256 == sha256_of(base / built.root / row.image_path)
    assert row.mask_sha256 == sha256_of(base / built.root / row.mask_path)
    assert built.rows["unlabelled"].mask_path is None and built.rows["unlabelled"].mask_sha256 is None
    assert built.root == Path("data/raw/mine")


def test_subsets_and_sizes(base: Path, built: Manifest) -> None:
    assert [row.image_id for row in built.split("val")] == ["val"]
    assert [row.image_id for row in built.training] == ["Straße 1", "a", "b", "d", "sub/c", "unlabelled"]
    assert len(built.labelled) == 2 and len(built.unlabelled) == 4 and "unlabelled" in {r.image_id for r in built.unlabelled}
    assert sorted(built.labelled + built.unlabelled, key=lambda row: row.image_id) == built.training
    assert built.partition_fingerprint == partition_fingerprint(row.image_id for row in built.labelled)
    for row in built.rows.values():
        assert read_image(base / built.root / row.image_path, built.long_side).shape[:2] == built.size(row)
    assert built.size(built.rows["val"]) == (7, 10)


def test_a_round_trip_keeps_everything(base: Path, built: Manifest) -> None:
    for manifest in (built, replace(built, long_side=None)):
        write_manifest(manifest, base / "data/manifest")
        assert read_manifest(base / "data/manifest", base) == manifest
    assert sorted(path.name for path in (base / "data/manifest").iterdir()) == ["images.parquet", "partition.parquet"]


def test_bytes_repeat_and_hold_no_path_of_this_machine(base: Path, built: Manifest) -> None:
    write_manifest(built, base / "one")
    backwards = replace(built, rows=dict(reversed(built.rows.items())), subsets=dict(reversed(built.subsets.items())))
    write_manifest(backwards, base / "two")
    moved = base / "elsewhere"
    shutil.copytree(base / "data", moved / "data")
    write_manifest(build_manifest(folder_params(long_side=10), moved), base / "three")
    for name in ("images.parquet", "partition.parquet"):
        content = (base / "one" / name).read_bytes()
        assert content == (base / "two" / name).read_bytes() == (base / "three" / name).read_bytes()
        assert str(base).encode() not in content


def test_another_partition_leaves_the_images_as_they_are(base: Path) -> None:
    calls: list[tuple[int, int]] = []
    write_manifest(build_manifest(folder_params(), base, lambda done, total: calls.append((done, total))), base / "one")
    assert calls == [(done, 8) for done in range(1, 9)]
    write_manifest(build_manifest(folder_params(partition="1/5"), base), base / "two")
    for name, same in (("images.parquet", True), ("partition.parquet", False)):
        assert ((base / "one" / name).read_bytes() == (base / "two" / name).read_bytes()) == same
    table = pq.read_table(base / "one/images.parquet")
    assert table.schema.field("height").type == pa.int32() and table.num_rows == 8, "as plain pyarrow reads it"
    assert json.loads(table.schema.metadata[b"mgd"])["manifest_version"] == 1


def refusal(base: Path) -> list[str]:
    """The lines with which the data set is refused."""
    with pytest.raises(DataError) as caught:
        build_manifest(folder_params(), base)
    return str(caught.value).splitlines()


def test_each_bad_file_is_named(base: Path) -> None:
    root = base / "data/raw/mine"
    save_mask(root / "masks/train/a.png", values=(0, 200))
    save_mask(root / "masks/train/d.png", height=12, width=6)
    whole = (root / "images/train/b.jpg").read_bytes()
    (root / "images/train/b.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    Image.fromarray(np.zeros((6, 13), np.uint16)).save(root / "images/train/unlabelled.png")
    lines = refusal(base)
    expected = {
        "masks/train/a.png": "pixel value 200 (24 pixels) is none of the 2 classes",
        "images/train/b.jpg": "cannot be decoded",
        "masks/train/d.png": "mask of 6 x 12 pixels, but its image",
        "images/train/unlabelled.png": "8 bits a channel",
    }
    assert len(lines) == len(expected)
    for line, (name, words) in zip(lines, expected.items(), strict=True):
        assert line.startswith(f"{root / name}: ") and words in line


def test_many_bad_files_are_summed_up(base: Path) -> None:
    for number in range(15):
        (base / f"data/raw/mine/images/train/bad{number:02d}.png").write_bytes(b"no image")
    lines = refusal(base)
    assert (
        len(lines) == 11
        and "bad09.png" in lines[9]
        and lines[10]
        == "... and 5 more files that cannot be used; or leave them out with `mgd-pipeline prepare-data --on-error skip`"
    )


def test_orientations_are_written_only_where_there_are_some(base: Path, built: Manifest) -> None:
    write_manifest(built, base / "m")
    assert b"orientations" not in (base / "m/images.parquet").read_bytes()
    write_manifest(replace(built, orientations={"images/train/a.png": 3}), base / "m")
    manifest = read_manifest(base / "m", base)
    assert manifest.orientations == {"images/train/a.png": 3} and manifest.rows == built.rows
    unsound: Any
    for unsound in (1, [3], "3", True):
        write_manifest(replace(built, orientations={"images/train/a.png": unsound}), base / "m")
        with pytest.raises(DataError, match=r"metadata 'orientations' is not what prepare-data writes"):
            read_manifest(base / "m", base)


def test_a_manifest_with_two_classes_of_one_name_is_refused(base: Path, built: Manifest) -> None:
    """0.1.0 wrote it; a stage that reads it would mix the two classes' numbers, though params.yaml is right by now."""
    write_manifest(replace(built, classes=("a", "a")), base / "data/manifest")
    with pytest.raises(DataError, match=r"two classes are called 'a'; correct data\.classes in params\.yaml and run"):
        read_manifest(base / "data/manifest", base)


def rewrite(path: Path, change: str | list[dict[str, Any]] | dict[str, Any]) -> None:
    """Drops a column of one of the two files, or gives it other rows or metadata."""
    table = pq.read_table(path)
    if isinstance(change, str):
        table = table.drop_columns([change])
    elif isinstance(change, list):
        table = pa.Table.from_pylist(change, schema=table.schema)
    else:
        table = table.replace_schema_metadata({b"mgd": json.dumps(change).encode()})
    pq.write_table(table, path)


def test_manifests_that_are_missing_or_damaged(base: Path, built: Manifest) -> None:
    folder = base / "m"
    with pytest.raises(DataError, match=r"images\.parquet: no such file; run `mgd-pipeline prepare-data`"):
        read_manifest(folder, base)
    write_manifest(built, folder)
    (folder / "partition.parquet").unlink()
    with pytest.raises(DataError, match=r"partition\.parquet: no such file; run `mgd-pipeline prepare-data`"):
        read_manifest(folder, base)
    write_manifest(built, folder)
    whole = (folder / "images.parquet").read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:-4] + b"XXXX", b"PAR1" + bytes(100) + b"PAR1"):
        (folder / "images.parquet").write_bytes(content)
        with pytest.raises(DataError, match=r"images\.parquet: not a readable manifest") as caught:
            read_manifest(folder, base)
        assert "\n" not in str(caught.value)
    write_manifest(built, folder)
    shutil.rmtree(base / "data/raw/mine")
    with pytest.raises(DataError, match=r"data/raw/mine: the data set of .* is not here; link it again"):
        read_manifest(folder, base)


def test_manifests_that_contradict(base: Path, built: Manifest) -> None:
    images, partition = base / "m/images.parquet", base / "m/partition.parquet"
    write_manifest(built, base / "m")
    image_rows, subset_rows = pq.read_table(images).to_pylist(), pq.read_table(partition).to_pylist()
    first = subset_rows[0]
    other = "labelled" if first["subset"] == "unlabelled" else "unlabelled"
    meta = json.loads(pq.read_table(images).schema.metadata[b"mgd"])
    cases: list[tuple[Path, str | list[dict[str, Any]] | dict[str, Any], str]] = [
        (images, {**meta, "manifest_version": 2}, r"images\.parquet: manifest version 2, this program reads 1"),
        (images, {k: v for k, v in meta.items() if k != "lookup"}, "metadata lacks 'lookup'"),
        (images, "image_sha256", r"images\.parquet: column 'image_sha256' is missing"),
        (partition, "subset", r"partition\.parquet: column 'subset' is missing"),
        (images, [*image_rows, image_rows[0]], r"images\.parquet: image_id 'Straße 1' stands twice"),
        (images, [{**image_rows[0], "split": "dev"}, *image_rows[1:]], "'Straße 1' has split 'dev'"),
        (partition, [*subset_rows, first], f"{first['image_id']!r} is there twice"),
        (partition, [*subset_rows, {**first, "subset": other}], "is both labelled and unlabelled"),
        (partition, [{**first, "subset": "some"}], "has subset 'some', not labelled or unlabelled"),
        (partition, [{"image_id": "val", "subset": "unlabelled"}], "'val' is in the val split, but only train"),
        (partition, [{"image_id": "ghost", "subset": "unlabelled"}], "'ghost' is not in "),
        (partition, [{"image_id": "unlabelled", "subset": "labelled"}], "labelled image 'unlabelled' has no mask"),
    ]
    for path, change, words in cases:
        write_manifest(built, base / "m")
        assert read_manifest(base / "m", base) == built
        rewrite(path, change)
        with pytest.raises(DataError, match=f"{words}.*`mgd-pipeline prepare-data`"):
            read_manifest(base / "m", base)


def test_camvid() -> None:
    if not CAMVID.is_dir():
        pytest.skip("the CamVid copy in ../shared is not here")
    params = folder_params(root=CAMVID.name, partition="1/8", classes=[str(i) for i in range(11)])
    manifest = build_manifest(params, CAMVID.parent)
    assert (len(manifest.labelled), len(manifest.unlabelled), len(manifest.split("val"))) == (46, 321, 101)
    assert {(row.height, row.width) for row in manifest.rows.values()} == {(360, 480)}
