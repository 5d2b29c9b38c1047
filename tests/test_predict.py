"""mgd-pipeline predict as a user meets it: masks of files, folders and standard input, and what is said of the rest."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from conftest import tiny_student
from mgd_pipeline.data.images import read_raw_mask, turned
from mgd_pipeline.errors import ParamsError
from mgd_pipeline.networks.inference import predict_logits
from mgd_pipeline.pictures.overlays import blend
from mgd_pipeline.students.student import Student, load_student
from mgd_stages.cli import app
from mgd_stages.tools.predict import predict, shares
from test_images import with_orientation

README = Path(__file__).parents[1] / "README.md"


def run(*arguments: object, stdin: bytes = b"") -> Any:
    return CliRunner().invoke(app, ["predict", *map(str, arguments)], input=stdin, catch_exceptions=False)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Coarse random colours, so that masks have some shape."""
    random = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return random.repeat(8, 0).repeat(8, 1)[:height, :width]


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


@pytest.fixture(scope="module")
def student_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_student(tmp_path_factory.mktemp("student") / "student.safetensors")


@pytest.fixture(scope="module")
def student(student_file: Path) -> Student:
    return load_student(student_file)


def test_a_folder_is_predicted_whole(tmp_path: Path, student_file: Path, student: Student) -> None:
    """Masks in the images' own sizes and folders: class ids to whoever reads values, the classes' colours to a viewer."""
    images, out = tmp_path / "in", tmp_path / "out"
    pixels = {"a": photo(37, 61), "below/deep/b": photo(64, 40, 1), "below/c": photo(5, 90, 2)}
    for name, array in pixels.items():
        save(images / f"{name}.png", array)
    (images / "notes.txt").write_text("no image")
    (images / "below/.hidden.png").write_bytes(b"of macOS")
    (images / "below/phone.JP2").write_bytes(b"of a phone")
    result = run(student_file, images, "--output", out, "--overlays", "--json", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert "3 images; other files that are passed over: 3" in result.stdout and "images/s" in result.stdout
    unread = f"1 of the other files is a picture, such as {images}/below/phone.JP2, in formats that are not read: save them"
    assert unread in result.stdout
    masks, overlays = {f"masks/{name}.png" for name in pixels}, {f"overlays/{name}.png" for name in pixels}
    assert files_below(out) == masks | overlays | {"predictions.json"}
    for name, array in pixels.items():
        expected = student.predict(array)
        assert np.unique(expected).size > 1
        assert np.array_equal(read_raw_mask(out / f"masks/{name}.png"), expected)
        with Image.open(out / f"masks/{name}.png") as mask:
            assert mask.mode == "P"
            assert np.array_equal(np.asarray(mask.convert("RGB")), np.array(student.palette, np.uint8)[expected])
        with Image.open(out / f"overlays/{name}.png") as overlay:
            assert np.array_equal(np.asarray(overlay), blend(array, expected, student.palette))
    said = json.loads((out / "predictions.json").read_text())
    assert said["classes"] == student.classes and said["palette"] == student.palette and said["failed"] == []
    entry = next(entry for entry in said["images"] if entry["mask"] == "masks/a.png")
    assert (entry["image"], entry["height"], entry["width"]) == (str(images / "a.png"), 37, 61)
    mask = read_raw_mask(out / "masks/a.png")
    assert entry["shares"] == {name: round(float((mask == k).mean()), 6) for k, name in enumerate(student.classes)}
    assert sum(entry["shares"].values()) == pytest.approx(1) and max(entry["shares"].values()) < 1


@pytest.mark.parametrize(
    ("files", "inputs", "masks"),
    [
        # Names that differ by their suffix keep it. The third name is what the first would become.
        (["a.jpg", "a.png", "a.jpg.bmp", "b.bmp"], ["."], ["a.jpg.png", "a.png.png", "a.jpg.bmp.png", "b.png"]),
        (["day/x/a.png", "night/x/a.png", "a.png"], ["day", "night", "a.png", "a.png"], ["day/x/a.png", "night/x/a.png", "a.png"]),
    ],
)
def test_each_image_has_a_mask_of_its_own(
    tmp_path: Path, student_file: Path, files: list[str], inputs: list[str], masks: list[str]
) -> None:
    for height, name in enumerate(files, 33):
        save(tmp_path / "in" / name, photo(height, 40))
    assert run(student_file, *(tmp_path / "in" / name for name in inputs), "--output", tmp_path / "out").exit_code == 0
    heights = {name: read_raw_mask(tmp_path / "out" / name).shape[0] for name in files_below(tmp_path / "out")}
    assert heights == {f"masks/{name}": height for height, name in enumerate(masks, 33)}


def test_a_damaged_image_is_named_and_the_others_are_done(tmp_path: Path, student_file: Path) -> None:
    images, out = tmp_path / "in", tmp_path / "out"
    for name in ("a", "b", "c"):
        save(images / f"{name}.png", photo(32, 40))
    os.truncate(images / "b.png", (images / "b.png").stat().st_size // 2)
    result = run(student_file, images, "--output", out, "--json")
    damaged, counted = result.stderr.splitlines()
    assert result.exit_code == 1 and counted == "error: 1 of 3 images has no mask"
    assert damaged.startswith(f"error: {images}/b.png: ") and "damaged" in damaged
    assert files_below(out) == {"masks/a.png", "masks/c.png", "predictions.json"}
    said = json.loads((out / "predictions.json").read_text())
    assert len(said["images"]) == 2 and said["failed"] == [damaged.removeprefix("error: ")]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] can't allocate memory")]
)
def test_an_image_too_large_for_the_device(
    tmp_path: Path, student_file: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    for side in (32, 33):
        save(tmp_path / f"in/{side}.png", photo(side, 40))
    predict = Student.predict

    def small(self: Student, image: np.ndarray, **options: Any) -> np.ndarray:
        if image.shape[0] > 32:
            raise error
        return predict(self, image, **options)

    monkeypatch.setattr(Student, "predict", small)
    result = run(student_file, tmp_path / "in", "--output", tmp_path / "out")
    assert result.exit_code == 1 and files_below(tmp_path / "out") == {"masks/32.png"}
    assert re.search(r"error: .*33\.png: 40 x 33 pixels do not fit .* --window", result.stderr)
    windowed = run(student_file, tmp_path / "in/33.png", "--output", "-", "--window", "40x40")
    assert windowed.exit_code == 1
    assert re.fullmatch(r"error: .*33\.png: .*; cut it into tiles, or another device\n", windowed.stderr)
    monkeypatch.setattr(Student, "predict", lambda *_, **__: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        run(student_file, tmp_path / "in/32.png", "--output", tmp_path / "out")


def test_standard_input_to_standard_output(tmp_path: Path, student_file: Path, student: Student) -> None:
    """Nothing but the PNG is written there."""
    buffer = io.BytesIO()
    Image.fromarray(photo(45, 33)).save(buffer, "PNG")
    result = run(student_file, "-", "--output", "-", stdin=buffer.getvalue())
    assert result.exit_code == 0
    with Image.open(io.BytesIO(result.stdout_bytes)) as mask:
        assert mask.mode == "P" and np.array_equal(np.asarray(mask), student.predict(photo(45, 33)))
    assert run(student_file, "-", "--output", tmp_path / "out", stdin=buffer.getvalue()).exit_code == 0
    assert files_below(tmp_path / "out") == {"masks/stdin.png"}
    broken = run(student_file, "-", "--output", "-", stdin=buffer.getvalue()[:100])
    assert broken.exit_code == 1 and broken.stdout == "" and broken.stderr.startswith("error: standard input: ")


def test_results_of_any_predict_are_no_inputs(tmp_path: Path, student_file: Path) -> None:
    """Below the input, beside it through a link, of another call, and overlays of 0.1.0, which said nothing in the file."""
    images = tmp_path / "photos"
    save(images / "day/a.png", photo(32, 40))
    save(images / "overlays/mine.png", photo(32, 40))
    assert run(student_file, images, "--output", images / "first", "--overlays").exit_code == 0
    old = images / "first/overlays/day/a.png"
    with Image.open(old) as picture:
        picture.convert("RGB").save(images / "plain.png")
    os.replace(images / "plain.png", old)
    (images / "link").symlink_to(images / "first")
    for output in (images / "second", tmp_path / "beside", images / "first", images):
        result = run(student_file, images, "--output", output, "--overlays")
        assert result.exit_code == 0, result.stderr
        said = rf"^pictures that predict made, or that lie in {output}/masks and overlays, are not inputs: \d+$"
        assert re.search(said, result.stdout, re.M)
        masks = {path for path in files_below(output) if path.startswith("masks/")}
        assert masks == {"masks/day/a.png"} | ({"masks/overlays/mine.png"} if output != images else set())
    nothing_else = run(student_file, images / "masks", "--output", images)
    assert nothing_else.exit_code == 1 and f"besides the results in {images}; name another folder" in nothing_else.stderr
    for result_file in (images / "first/masks/day/a.png", old, images / "second/overlays/day/a.png"):
        refused = run(student_file, result_file, "--output", tmp_path / "out")
        said = "is a mask or an overlay that predict made; name photos, or a folder of them"
        assert refused.exit_code == 2 and refused.stderr == f"error: {result_file}: {said}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("letter", ["n", "é", "道"])
def test_names_as_long_as_the_file_system_allows(tmp_path: Path, student_file: Path, letter: str) -> None:
    """The longest ones work; where a mask's name would be longer than its image's, this image alone fails."""
    start = letter * (240 // len(letter.encode()))
    long, clash = (start + end * (251 - len(start.encode())) for end in "yz")
    for name in ("a.png", f"{long}.png", f"{clash}.jpg", f"{clash}.png", "z.png"):
        save(tmp_path / "in" / name, photo(32, 40))
    result = run(student_file, tmp_path / "in", "--output", tmp_path / "out", "--overlays")
    lines = [
        rf"error: {tmp_path}/out/masks/{clash}\.{end}\.png: the name \(259 bytes\) or the path .* too long for the file system.*\n"
        for end in ("jpg", "png")
    ]
    assert result.exit_code == 1
    assert re.fullmatch("".join([*lines, "error: 2 of 5 images have no mask\n"]), result.stderr)
    names = {f"{kind}/{name}.png" for kind in ("masks", "overlays") for name in ("a", "z", long)}
    assert files_below(tmp_path / "out") == names


def test_windows_slide_and_how_images_are_seen_is_said(tmp_path: Path, student_file: Path, student: Student) -> None:
    image, out = save(tmp_path / "a.png", photo(70, 100)), tmp_path / "out"
    assert "images are seen as a whole\n" in run(student_file, image, "--output", out).stdout
    assert run(student_file, image, "--output", out, "--window", "32x64").exit_code == 0
    logits = predict_logits(student.network, photo(70, 100), student.normalisation, window=(32, 64))
    mask = read_raw_mask(out / "masks/a.png")
    assert np.array_equal(mask, logits.argmax(0).numpy()) and not np.array_equal(mask, student.predict(image))
    scaling = tiny_student(tmp_path / "scaling.safetensors", long_side=64)
    said = run(scaling, image, "--output", out, "--window", "32x48", "--overlap", "0.5").stdout
    scaled = "scaled down to a long side of 64 pixels (if larger)"
    assert f"images are {scaled}, and seen through windows of 32 x 48 pixels, overlap 0.5\n" in said
    half = load_student(scaling).predict(photo(70, 100), window=(32, 48), overlap=0.5)
    assert np.array_equal(read_raw_mask(out / "masks/a.png"), half)


@pytest.mark.parametrize("kind", ["masks", "overlays"])
def test_pictures_of_somebody_else_are_not_replaced(tmp_path: Path, student_file: Path, kind: str) -> None:
    """A data set has folders images/ and masks/, and its owner may name it as --output."""
    for name in ("a", "b"):
        save(tmp_path / f"images/train/{name}.png", photo(32, 40))
    own = save(tmp_path / f"{kind}/train/b.png", np.zeros((32, 40), np.uint8))
    drawn = own.read_bytes()
    result = run(student_file, tmp_path / "images", "--output", tmp_path, "--overlays")
    assert result.exit_code == 2
    assert result.stderr == f"error: {own}: exists, and predict has not made it; name another folder by --output\n"
    assert own.read_bytes() == drawn and not (tmp_path / "masks/train/a.png").exists()


def test_closed_standard_streams(tmp_path: Path, student_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `<&-` and `>&-` close them; Python has None in their place then."""
    image = save(tmp_path / "a.png", photo(32, 40))
    for stream, place, output, said in (
        ("stdin", Path("-"), tmp_path / "out", "-: standard input is closed; name a file"),
        ("stdout", image, Path("-"), "--output -: standard output is closed; name a folder"),
    ):
        with monkeypatch.context() as patched, pytest.raises(ParamsError, match=said):
            patched.setattr(sys, stream, None)
            predict(student_file, [place], output, overlays=False, as_json=False, window=None, device=torch.device("cpu"))


def test_an_interrupted_call_leaves_whole_masks_only(
    tmp_path: Path, student_file: Path, student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command writes each mask beside its place; and begins again."""
    for name in ("a", "b", "c"):
        save(tmp_path / f"in/{name}.png", photo(32, 40))
    replace, call = os.replace, (student_file, tmp_path / "in", "--output", tmp_path / "out", "--json")

    def interrupted(source: Any, target: Any) -> None:
        if str(target).endswith("b.png"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupted)
        result = run(*call)
    assert result.exit_code == 130 and "interrupted; what is written is whole; the same command begins again" in result.stderr
    assert files_below(tmp_path / "out") == {"masks/a.png"}
    assert np.array_equal(read_raw_mask(tmp_path / "out/masks/a.png"), student.predict(photo(32, 40)))
    assert run(*call).exit_code == 0
    assert files_below(tmp_path / "out") == {"predictions.json", *(f"masks/{name}.png" for name in "abc")}


def test_mistakes_are_one_line_and_nothing_is_written(tmp_path: Path, student_file: Path) -> None:
    image, out = save(tmp_path / "a.png", photo(32, 32)), tmp_path / "out"
    for name in ("drive.mp4", "empty/drive.mp4", "taken/2/overlays", "taken/3/predictions.json/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "dead").symlink_to("nowhere")
    clash = [save(tmp_path / name, photo(32, 32)) for name in ("x/a.png", "x/b.png", "y/b.png", "z/a.png")]
    same = f"{clash[0]} and {clash[3]}: their masks would have the same name; predict them into different folders"
    for arguments, code, message in (
        ([*clash, "--output", out], 2, same),
        ([tmp_path / "gone.png", "--output", out], 2, f"{tmp_path}/gone.png: no such file or folder"),
        ([tmp_path / "drive.mp4", "--output", out], 2, f"--output {out}: the overlays of a video are a video"),
        ([tmp_path / "empty", "--output", out], 1, f"{tmp_path}/empty: holds no images (.jpg"),
        ([image, "--output", image], 2, f"{image}: is not a folder, so nothing can be written below it; name another place"),
        ([image, "--output", tmp_path / "taken/2"], 2, f"{tmp_path}/taken/2/overlays: is not a folder"),
        ([image, "--output", tmp_path / "taken/3", "--json"], 1, "predictions.json: is a folder"),
        ([image, "--output", tmp_path / "dead"], 2, f"{tmp_path}/dead: is not a folder"),
        ([os.fsdecode(bytes(tmp_path) + b"/\xff.png"), "--output", out], 1, "\\udcff.png': the file name is not UTF-8; rename it"),
        ([image, "--output", "-", "--json"], 2, "--output -: standard output takes the mask alone"),
        ([image, "-", "--output", "-"], 2, "--output -: takes one image, and there are 2"),
        ([image, "--output", out, "--overlap", "0.5"], 2, "applies only to windows"),
        ([image, "--output", out, "--window", "32x32", "--overlap", "1"], 2, "0 to below 1"),
        *(
            ([image, "--output", out, f"--window={text}"], 2, f"--window {text}: write height x width in pixels, such as 512x512")
            for text in ("512", "0x32", "32x32x32", "-1x32")
        ),
    ):
        result = run(student_file, *arguments)
        assert result.exit_code == code, (arguments, result.stderr)
        assert message in result.stderr and len(result.stderr.splitlines()) == 1
    result = run(image, image, "--output", out)
    assert result.exit_code == 1 and "not a student" in result.stderr
    assert not out.exists() and files_below(tmp_path / "taken/3") == {"predictions.json/x"}


def test_the_examples_of_the_readme_run_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(examples) == 1
    path = tiny_student(tmp_path / "data/students/best.safetensors")
    save(tmp_path / "photo.jpg", photo(40, 56))
    monkeypatch.chdir(tmp_path)
    exec(compile(examples[0], str(README), "exec"), {})
    student = load_student(path)
    mask = student.predict("photo.jpg")
    with Image.open("mask.png") as picture:
        assert np.array_equal(np.asarray(picture), mask)
        assert np.array_equal(np.asarray(picture.convert("RGB")), np.array(student.palette, np.uint8)[mask])
    shares = [f"{name}: {100 * (mask == k).mean():.1f} %" for k, name in enumerate(student.classes)]
    assert capsys.readouterr().out.splitlines() == shares


def test_masks_lie_on_photos_as_viewers_show_them(tmp_path: Path, student_file: Path, student: Student) -> None:
    for name, value in (("a", 6), ("b", 1), ("c", 3)):
        save(tmp_path / f"in/{name}.png", photo(40, 64), exif=with_orientation(value))
    result = run(student_file, tmp_path / "in", "--output", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 0 and "EXIF" not in result.stdout
    for name, value in (("a", 6), ("b", 1), ("c", 3)):
        mask = read_raw_mask(tmp_path / f"out/masks/{name}.png")
        assert np.array_equal(mask, student.predict(turned(photo(40, 64), value)))
        with Image.open(tmp_path / f"in/{name}.png") as picture:
            assert np.array_equal(mask, student.predict(picture))
    piped = run(student_file, tmp_path / "in/c.png", "--output", "-", "--device", "cpu")
    assert piped.stdout_bytes.startswith(b"\x89PNG") and piped.stdout_bytes.endswith(b"IEND\xaeB`\x82") and not piped.stderr


@pytest.mark.parametrize(
    ("folder", "indexed", "said"), [("photos", True, True), ("Labels/val", False, True), ("photos", False, False)]
)
def test_label_masks_in_place_of_photos_are_told_of(
    tmp_path: Path, student_file: Path, folder: str, indexed: bool, said: bool
) -> None:
    path = save(tmp_path / folder / "a.png", photo(40, 64)[..., 0])
    if indexed:
        Image.open(path).convert("P").save(path)
    result = run(student_file, tmp_path / folder, "--output", tmp_path / "out", "--device", "cpu")
    warning = f"warning: 1 of 1 image looks like a label mask, such as {path}"
    assert result.exit_code == 0 and (warning in result.stdout) == said, result.output


def test_shares_of_classes_of_one_name_are_added() -> None:
    """A student of 0.1.0 may have such classes, and the last one's share would stand for both."""
    mask = np.array([[0, 1], [2, 2]], np.uint8)
    assert shares(mask, ["back", "crack", "crack"]) == {"back": 0.25, "crack": 0.75}
    assert shares(mask, ["back", "crack", "other"]) == {"back": 0.25, "crack": 0.25, "other": 0.5}
