"""The corpus of bad inputs: each spoils one thing in a good folder data set, and knows what the error line must say.

`test_bad_inputs` runs the real commands on them.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import struct
import unicodedata
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from test_images import png, rgb
from test_manifest import rewrite, save_image, save_mask

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


# --- Files that cannot be used: image x, and masks of image x -------------------------------------------------------------


def image(content: bytes, name: str = "x.png") -> Plant:
    return lambda root: (root / "images/train" / name).write_bytes(content)


def saved(picture: Image.Image, **options: Any) -> Plant:
    """`picture` in `format=`, always called x.png: what counts is the content."""
    return lambda root: picture.save(root / "images/train/x.png", **{"format": "PNG", **options})


def half(suffix: str) -> Plant:
    def plant(root: Path) -> None:
        path = root / f"images/train/x.{suffix}"
        Image.fromarray(rgb(64, 64)).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return plant


def mask(spoil: Callable[[Path], object]) -> Plant:
    """A good image x of 8 x 6 pixels, whose mask `spoil` writes."""

    def plant(root: Path) -> None:
        save_image(root / "images/train/x.png")
        spoil(root / "masks/train/x.png")

    return plant


def mask_of(values: np.ndarray, **options: Any) -> Plant:
    return mask(lambda path: Image.fromarray(values).save(path, **{"format": "PNG", **options}))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_wrong_crc() -> bytes:
    content = bytearray(png(3, 8, 0, b"\1\2\3"))
    content[content.index(b"IEND") - 5] ^= 1  # the last byte of the checksum of the pixels
    return bytes(content)


def with_a_flipped_bit() -> bytes:
    """A mask that Pillow alone reads without an error, with other class ids than were written."""
    values = np.resize(np.repeat(np.array([0, 1], np.uint8), 30), (6, 8))
    file = io.BytesIO()
    Image.fromarray(values).save(file, format="PNG")
    whole = file.getvalue()
    for bit in range(8 * (whole.index(b"IDAT") + 4), 8 * (whole.index(b"IEND") - 8)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        try:
            read = np.asarray(Image.open(io.BytesIO(content)))
        except (OSError, SyntaxError):
            continue
        if (read != values).any() and read.max() <= 1:
            return bytes(content)
    pytest.skip("Pillow itself finds every flipped bit")


def with_text_bomb() -> bytes:
    content = png(3, 8, 0, b"\1\2\3")
    end_of_header = content.index(b"IDAT") - 4
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200_000_000), 9))  # 200 kB that become 200 MB
    return content[:end_of_header] + bomb + content[end_of_header:]


def turned_with_its_mask(root: Path) -> None:
    """A phone's photo, stored lying, shown standing; its mask was drawn on what was shown."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rgb()).save(root / "images/train/x.jpg", exif=exif)
    save_mask(root / "masks/train/x.png", height=8, width=6)


def transparent() -> Image.Image:
    return Image.fromarray(np.dstack([rgb(), np.full((6, 8), 128, np.uint8)]))


def with_key() -> Image.Image:
    return Image.fromarray(np.zeros((6, 8), np.uint8)).convert("P")


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket may have 108 bytes only
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)
    os.chdir(here)


