"""Bad inputs, as a user meets them: one error line that names the file, list or key and says what to do, and nothing written.

Each case spoils one thing in a folder data set of six good images and runs the real command. With `--on-error skip` a file
that cannot be used is left out and recorded; faults of names, folders and lists stop the command all the same.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from bad_inputs import FILES, IMAGES, LISTS, MANIFESTS, PARTITION, SETS, Bad, listed, unreadable
from mgd_pipeline.data.datasets import index_dataset
from mgd_pipeline.data.manifest import Manifest, read_manifest
from mgd_pipeline.data.partition import partition_images
from mgd_pipeline.errors import DataError
from mgd_stages.cli import app
from mgd_stages.projects.init import init_project
from mgd_stages.run.project import open_project
from test_images import rgb
from test_manifest import save_image, save_mask

# A bad input that makes the command wait must fail its test; "thread", because a reader that waits is no main thread.
pytestmark = pytest.mark.timeout(120, method="thread")


def make_good(root: Path) -> None:
    """Four labelled candidates, an unlabelled image and a validation image, of 8 x 6 pixels, with the classes 0 and 1."""
    for number, name in enumerate(("train/a", "train/b", "train/c", "train/d", "train/plain", "val/v")):
        save_image(root / f"images/{name}.png", seed=number)
        if name != "train/plain":
            save_mask(root / f"masks/{name}.png")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A project as init leaves it for the good data set, which lies below data/raw/folder."""
    make_good(tmp_path / "source")
    init_project("folder", tmp_path / "source", "1/2", tmp_path / "project")
    return tmp_path / "project"


def root_of(base: Path) -> Path:
    return base / "data/raw/folder"


def run(base: Path, *arguments: str, sets: tuple[str, ...] = ()) -> Any:
    options = [part for text in sets for part in ("--set", text)]
    return CliRunner().invoke(app, [*arguments, "--config", str(base / "params.yaml"), *options], env={"COLUMNS": "80"})


def assert_one_error(result: Any, bad: Bad) -> None:
    assert isinstance(result.exception, SystemExit), f"accepted, or a traceback: {result.exception!r}"
    assert result.exit_code == bad.code, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "Traceback" not in result.output
    for words in (bad.names, bad.fault, bad.remedy):
        assert words in line, f"{words!r} is not in: {line}"


@pytest.mark.parametrize("case", [*FILES, *SETS])
def test_prepare_data_names_a_bad_input(base: Path, case: str) -> None:
    """Skipping helps against the fault of a single image only."""
    bad = {**FILES, **SETS}[case]
    bad.plant(root_of(base))
    for options in ([], ["--on-error", "skip"]) if case in SETS else ([],):
        result = run(base, "prepare-data", *options, sets=bad.sets)
        assert_one_error(result, bad)
        assert case in SETS or "--on-error skip" in result.stderr
        assert not (base / "data/manifest").exists()


@pytest.mark.parametrize("case", MANIFESTS)
def test_later_stages_name_a_bad_manifest(base: Path, case: str) -> None:
    bad = MANIFESTS[case]
    assert run(base, "prepare-data").exit_code == 0
    bad.plant(base / (PARTITION if case.startswith("partition") else IMAGES))
    assert_one_error(run(base, "evaluate", "--device", "cpu"), bad)


def skip(base: Path, *sets: str) -> tuple[Any, Manifest]:
    result = run(base, "prepare-data", "--on-error", "skip", sets=sets)
    assert result.exit_code == 0 and result.stderr == "", result.output
    return result, read_manifest(base / "data/manifest", base)


@pytest.mark.parametrize("case", FILES)
def test_skip_leaves_out_one_image_and_records_it(base: Path, case: str) -> None:
    _, good = skip(base)
    assert good.skipped == () and b"skipped" not in (base / IMAGES).read_bytes()
    bad = FILES[case]
    bad.plant(root_of(base))
    result, manifest = skip(base)
    assert manifest.rows == good.rows, "the others as without the bad one, and no row for it"
    params = open_project(base / "params.yaml").params.data
    drawn = partition_images(params, index_dataset(params, base).samples, base)
    assert drawn.pop("x") and manifest.subsets == drawn, "the others in the subsets that were drawn with it"
    (skipped,) = manifest.skipped
    assert skipped.image_id == "x" and skipped.path == bad.names.removesuffix(": ")
    assert bad.fault in skipped.reason and bad.remedy in skipped.reason and str(base) not in skipped.reason
    assert f"skipped x: {skipped.path}: {skipped.reason}" in result.stdout
    assert "left out 1 of 7 images" in result.stdout


