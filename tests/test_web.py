"""The page in which a student runs in a browser. In headless Chromium its masks are those of `predict`."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from typer.testing import CliRunner

from browser import PROGRAM, Chromium, chromium, served, wait_for
from conftest import tiny_student
from mgd_pipeline.data.images import PhotoRules, read_photo
from mgd_pipeline.errors import DataError, ParamsError
from mgd_pipeline.exports import web
from mgd_pipeline.pictures.overlays import is_png_of_mask, is_predicted, png_of_mask
from mgd_pipeline.students.student import load_student
from mgd_stages.cli import app
from mgd_stages.tools.predict import shares as predicted_shares
from pages import Page, everything

pytestmark = pytest.mark.timeout(900)
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
NOTHING_KEPT = "delete Navigator.prototype.serviceWorker"
"""Each address would get its own copy of the folder, which takes seconds."""
STATUS, PROBLEM = (f"document.getElementById('{name}').textContent" for name in ("status", "problem"))


def mask_of(browser: Chromium, photo: Path, downloads: Path) -> Path:
    """Chooses a photo, waits for its mask and downloads it."""
    browser.browser("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
    browser.evaluate(f"{STATUS} = ''")
    browser.choose("#file", photo)
    browser.wait(f"{STATUS}.startsWith('Done') || {PROBLEM}")
    assert text(browser, "problem") == ""
    browser.click("#save")
    path = downloads / f"{photo.stem}-mask.png"
    wait_for(path.is_file, lambda: f"{path}: not downloaded")
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
    made["two-colours.png"] = (Image.fromarray(scene(70, 90)).quantize(2), {"bits": 1})
    made["bits.bmp"] = (Image.fromarray(scene(33, 65)), {})
    made["photo.jpg"] = (Image.fromarray(scene(150, 201)), {"quality": 90})
    made["lossless.webp"] = (Image.fromarray(scene(64, 80)), {"lossless": True})
    made["profile.png"] = (Image.fromarray(scene(50, 60)), {"icc_profile": linear_profile()})
    for orientation in range(2, 9):
        exif[ExifTags.Base.Orientation] = orientation
        made[f"turned{orientation}.jpg"] = (Image.fromarray(scene(40, 90, orientation)), {"exif": exif.tobytes(), "quality": 95})
    made["xmp.jpg"] = (Image.fromarray(scene(40, 90)), {"xmp": b'<x tiff:Orientation="6"/>'})
    made["turned.png"] = (Image.fromarray(scene(40, 90)), {"exif": exif.tobytes()})
    made["turned9.webp"] = (Image.fromarray(scene(40, 90)), {"exif": exif.tobytes(), "lossless": True})
    for name, (picture, options) in made.items():
        picture.save(folder / name, **options)
    return [folder / name for name in made]


def linear_profile() -> bytes:
    """A colour profile that would change every value: sRGB's, of linear light."""
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()


def visit(browser: Chromium, address: str, script: str = NOTHING_KEPT) -> None:
    """Opens a page, in which a script runs first, and waits until its network is ready."""
    number = browser.call("Page.addScriptToEvaluateOnNewDocument", source=script)["identifier"]
    browser.requests.clear()
    browser.complaints.clear()
    browser.open(address)
    browser.wait(f"{STATUS} === 'Ready.' || {PROBLEM}")
    browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=number)


def text(browser: Chromium, name: str) -> str:
    return browser.evaluate(f"document.getElementById({name!r}).innerText")


def changed(demo: Path, folder: Path, changes: dict[str, bytes]) -> Path:
    """A copy of the folder in which some files have other contents."""
    shutil.copytree(demo, folder, copy_function=os.link)
    for name, data in changes.items():
        (folder / name).unlink()
        (folder / name).write_bytes(data)
    return folder


def with_about(demo: Path, folder: Path, **facts: Any) -> Path:
    return changed(
        demo, folder, {"student.json": json.dumps({**json.loads((demo / "student.json").read_text()), **facts}).encode()}
    )