def unreadable(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read every file")
    path.chmod(0)


def of_a_failing_disk(path: Path) -> None:
    if not Path("/proc/self/mem").exists():
        pytest.skip("no /proc here")
    path.symlink_to("/proc/self/mem")  # opens, and answers every reading with "Input/output error"


X, XJPG, XMASK = "images/train/x.png: ", "images/train/x.jpg: ", "masks/train/x.png: "
NOT_AN_IMAGE, DAMAGED = "not a readable image; expected PNG, JPEG, BMP, WEBP", "cannot be decoded"
EMPTY, LFS = "not a readable image; the file is empty", "not a readable image; it is a pointer of Git LFS"
REPLACE, AS_RGB = "replace or remove", "save it as 8-bit RGB"

FILES: dict[str, Bad] = {
    "truncated JPEG": Bad(half("jpg"), XJPG, DAMAGED, REPLACE),
    "truncated PNG": Bad(half("png"), X, DAMAGED, REPLACE),
    "truncated BMP": Bad(half("bmp"), "images/train/x.bmp: ", DAMAGED, REPLACE),
    "truncated WebP": Bad(half("webp"), "images/train/x.webp: ", DAMAGED, REPLACE),
    "zero-length file": Bad(image(b""), X, EMPTY, "fetch it again, or remove it"),
    "file of zeros after a crash": Bad(image(bytes(5000)), X, NOT_AN_IMAGE, REPLACE),
    "text": Bad(image(b"404 not found\n"), X, NOT_AN_IMAGE, REPLACE),
    "pointer of Git LFS": Bad(image(b"version https://git-lfs.github.com/spec/v1\n", "x.jpg"), XJPG, LFS, "`git lfs pull`"),
    "GIF": Bad(saved(Image.fromarray(rgb()), format="GIF"), X, NOT_AN_IMAGE, REPLACE),
    "TIFF": Bad(saved(Image.fromarray(rgb()), format="TIFF"), X, NOT_AN_IMAGE, REPLACE),
    "TIFF of 32-bit floats": Bad(saved(Image.new("F", (8, 6)), format="TIFF"), X, NOT_AN_IMAGE, REPLACE),
    "EPS": Bad(image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), X, NOT_AN_IMAGE, REPLACE),
    "HEIC of a phone": Bad(image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "x.jpg"), XJPG, NOT_AN_IMAGE, REPLACE),
    "16-bit grey": Bad(image(png(4, 16, 0, bytes(8))), X, "mode I;16B is not 8 bits", AS_RGB),
    "16-bit colours": Bad(image(png(4, 16, 2, bytes(24))), X, "mode RGB;16B is not 8 bits", AS_RGB),
    "1-bit scan": Bad(image(png(8, 1, 0, b"\x55")), X, "mode 1 is not 8 bits", AS_RGB),
    "transparent pixels": Bad(saved(transparent()), X, "100 % of the pixels are transparent", "save the image as RGB"),
    "transparent key": Bad(saved(with_key(), transparency=0), X, "are transparent (lowest alpha 0)", "save the image as RGB"),
    "bomb of 196 million pixels": Bad(image(png(14_000, 8, 0, bytes(14_000), 14_000)), X, "exceeds 89 million pixels", "tiles"),
    "bomb of 90 million pixels": Bad(image(png(9_500, 8, 0, bytes(9_500), 9_500)), X, "9500 x 9500 exceeds", "into tiles"),
    "bomb in a text chunk": Bad(image(with_text_bomb()), X, "too large", REPLACE),
    "wrong checksum in PNG": Bad(image(with_wrong_crc()), X, DAMAGED, REPLACE),
    "PNG of no width": Bad(image(png(0, 8, 0, b"")), X, NOT_AN_IMAGE, REPLACE),
    "PNG that ends after its header": Bad(image(png(3, 8, 0, b"")[:33] + chunk(b"IEND", b"")), X, DAMAGED, REPLACE),
    "strip of 1 x 100,000": Bad(saved(Image.new("RGB", (100_000, 1))), X, "a strip of 100000 x 1 pixels", "cut it into pieces"),
    "folder called x.png": Bad(lambda root: (root / "images/train/x.png").mkdir(), X, "is a folder", "rename or remove"),
    "link to nothing": Bad(lambda root: (root / "images/train/x.png").symlink_to("gone.png"), X, "a link", "restore"),
    "link to itself": Bad(lambda root: (root / "images/train/x.png").symlink_to("x.png"), X, "a link", "remove the link"),
    "pipe": Bad(lambda root: os.mkfifo(root / "images/train/x.png"), X, "is a pipe", "remove it"),
    "socket": Bad(lambda root: a_socket(root / "images/train/x.png"), X, "is a pipe, socket", "remove it"),
    "device": Bad(lambda root: (root / "images/train/x.png").symlink_to("/dev/zero"), X, "or device", "remove it"),
    "failing disk": Bad(lambda root: of_a_failing_disk(root / "images/train/x.png"), X, "Input/output error", "check the file"),
    "mask of another size": Bad(mask(lambda path: save_mask(path, height=7)), XMASK, "mask of 8 x 7 pixels, but", "at one size"),
    "mask drawn turned (EXIF)": Bad(turned_with_its_mask, XMASK, "mask of 6 x 8 pixels, but", "EXIF orientation is ignored"),
    "mask value outside the classes": Bad(mask_of(np.full((6, 8), 2, np.uint8)), XMASK, "value 2 (48 pixels)", "params.yaml"),
    "mask in colours": Bad(mask_of(rgb()), XMASK, "mode RGB holds colours", "save the mask as PNG with one value"),
    "mask with alpha": Bad(mask(lambda path: transparent().save(path)), XMASK, "mode RGBA", "save the mask as PNG with one value"),
    "JPEG mask": Bad(mask_of(np.zeros((6, 8), np.uint8), format="JPEG"), XMASK, "a JPEG cannot hold a mask", "as PNG"),
    "16-bit mask of 300": Bad(mask_of(np.full((6, 8), 300, np.uint16)), XMASK, "pixel value 300", "save it with 8 bits"),
    "truncated mask": Bad(mask(lambda path: path.write_bytes(png(8, 8, 0, bytes(8), 6)[:-20])), XMASK, DAMAGED, REPLACE),
    "mask with a flipped bit": Bad(mask(lambda path: path.write_bytes(with_a_flipped_bit())), XMASK, DAMAGED, REPLACE),
    "zero-length mask": Bad(mask(lambda path: path.touch()), XMASK, EMPTY, "fetch it again, or remove it"),
    "folder as mask": Bad(mask(lambda path: path.mkdir()), XMASK, "is a folder", "rename or remove"),
    "mask that links to nothing": Bad(mask(lambda path: path.symlink_to("gone.png")), XMASK, "a link", "restore"),
}