def test_an_image_without_a_mask_has_none_to_read(base: Path) -> None:
    _, manifest = skip(base)
    assert manifest.image(manifest.rows["plain"]).shape == (6, 8, 3) and manifest.mask(manifest.rows["a"]).shape == (6, 8)
    with pytest.raises(DataError, match=r"images/train/plain\.png: has no mask in the manifest; run `mgd-pipeline prepare-data`"):
        manifest.mask(manifest.rows["plain"])


def test_what_is_left_out_is_said_before_anything_is_read(base: Path) -> None:
    root = root_of(base)
    (root / "masks/train/a.tif").touch()
    (root / ".lock").symlink_to("gone")
    said = run(base, "prepare-data").stdout
    assert "warning: 1 file among the masks is left out, such as a.tif: no mask in a format that is read; remove them" in said
    assert f"warning: {root}/.lock: is a link that leads to no file, and DVC reads every file; restore what it links to" in said
    assert said.index("warning: 1 file") < said.index("warning: networks")


def test_few_images_to_compare_on_are_said(base: Path) -> None:
    said = run(base, "prepare-data").stdout
    assert "warning: networks will be compared on 1 image (val), which says little; give it more images and masks" in said
    globs = ("data.images=images/**/*.png", "data.masks=masks/**/*.png", "data.val_fraction=0.5")
    said = run(base, "prepare-data", sets=globs).stdout
    assert "(val), which says little; raise data.val_fraction or give masks to more images" in said
    for number in range(9):
        for split in ("train", "val"):
            save_image(root_of(base) / f"images/{split}/{split}{number}.png", seed=10 * len(split) + number)
            save_mask(root_of(base) / f"masks/{split}/{split}{number}.png")
    assert "warning" not in run(base, "prepare-data").stdout


def test_skip_of_many_records_each_in_order(base: Path) -> None:
    for case in ("truncated JPEG", "mask value outside the classes"):
        FILES[case].plant(root_of(base))
        for folder in ("images", "masks"):
            for path in (root_of(base) / folder / "train").glob("x.*"):
                path.rename(path.with_stem(f"x{len(case)}"))
    (root_of(base) / "masks/train/a.png").write_bytes(b"")
    result, manifest = skip(base, "data.partition=1/3")
    assert [bad.image_id for bad in manifest.skipped] == ["a", "x14", "x30"]
    assert "left out 3 of 8 images" in result.stdout and set(manifest.rows) == {"b", "c", "d", "plain", "v"}


def test_another_partition_skips_the_same_images(base: Path) -> None:
    """So images.parquet, and what teachers made of it, stays as it is: also where the image of a bad mask is unlabelled."""
    listed("a\nb\n")(root_of(base))
    (root_of(base) / "masks/train/a.png").write_bytes(b"")
    (root_of(base) / "masks/train/c.png").write_bytes(b"")
    _, manifest = skip(base, *LISTS)
    before = (base / IMAGES).read_bytes()
    assert manifest.subsets == {"b": "labelled", "d": "unlabelled", "plain": "unlabelled"}
    listed("c\nd\n", "a\nb\n")(root_of(base))
    _, manifest = skip(base, *LISTS)
    assert manifest.subsets == {"b": "unlabelled", "d": "labelled"}
    assert (base / IMAGES).read_bytes() == before


@pytest.mark.parametrize(
    ("spoilt", "words"),
    [
        (["masks/train/a.png", "masks/train/b.png"], r"masks/train/a\.png: .*none of the 2 labelled images can be used"),
        (["images/train/c.png", "images/train/d.png", "images/train/plain.png"], "none of the 3 unlabelled images"),
        (["images/val/v.png"], r"images/val/v\.png: .*the only val image cannot be used"),
    ],
)
def test_skip_stops_where_nothing_is_left(base: Path, spoilt: list[str], words: str) -> None:
    listed("a\nb\n")(root_of(base))
    for name in spoilt:
        (root_of(base) / name).write_bytes(b"")
    result = run(base, "prepare-data", "--on-error", "skip", sets=LISTS)
    assert result.exit_code == 1 and not (base / "data/manifest").exists()
    (line,) = result.stderr.splitlines()
    assert re.search(words, line), line
    assert "the file is empty; fetch it again, or remove it" in line