def test_masks_are_those_of_predict(browser: Chromium, demo: Path, tmp_path: Path) -> None:
    """Their ids, their palette and their notes; nothing is fetched from elsewhere, and nothing fails on the way."""
    student = load_student(demo.parent / "student.safetensors")
    with served(demo) as (address, _):
        visit(browser, address)
        assert text(browser, "runtime") == "WebAssembly"
        for photo in photos(tmp_path):
            path = mask_of(browser, photo, tmp_path)
            expected = student.predict(photo)
            with Image.open(path) as made:
                assert made.mode == "P" and np.asarray(made).shape == expected.shape, photo.name
                assert (np.asarray(made) == expected).mean() >= 0.999, photo.name
                assert made.getpalette() == Image.open(io.BytesIO(png_of_mask(expected, student.palette))).getpalette()
            assert is_png_of_mask(path) and is_predicted(path)
        said = {name: float(share) for name, share in re.findall(r"(\w+)\s+([\d.]+) %", text(browser, "legend"))}
        shares = {name: 100 * share for name, share in predicted_shares(expected, student.classes).items() if share}
        assert said == pytest.approx(shares, abs=0.06) and list(said) == sorted(said, key=said.__getitem__, reverse=True)
        assert browser.complaints == []
        assert {address + name for name in ("student.onnx", "runtime/ort-wasm-simd-threaded.wasm")} <= set(browser.requests)
        assert [one for one in browser.requests if not one.startswith((address, "blob:" + address))] == []
        refused = "fetch('http://127.0.0.1:9/').then(() => 'fetched', (error) => error.name)"
        assert browser.evaluate(refused) == "TypeError" and "Content Security Policy" in browser.complaints[0]


def test_photos_follow_the_student_s_rules(browser: Chromium, demo: Path, tmp_path: Path) -> None:
    """As they are stored, not turned; a colour behind transparent pixels, which a canvas blends to the next level."""
    student = load_student(demo.parent / "student.safetensors")
    rules = PhotoRules(apply_orientation=False, background_colour=(200, 30, 90))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    clear = np.dstack([scene(50, 70), np.tile(np.linspace(0, 255, 70).round().astype(np.uint8), (50, 1))])
    Image.fromarray(clear).save(tmp_path / "clear.png")
    for name in ("turned.jpg", "turned.png", "turned.webp"):
        Image.fromarray(scene(40, 90)).save(tmp_path / name, exif=exif.tobytes(), quality=95)
    photos = json.loads((demo / "student.json").read_text())["photos"]
    folder = with_about(demo, tmp_path / "demo", photos={**photos, **asdict(rules)})
    with served(folder) as (address, _):
        visit(browser, address)
        as_text = base64.b64encode((tmp_path / "clear.png").read_bytes()).decode()
        file = f"new File([Uint8Array.from(atob('{as_text}'), (one) => one.charCodeAt(0))], 'clear.png')"
        read = f"import('./photos.js').then(({{ readPhoto }}) => readPhoto({file}, {json.dumps({**photos, **asdict(rules)})}))"
        pixels = np.reshape(browser.evaluate(f"{read}.then(({{ pixels }}) => [...pixels])"), (50, 70, 4))[..., :3]
        assert np.abs(pixels - read_photo(tmp_path / "clear.png", rules)[0].astype(int)).max() <= 1
        for path in tmp_path.glob("turned.*"):
            (tmp_path / path.suffix).mkdir()
            mask = np.asarray(Image.open(mask_of(browser, path, tmp_path / path.suffix)))
            expected = student.predict(read_photo(path, rules)[0])
            assert mask.shape == expected.shape and (mask == expected).mean() >= 0.999, path.name


def test_what_predict_refuses_is_refused_in_words(browser: Chromium, demo: Path, tmp_path: Path) -> None:
    """A browser would show each of them, and predict would not; or cannot open it."""
    frames = [Image.fromarray(scene(20, 30, seed)) for seed in (0, 1)]
    jpeg = io.BytesIO()
    Image.fromarray(scene(300, 400)).save(jpeg, "JPEG")
    (tmp_path / "notes.jpg").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "damaged.png").write_bytes((demo / "check.png").read_bytes()[:60])
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "old.gif")
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)).save(tmp_path / "wide.png")
    Image.fromarray(np.dstack([scene(20, 30), np.full((20, 30), 128, np.uint8)])).save(tmp_path / "clear.png")
    Image.fromarray(scene(2, 202)).save(tmp_path / "strip.png")
    for name in ("scan.png", "scan.bmp"):
        Image.fromarray(scene(20, 30)).convert("1").save(tmp_path / name)
    student = load_student(demo.parent / "student.safetensors")
    with served(demo) as (address, _):
        visit(browser, address)
        for name, said in {
            "notes.jpg": "notes.jpg is not a picture that the student reads.",
            "empty.png": "empty.png is not a picture that the student reads.",
            "old.gif": "old.gif is not a picture that the student reads.",
            "damaged.png": "damaged.png cannot be opened. The file is damaged,",
            "moving.png": "moving.png holds several frames.",
            "moving.webp": "moving.webp holds several frames.",
            "wide.png": "wide.png has 16 bits a channel.",
            "clear.png": "100 % of the pixels of clear.png are transparent",
            "strip.png": "strip.png is a strip of 202 × 2 pixels",
            "scan.png": "scan.png has 1 bit a pixel, black or white.",
            "scan.bmp": "scan.bmp has 1 bit a pixel, black or white.",
        }.items():
            with pytest.raises(DataError):
                student.predict(tmp_path / name)
            browser.evaluate(f"{PROBLEM} = ''")
            browser.choose("#file", tmp_path / name)
            browser.wait(PROBLEM)
            assert text(browser, "problem").startswith(said), text(browser, "problem")
            assert browser.evaluate("document.getElementById('problem').getAttribute('role')") == "alert"
            assert text(browser, "status") == "" and not browser.evaluate("'working' in document.body.dataset")
        assert browser.complaints == []


