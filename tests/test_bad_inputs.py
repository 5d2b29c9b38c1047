"""Bad inputs, as a user meets them: one error line that names the file, list or key and says what to do, and nothing written.

Each case spoils one thing in a folder data set of six good images and runs the real command. With `--on-error skip` a file
that cannot be used is left out and recorded; faults of names, folders and lists stop the command all the same.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mgd_pipeline.data.datasets import index_dataset
from mgd_pipeline.data.images import turned
from mgd_pipeline.data.manifest import Manifest, read_manifest
from mgd_pipeline.data.partition import partition_images
from mgd_stages.cli import app
from mgd_stages.projects.init import init_project
from mgd_stages.run.project import open_project
from test_images import chunk, png, rgb
from test_manifest import save_image, save_mask

# A bad input that makes the command wait must fail its test; "thread", because a reader that waits is no main thread.
pytestmark = pytest.mark.timeout(120, method="thread")

Plant = Callable[[Path], object]
"""Spoils the data set below a root."""
GLOBS = ("data.images=photos/*.png", "data.masks=labels/*.png")
LISTS = ("data.partition={labelled: labelled.txt, unlabelled: unlabelled.txt}",)


@dataclass(frozen=True)
class Bad:
    plant: Plant
    names: str
    """What the error line names: a file relative to the data set or the project, or a key."""
    fault: str
    remedy: str
    sets: tuple[str, ...] = ()
    code: int = 1


def image(content: bytes, name: str = "x.png") -> Plant:
    return lambda root: (root / "images/train" / name).write_bytes(content)


def saved(picture: Image.Image, **options: Any) -> Plant:
    return lambda root: picture.save(root / "images/train/x.png", **options)


def link(target: str) -> Plant:
    return lambda root: (root / "images/train/x.png").symlink_to(target)


def half(suffix: str) -> Plant:
    file = io.BytesIO()
    Image.fromarray(rgb(64, 64)).save(file, suffix)
    return image(file.getvalue()[: file.tell() // 2], f"x.{suffix}")


def mask(spoil: Callable[[Path], object]) -> Plant:
    """A good image x of 8 x 6 pixels, whose mask `spoil` writes."""

    def plant(root: Path) -> None:
        save_image(root / "images/train/x.png")
        spoil(root / "masks/train/x.png")

    return plant


def mask_of(picture: Image.Image, kind: str = "PNG") -> Plant:
    return mask(lambda path: picture.save(path, kind))


def with_a_flipped_bit() -> bytes:
    """A mask that Pillow alone reads without an error, with other class ids than were written."""
    values = np.resize(np.repeat(np.array([0, 1], np.uint8), 30), (6, 8))
    file = io.BytesIO()
    Image.fromarray(values).save(file, format="PNG")
    whole = file.getvalue()
    for bit in range(8 * (whole.index(b"IDAT") + 4), 8 * (whole.index(b"IEND") - 8)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(OSError, SyntaxError):
            read = np.asarray(Image.open(io.BytesIO(content)))
            if (read != values).any() and read.max() <= 1:
                return bytes(content)
    pytest.skip("Pillow itself finds every flipped bit")


def with_text_bomb() -> bytes:
    content = png(3, 8, 0, b"\1\2\3")
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(20_000_000)))  # 20 kB that become 20 MB
    return content[:33] + bomb + content[33:]  # behind the header


def turned_with_its_mask(root: Path) -> None:
    """A phone's photo, stored lying, shown standing; its mask was drawn on the stored pixels."""
    save_image(root / "images/train/x.jpg", orientation=6)
    save_mask(root / "masks/train/x.png")


X, XJPG, XMASK = "images/train/x.png: ", "images/train/x.jpg: ", "masks/train/x.png: "
NOT_AN_IMAGE, DAMAGED = "not a readable image; expected PNG, JPEG, BMP, WEBP", "cannot be decoded"
EMPTY, LFS = "not a readable image; the file is empty", "not a readable image; it is a pointer of Git LFS"
MEM, REPLACE, AS_RGB = "/proc/self/mem", "replace or remove", "save it as 8-bit RGB"
RGB, GREY = Image.fromarray(rgb()), Image.fromarray(np.zeros((6, 8), np.uint8))
TRANSPARENT = Image.fromarray(np.dstack([rgb(), np.full((6, 8), 128, np.uint8)]))