@pytest.mark.parametrize("case", ["file", "folder"])
def test_what_may_not_be_read_is_named(base: Path, case: str) -> None:
    path = root_of(base) / ("images/train/a.png" if case == "file" else "images/train/sub")
    if case == "folder":
        path.mkdir()
    unreadable(path)
    result = run(base, "prepare-data")
    path.chmod(0o755)
    assert_one_error(result, Bad(unreadable, f"{path.name}: ", "Permission denied", "permissions"))


def test_good_inputs_that_look_odd(base: Path) -> None:
    """Palette masks, grey, CMYK, palette and opaque images, phones' photos, turned photos whose mask fits, odd names."""
    root, images = root_of(base), root_of(base) / "images/train"
    grey, values = rgb()[..., 0], np.resize(np.array([0, 1, 255], np.uint8), (6, 8))
    Image.fromarray(grey).save(images / "grey.png")
    Image.new("CMYK", (8, 6), (0, 255, 255, 0)).save(images / "print.jpg", quality=95)
    Image.fromarray(np.dstack([rgb(), np.full((6, 8), 255, np.uint8)])).save(images / "opaque.png")
    palette = Image.fromarray(values)
    palette.putpalette([10, 20, 30] * 256)
    palette.save(images / "palette.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rgb()).save(images / "turned.png", exif=exif)
    Image.fromarray(rgb()).save(images / "phone.jpg", format="MPO", save_all=True, append_images=[Image.fromarray(rgb())])
    for name in ("Straße in Köln 1.png", "日本語.png", "a.b.c.png", "quote'%s\".png", "-rf.PNG", "narrow\u202fspace.png"):
        save_image(images / name)
    for path in list(images.iterdir()):
        save_mask(root / "masks/train" / f"{path.stem}.png", values=(0, 1, 255), palette=path.stem != "turned")
    result = run(base, "prepare-data")
    assert result.exit_code == 0 and result.stderr == "", result.output
    manifest = read_manifest(base / "data/manifest", base)
    assert len(manifest.split("train")) == 5 + 12 and manifest.skipped == ()
    pixels = {row.image_id: manifest.image(row) for row in manifest.rows.values()}
    assert (pixels["grey"] == grey[..., None]).all() and (pixels["palette"] == [10, 20, 30]).all()
    assert (pixels["opaque"] == rgb()).all() and (pixels["turned"] == rgb()).all()
    assert pixels["print"][..., 0].min() > 240 and pixels["print"][..., 1:].max() < 15
    assert pixels["phone"].shape == (6, 8, 3)
    for row in manifest.split("train"):
        assert (manifest.mask(row) == values).all(), row.image_id


@pytest.mark.parametrize(
    "text", ["\ufeffa\nb\n", "a\r\nb\r\n", "\ufeffa\r\nb", "a\n\n  b  \n\n", "/old/images/train/a.png /old/m.png\nb.png\tm.png\n"]
)
def test_good_lists_that_look_odd(base: Path, text: str) -> None:
    listed(text)(root_of(base))
    assert run(base, "prepare-data", sets=LISTS).exit_code == 0
    assert [row.image_id for row in read_manifest(base / "data/manifest", base).labelled] == ["a", "b"]


def test_a_process_of_its_own_prints_nothing_but_the_errors(base: Path) -> None:
    """Pytest keeps warnings and tracebacks of threads from standard error; a terminal shows them."""
    cases = ("truncated JPEG", "bomb of 90 million pixels", "strip of 1 x 100,000", "pipe", "transparent key", "truncated WebP")
    for number, case in enumerate(cases):
        FILES[case].plant(root_of(base))
        for path in (root_of(base) / "images/train").glob("x.*"):
            path.rename(path.with_stem(f"y{number}"))
    command = [sys.executable, "-m", "mgd_stages.cli", "prepare-data", "--config", str(base / "params.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == len(cases), done.stderr
    for number, line in enumerate(lines):
        assert line.startswith("error: ") and f"images/train/y{number}." in line