def test_a_camera_is_segmented_until_it_stops(browser: Chromium, demo: Path, tmp_path: Path) -> None:
    with served(demo) as (address, _):
        visit(browser, address)
        real = "navigator.mediaDevices.getUserMedia"
        for fault, said in {
            "NotAllowedError": "The browser was not allowed to use the camera.",
            "NotFoundError": "There is no",
        }.items():
            browser.evaluate(f"{real} = async () => {{ throw new DOMException('', '{fault}') }}, {PROBLEM} = ''")
            browser.click("#camera")
            browser.wait(PROBLEM)
            assert text(browser, "problem").startswith(said)
        browser.evaluate(f"delete {real}")
        browser.click("#camera")
        browser.wait("document.getElementById('time').textContent.includes('frames a second')")
        assert text(browser, "camera") == "Stop the camera" and text(browser, "problem") == ""
        assert browser.evaluate("document.getElementById('photo').width") >= 320
        browser.click("#camera")
        assert text(browser, "status").startswith("The camera is off. Last frame: ")
        browser.browser("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        browser.click("#save")
        wait_for((tmp_path / "camera-mask.png").is_file, lambda: "no mask")
        with Image.open(tmp_path / "camera-mask.png") as mask:
            assert [*mask.size] == browser.evaluate("['width', 'height'].map((side) => document.getElementById('mask')[side])")
        assert browser.complaints == []


def test_it_works_without_the_server_once_it_was_there(browser: Chromium, demo: Path, tmp_path: Path) -> None:
    Image.fromarray(scene(40, 60)).save(tmp_path / "photo.png")
    with served(demo) as (address, _):
        visit(browser, address, "")
        browser.wait(
            "navigator.serviceWorker.controller && navigator.serviceWorker.ready.then((one) => one.active?.state === 'activated')"
        )
    visit(browser, address, "")
    assert text(browser, "status") == "Ready."
    assert is_png_of_mask(mask_of(browser, tmp_path / "photo.png", tmp_path))


def test_a_newer_student_is_never_hidden_by_an_older_one(browser: Chromium, demo: Path, tmp_path: Path) -> None:
    folder = with_about(demo, tmp_path / "demo", network="the older one")
    with served(folder) as (address, _):
        visit(browser, address, "")
        browser.wait("navigator.serviceWorker.controller !== null")
        (folder / "student.json").write_bytes((demo / "student.json").read_bytes())
        visit(browser, address, "")
        assert text(browser, "about").startswith("test_resnet with fpn, 4 classes")


NO_WEBASSEMBLY = "delete globalThis.WebAssembly"
FALSE_GPU = "Object.defineProperty(navigator, 'gpu', { value: { requestAdapter: async () => ({ info: {} }) } })"
"""A graphics processor that the page sees and the runtime cannot use."""


def test_a_browser_that_cannot_run_the_network_says_so(browser: Chromium, demo: Path, tmp_path: Path) -> None:
    """Without WebAssembly; with another mask; with a file less. A graphics processor that fails is replaced without a word."""
    other = changed(demo, tmp_path / "other", {"check.mask": bytes((demo / "check.mask").stat().st_size)})
    lacking = changed(demo, tmp_path / "lacking", {})
    (lacking / "student.onnx").unlink()
    for folder, script, said in (
        (demo, NO_WEBASSEMBLY, "This browser has no WebAssembly"),
        (demo, FALSE_GPU, ""),
        (other, "", "The network does not run in this browser (it gives "),
        (lacking, "", "The network does not run in this browser ("),
    ):
        with served(folder) as (address, asked):
            visit(browser, address, f"{NOTHING_KEPT}; {script}")
        assert text(browser, "problem").startswith(said) and bool(said) == bool(text(browser, "problem"))
        assert text(browser, "runtime") == ("WebAssembly" if folder is demo and not said else "–")
        assert ("/runtime/ort.webgpu.min.mjs" in asked) == (script == FALSE_GPU)


def test_a_photo_that_is_too_large_is_said_to_be(demo: Path, tmp_path: Path) -> None:
    """With 64 MB of memory for WebAssembly; the next photo is segmented."""
    Image.fromarray(scene(40, 60)).save(tmp_path / "small.png")
    Image.new("RGB", (6000, 4000)).save(tmp_path / "large.png")
    with chromium(tmp_path / "profile", "--js-flags=--wasm-max-mem-pages=1024") as browser, served(demo) as (address, _):
        visit(browser, address)
        assert text(browser, "problem") == ""
        browser.choose("#file", tmp_path / "large.png")
        browser.wait(PROBLEM)
        assert text(browser, "problem") == (
            "The photo (6000 × 4000 pixels) is too large for this browser's memory. Take a smaller one."
        )
        assert is_png_of_mask(mask_of(browser, tmp_path / "small.png", tmp_path))


def test_a_phone_and_a_keyboard_are_enough(browser: Chromium, demo: Path, tmp_path: Path) -> None:
    Image.fromarray(scene(90, 120)).save(tmp_path / "a-rather-long-name-without-any-space-that-a-camera-gives-its-photos.png")
    with served(demo) as (address, _):
        visit(browser, address)
        browser.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
        mask_of(browser, next(tmp_path.iterdir()), tmp_path)
        assert browser.evaluate("document.documentElement.scrollWidth") == 360
        small = "[...document.querySelectorAll('button:enabled, input[type=range]')].filter((one) => one.getClientRects().length)"
        assert browser.evaluate(f"Math.min(...{small}.map((one) => one.getBoundingClientRect().height))") >= 24
        browser.call("Emulation.clearDeviceMetricsOverride")
        browser.evaluate("document.getElementById('choose').focus()")
        seen = []
        for _ in range(4):
            browser.press("Tab", 9)
            seen.append(browser.evaluate("document.activeElement.id || document.activeElement.parentElement.parentElement.id"))
            assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", seen
        assert seen == ["camera", "save", "opacity", "legend"]
        browser.press("Enter", 13)
        assert browser.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
        drawn = "[...document.getElementById('mask').getContext('2d').getImageData(0, 0, 120, 90).data]"
        assert set(browser.evaluate(f"{drawn}.filter((_, n) => n % 4 === 3)")) == {0, 255}


# --- what the folder is made of


def test_the_page_names_nothing_that_is_elsewhere() -> None:
    page = Page((PAGE / "index.html").read_text(encoding="utf-8")).root
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy.attributes["content"].startswith("default-src 'none';") and "unsafe-inline" not in policy.attributes["content"]
    for element in everything(page):
        for key, value in element.attributes.items():
            assert not key.startswith("on") and key != "style", f"{element.tag} {key}"
            if key in ("src", "href"):
                assert (PAGE / value).is_file(), value
    for source in PAGE.iterdir():
        assert not re.search(r"(https?:)?//[a-z]", re.sub(r"http://(localhost|www\.w3\.org/2000/svg)", "", source.read_text())), (
            source
        )
    named = {element.attributes["id"] for element in everything(page) if "id" in element.attributes}
    assert set(re.findall(r'\$\("(\w+)"\)', (PAGE / "page.js").read_text())) <= named
    labelled = {label.attributes["for"] for label in page.all("label")}
    assert {field.attributes["id"] for field in page.all("input") if field.attributes["type"] != "file"} <= labelled


def tarball(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


FILES = {name: name.encode() for name in web.RUNTIME_FILES}
NPM = "#!/bin/sh\nwhile [ $# -gt 1 ]; do [ $1 = --pack-destination ] && folder=$2; shift; done\n"


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that stands for npm and packs one's own tarball, whose hash is the known one."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "packed.tgz").write_bytes(tarball(FILES))
    program = tmp_path / "bin/npm"
    program.write_text(f"{NPM}/bin/cp {tmp_path}/packed.tgz $folder/onnxruntime-web.tgz\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(web, "INTEGRITY", web.integrity(tarball(FILES)))
    return program


def test_the_runtime_is_fetched_once_and_checked_every_time(npm: Path, tmp_path: Path) -> None:
    said: list[str] = []
    assert web.runtime_files(None, said.append) == FILES
    assert said == [f"fetching onnxruntime-web {web.VERSION} by npm, once"]
    npm.write_text("#!/bin/sh\nexit 1\n")
    assert web.runtime_files(None, said.append) == FILES and len(said) == 1
    (kept,) = (tmp_path / "cache/mgd-pipeline").iterdir()
    assert web.runtime_files(kept, said.append) == FILES, "what npm packed may be named, too"
    kept.write_bytes(tarball({**FILES, "ort.wasm.min.mjs": b"other"}))
    with pytest.raises(ParamsError, match=r"--runtime .*: is not the tarball of onnxruntime-web .* \(its SHA-512 differs\)"):
        web.runtime_files(kept, said.append)
    with pytest.raises(
        ParamsError, match=r"npm: cannot fetch onnxruntime-web \S+ \(no reason given\); check the network, or fetch"
    ):
        web.runtime_files(None, said.append)
    npm.write_text(f"{NPM}/bin/cp {kept} $folder/other.tgz\n")
    with pytest.raises(ParamsError, match="npm: gave another onnxruntime-web"):
        web.runtime_files(None, said.append)
    npm.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND\nnpm error network request failed' >&2\nexit 1\n")
    with pytest.raises(ParamsError, match=r"\(code ENOTFOUND network request failed\)"):
        web.runtime_files(None, said.append)


def test_an_unpacked_runtime_needs_no_npm(npm: Path, tmp_path: Path) -> None:
    npm.unlink()
    for place in ("unpacked", "above/package", "project/node_modules/onnxruntime-web"):
        package(tmp_path / place, FILES)
    for name in ("unpacked", "above", "project"):
        assert web.runtime_files(tmp_path / name, print) == FILES
    package(tmp_path / "old", FILES, "1.2.3")
    package(tmp_path / "half", dict(list(FILES.items())[:2]))
    for place, said in (
        (None, r"npm: not installed, and needed for onnxruntime-web .*; install Node\.js, or fetch .* and name it by --runtime$"),
        (tmp_path / "gone", "gone: no such file or folder"),
        (tmp_path / "bin", "bin: holds no package.json"),
        (tmp_path / "old", r"old: holds onnxruntime-web 1\.2\.3, not onnxruntime-web"),
        (tmp_path / "half", r"half: lacks dist/ort-wasm-simd-threaded\.wasm; `npm pack onnxruntime-web@"),
    ):
        with pytest.raises(ParamsError, match=said):
            web.runtime_files(place, print)


def test_a_folder_with_files_of_a_person_is_not_replaced(tmp_path: Path) -> None:
    student, demo = tiny_student(tmp_path / "student.safetensors"), tmp_path / "demo"
    web.write_web(load_student(student), b"", FILES, demo)
    assert web.strange_files(demo) == []
    (demo / "runtime/notes.txt").write_text("mine")
    result = export(student, demo)
    assert result.exit_code == 2 and "has not made runtime/notes.txt in it; move it away\n" in result.stderr
    assert len(result.stderr.splitlines()) == 1 and (demo / "runtime/notes.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/student.json").write_text("{}")
    result = export(student, tmp_path / "other")
    assert result.exit_code == 2 and "other: exists, and this command has not made it" in result.stderr


def test_mistakes_are_one_line_and_nothing_is_written(npm: Path, tmp_path: Path) -> None:
    student = tiny_student(tmp_path / "student.safetensors")
    npm.unlink()
    (tmp_path / "demo").mkdir()
    before = {path.name for path in tmp_path.iterdir()}
    for arguments, said in (
        ([student, tmp_path / "demo"], "demo: exists, and this command has not made it; name another folder"),
        ([student, student / "demo"], "student.safetensors: is not a folder, so nothing can be written below it"),
        ([student, tmp_path / "new"], "npm: not installed"),
        ([student, tmp_path / "new", "--int8"], "--int8: is not for --format web"),
    ):
        result = export(*arguments)
        assert result.exit_code == 2 and said in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
    refused = CliRunner().invoke(app, ["export", str(student), str(tmp_path / "a.onnx"), "--runtime", "x"])
    assert refused.exit_code == 2 and "--runtime x: is for --format web alone" in refused.stderr
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == before, "libraries keep things there, too"
