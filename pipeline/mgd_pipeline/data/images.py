"""Reads images and masks from files, or says in one line which file cannot be used and why.

The policy, the same for every data set, so that pixels mean the same to every teacher and student:

* Formats are PNG, JPEG, BMP, WebP, TIFF and AVIF, and HEIC with an extra, recognised by content; a damaged or truncated file is an
  error, never a half-grey image. A file of several pages is an error: which page is meant? Pipes, devices and folders are not
  opened: a pipe would wait for ever.
* Images are 8 bits a channel: L, P, CMYK and RGB become RGB. Transparent pixels are an error unless `background_colour` says what
  lies behind them, because hidden pixels would otherwise enter training. Images of one channel of 16 or 32 bits or of float numbers
  are an error unless `value_range` says which values become 0 and 255, because a silent conversion saturates.
* The EXIF orientation is applied, as viewers and annotation tools do, unless a project ignores it; Pillow always applies the one of
  a TIFF. The manifest says of each file how it is decoded.
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from mgd_pipeline.access import access_error, says_nothing, stand_in
from mgd_pipeline.errors import DataError, MGDError

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".avif", ".heic", ".heif")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "AVIF", "HEIF")
"""Naming them keeps Pillow from trying formats that run other programs, such as EPS. Pillow may lack the last two."""
_HEIC = (".heic", ".heif")
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
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}
# Pillow reads an EXIF block tag by tag, and a damaged one fails in each of these ways; the pixels may be sound all the same.
_DAMAGED_EXIF = (SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OSError, OverflowError, struct.error)

# Pillow scales grey PNGs of 2 and 4 bits to the full range; as masks their stored values are these multiples.
_GREY_STEP = {"L;2": 85, "L;4": 17}
_UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombWarning)


@dataclass(frozen=True)
class PhotoRules:
    """What a project says of photos that need more than decoding."""

    apply_orientation: bool = True
    background_colour: tuple[int, int, int] | None = None
    """RGB, 0 to 255, behind transparent pixels."""
    value_range: tuple[float, float] | None = None
    """The values of a 16-bit, 32-bit or float image that become 0 and 255; values outside become the nearer one."""


@dataclass(frozen=True)
class Decoding:
    """What is done to the pixels of one file, because the rules say so and the file needs it."""

    orientation: int = 1
    """EXIF orientation that is applied, 1 to 8."""
    background_colour: tuple[int, int, int] | None = None
    value_range: tuple[float, float] | None = None

    def as_json(self) -> dict[str, Any]:
        """What differs from a file that is decoded as it is stored."""
        return {key: value for key, value in asdict(self).items() if value != getattr(AS_STORED, key)}


AS_STORED = Decoding()


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
    """(height, width) in pixels as stored and EXIF orientation, 1 to 8, from the header alone. Raises DataError.

    A PNG may have its orientation behind the pixels, where only `read_photo` finds it.
    """
    with open_image(path) as image:
        # Pillow decodes all pixels to look behind them.
        hidden = image.format == "PNG" and not image.info.keys() & {"exif", "Raw profile type exif"}
        return image.height, image.width, 1 if hidden or image.format == "TIFF" else _orientation(image)


def shown_size(path: Path | str, *, apply_orientation: bool = True) -> tuple[int, int]:
    """(height, width) in pixels of a photo as `read_photo` returns it, most often from the header alone. Raises DataError."""
    with open_image(path) as image:
        if image.format in ("PNG", "TIFF"):  # one may have its orientation behind the pixels, the other is turned when it is loaded
            image.load()
        swapped = apply_orientation and _orientation(image) in SWAPPING
        return (image.width, image.height) if swapped else (image.height, image.width)


def orientation_of(path: Path | str) -> int:
    """EXIF orientation of a file, 1 to 8, wherever in the file it is. Raises DataError."""
    with open_image(path) as image:
        image.load()
        return _orientation(image)


def verify_checksums(path: Path | str) -> None:
    """Raises DataError where a readable PNG does not match its checksums; JPEG, BMP and WebP have no checksums.

    Pillow's decoder skips the last checksum: a flipped bit in a small mask would quietly become another class id.
    """
    with open_image(path) as image:
        image.verify()


def read_image(
    path: Path | str, long_side: int | None = None, decoding: Decoding = AS_STORED, *, data: bytes | None = None
) -> np.ndarray:
    """(H, W, 3) uint8 RGB, scaled down (bilinear, antialiased) where its longer side exceeds `long_side` pixels.

    `data`: the file's bytes where they come from elsewhere, such as standard input; errors then still name `path`.
    Raises DataError, naming the file, for a file that cannot be decoded and for pixels that the policy above excludes.
    """
    rules = PhotoRules(False, decoding.background_colour, decoding.value_range)
    with open_image(path, data) as image:
        pixels = turned(rgb_of(image, path, rules)[0], decoding.orientation)
    return resize_image(pixels, *scaled_size(pixels.shape[0], pixels.shape[1], long_side))


def read_photo(
    path: Path | str, rules: PhotoRules = PhotoRules(), long_side: int | None = None, *, data: bytes | None = None
) -> tuple[np.ndarray, Decoding]:
    """(H, W, 3) uint8 RGB of a photo, and how it was decoded: `read_image` with that decoding returns the same pixels.

    A damaged EXIF block counts as orientation 1, as in viewers. Raises DataError as `read_image` does.
    """
    with open_image(path, data) as image:
        pixels, decoding = photo_of(image, path, rules)
    return resize_image(pixels, *scaled_size(pixels.shape[0], pixels.shape[1], long_side)), decoding


def photo_of(image: Image.Image, path: Path | str, rules: PhotoRules) -> tuple[np.ndarray, Decoding]:
    """`read_photo` of a picture that is open already; errors name `path`."""
    pixels, decoding = rgb_of(image, path, rules)
    if rules.apply_orientation:
        decoding = replace(decoding, orientation=_orientation(image))
    return turned(pixels, decoding.orientation), decoding


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, ...) pixels as a viewer shows them that applies the EXIF orientation, 1 to 8."""
    return np.ascontiguousarray(_TURNS[orientation](pixels)) if orientation in _TURNS else pixels


