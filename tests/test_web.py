"""The page in which a student runs in a browser: in headless Chromium, its masks are those of `predict`; and what the folder is made of."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from typer.testing import CliRunner

from browser import PROGRAM, Chromium, chromium, served
from conftest import tiny_student
from mgd_pipeline.errors import ParamsError
from mgd_pipeline.exports import web
from mgd_pipeline.pictures.overlays import is_png_of_mask
from mgd_pipeline.students.student import load_student
from mgd_stages.cli import app
from pages import Page, everything

LONG_SIDE = 72
PAGE = Path(web.__file__).parent / "page"


def export(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["export", *map(str, arguments), "--format", "web"], catch_exceptions=False)


# --- in a browser


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """onnxruntime-web as an unpacked package, from the cache or from npm."""
    if shutil.which(PROGRAM) is None:
        pytest.skip(f"{PROGRAM}: not installed; CHROMIUM names another program")
    try:
        files = web.runtime_files(None, print)
    except ParamsError as error:
        pytest.skip(str(error))
    return package(tmp_path_factory.mktemp("runtime"), files)


def package(folder: Path, files: dict[str, bytes], version: str = web.VERSION) -> Path:
    """An unpacked npm package."""
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": web.RUNTIME, "version": version}))
    for name, data in files.items():
        (folder / "dist" / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def demo(runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the command makes of a student that scales."""
    folder = tmp_path_factory.mktemp("web")
    student = tiny_student(folder / "student.safetensors", long_side=LONG_SIDE)
    result = export(student, folder / "demo", "--runtime", runtime)
    assert result.exit_code == 0, result.output
    return folder / "demo"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with chromium(tmp_path_factory.mktemp("profile"), *CAMERA) as one:
        yield one


CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
"""A camera that films a test picture, and that nobody is asked for."""


def mask_of(browser: Chromium, photo: Path, downloads: Path) -> Path:
    """Chooses a photo, waits for its mask and downloads it."""
    browser.browser("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
    browser.evaluate("document.getElementById('status').textContent = ''")
    browser.choose("#file", photo)
    browser.wait("document.getElementById('status').textContent.startsWith('Done') || document.getElementById('problem').textContent")
    assert browser.evaluate("document.getElementById('problem').textContent") == ""
    browser.click("#save")
    path = downloads / f"{photo.stem}-mask.png"
    browser.wait_for(path.is_file)
    return path


def scene(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8: blocks of colours with grain."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (-(-height // 12), -(-width // 12), 3)).repeat(12, 0).repeat(12, 1)[:height, :width]
    return (blocks + random.integers(-6, 7, blocks.shape)).clip(0, 255).astype(np.uint8)


def photos(folder: Path) -> list[Path]:
    """Odd sizes, one pixel, larger than the long side, a palette, grey values, a colour profile, JPEG, WebP, and turned photos."""
    exif = Image.Exif()
    sizes = {"odd": (61, 47), "one": (1, 1), "large": (301, 403), "strip": (7, 320)}
    made = {f"{name}.png": (Image.fromarray(scene(*size)), {}) for name, size in sizes.items()}
    made["palette.png"] = (Image.fromarray(scene(70, 90)).quantize(32), {})
    made["grey.png"] = (Image.fromarray(scene(70, 90)).convert("L"), {})
    made["bits.bmp"] = (Image.fromarray(scene(33, 65)), {})
    made["photo.jpg"] = (Image.fromarray(scene(150, 201)), {"quality": 90})
    made["photo.webp"] = (Image.fromarray(scene(64, 80)), {"lossless": True})
    made["profile.png"] = (Image.fromarray(scene(50, 60)), {"icc_profile": linear_profile()})
    for orientation in range(2, 9):
        exif[ExifTags.Base.Orientation] = orientation
        made[f"turned{orientation}.jpg"] = (Image.fromarray(scene(40, 90, orientation)), {"exif": exif.tobytes(), "quality": 95})
    made["turned.png"] = (Image.fromarray(scene(40, 90)), {"exif": exif.tobytes()})
    made["turned.webp"] = (Image.fromarray(scene(40, 90)), {"exif": exif.tobytes(), "lossless": True})
    for name, (picture, options) in made.items():
        picture.save(folder / name, **options)
    return [folder / name for name in made]


def linear_profile() -> bytes:
    """A colour profile that would change every value: sRGB's, of linear light."""
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
