"""Predict: a student over images, folders or standard input; masks, pictures, and the share of each class."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from mgd_pipeline.datasets import image_files
from mgd_pipeline.durable import replace_file
from mgd_pipeline.errors import DataError, ParamsError
from mgd_pipeline.images import SUFFIXES, read_image
from mgd_pipeline.overlays import blend, png_of_image, png_of_mask
from mgd_pipeline.prediction import Student, load_student
from mgd_stages.progress import console, progress, write_json

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
    to_standard = output == _STANDARD
    names, passed_over = find_images(inputs, output)
    if to_standard and len(names) > 1:
        raise ParamsError(f"--output -: takes one image, and there are {len(names)}; name a folder")
    student = load_student(student_path, device)
    if to_standard:
        (image_path,) = names
        image = _read(image_path)
        sys.stdout.buffer.write(png_of_mask(student.predict(image, window=window), student.palette))
        sys.stdout.buffer.flush()
        return
    if passed_over:
        console.print(f"{len(names)} images; files that are none and passed over: {passed_over}")
    done: list[dict[str, object]] = []
    failures: list[str] = []
    began = time.monotonic()
    with progress("predict", len(names), "images") as advance:
        for count, (image_path, name) in enumerate(names.items(), 1):
            try:
                image = _read(image_path)
                mask = _predict(student, image_path, image, window)
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


def find_images(inputs: list[Path], output: Path) -> tuple[dict[Path, str], int]:
    """Each image with the name of its mask, without suffix; and how many other files lie in the folders.

    Names are paths below the input folder, behind the folder's own name where there are several inputs. Images that differ
    by their suffix alone keep it. What lies in `output` is no input.
    """
    found: dict[Path, Path] = {}
    passed_over = 0
    for place in inputs:
        if not place.is_dir():
            found.setdefault(place, Path("stdin" if place == _STANDARD else place.name))
            continue
        inside = [path for path in image_files(place) if not _below(path, output)]
        files = (Path(top, name) for top, _, names in os.walk(place, followlinks=True) for name in names)
        passed_over += sum(not _below(path, output) for path in files) - sum(not path.is_dir() for path in inside)
        if not inside:
            raise DataError(f"{place}: holds no images ({', '.join(SUFFIXES)})")
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
    return names, passed_over


def shares(mask: np.ndarray, classes: list[str]) -> dict[str, float]:
    """The part of the pixels that each class has."""
    counts = np.bincount(mask.ravel(), minlength=len(classes))
    return {name: round(float(count / mask.size), 6) for name, count in zip(classes, counts, strict=True)}


def _check(inputs: list[Path], output: Path, in_folder: bool) -> None:
    """Raises ParamsError before anything is loaded."""
    for place in inputs:
        if place == _STANDARD:
            continue
        if not place.exists():
            raise ParamsError(f"{place}: no such file or folder")
        if place.suffix.lower() in _VIDEOS and place.is_file():
            raise ParamsError(
                f"{place}: is a video; make images of it by `mkdir frames && ffmpeg -i {place} frames/%06d.jpg` and name frames"
            )
    if output == _STANDARD and in_folder:
        raise ParamsError("--output -: standard output takes the mask alone; name a folder for --overlays and --json")
    if output.exists() and not output.is_dir():
        raise ParamsError(f"--output {output}: is a file; name a folder")


def _below(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _read(path: Path) -> np.ndarray:
    """At its own size; the student scales it where it was trained so."""
    return read_image("standard input", data=sys.stdin.buffer.read()) if path == _STANDARD else read_image(path)


def _predict(student: Student, path: Path, image: np.ndarray, window: tuple[int, int] | None) -> np.ndarray:
    try:
        return student.predict(image, window=window)
    except torch.OutOfMemoryError:
        height, width = image.shape[:2]
        raise DataError(
            f"{path}: {width} x {height} pixels do not fit into the device's memory; predict it by --window 512x512, or on the CPU"
        ) from None
