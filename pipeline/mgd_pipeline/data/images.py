"""Reads images and masks from files, or says in one line which file cannot be used and why.

The policy, the same for every data set, so that pixels mean the same to every teacher and student:

* Formats are PNG, JPEG, BMP and WebP, recognised by content; a damaged or truncated file is an error, never a half-grey image.
  Pipes, devices and folders are not opened: a pipe would wait for ever.
* Images are 8 bits a channel: L, P, CMYK and RGB become RGB; transparency is an error unless every pixel is opaque, because
  hidden pixels would otherwise enter training; 16-bit and float images are an error, because a silent conversion saturates.
* The EXIF orientation is ignored on purpose (as torchvision does): masks are drawn on the stored pixels. The manifest notes it,
  because a mask of the same size may have been drawn on the turned image.
* Masks are read as stored class ids, never converted: `.convert("L")` turns palette indices into grey levels.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from mgd_pipeline.access import access_error, says_nothing, stand_in
from mgd_pipeline.errors import DataError, MGDError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")  # naming them keeps PIL from trying formats that run other programs, such as EPS
MAX_PIXELS = 89_000_000  # just below PIL's own limit for a warning; one such image takes 267 MB
MAX_ASPECT = 100  # longer side over shorter; padded to the networks' multiple of 32, a thinner strip is nearly all padding
IGNORE = 255
"""Label of pixels that have no class: void, and padding."""

ORIENTATIONS = {
    2: "mirrored left to right",
    3: "turned by 180 degrees",
    4: "mirrored top to bottom",
    5: "turned by 90 degrees and mirrored",
    6: "turned by 90 degrees clockwise",
    7: "turned by 90 degrees and mirrored",
    8: "turned by 90 degrees anticlockwise",
}
"""What a viewer does with the stored pixels, by EXIF orientation; with 1 and all other values nothing."""
SWAPPING = (5, 6, 7, 8)
"""Orientations that exchange height and width."""
# Pillow reads an EXIF block tag by tag, and a damaged one fails in each of these ways; the pixels may be sound all the same.
_DAMAGED_EXIF = (SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OSError, OverflowError, struct.error)

# Pillow scales grey PNGs of 2 and 4 bits to the full range; as masks their stored values are these multiples.
_GREY_STEP = {"L;2": 85, "L;4": 17}
_DECODING = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombWarning)


def sha256_of(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file's bytes. Raises DataError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from None


def check_unchanged(path: Path | str, sha256: str) -> None:
    """Raises DataError where a file is not what the manifest describes."""
    now = sha256_of(path)
    if now != sha256:
        raise DataError(
            f"{path}: has changed since `mgd-pipeline prepare-data` read it (SHA-256 was {sha256[:12]}..., is {now[:12]}...); "
            "restore the file, or run `mgd-pipeline prepare-data` again"
        )


def scaled_size(height: int, width: int, long_side: int | None) -> tuple[int, int]:
    """(height, width) in pixels of an image scaled so that its longer side has at most `long_side`; rounded, and at least 1."""
    longest = max(height, width)
    if long_side is None or longest <= long_side:
        return height, width
    return tuple(max(1, (2 * side * long_side + longest) // (2 * longest)) for side in (height, width))  # pyright: ignore


def read_header(path: Path | str) -> tuple[int, int, int]:
    """(height, width) in pixels and EXIF orientation, 1 to 8, from the header alone. Raises DataError.

    A PNG may have its orientation behind the pixels, where only `read_oriented` finds it.
    """
    with _opened(path) as image:
        # Pillow decodes all pixels to look behind them.
        hidden = image.format == "PNG" and not image.info.keys() & {"exif", "Raw profile type exif"}
        return image.height, image.width, 1 if hidden else _orientation(image)


def verify_checksums(path: Path | str) -> None:
    """Raises DataError where a readable PNG does not match its checksums; JPEG, BMP and WebP have no checksums.

    Pillow's decoder skips the last checksum: a flipped bit in a small mask would quietly become another class id.
    """
    with _opened(path) as image:
        image.verify()


def read_image(path: Path | str, long_side: int | None = None, *, data: bytes | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB, scaled down (bilinear, antialiased) where its longer side exceeds `long_side` pixels.

    `data`: the file's bytes where they come from elsewhere, such as standard input; errors then still name `path`.
    Raises DataError, naming the file, for a file that cannot be decoded and for pixels that the policy above excludes.
    """
    with _opened(path, data) as image:
        pixels = rgb_of(image, path)
    return resize_image(pixels, *scaled_size(pixels.shape[0], pixels.shape[1], long_side))


