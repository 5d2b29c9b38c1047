"""Reading images and masks: pixels as stored; test_bad_inputs has the files that are refused."""

from __future__ import annotations

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from mgd_pipeline.data.images import (
    read_drawn_mask,
    read_header,
    read_image,
    read_mask,
    read_photo,
    read_raw_mask,
    scaled_size,
)
from mgd_pipeline.errors import DataError

IDS = np.array([value if value < 5 else 255 if value == 255 else -1 for value in range(256)], np.int16)


def rgb(height: int = 6, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def with_orientation(value: int) -> bytes:
    """An EXIF block that says how a viewer turns the picture."""
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, depth: int, colour_type: int, row: bytes, claimed: int = 1) -> bytes:
    """A PNG of one row in any bit depth (Pillow itself writes only some), whose header claims a height of `claimed`."""
    header = struct.pack(">IIBBBBB", width, claimed, depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"\0" + row)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@example(375, 500, 256)
@example(1, 1000, 10)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 5000))
def test_scaled_size_keeps_the_shape_and_the_limit(height: int, width: int, long_side: int) -> None:
    h, w = scaled_size(height, width, long_side)
    if max(height, width) <= long_side:
        assert (h, w) == (height, width)
    else:
        assert max(h, w) == long_side
        factor = long_side / max(height, width)
        assert abs(h - height * factor) <= 0.5 or h == 1
        assert abs(w - width * factor) <= 0.5 or w == 1


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp"])
def test_lossless_formats_return_the_pixels(tmp_path: Path, suffix: str) -> None:
    pixels, path = rgb(), tmp_path / f"Größe 1.{suffix}"
    Image.fromarray(pixels).save(path, lossless=True)  # only WebP heeds it
    image = read_image(path)
    assert image.dtype == np.uint8 and image.flags.writeable
    np.testing.assert_array_equal(image, pixels)
    assert read_header(path) == (6, 8, 1)


def test_long_side_scales_with_antialiasing(tmp_path: Path) -> None:
    stripes = np.zeros((40, 80, 3), np.uint8)
    stripes[:, ::2] = 200  # finer than the result can show: must average to 100, not alias to 0 or 200
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    small = read_image(tmp_path / "stripes.png", long_side=10)
    assert small.shape == (5, 10, 3)
    assert abs(small[:, 1:-1].astype(int) - 100).max() <= 10
    assert read_image(tmp_path / "stripes.png", long_side=80).shape == (40, 80, 3)


@pytest.mark.parametrize("mode", ["L", "P", "1", "I;16"])
def test_masks_are_read_raw(tmp_path: Path, mode: str) -> None:
    values = np.array([[0, 1, 1], [1, 0, 0]] if mode == "1" else [[0, 4, 255], [3, 2, 1]], np.uint8)
    picture = Image.fromarray(values.astype({"I;16": np.uint16, "1": bool}.get(mode, np.uint8)))
    if mode == "P":  # colours far from the ids: `.convert("L")` would destroy them
        picture.putpalette([77] * 768)
    picture.save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as stored:
        assert stored.mode == mode
    mask = read_mask(tmp_path / "mask.png", IDS)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, values)


@pytest.mark.parametrize(("depth", "row", "values"), [(4, b"\x01\x24", [0, 1, 2, 4]), (2, b"\x1b", [0, 1, 2, 3])])
def test_grey_masks_of_few_bits_keep_their_ids(tmp_path: Path, depth: int, row: bytes, values: list[int]) -> None:
    (tmp_path / "mask.png").write_bytes(png(4, depth, 0, row))
    assert read_raw_mask(tmp_path / "mask.png").tolist() == [values]


def test_lookup_maps_values_and_names_the_foreign_one(tmp_path: Path) -> None:
    Image.fromarray(np.array([[7, 7, 9, 255]], np.uint8)).save(tmp_path / "mask.png")
    lookup = np.full(256, -1, np.int16)
    lookup[[7, 9, 255]] = [0, 1, 255]
    assert read_mask(tmp_path / "mask.png", lookup).tolist() == [[0, 0, 1, 255]]
    lookup[7] = -1
    value = f"{tmp_path / 'mask.png'}: pixel value 7 (2 pixels) is none of the 1 classes (allowed values: 9, 255)"
    with pytest.raises(DataError, match=re.escape(f"{value}; correct the mask, or the classes and ignore value in params.yaml")):
        read_mask(tmp_path / "mask.png", lookup)


def test_masks_resize_to_the_nearest_value(tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 5, (6, 8), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "mask.png")
    for size in ((3, 4), (6, 8), (5, 7), (12, 20), (1, 1)):
        rows, columns = (((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, (6, 8), strict=True))
        np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", IDS, size), values[np.ix_(rows, columns)])


def test_orientations_behind_the_pixels_in_xmp_and_of_masks(tmp_path: Path) -> None:
    whole = io.BytesIO()
    Image.fromarray(rgb()).save(whole, "PNG")
    start, end = whole.getvalue()[:-12], whole.getvalue()[-12:]
    behind = start + chunk(b"eXIf", with_orientation(6).removeprefix(b"Exif\0\0")) + end  # where some programs write it
    assert read_photo("a.png", data=behind)[1].orientation == 6
    Image.fromarray(rgb()).save(tmp_path / "x.jpg", xmp=b'<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>')
    assert read_photo(tmp_path / "x.jpg")[1].orientation == 3
    Image.fromarray(np.ones((6, 8), np.uint8)).save(tmp_path / "m.png", exif=with_orientation(8))
    mask, orientation = read_drawn_mask(tmp_path / "m.png", IDS)
    assert orientation == 8 and mask.shape == (8, 6) and (mask == 1).all()


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_damaged_or_senseless_exif_block_is_no_orientation_and_no_error(tmp_path: Path, suffix: str) -> None:
    good, random = with_orientation(6), np.random.default_rng(0)
    blocks = [with_orientation(0), with_orientation(9), b"Exif\0\0", b"Exif\0\0II*\0garbage", good[:-9]]
    for _ in range(100):
        spoilt = bytearray(good)
        spoilt[random.integers(6, len(spoilt))] = random.integers(0, 256)
        blocks.append(bytes(spoilt))
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.{suffix}"
        Image.fromarray(rgb()).save(path, exif=block)
        pixels, decoding = read_photo(path)
        assert pixels.size == 6 * 8 * 3 and 1 <= decoding.orientation <= 8
        assert decoding.orientation == 1 or number >= 5