def rgb_of(image: Image.Image, path: Path | str, rules: PhotoRules = PhotoRules()) -> tuple[np.ndarray, Decoding]:
    """(H, W, 3) uint8 RGB of a picture that the rules allow, not turned, and its decoding. Raises DataError, naming `path`."""
    wide = ";16" in _stored_as(image)  # Pillow drops the low byte of 16-bit colours silently
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scaled(np.asarray(image), path, rules.value_range), Decoding(value_range=rules.value_range)
    if wide or image.mode not in ("L", "RGB", "P", "RGBA", "LA", "PA", "CMYK"):
        raise DataError(f"{path}: mode {_stored_as(image) if wide else image.mode} is not 8 bits a channel; save it as 8-bit RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"))
        if (alpha < 255).any():
            colour = rules.background_colour
            if colour is None:
                share = 100 * float((alpha < 255).mean())
                raise DataError(
                    f"{path}: {share:.3g} % of the pixels are transparent (lowest alpha {alpha.min()}); set data.background_colour "
                    "to the colour that you want behind them, such as [255, 255, 255], or save the image as RGB"
                )
            behind = Image.new("RGBA", image.size, (*colour, 255))
            return np.array(Image.alpha_composite(behind, image).convert("RGB")), Decoding(background_colour=colour)
    return np.array(image.convert("RGB")), AS_STORED


