"""docs/design/target-cache.md cannot rot silently: its reader reads our caches, its tables are those of the code."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import tensorstore
import torch
import zarr

from caches import (
    ENCODED,
    LAYOUT,
    PROVENANCE,
    SMALL,
    build,
    compute_with,
    encoded_of,
    image,
    images,
    link_into_dvc,
    spoil,
    targets_of,
)
from mgd_pipeline.caches import format as cache_format
from mgd_pipeline.caches.commit import CONTROL_BYTES, RECEIPT, read_sealed
from mgd_pipeline.caches.encoding import TARGETS_VERSION, TeacherTargets
from mgd_pipeline.caches.format import ARRAYS, AXES, Layout, array_metadata, canonical, index_schema, plan_layout
from mgd_pipeline.caches.levels import level_step
from mgd_pipeline.caches.provenance import expected_provenance
from mgd_pipeline.caches.reader import open_cache
from mgd_pipeline.caches.shards import Skipped
from mgd_pipeline.data.manifest import ImageKey
from mgd_pipeline.errors import CacheError
from mgd_pipeline.networks.normalisation import IMAGENET
from mgd_pipeline.params import SmpTeacher, TargetsParams
from mgd_pipeline.teachers.teacher import Teacher, teacher_provenance
from mgd_pipeline.training.batches import ReadTargets, make_source, view_targets
from mgd_pipeline.views import identity_view

DOCUMENT = (Path(__file__).parents[1] / "docs/design/target-cache.md").read_text(encoding="utf-8")
PROSE = re.sub(r"^```.*?^```$", "", DOCUMENT, flags=re.DOTALL | re.MULTILINE)
GAP, MENDED = image("bad 1"), image("bad 2")


def block(language: str) -> str:
    """The only code block of a language."""
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE)
    return text


def table(heading: str) -> list[list[str]]:
    """Rows of the table whose first column has this heading."""
    lines = DOCUMENT[DOCUMENT.index(f"\n| {heading} |") + 1 :].split("\n\n", 1)[0].splitlines()
    return [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in lines[2:]]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@pytest.fixture(scope="module")
def reader() -> Callable[..., Any]:
    """The class of the document's reader."""
    space: dict[str, Any] = {}
    exec(compile(block("python"), "target-cache.md", "exec"), space)
    return space["TeacherCache"]


def grown(folder: Path, layout: Layout = LAYOUT) -> Path:
    """Three shards, the last one not full, then two more. One image is a gap twice, another was one and was mended."""

    def compute(keys: Sequence[ImageKey]) -> Iterator[TeacherTargets | Skipped]:
        return (Skipped("unreadable") if key == GAP.key else encoded_of(key, layout) for key in keys)

    first = [*images(5), GAP, MENDED, *images(9)[5:]]
    build(folder, first, layout=layout, compute=compute_with(layout))
    return build(folder, [*first, *images(14)[9:]], layout=layout, compute=compute)


def read_all(cache: Any) -> list[bytes]:
    """Every value, at the image's pixels too, for the damage tests."""
    return [
        value.tobytes()
        for row in cache.entries
        for value in (*(cache.record(name, row) for name in cache.records), cache.pixel_logits(row))
    ]


def test_the_reader_needs_nothing_of_this_project_and_no_zarr() -> None:
    imports = [node for node in ast.walk(ast.parse(block("python"))) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in imports if isinstance(node, ast.ImportFrom)}
    third_party = {"google_crc32c", "numpy", "pyarrow", "pyarrow.parquet"}
    assert third_party < names and names - third_party <= {"collections", "hashlib", "json", "os", "re", "stat", "struct"}
    assert f"{google_crc32c.value(b'123456789'):X}" in DOCUMENT


@pytest.mark.parametrize("layout", [LAYOUT, replace(LAYOUT, encoding="float16"), SMALL], ids=["uint8", "float16", "small"])
@pytest.mark.filterwarnings("ignore:Object at .* is not recognized as a component of a Zarr hierarchy")
def test_its_reader_equals_ours_plain_zarr_and_tensorstore(tmp_path: Path, reader: Callable[..., Any], layout: Layout) -> None:
    path = grown(tmp_path, layout)
    theirs, ours, plain = reader(path, PROVENANCE), open_cache(path), zarr.open_group(path, mode="r")
    stores = {name: {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / name)}} for name in layout.records}
    others = {name: tensorstore.open(store).result().read().result() for name, store in stores.items()}
    wanted = [*images(14), MENDED]
    assert ours.generation == 2 and len(list((path / "logits/c").iterdir())) == 5
    assert sorted(theirs.row) == sorted(ours.index.place) == sorted(one.key for one in wanted)
    for one in wanted:
        row = theirs.row[one.key]
        assert row == ours.row(one.key)
        for name in layout.records:
            values = theirs.record(name, row)
            assert values.dtype == ours.record(name, row).dtype == np.asarray(plain[name]).dtype
            assert values.tobytes() == ours.record(name, row).tobytes() == np.asarray(plain[name])[row].tobytes()
            assert values.tobytes() == others[name][row].tobytes()
    for row in (5, 6, 11, 12, 19, -1):  # gaps, the hole before the growth, a gap again, the end, no row at all
        with pytest.raises(ValueError, match=f"row {row} has no targets"):
            theirs.record("logits", row)
    assert image(3, "changed").key not in theirs.row