# --- Faults of names, folders, lists and the partition: no single image to leave out ---------------------------------------


def named(name: str | bytes) -> Plant:
    def plant(root: Path) -> None:
        try:
            Path(os.fsdecode(os.fsencode(root / "images/train") + b"/" + os.fsencode(name))).write_bytes(png(1, 8, 0, b"\0"))
        except OSError:
            pytest.skip("this file system refuses such names itself")

    return plant


def in_both_forms(root: Path) -> None:
    for form in ("NFC", "NFD"):
        save_image(root / "images/train" / f"{unicodedata.normalize(form, 'Tür')}.png")
    if len(list((root / "images/train").glob("T*r.png"))) < 2:
        pytest.skip("one file in both forms on this file system")


def only_links(root: Path) -> None:
    """The whole data set was a link, and what it leads to was moved."""
    moved = root.resolve()
    moved.rename(moved.with_name("moved"))


def no_masks(root: Path) -> None:
    shutil.rmtree(root / "masks/train")


def file_in_place_of(folder: str) -> Plant:
    def plant(root: Path) -> None:
        shutil.rmtree(root / folder)
        (root / folder).touch()

    return plant


def globbed(*names: str, labels: tuple[str, ...] = ()) -> Plant:
    def plant(root: Path) -> None:
        (root / "photos").mkdir()
        (root / "labels").mkdir()
        for name in names:
            save_image(root / "photos" / name)
        for name in labels:
            save_mask(root / "labels" / name)

    return plant