def _scaled(values: np.ndarray, path: Path | str, value_range: tuple[float, float] | None) -> np.ndarray:
    """(H, W, 3) uint8 of one channel of wide or float values; the range becomes 0 to 255, rounded."""
    if value_range is None:
        finite = values[np.isfinite(values)]
        seen = f"{finite.min():g} to {finite.max():g}" if finite.size else "no finite number"
        raise DataError(
            f"{path}: holds values of {values.dtype} ({seen}), not of 8 bits; set data.value_range to the values that become black "
            "and white, the same for all photos, or save the image as 8-bit RGB"
        )
    if not np.isfinite(values).all():
        raise DataError(f"{path}: holds NaN or infinity; save the image without")
    low, high = value_range
    grey = np.rint((np.clip(values.astype(np.float64), low, high) - low) * (255 / (high - low))).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 to (height, width, 3), bilinear and antialiased; the image itself where it has that size."""
    if image.shape[:2] == (height, width):
        return image
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def read_raw_mask(path: Path | str) -> np.ndarray:
    """(H, W) uint8 values of a mask exactly as stored: palette indices, grey values or bits. Raises DataError."""
    with open_image(path) as image:
        return _mask_values(image, path)


def read_drawn_mask(path: Path | str, lookup: np.ndarray, *, apply_orientation: bool = True) -> tuple[np.ndarray, int]:
    """(H, W) uint8 train ids of a mask, turned by its own EXIF orientation if that is applied, and the orientation, 1 to 8."""
    with open_image(path) as image:
        orientation = _orientation(image) if apply_orientation else 1
        return turned(_train_ids(_mask_values(image, path), lookup, path), orientation), orientation


def read_mask(path: Path | str, lookup: np.ndarray, size: tuple[int, int] | None = None, orientation: int = 1) -> np.ndarray:
    """(H, W) uint8 train ids of a mask, 255 = ignore.

    `lookup`: (256,) integers, the train id of each stored value, -1 where a value is not allowed.
    `orientation`: EXIF orientation of the file that is applied, 1 to 8.
    `size`: (height, width) in pixels to resize to, nearest: row i comes from row floor((i + 0.5) * h / H).
    Raises DataError for a file that cannot be decoded or that holds a value which is not allowed.
    """
    mask = turned(_train_ids(read_raw_mask(path), lookup, path), orientation)
    if size is None or size == mask.shape:
        return mask
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, mask.shape, strict=True))
    return mask[rows[:, None], columns]


def _mask_values(image: Image.Image, path: Path | str) -> np.ndarray:
    """(H, W) uint8 values as stored."""
    if image.format == "JPEG":
        raise DataError(f"{path}: a JPEG cannot hold a mask, its compression changes class ids; export the mask as PNG")
    if image.mode not in ("P", "L", "1", "I;16", "I"):
        what = "holds transparency beside its values" if image.mode in ("LA", "La", "PA") else "holds colours, not class ids"
        raise DataError(f"{path}: mode {image.mode} {what}; save the mask as PNG with one value a pixel (mode L or P)")
    step = _GREY_STEP.get(_stored_as(image), 1)
    values = np.asarray(image)
    if values.dtype in (np.uint16, np.int32) and (values.max() > 255 or values.min() < 0):
        value, bits = values.max() if values.max() > 255 else values.min(), 8 * values.dtype.itemsize
        raise DataError(f"{path}: pixel value {value} in a {bits}-bit mask; class ids must be 0 to 255, save it with 8 bits")
    return values.astype(np.uint8) // np.uint8(step)


def _train_ids(raw: np.ndarray, lookup: np.ndarray, path: Path | str) -> np.ndarray:
    """(H, W) uint8 train ids of stored values; a DataError where one is not allowed."""
    table = np.asarray(lookup, dtype=np.int16)
    counts = np.bincount(raw.ravel(), minlength=256)
    if (foreign := np.flatnonzero((counts > 0) & (table < 0))).size:
        known, classes = np.flatnonzero(table >= 0), np.unique(table[(table >= 0) & (table != IGNORE)]).size
        shifted = "; if your ids begin at 1, list them in data.values" if foreign[0] == classes and not counts[0] else ""
        raise DataError(
            f"{path}: pixel value {foreign[0]} ({counts[foreign[0]]} pixels) is none of the {classes} classes "
            f"(allowed values: {_ranges(known)}); correct the mask, or the classes and ignore value in params.yaml{shifted}"
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
def open_image(path: Path | str, data: bytes | None = None) -> Iterator[Image.Image]:
    """Opens an image and reads its header; every failure to decode inside the block becomes a DataError that names the file."""
    start = b""
    try:
        if str(path).lower().endswith(_HEIC):
            _register_heic(path)
        if data is None and not stat.S_ISREG(mode := os.stat(path).st_mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
            raise DataError(f"{path}: is {kind}, not a file; rename or remove it")
        # Opened here, not by Pillow, which leaves a file open where reading fails.
        with open(path, "rb") if data is None else io.BytesIO(data) as file:
            start = file.read(64)
            file.seek(0)
            with Image.open(file, formats=_formats()) as image:
                size = f"{image.width} x {image.height}"
                if image.width * image.height > MAX_PIXELS:
                    raise DataError(_too_large(path, size))
                if max(image.size) > MAX_ASPECT * min(image.size):
                    long = f"a strip of {size} pixels, over {MAX_ASPECT} times as long as wide"
                    raise DataError(f"{path}: {long}; cut it into pieces or remove the file")
                pages = getattr(image, "n_frames", 1)
                if pages > 1 and image.format != "MPO":  # a phone's second picture is a preview
                    raise DataError(f"{path}: holds {pages} pages or frames; save the one that you mean")
                yield image
    except DataError:  # is a ValueError too, but already says all
        raise
    except Image.UnidentifiedImageError:
        remedy = stand_in(start) or f"expected {', '.join(FORMATS)}; replace or remove the file"
        raise DataError(f"{path}: not a readable image; {remedy}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DataError(_too_large(path, "its size")) from None
    except _UNDECODABLE as error:
        if isinstance(error, OSError) and error.errno:  # from the disk; Pillow's own have no number
            raise _unreadable(path, error) from None
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be decoded ({reason}); the file is damaged, replace or remove it") from None


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _register_heic(path: Path | str) -> None:
    try:
        from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports] - an extra
    except ImportError:
        raise DataError(f"{path}: HEIC needs an extra; run `pip install 'mgd-pipeline[heic]'`, or save the photo as JPEG") from None
    register_heif_opener()


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