@pytest.mark.parametrize(
    "layout",
    [LAYOUT, replace(LAYOUT, stride=8), replace(LAYOUT, stride=16, encoding="float16"), SMALL],
    ids=["stride 4", "stride 8", "stride 16", "small"],
)
def test_its_pixel_logits_are_those_of_training_and_of_the_network(
    tmp_path: Path, reader: Callable[..., Any], layout: Layout
) -> None:
    path = build(tmp_path, images(6), layout=layout)
    theirs, ours = reader(path, {}), open_cache(path)
    for one in images(6):
        row = ours.row(one.key)
        logits = theirs.pixel_logits(row)
        targets, pixels = {"t": ReadTargets(ours.read([row]), ours.layout)}, torch.zeros(1, 3, *one.size, dtype=torch.uint8)
        source = make_source([None], [identity_view(*one.size)], pixels, None, targets, torch.zeros(1, 6))  # type: ignore[list-item]
        np.testing.assert_allclose(logits, view_targets(source, "t").logits[0].numpy(), rtol=0, atol=1e-3)

        said = torch.from_numpy(targets_of(one.key, layout).logits)[None]
        step = float(np.ptp(said.numpy())) / 255 if layout.encoding == "uint8" else 0.02
        if layout == SMALL:
            floor = ENCODED.floor_of(layout.classes)
            said, step = said.log_softmax(1), 3 * level_step(floor, ENCODED.levels)  # of a class that shares the highest level
            said[said < 2 - floor] = -floor
        upsampled = torch.nn.functional.interpolate(said, size=one.frame, mode="bilinear", align_corners=True)[0].numpy()
        assert np.abs(logits - upsampled[:, : one.size[0], : one.size[1]]).max() <= step / 2 + 1e-3


@pytest.mark.parametrize("layout", [LAYOUT, SMALL], ids=["plain", "small"])
def test_its_reader_refuses_what_ours_refuses(tmp_path: Path, reader: Callable[..., Any], layout: Layout) -> None:
    path = grown(tmp_path, layout)
    truth = read_all(reader(path, PROVENANCE))
    assert len(truth) == 15 * (len(layout.records) + 1)
    with pytest.raises(ValueError, match="made from something else"):
        reader(path, {**PROVENANCE, "classes": ["other"]})

    # --- one bit of each file, and where a file has several parts, of each part
    for file in sorted(name for name in path.rglob("*") if name.is_file()):
        good = file.read_bytes()
        for share in (0.01, 0.3, 0.6, 0.99):
            spoil(file, int(share * len(good)))
            with pytest.raises((ValueError, LookupError, AttributeError, TypeError)):
                read_all(reader(path, PROVENANCE))
            with pytest.raises(CacheError):
                everything = open_cache(path)
                _ = [everything.record(name, everything.row(key)) for key in everything.index.place for name in layout.records]
            file.write_bytes(good)

    # --- a valid shard in another's place, a link out of the cache
    assert read_all(reader(path, PROVENANCE)) == truth
    full = build(tmp_path / "full", images(8), layout=layout)
    one, other = full / "global_descriptors/c/0/0", full / "global_descriptors/c/1/0"
    one.chmod(0o644)
    one.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match="belongs to another place"):
        read_all(reader(full, PROVENANCE))
    one.unlink()
    one.symlink_to(path / "global_descriptors/c/0/0")
    with pytest.raises(ValueError, match="a link out of the cache"):
        reader(full, PROVENANCE)
    link_into_dvc(path, tmp_path)
    assert read_all(reader(path, PROVENANCE)) == truth, "links into a DVC cache are followed"


def test_constants_have_the_values_of_the_code() -> None:
    named = dict(re.findall(r"`([A-Z_]+)` = ([\w.]+)", DOCUMENT))
    constants = {name: value for name, value in vars(cache_format).items() if re.fullmatch("[A-Z][A-Z_]*", name)}
    elsewhere = {"ARRAYS", "AXES"}  # these have tables of their own
    expected = {name: str(value) for name, value in constants.items() if name not in elsewhere}
    assert elsewhere < set(constants) and named == {**expected, "TARGETS_VERSION": str(TARGETS_VERSION)}


def test_files_have_the_bounds_of_the_reader() -> None:
    bounds = {quoted(file)[0]: int(size) for file, size, _ in table("File") if size}
    ours = {name: size for name, size in CONTROL_BYTES.items() if name != RECEIPT}
    assert bounds == {**ours, "<array>/zarr.json": ours["zarr.json"]}