FILES: dict[str, Bad] = {
    "truncated JPEG": Bad(half("jpeg"), "images/train/x.jpeg: ", DAMAGED, REPLACE),
    "truncated WebP": Bad(half("webp"), "images/train/x.webp: ", DAMAGED, REPLACE),
    "zero-length file": Bad(image(b""), X, EMPTY, "fetch it again, or remove it"),
    "text": Bad(image(b"404 not found\n"), X, NOT_AN_IMAGE, REPLACE),
    "pointer of Git LFS": Bad(image(b"version https://git-lfs.github.com/spec/v1\n", "x.jpg"), XJPG, LFS, "`git lfs pull`"),
    "EPS": Bad(image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), X, NOT_AN_IMAGE, REPLACE),
    "16-bit colours": Bad(image(png(4, 16, 2, bytes(24))), X, "mode RGB;16B is not 8 bits", AS_RGB),
    "1-bit scan": Bad(image(png(8, 1, 0, b"\x55")), X, "mode 1 is not 8 bits", AS_RGB),
    "transparent pixels": Bad(saved(TRANSPARENT), X, "100 % of the pixels are transparent", "save the image as RGB"),
    "transparent key": Bad(saved(GREY, transparency=0), X, "are transparent (lowest alpha 0)", "save the image as RGB"),
    "bomb of 196 million pixels": Bad(image(png(14_000, 8, 0, bytes(14_000), 14_000)), X, "exceeds 89 million pixels", "tiles"),
    "bomb of 90 million pixels": Bad(image(png(9_500, 8, 0, bytes(9_500), 9_500)), X, "9500 x 9500 exceeds", "into tiles"),
    "bomb in a text chunk": Bad(image(with_text_bomb()), X, "too large", REPLACE),
    "image with a flipped bit": Bad(lambda root: image(with_a_flipped_bit())(root), X, DAMAGED, REPLACE),
    "strip of 1 x 100,000": Bad(saved(Image.new("RGB", (100_000, 1))), X, "a strip of 100000 x 1 pixels", "cut it into pieces"),
    "folder called x.png": Bad(lambda root: (root / "images/train/x.png").mkdir(), X, "is a folder", "rename or remove"),
    "link to nothing": Bad(link("gone.png"), X, "a link", "restore"),
    "pipe": Bad(lambda root: os.mkfifo(root / "images/train/x.png"), X, "is a pipe", "remove it"),
    "device": Bad(link("/dev/zero"), X, "or device", "remove it"),
    # It opens, and answers every reading with an error.
    **({"failing disk": Bad(link(MEM), X, "Input/output error", "check the file")} if Path(MEM).exists() else {}),
    "mask of another size": Bad(mask(lambda path: save_mask(path, height=7)), XMASK, "mask of 8 x 7 pixels, but", "at one size"),
    "mask drawn on stored pixels (EXIF)": Bad(
        turned_with_its_mask, XMASK, "mask of 8 x 6 pixels, but its image images/train/x.jpg has 6 x 8 as viewers show it",
        "the mask was drawn on the photo as it is stored; set data.exif_orientation to ignored if all masks were",
    ),
    "mask value outside the classes": Bad(mask(lambda path: save_mask(path, values=(2,))), XMASK, "value 2 (48 pix", "params.yaml"),
    "mask in colours": Bad(mask_of(RGB), XMASK, "mode RGB holds colours", "save the mask as PNG with one value"),
    "mask with alpha": Bad(mask_of(GREY.convert("LA")), XMASK, "mode LA holds transparency", "save the mask as PNG with one value"),
    "JPEG mask": Bad(mask_of(GREY, "JPEG"), XMASK, "a JPEG cannot hold a mask", "as PNG"),
    "16-bit mask of 300": Bad(
        mask_of(Image.fromarray(np.full((6, 8), 300, np.uint16))), XMASK, "pixel value 300", "save it with 8 bits"
    ),
    "mask with a flipped bit": Bad(mask(lambda path: path.write_bytes(with_a_flipped_bit())), XMASK, DAMAGED, REPLACE),
    "mask that links to nothing": Bad(mask(lambda path: path.symlink_to("gone.png")), XMASK, "a link", "restore"),
}  # fmt: skip


def named(name: str | bytes) -> Plant:
    def plant(root: Path) -> None:
        try:
            Path(os.fsdecode(os.fsencode(root / "images/train") + b"/" + os.fsencode(name))).write_bytes(png(1, 8, 0, b"\0"))
        except OSError:
            pytest.skip("this file system refuses such names itself")

    return plant