def listed(labelled: str | bytes | None, unlabelled: str | None = "c\nd\nplain\n") -> Plant:
    """The two lists beside params.yaml; None leaves one out."""

    def plant(root: Path) -> None:
        for name, content in (("labelled.txt", labelled), ("unlabelled.txt", unlabelled)):
            if content is not None:
                (root.parents[2] / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return plant


LABELLED, UNLABELLED = "project/labelled.txt: ", "project/unlabelled.txt: "
LINE_1, LINE_2 = "project/labelled.txt, line 1: ", "project/labelled.txt, line 2: "

SETS: dict[str, Bad] = {
    "name that is not UTF-8": Bad(named(b"caf\xe9.png"), r"caf\udce9.png", "the file name is not UTF-8", "rename it"),
    "line break in a name": Bad(named("two\nlines.png"), r"two\nlines.png", "a line break, tab or control", "rename it"),
    "tab in a name": Bad(named("a\tb.png"), r"a\tb.png", "a line break, tab or control", "rename it"),
    "line separator in a name": Bad(named("a\u2028b.png"), r"a\u2028b.png", "a line break, tab or control", "rename it"),
    "names equal but for the Unicode form": Bad(in_both_forms, "Tür.png: ", "same name as", "remove or rename one"),
    "a.jpg and a.png": Bad(lambda root: save_image(root / "images/train/a.jpg"), "a.png: ", "same name as", "remove or rename one"),
    "two masks of an image": Bad(lambda root: save_mask(root / "masks/train/a.bmp"), "a.png: ", "same name as", "rename one"),
    "an id in train and val": Bad(
        lambda root: (save_image(root / "images/train/v.png"), save_mask(root / "masks/train/v.png")),
        "images/train/v.png and images/val/v.png: ", "both have the image_id 'v'", "rename one, or remove it from train or val",
    ),
    "mask without image": Bad(lambda root: save_mask(root / "masks/train/x.png"), XMASK, "no image 'x'", "or remove the mask"),
    "masks named otherwise": Bad(
        lambda root: [path.rename(path.with_name(f"{path.stem}_mask.png")) for path in (root / "masks/train").iterdir()],
        "images/train: ", "no mask belongs to an image", "give a mask its image's path and name",
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
    "file in place of images/train": Bad(file_in_place_of("images/train"), "images/train: ", "no such folder", "expected images/"),
    "data set that moved": Bad(only_links, "data/raw/folder: ", "is a link to", "link it again: ln -sfn"),
    "link to a folder around it": Bad(
        lambda root: (root / "images/train/again").symlink_to(".."), "images/train/again: ", "has no end", "remove the link"
    ),
    "no masks at all": Bad(no_masks, "data.partition: ", "no train image has a mask (val has 1)", "move images with their masks"),
    "glob without a match": Bad(globbed(), "'photos/*.png'", "no image matches", "readable suffixes are .jpg", GLOBS),
    "glob for masks without a match": Bad(globbed("a.png"), "data.partition: ", "no train image has a mask", "add masks", GLOBS),
    "glob with a mask too many": Bad(
        globbed("a.png", "b.png", labels=("a.png", "b.png", "c.png")), "labels/c.png: ", "no image 'c'", "remove the mask", GLOBS
    ),
    "glob that leaves the root": Bad(
        globbed("a.png"), "../*.png: ", "a glob must stay below root", "write it relative", ("data.images=../*.png", GLOBS[1])
    ),
    "one glob of two": Bad(globbed("a.png"), "data", "give both globs", "or neither", GLOBS[:1], code=2),
    "share of a millionth": Bad(
        lambda root: None, "data.partition=1/1000000", "write a share", "such as 1/8", ("data.partition=1/1000000",), code=2
    ),
    "missing list": Bad(listed(None), LABELLED, "no such list", "correct data.partition in params.yaml", LISTS),
    "empty list": Bad(listed(""), LABELLED, "holds no id", "write one image a line", LISTS),
    "list of empty lines": Bad(listed("\r\n \n\t\n"), LABELLED, "holds no id", "write one image a line", LISTS),
    "empty second list": Bad(listed("a\nb\n", ""), UNLABELLED, "holds no id", "write one image a line", LISTS),
    "unknown id": Bad(
        listed("a\nplai\n"), LINE_2, "no image has the id or path 'plai'", "nearest is 'plain'", LISTS
    ),
    "path of another folder": Bad(
        listed("images/train/seq1/a.png\n"), LINE_1, "no image has the id or path 'images/train/seq1/a.png'",
        "images of this name are images/train/a.png: write the path", LISTS,
    ),
    "name of two images": Bad(
        lambda root: (
            *(save_image(root / f"images/train/{seq}/x.png", seed=seed) for seed, seq in ((7, "one"), (8, "two"))),
            listed("a\nx.png\n")(root),
        ),
        LINE_2, "'x.png' may be images/train/one/x.png or images/train/two/x.png", "write the path", LISTS,
    ),
    "mask of another image": Bad(
        listed("images/train/a.png masks/train/b.png\n"), LINE_1, "is the mask of 'b', not of 'a'",
        "correct the line", LISTS,
    ),
    "id that stands twice": Bad(listed("a\nb\na\n"), LABELLED, "'a' stands 2 times", "keep one line", LISTS),
    "id in both lists": Bad(listed("a\nb\nc\n"), UNLABELLED, "'c' is also in", "remove it from one list", LISTS),
    "id of val in a list": Bad(listed("a\nv\n"), LABELLED, "'v' is in the val split", "remove it", LISTS),
    "labelled id without mask": Bad(listed("plain\n", "c\n"), LABELLED, "'plain' has no mask", "add the mask or move", LISTS),
    "list in UTF-16 without a mark": Bad(
        listed("a\nb\n".encode("utf-16-le")), LABELLED, "cannot be read", "expected UTF-8 text", LISTS
    ),
    "folder in place of a list": Bad(
        lambda root: (root.parents[2] / "labelled.txt").mkdir(), LABELLED, "cannot be read", "expected UTF-8 text", LISTS
    ),
}  # fmt: skip

# --- Manifests that somebody damaged or edited, as evaluate finds them ------------------------------------------------------


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edited(change: Callable[[list[dict[str, Any]]], object]) -> Plant:
    def plant(path: Path) -> None:
        rows = pq.read_table(path).to_pylist()
        change(rows)
        rewrite(path, rows)

    return plant


def meta(**values: Any) -> Plant:
    def plant(path: Path) -> None:
        rewrite(path, {**json.loads(pq.read_table(path).schema.metadata[b"mgd"]), **values})

    return plant


IMAGES, PARTITION = "data/manifest/images.parquet", "data/manifest/partition.parquet"
AGAIN = "run `mgd-pipeline prepare-data`"

WRONG = {"lookup": [0, 1], "palette": [[0, 0], [9, 9]], "classes": "a b", "root": 3, "long_side": 0, "skipped": ["x"]}

MANIFESTS: dict[str, Bad] = {
    "manifest truncated": Bad(truncated, IMAGES, "not a readable manifest", AGAIN),
    "manifest of zero bytes": Bad(lambda path: path.write_bytes(b""), IMAGES, "not a readable manifest", AGAIN),
    "manifest missing": Bad(lambda path: path.unlink(), IMAGES, "no such file", AGAIN),
    "manifest of another program": Bad(
        lambda path: pq.write_table(pq.read_table(path).replace_schema_metadata(), path), IMAGES, "version None", AGAIN
    ),
    "manifest of another version": Bad(meta(manifest_version=2), IMAGES, "manifest version 2, this program reads 1", AGAIN),
    **{
        f"manifest with a wrong {key}": Bad(meta(**{key: value}), IMAGES, f"metadata {key!r}", AGAIN)
        for key, value in WRONG.items()
    },
    "manifest without a column": Bad(lambda path: rewrite(path, "height"), IMAGES, "column 'height' is missing", AGAIN),
    "manifest with a size of 0": Bad(edited(lambda rows: rows[0].update(height=0)), IMAGES, "'a' has a size of 8 x 0", AGAIN),
    "manifest with an image twice": Bad(edited(lambda rows: rows.append(rows[0])), IMAGES, "'a' stands twice", AGAIN),
    "manifest without an image": Bad(edited(lambda rows: rows.pop(0)), PARTITION, "'a' is not in", AGAIN),
    "partition truncated": Bad(truncated, PARTITION, "not a readable manifest", AGAIN),
    "partition with another subset": Bad(
        edited(lambda rows: rows[0].update(subset="some")), PARTITION, "'a' has subset 'some'", AGAIN
    ),
    "partition without labels": Bad(
        edited(lambda rows: [row.update(subset="unlabelled") for row in rows]), PARTITION, "no image is labelled", AGAIN
    ),
}