@pytest.mark.parametrize(
    "layout", [SMALL, Layout(21, 21, 512, 1024, 8, 8, "float16", 16, "uint8"), Layout(2, 3, 96, 160, 16, 64, "uint8", 1, "uint8")]
)
def test_arrays_have_the_shapes_and_types_of_the_code(layout: Layout) -> None:
    rows = table("Array")
    assert [quoted(name)[0] for name, *_ in rows] == list(layout.arrays) and set(layout.arrays) - set(ARRAYS) == {"region_affine"}
    sizes = {"K": layout.classes, "D": layout.features, "2": 2, "4": 4}
    sizes |= {"h": layout.height // layout.stride, "w": layout.width // layout.stride}
    sizes |= {"r": math.ceil(layout.height / layout.region_stride), "c": math.ceil(layout.width / layout.region_stride)}
    for name, shape, dtype, _ in rows:
        documented = tuple(sizes[side] for side in shape.strip("()").split(", "))
        assert (documented, getattr(layout, quoted(dtype)[0]) if quoted(dtype) else dtype) == (
            layout.records[quoted(name)[0]][0],
            layout.records[quoted(name)[0]][1].name,
        )
    metadata = [json.loads(array_metadata(layout, name, 9)) for name in layout.records]
    axes = {axis for array in metadata for axis in zip(array["dimension_names"], array["shape"], strict=True)}
    assert len(axes) == len(dict(axes)), "axes of one name have one length, as xarray asks for"


def test_fields_are_those_of_the_code() -> None:
    assert [name for row in table("Layout field") for name in quoted(row[0])] == [field.name for field in fields(Layout)]
    columns = []
    for names, dtype, _ in table("Column"):
        for name in quoted(names):
            columns += [(name.replace("<array>", array), dtype) for array in (SMALL.arrays if "<array>" in name else [""])]
    schema = index_schema(SMALL.arrays)
    assert columns == [(field.name, str(field.type)) for field in schema]
    assert all(not field.nullable for field in schema) and "All columns are required" in DOCUMENT
    assert set(ImageKey._fields) <= set(quoted(PROSE))


def test_the_example_of_metadata_is_what_is_written() -> None:
    layout = plan_layout(21, 256, 512, 512, 4, 16, "uint8")
    assert canonical(json.loads(block("json"))) == array_metadata(layout, "logits", 1000)
    floats = json.loads(array_metadata(layout, "logits_affine", 1000))
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    assert floats["codecs"][0]["configuration"]["codecs"] == [little, {"name": "crc32c"}]
    assert floats["fill_value"] == "NaN" and floats["dimension_names"] == ["image", "offset_scale"]
    zstd = json.loads(array_metadata(replace(layout, compression="zstd"), "logits", 9))["codecs"][0]["configuration"]["codecs"][1]
    assert zstd in [json.loads(text) for text in quoted(PROSE) if text.startswith('{"name"')]
    assert {quoted(name)[0]: tuple(quoted(axes)) for name, axes in table("Axes of")} == AXES
    assert json.loads(array_metadata(layout, "logits", 1000, 2))["dimension_names"] == ["image", "channel", "row", "column"]


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]


def test_provenance_has_the_fields_of_the_code() -> None:
    params = SmpTeacher(encoder="resnet18", decoder_channels=16, weights="w")  # type: ignore[call-arg]
    teacher = Teacher(torch.nn.Identity(), IMAGENET, align_corners=True)
    plain, scaled = (
        teacher_provenance(expected_provenance(seen, options, ("a",), None), teacher, "ab", None)
        for seen, options in ((params, TargetsParams()), (params.model_copy(update={"short_side": 520}), ENCODED))
    )
    documented = [name for row in table("Provenance field") for name in quoted(row[0])]
    assert sorted(documented) == sorted(leaves(scaled))
    small = {f"encoding.{name}" for name in ("floor", "levels", "region_levels", "compression")}
    assert set(leaves(scaled)) - set(leaves(plain)) == {"preprocessing.short_side_of", *small}


def test_commit_and_receipt_have_the_documented_keys(tmp_path: Path) -> None:
    path = grown(tmp_path, SMALL)
    commit = json.loads((path / "commit.json").read_bytes())
    receipt = read_sealed(next((tmp_path / "work/shards").iterdir()) / RECEIPT)
    assert receipt is not None
    levels = (
        commit,
        commit["feature_statistics"],
        commit["files"]["zarr.json"],
        commit["shards"][0],
        commit["shards"][0]["fidelity"],
        receipt,
        receipt["rows"][0],
        receipt["files"]["logits"],
    )
    keys = {key for level in levels for key in level}
    assert keys <= set(quoted(PROSE)), keys - set(quoted(PROSE))
    assert sorted(commit) == ["feature_statistics", "files", "format", "generation", "self", "shards"]
    mgd = json.loads((path / "zarr.json").read_bytes())["attributes"]["mgd"]
    assert sorted(mgd) == ["fingerprint", "format", "layout", "provenance"] and set(mgd) <= set(quoted(PROSE))
    assert RECEIPT in quoted(PROSE)