def read_oriented(path: Path | str, *, data: bytes | None = None) -> tuple[np.ndarray, int]:
    """(H, W, 3) uint8 RGB as stored, as `read_image` returns it, and the EXIF orientation, 1 to 8, which is not applied.

    A damaged EXIF block counts as orientation 1, as in viewers. Raises DataError as `read_image` does.
    """
    with _opened(path, data) as image:
        return rgb_of(image, path), _orientation(image)


def rgb_of(image: Image.Image, path: Path | str) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a picture that the policy above allows. Raises DataError, naming `path`, for any other picture."""
    wide = ";16" in _stored_as(image)  # Pillow drops the low byte of 16-bit colours silently
    if wide or image.mode not in ("L", "RGB", "P", "RGBA", "LA", "PA", "CMYK"):
        raise DataError(f"{path}: mode {_stored_as(image) if wide else image.mode} is not 8 bits a channel; save it as 8-bit RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"))
        if (alpha < 255).any():
            share = 100 * float((alpha < 255).mean())
            raise DataError(
                f"{path}: {share:.3g} % of the pixels are transparent (lowest alpha {alpha.min()}); "
                "save the image as RGB, with the background that you want in their place"
            )
    return np.array(image.convert("RGB"))


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 to (height, width, 3), bilinear and antialiased; the image itself where it has that size."""
    if image.shape[:2] == (height, width):
        return image
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def read_raw_mask(path: Path | str) -> np.ndarray:
    """(H, W) uint8 values of a mask exactly as stored: palette indices, grey values or bits. Raises DataError."""
    with _opened(path) as image:
        return _mask_values(image, path)


def read_oriented_mask(path: Path | str, lookup: np.ndarray) -> tuple[np.ndarray, int]:
    """(H, W) uint8 train ids of a mask as `read_mask` returns them, and its EXIF orientation, 1 to 8, which is not applied."""
    with _opened(path) as image:
        return _train_ids(_mask_values(image, path), lookup, path), _orientation(image)


def read_mask(path: Path | str, lookup: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
    """(H, W) uint8 train ids of a mask, 255 = ignore.

    `lookup`: (256,) integers, the train id of each stored value, -1 where a value is not allowed.
    `size`: (height, width) in pixels to resize to, nearest: row i comes from row floor((i + 0.5) * h / H).
    Raises DataError for a file that cannot be decoded or that holds a value which is not allowed.
    """
    mask = _train_ids(read_raw_mask(path), lookup, path)
    if size is None or size == mask.shape:
        return mask
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, mask.shape, strict=True))
    return mask[rows[:, None], columns]


def _mask_values(image: Image.Image, path: Path | str) -> np.ndarray:
    """(H, W) uint8 values as stored."""
    if image.format == "JPEG":
        raise DataError(f"{path}: a JPEG cannot hold a mask, its compression changes class ids; export the mask as PNG")
    if image.mode not in ("P", "L", "1", "I;16"):
        what = "holds transparency beside its values" if image.mode in ("LA", "La", "PA") else "holds colours, not class ids"
        raise DataError(f"{path}: mode {image.mode} {what}; save the mask as PNG with one value a pixel (mode L or P)")
    step = _GREY_STEP.get(_stored_as(image), 1)
    values = np.asarray(image)
    if values.dtype == np.uint16 and values.max() > 255:
        raise DataError(f"{path}: pixel value {values.max()} in a 16-bit mask; class ids must be 0 to 255, save it with 8 bits")
    return values.astype(np.uint8) // np.uint8(step)


