"""Predict: a student over images, folders or standard input; masks, pictures, and the share of each class."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from mgd_pipeline.datasets import UNREAD_SUFFIXES, check_name, image_files
from mgd_pipeline.durable import replace_file
from mgd_pipeline.errors import DataError, ParamsError, shell_command
from mgd_pipeline.images import SUFFIXES, read_image
from mgd_pipeline.overlays import blend, is_png_of_mask, png_of_image, png_of_mask
from mgd_pipeline.prediction import Student, load_student
from mgd_stages.progress import console, progress, write_json
from mgd_stages.project import require_folder, short_of_memory

_VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")
_STANDARD = Path("-")


def predict(
    student_path: Path,
    inputs: list[Path],
    output: Path,
    *,
    overlays: bool,
    as_json: bool,
    window: tuple[int, int] | None,
    device: torch.device,
) -> None:
    """Writes masks/<name>.png below `output`, on request overlays/<name>.png and predictions.json.

    `output` may be `-` for one image, whose mask goes to standard output. An image that cannot be used is left out; once
    the others are done, a DataError names each of them.
    """
    _check(inputs, output, overlays or as_json)
    names, passed_over = find_images(inputs, output)
    if output == _STANDARD:
        if len(names) > 1:
            raise ParamsError(f"--output -: takes one image, and there are {len(names)}; name a folder")
        student = load_student(student_path, device)
        _, mask = _predict(student, next(iter(names)), window)
        sys.stdout.buffer.write(png_of_mask(mask, student.palette))
        sys.stdout.buffer.flush()
        return
    _check_results(output, names)
    student = load_student(student_path, device)
    if passed_over:
        console.print(f"{len(names)} images; files that are none and passed over: {len(passed_over)}")
    if unread := [path for path in passed_over if path.suffix.lower() in UNREAD_SUFFIXES]:
        console.print(
            f"{len(unread)} of these are pictures, such as {unread[0]}, in formats that are not read: save them as PNG or JPEG"
        )
    done: list[dict[str, object]] = []
    failures: list[str] = []
    began = time.monotonic()
    with progress("predict", len(names), "images") as advance:
        for count, (image_path, name) in enumerate(names.items(), 1):
            try:
                image, mask = _predict(student, image_path, window)
            except DataError as error:
                failures.append(str(error))
            else:
                entry: dict[str, object] = {"image": str(image_path), "mask": f"masks/{name}.png"}
                replace_file(output / f"masks/{name}.png", png_of_mask(mask, student.palette))
                if overlays:
                    entry["overlay"] = f"overlays/{name}.png"
                    replace_file(output / f"overlays/{name}.png", png_of_image(blend(image, mask, student.palette)))
                done.append({**entry, "height": mask.shape[0], "width": mask.shape[1], "shares": shares(mask, student.classes)})
            advance(count, f"{count / max(time.monotonic() - began, 1e-9):.1f} images/s")
    if as_json:
        content = {"student": str(student_path), "classes": student.classes, "palette": student.palette, "images": done}
        write_json(output / "predictions.json", {**content, "failed": failures})
    if done:
        console.print(f"{len(done)} masks: {output / 'masks'}")
    if failures:
        raise DataError("\n".join([*failures, f"{len(failures)} of {len(names)} images have no mask"]))


def find_images(inputs: list[Path], output: Path) -> tuple[dict[Path, str], list[Path]]:
    """Each image with the name of its mask, without suffix; and the other files in the folders, sorted.

    Names are paths below the input folder, behind the folder's own name where there are several inputs. Images that differ
    by their suffix alone keep it. Pictures in the masks/ and overlays/ of `output` are no inputs.
    """
    results = [folder.resolve() for folder in _results(output)]

    def is_result(path: Path) -> bool:
        resolved = path.resolve()
        return any(resolved.is_relative_to(folder) for folder in results)

    found: dict[Path, Path] = {}
    passed_over: set[Path] = set()
    for place in inputs:
        if not place.is_dir():
            found.setdefault(place, Path("stdin" if place == _STANDARD else place.name))
            continue
        images = image_files(place)
        inside = [path for path in images if not is_result(path)]
        files = (Path(top, name) for top, _, names in os.walk(place, followlinks=True) for name in names)
        passed_over |= {path for path in files if not is_result(path)} - set(inside)
        if not inside:
            besides = f" besides the results in {output}" if images else ""
            raise DataError(f"{place}: holds no images ({', '.join(SUFFIXES)}){besides}; name another folder")
        for path in inside:
            below = path.relative_to(place)
            found.setdefault(path, below if len(inputs) == 1 else place.resolve().name / below)
    names = {path: below.with_suffix("").as_posix() for path, below in found.items()}
    while doubles := {name for name, count in Counter(names.values()).items() if count > 1}:
        kept = {path: found[path].as_posix() if name in doubles else name for path, name in names.items()}
        if kept == names:
            one, other = [str(path) for path, name in names.items() if name in doubles][:2]
            raise ParamsError(f"{one} and {other}: their masks would have the same name; predict them into different folders")
        names = kept
    return names, sorted(passed_over)


def shares(mask: np.ndarray, classes: list[str]) -> dict[str, float]:
    """The part of the pixels that each class has."""
    counts = np.bincount(mask.ravel(), minlength=len(classes))
    return {name: round(float(count / mask.size), 6) for name, count in zip(classes, counts, strict=True)}


def _results(output: Path) -> tuple[Path, Path]:
    return output / "masks", output / "overlays"


def _check(inputs: list[Path], output: Path, in_folder: bool) -> None:
    """Raises ParamsError before anything is loaded."""
    for place in inputs:
        if place == _STANDARD:
            if sys.stdin is None:
                raise ParamsError("-: standard input is closed; name a file, or send one by < photo.jpg")
            continue
        check_name(place)
        if not place.exists():
            raise ParamsError(f"{place}: no such file or folder")
        if place.suffix.lower() in _VIDEOS and place.is_file():
            raise ParamsError(
                f"{place}: is a video; make images of it by `mkdir frames && "
                f"{shell_command('ffmpeg', '-i', place, 'frames/%06d.jpg')}` and name frames"
            )
    if output == _STANDARD:
        if in_folder:
            raise ParamsError("--output -: standard output takes the mask alone; name a folder for --overlays and --json")
        if sys.stdout is None:
            raise ParamsError("--output -: standard output is closed; name a folder")
        return
    check_name(output)


def _check_results(output: Path, names: dict[Path, str]) -> None:
    """Raises ParamsError where results cannot be written, and where a mask would replace a label that somebody has drawn."""
    for name in names.values():
        path, overlay = (folder / f"{name}.png" for folder in _results(output))
        require_folder(path.parent)
        require_folder(overlay.parent)
        if os.path.lexists(path) and not is_png_of_mask(path):
            raise ParamsError(f"{path}: exists, and predict has not made it; name another folder by --output")


def _predict(student: Student, path: Path, window: tuple[int, int] | None) -> tuple[np.ndarray, np.ndarray]:
    """The image at its own size, which the student scales where it was trained so; and its mask. Raises DataError."""
    image = read_image("standard input", data=sys.stdin.buffer.read()) if path == _STANDARD else read_image(path)
    try:
        return image, student.predict(image, window=window)
    except RuntimeError as error:
        if not short_of_memory(error):
            raise
        size = f"{image.shape[1]} x {image.shape[0]}"
        remedy = "cut it into tiles" if window else "use --window 512x512"
        raise DataError(f"{path}: {size} pixels do not fit into the device's memory; {remedy}, or another device") from None