def moved(root: Path) -> None:
    """The whole data set was a link, and what it leads to was moved."""
    root.resolve().rename(root.resolve().with_name("moved"))


def file_in_place_of_a_folder(root: Path) -> None:
    shutil.rmtree(root / "images/train")
    (root / "images/train").touch()


def photo(root: Path) -> None:
    save_image(root / "photos/a.png")


def listed(labelled: str | bytes | None, unlabelled: str = "c\nd\nplain\n") -> Plant:
    """The two lists beside params.yaml; None leaves one out."""

    def plant(root: Path) -> None:
        for name, content in (("labelled.txt", labelled), ("unlabelled.txt", unlabelled)):
            if content is not None:
                (root.parents[2] / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return plant


LABELLED, UNLABELLED = "project/labelled.txt: ", "project/unlabelled.txt: "

SETS: dict[str, Bad] = {
    "name that is not UTF-8": Bad(named(b"caf\xe9.png"), r"caf\udce9.png", "the file name is not UTF-8", "rename it"),
    "line break in a name": Bad(named("two\nlines.png"), r"two\nlines.png", "a line break, tab or control", "rename it"),
    "line separator in a name": Bad(named("a\u2028b.png"), r"a\u2028b.png", "a line break, tab or control", "rename it"),
    "a.jpg and a.png": Bad(lambda root: save_image(root / "images/train/a.jpg"), "a.png: ", "same name as", "remove or rename one"),
    "an id in train and val": Bad(
        lambda root: (save_image(root / "images/train/v.png"), save_mask(root / "masks/train/v.png")),
        "images/train/v.png and images/val/v.png: ", "both have the image_id 'v'", "rename one, or remove it from train or val",
    ),
    "mask without image": Bad(lambda root: save_mask(root / "masks/train/x.png"), XMASK, "no image 'x'", "or remove the mask"),
    "masks named otherwise": Bad(
        lambda root: [path.rename(path.with_name(f"{path.stem}_mask.png")) for path in (root / "masks/train").iterdir()],
        "images/train: ", "no mask belongs to an image, such as mask 'a_mask' and image 'a'",
        "give a mask its image's path and name",
    ),
    "val image without mask": Bad(
        lambda root: save_image(root / "images/val/x.png"), "images/val/x.png: ", "val image without a mask", "images/train"
    ),
    "no val images": Bad(
        lambda root: [shutil.rmtree(root / f"{kind}/val") for kind in ("images", "masks")],
        "evaluation.split: ", "val has no images", "choose the other split, or add images",
    ),
    "no train images": Bad(
        lambda root: [path.unlink() for path in (root / "images/train").iterdir()],
        "images/train: ", "no image found", "readable suffixes are .jpg",
    ),
    "file in place of images/train": Bad(
        file_in_place_of_a_folder, "images/train: ", "no such folder; expected images/", "link it: ln -s /path/to/images "
    ),
    "data set that moved": Bad(moved, "data/raw/folder: ", "is a link to", "link it again: ln -sfn"),
    "link to a folder around it": Bad(
        lambda root: (root / "images/train/again").symlink_to(".."), "images/train/again: ", "has no end", "remove the link"
    ),
    "no masks at all": Bad(
        lambda root: shutil.rmtree(root / "masks/train"),
        "data.partition: ", "no train image has a mask (val has 1)", "move images with their masks",
    ),
    "glob without a match": Bad(lambda root: None, "'photos/*.png'", "no image matches", "readable suffixes are .jpg", GLOBS),
    "glob for masks without a match": Bad(photo, "data.partition: ", "no train image has a mask", "add masks", GLOBS),
    "glob that leaves the root": Bad(
        photo, "../*.png: ", "a glob must stay below root", "write it relative", ("data.images=../*.png", GLOBS[1])
    ),
    "one glob of two": Bad(photo, "data", "give both globs", "or neither", GLOBS[:1], code=2),
    "missing list": Bad(listed(None), LABELLED, "no such list", "correct data.partition in params.yaml", LISTS),
    "list of empty lines": Bad(listed("\r\n \n\t\n"), LABELLED, "holds no id", "write one image a line", LISTS),
    "unknown id": Bad(listed("a\nplai\n"), "project/labelled.txt, line 2: ", "no image has the id or path 'plai'", "near", LISTS),
    "id in both lists": Bad(listed("a\nb\nc\n"), UNLABELLED, "'c' is also in", "remove it from one list", LISTS),
    "id of val in a list": Bad(listed("a\nv\n"), LABELLED, "'v' is in the val split; labels of val", "remove it", LISTS),
    "labelled id without mask": Bad(listed("plain\n", "c\n"), LABELLED, "'plain' has no mask", "add the mask or move", LISTS),
    "list in UTF-16 without a mark": Bad(
        listed("a\nb\n".encode("utf-16-le")), LABELLED, "cannot be read (it holds zero bytes)", "expected UTF-8 text", LISTS
    ),
    "folder in place of a list": Bad(
        lambda root: (root.parents[2] / "labelled.txt").mkdir(), LABELLED, "cannot be read", "expected UTF-8 text", LISTS
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four labelled candidates, an unlabelled image and a validation image, of 8 x 6 pixels, with the classes 0 and 1; and a
    project as init and prepare-data leave it."""
    folder = tmp_path_factory.mktemp("good")
    for number, name in enumerate(("train/a", "train/b", "train/c", "train/d", "train/plain", "val/v")):
        save_image(folder / f"source/images/{name}.png", seed=number)
        if name != "train/plain":
            save_mask(folder / f"source/masks/{name}.png")
    init_project("folder", folder / "source", "1/2", folder / "project")
    assert run(folder / "project", "prepare-data").exit_code == 0
    return folder


@pytest.fixture
def base(good: Path, tmp_path: Path) -> Path:
    """A project as init leaves it for a copy of the good data set."""
    shutil.copytree(good, tmp_path, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest"))
    root_of(tmp_path / "project").unlink()
    root_of(tmp_path / "project").symlink_to(tmp_path / "source")
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


def skip(base: Path, *sets: str) -> tuple[Any, Manifest]:
    result = run(base, "prepare-data", "--on-error", "skip", sets=sets)
    assert result.exit_code == 0 and result.stderr == "", result.output
    return result, read_manifest(base / "data/manifest", base)


@pytest.mark.parametrize("case", SETS)
def test_a_fault_of_more_than_one_image_stops_even_where_images_may_be_left_out(base: Path, case: str) -> None:
    SETS[case].plant(root_of(base))
    assert_one_error(run(base, "prepare-data", "--on-error", "skip", sets=SETS[case].sets), SETS[case])
    assert not (base / "data/manifest").exists()


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_is_named_or_left_out_and_recorded(good: Path, base: Path, case: str) -> None:
    bad = FILES[case]
    bad.plant(root_of(base))
    stopped = run(base, "prepare-data")
    assert_one_error(stopped, bad)
    assert "--on-error skip" in stopped.stderr and not (base / "data/manifest").exists()
    result, manifest = skip(base)
    without = read_manifest(good / "project/data/manifest", good / "project")
    assert without.skipped == () and b"skipped" not in (good / "project/data/manifest/images.parquet").read_bytes()
    assert manifest.rows == without.rows, "the others as without the bad one, and no row for it"
    params = open_project(base / "params.yaml").params.data
    drawn = partition_images(params, index_dataset(params, base).samples, base)
    assert drawn.pop("x") and manifest.subsets == drawn, "the others in the subsets that were drawn with it"
    (skipped,) = manifest.skipped
    assert skipped.image_id == "x" and skipped.path == bad.names.removesuffix(": ")
    assert bad.fault in skipped.reason and bad.remedy in skipped.reason and str(base) not in skipped.reason
    assert f"skipped x: {skipped.path}: {skipped.reason}" in result.stdout
    assert "left out 1 of 7 images" in result.stdout


def test_a_later_stage_names_a_damaged_manifest(base: Path) -> None:
    bad = Bad(Path.touch, "data/manifest/images.parquet: ", "not a readable manifest", "run `mgd-pipeline prepare-data`")
    (base / "data/manifest").mkdir()
    bad.plant(base / "data/manifest/images.parquet")
    assert_one_error(run(base, "evaluate", "--device", "cpu"), bad)


def test_what_is_left_out_and_few_images_are_said_before_anything_is_read(base: Path) -> None:
    root = root_of(base)
    (root / "masks/train/a.gif").touch()
    (root / ".lock").symlink_to("gone")
    said = run(base, "prepare-data").stdout
    assert "warning: 1 file among the masks is left out, such as a.gif: no mask in a format that is read; remove them" in said
    assert f"warning: {root}/.lock: is a link that leads to no file, and DVC reads every file; restore what it links to" in said
    few = "warning: networks will be compared on 1 image (val), which says little; "
    assert f"{few}add more images with masks to val" in said and said.index("warning: 1 file") < said.index("warning: networks")
    globs = ("data.images=images/**/*.png", "data.masks=masks/**/*.png", "data.val_fraction=0.5")
    assert "which says little; raise data.val_fraction or give masks to more images" in run(base, "prepare-data", sets=globs).stdout
    (root / "masks/train/a.gif").unlink()
    (root / ".lock").unlink()
    for number in range(9):
        for split in ("train", "val"):
            save_image(root / f"images/{split}/{split}{number}.png", seed=10 * len(split) + number)
            save_mask(root / f"masks/{split}/{split}{number}.png")
    assert "warning" not in run(base, "prepare-data").stdout


def test_another_partition_skips_the_same_images(base: Path) -> None:
    """So images.parquet, and what teachers made of it, stays as it is: also where the image of a bad mask is unlabelled."""
    for labelled, unlabelled, subsets in (
        ("a\nb\n", "c\nd\nplain\n", {"b": "labelled", "d": "unlabelled", "plain": "unlabelled"}),
        ("c\nd\n", "a\nb\n", {"b": "unlabelled", "d": "labelled"}),
    ):
        listed(labelled, unlabelled)(root_of(base))
        for name in ("c", "a"):
            (root_of(base) / f"masks/train/{name}.png").write_bytes(b"")
        before = [path.read_bytes() for path in base.glob("data/manifest/images.parquet")]
        result, manifest = skip(base, *LISTS)
        assert manifest.subsets == subsets and [bad.image_id for bad in manifest.skipped] == ["a", "c"]
        assert "left out 2 of 6 images" in result.stdout and set(manifest.rows) == {"b", "d", "plain", "v"}
        assert before in ([], [(base / "data/manifest/images.parquet").read_bytes()])


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


def test_good_inputs_that_look_odd(base: Path) -> None:
    """Palette masks, grey, CMYK, palette and opaque images, phones' photos, turned photos whose mask fits, odd names."""
    root, images = root_of(base), root_of(base) / "images/train"
    grey, values = rgb()[..., 0], np.resize(np.array([0, 1, 255], np.uint8), (6, 8))
    Image.fromarray(grey).save(images / "grey.png")
    Image.new("CMYK", (8, 6), (0, 255, 255, 0)).save(images / "print.jpg", quality=95)
    Image.fromarray(np.dstack([rgb(), np.full((6, 8), 255, np.uint8)])).save(images / "opaque.png")
    palette = Image.fromarray(values)
    palette.putpalette([number % 256 for number in range(768)])
    palette.save(images / "palette.png")
    save_image(images / "turned.png", orientation=6)
    RGB.save(images / "phone.jpg", format="MPO", save_all=True, append_images=[RGB])
    for name in ("Straße in Köln 1.png", "日本語.png", "a.b.c.png", "quote'%s\".png", "-rf.PNG", "narrow\u202fspace.png"):
        save_image(images / name)
    for path in list(images.iterdir()):
        save_mask(root / "masks/train" / f"{path.stem}.png")
    Image.fromarray(turned(values, 6)).save(root / "masks/train/turned.png")
    result = run(base, "prepare-data")
    assert result.exit_code == 0 and result.stderr == "", result.output
    manifest = read_manifest(base / "data/manifest", base)
    assert len(manifest.split("train")) == 5 + 12 and manifest.skipped == ()
    pixels = {row.image_id: manifest.image(row) for row in manifest.rows.values()}
    assert (pixels["grey"] == grey[..., None]).all()
    assert (pixels["palette"] == (3 * values[..., None].astype(int) + np.arange(3)) % 256).all()
    assert (pixels["opaque"] == rgb()).all() and (pixels["turned"] == turned(rgb(), 6)).all()
    assert pixels["print"][..., 0].min() > 240 and pixels["print"][..., 1:].max() < 15
    assert pixels["phone"].shape == (6, 8, 3)
    for row in manifest.split("train"):
        assert (manifest.mask(row) == (turned(values, 6) if row.image_id == "turned" else values)).all(), row.image_id


def test_a_process_of_its_own_prints_nothing_but_the_errors(base: Path) -> None:
    """Pytest makes errors of warnings and keeps tracebacks of threads from standard error; a terminal shows both."""
    cases = ("bomb of 90 million pixels", "strip of 1 x 100,000", "pipe", "transparent key", "truncated WebP")
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
