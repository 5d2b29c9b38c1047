"""Photos that need more than decoding: EXIF orientation, wide values, transparency, several pages, formats of phones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import ExifTags, Image, ImageOps

from mgd_pipeline.data.alignment import better_turn
from mgd_pipeline.data.build import build_manifest
from mgd_pipeline.data.images import (
    AS_STORED,
    ORIENTATIONS,
    SWAPPING,
    Decoding,
    PhotoRules,
    read_header,
    read_image,
    read_photo,
    turned,
)
from mgd_pipeline.data.manifest import read_manifest, write_manifest
from mgd_pipeline.errors import DataError
from mgd_pipeline.params import FolderData

RAMP = np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3)


def save(path: Path, pixels: np.ndarray, orientation: int = 1, **options: Any) -> Path:
    """A picture whose EXIF block says how a viewer turns it."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize("orientation", [1, *ORIENTATIONS])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_photos_are_turned_as_pillow_turns_them(orientation: int, suffix: str, tmp_path: Path) -> None:
    path = save(tmp_path / f"x{suffix}", RAMP, orientation, **({"lossless": True} if suffix == ".webp" else {}))
    with Image.open(path) as picture:
        shown = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    pixels, decoding = read_photo(path)
    tiff = suffix == ".tif"  # which Pillow turns by itself
    assert np.array_equal(pixels, shown) and decoding == Decoding(1 if tiff else orientation)
    assert np.array_equal(read_image(path, decoding=decoding), shown)
    height, width, noted = read_header(path)
    assert shown.shape[:2] == ((width, height) if noted in SWAPPING else (height, width))
    stored, as_stored = read_photo(path, PhotoRules(apply_orientation=False))
    assert np.array_equal(stored, shown if tiff else RAMP) and as_stored == AS_STORED
    assert np.array_equal(turned(RAMP, orientation), shown)


def test_wide_values_need_a_range(tmp_path: Path) -> None:
    values = np.array([[0, 100, 1000], [2000, 4095, 65535]], np.uint16)
    for name, pixels in (
        ("a.png", values),
        ("b.tif", values),
        ("c.tif", values.astype(np.float32)),
        ("d.tif", values.astype(np.int32)),
    ):
        Image.fromarray(pixels).save(tmp_path / name)
        with pytest.raises(DataError, match=rf"{name}: holds values of \w+ \(0 to 65535\), not of 8 bits; set data\.value_range"):
            read_photo(tmp_path / name)
        rules = PhotoRules(value_range=(100, 4100))
        image, decoding = read_photo(tmp_path / name, rules)
        assert decoding == Decoding(value_range=(100, 4100)) and np.array_equal(
            read_image(tmp_path / name, decoding=decoding), image
        )
        expected = np.rint((np.clip(values, 100, 4100) - 100.0) / 4000 * 255)
        assert np.array_equal(image, np.repeat(expected[..., None], 3, 2))
    Image.fromarray(np.array([[np.nan, 1]], np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(DataError, match="holds NaN or infinity"):
        read_photo(tmp_path / "nan.tif", PhotoRules(value_range=(0, 1)))


def test_transparent_pixels_need_a_colour(tmp_path: Path) -> None:
    pixels = np.dstack([RAMP, np.full((6, 10), 255, np.uint8)])
    pixels[2:4, :, 3], pixels[0, 0, 3] = 0, 128
    Image.fromarray(pixels).save(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"35 % of the pixels are transparent \(lowest alpha 0\); set data\.background_colour"):
        read_photo(tmp_path / "x.png")
    image, decoding = read_photo(tmp_path / "x.png", PhotoRules(background_colour=(255, 0, 10)))
    assert (image[2:4] == (255, 0, 10)).all() and np.array_equal(image[4:], RAMP[4:])
    assert decoding.background_colour == (255, 0, 10)
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / "opaque.png")
    assert read_photo(tmp_path / "opaque.png", PhotoRules(background_colour=(255, 0, 10)))[1] == AS_STORED


def test_files_of_several_pages_and_phones_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (0, 200)]
    for name in ("scan.tif", "moving.webp", "moving.png"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        with pytest.raises(DataError, match=rf"{name}: holds 2 pages or frames; save the one that you mean"):
            read_photo(tmp_path / name)
    pages[0].save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=pages[1:])
    assert read_photo(tmp_path / "phone.jpg")[0].shape == (4, 4, 3), "a phone's second picture is a preview"
    save(tmp_path / "x.avif", RAMP.repeat(8, 0).repeat(8, 1))
    assert read_photo(tmp_path / "x.avif")[0].shape == (48, 80, 3)
    pillow_heif.register_heif_opener()
    save(tmp_path / "IMG_0.HEIC", RAMP.repeat(8, 0).repeat(8, 1), 6, format="HEIF")
    assert read_photo(tmp_path / "IMG_0.HEIC")[0].shape[2] == 3
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(DataError, match=r"IMG_1\.HEIC: HEIC needs an extra; run `pip install 'mgd-pipeline\[heic\]'`"):
        read_photo(tmp_path / "IMG_1.HEIC")