def _train_ids(raw: np.ndarray, lookup: np.ndarray, path: Path | str) -> np.ndarray:
    """(H, W) uint8 train ids of stored values; a DataError where one is not allowed."""
    table = np.asarray(lookup, dtype=np.int16)
    counts = np.bincount(raw.ravel(), minlength=256)
    if (foreign := np.flatnonzero((counts > 0) & (table < 0))).size:
        known, classes = np.flatnonzero(table >= 0), np.unique(table[(table >= 0) & (table != IGNORE)]).size
        raise DataError(
            f"{path}: pixel value {foreign[0]} ({counts[foreign[0]]} pixels) is none of the {classes} classes "
            f"(allowed values: {_ranges(known)}); correct the mask, or the classes and ignore value in params.yaml"
        )
    return table.astype(np.uint8)[raw]


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none, where the EXIF block is damaged, and for a value without a meaning."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except _DAMAGED_EXIF:
        return 1
    return value if isinstance(value, int) and value in ORIENTATIONS else 1


@contextlib.contextmanager
def _opened(path: Path | str, data: bytes | None = None) -> Iterator[Image.Image]:
    """Opens an image and reads its header; every failure to decode inside the block becomes a DataError that names the file."""
    start = b""
    try:
        if data is None and not stat.S_ISREG(mode := os.stat(path).st_mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
            raise DataError(f"{path}: is {kind}, not a file; rename or remove it")
        # Opened here, not by Pillow, which leaves a file open where reading fails.
        with open(path, "rb") if data is None else io.BytesIO(data) as file:
            start = file.read(64)
            file.seek(0)
            with Image.open(file, formats=FORMATS) as image:
                size = f"{image.width} x {image.height}"
                if image.width * image.height > MAX_PIXELS:
                    raise DataError(_too_large(path, size))
                if max(image.size) > MAX_ASPECT * min(image.size):
                    long = f"a strip of {size} pixels, over {MAX_ASPECT} times as long as wide"
                    raise DataError(f"{path}: {long}; cut it into pieces or remove the file")
                yield image
    except DataError:  # is a ValueError too, but already says all
        raise
    except Image.UnidentifiedImageError:
        remedy = stand_in(start) or f"expected {', '.join(FORMATS)}; replace or remove the file"
        raise DataError(f"{path}: not a readable image; {remedy}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DataError(_too_large(path, "its size")) from None
    except _DECODING as error:
        if isinstance(error, OSError) and error.errno:  # from the disk; Pillow's own have no number
            raise _unreadable(path, error) from None
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be decoded ({reason}); the file is damaged, replace or remove it") from None


def _unreadable(path: Path | str, error: OSError) -> MGDError:
    if os.path.islink(path) and not os.path.exists(path):
        return DataError(f"{path}: is a link that leads to no file; restore what it links to, or remove the link")
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: no such file; restore it or run `mgd-pipeline prepare-data` again")
    if isinstance(error, PermissionError):
        return DataError(str(access_error(path, error)))
    if says_nothing(error) and error.errno != errno.EIO:  # the disk is away, so leaving its images out is no remedy
        return access_error(path, error)
    return DataError(f"{path}: cannot be read ({error.strerror}); check the file, its permissions and the disk")


def _stored_as(image: Image.Image) -> str:
    """How the file stores its pixels, in Pillow's terms, such as RGB;16B or L;4; Pillow converts them to the mode."""
    tiles = getattr(image, "tile", [])
    return str(tiles[0].args) if tiles else ""


def _too_large(path: Path | str, size: str) -> str:
    return f"{path}: {size} exceeds {MAX_PIXELS // 1_000_000} million pixels; cut the image into tiles or remove the file"


def _ranges(values: np.ndarray) -> str:
    """Sorted integers as text: 0-20, 255."""
    runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(f"{run[0]}-{run[-1]}" if run.size > 1 else f"{run[0]}" for run in runs if run.size) or "none"