def data_set(base: Path, orientation: int, mask: np.ndarray, **changes: Any) -> FolderData:
    """Three photos of 6 x 10 stored pixels with an orientation, each with this mask."""
    for number in range(3):
        save(base / f"set/images/{number}.png", RAMP + number, orientation)
        (base / "set/masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(base / f"set/masks/{number}.png")
    globs = {"images": "images/*", "masks": "masks/*"}
    return FolderData(**{"dataset": "folder", "root": "set", "partition": "1/1", "classes": ["a", "b"], **globs, **changes})


def test_the_manifest_says_how_each_photo_is_decoded(tmp_path: Path) -> None:
    mask = np.zeros((10, 6), np.uint8)
    mask[:3] = 1
    data = data_set(tmp_path, 6, mask)
    write_manifest(build_manifest(data, tmp_path), tmp_path / "m")
    manifest = read_manifest(tmp_path / "m", tmp_path)
    row = manifest.rows["0"]
    assert (row.height, row.width) == (10, 6) == manifest.size(row)
    assert np.array_equal(manifest.image(row), turned(RAMP, 6)) and np.array_equal(manifest.mask(row), mask)
    assert manifest.key(row).image_sha256 != row.image_sha256, "targets of the stored pixels do not pass for its own"
    data = data.model_copy(update={"exif_orientation": "ignored"})
    with pytest.raises(DataError, match=r"0\.png: mask of 6 x 10 pixels, but its image images/0\.png has 10 x 6: .* to applied"):
        build_manifest(data, tmp_path)


def test_masks_of_stored_pixels_are_refused_or_asked_for(tmp_path: Path) -> None:
    data = data_set(tmp_path, 8, np.eye(6, 10, dtype=np.uint8))
    with pytest.raises(DataError, match=r"mask of 10 x 6 pixels, but .* 6 x 10 as viewers show it, turned by 90 .* to ignored"):
        build_manifest(data, tmp_path)
    manifest = build_manifest(data.model_copy(update={"exif_orientation": "ignored"}), tmp_path)
    row = manifest.rows["0"]
    assert np.array_equal(manifest.image(row), RAMP) and manifest.key(row).image_sha256 == row.image_sha256
    assert manifest.orientations["images/0.png"] == 8


def test_masks_that_lie_wrong_are_told_by_their_edges() -> None:
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(6):
        mask = np.zeros((64, 64), np.uint8)
        left, top = rng.integers(2, 24, 2)
        mask[top : top + 30, left : left + 14] = 1
        pairs.append((np.uint8(rng.integers(0, 40, (64, 64, 1)) + 120 * mask[..., None]).repeat(3, 2), mask))
    assert better_turn(pairs) is None and better_turn(pairs[:3]) is None
    for orientation, back in {2: 2, 3: 3, 6: 8}.items():
        wrong = [(image, turned(mask, orientation)) for image, mask in pairs]
        assert better_turn(wrong) == (back, 6, 6)
