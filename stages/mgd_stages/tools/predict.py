"""`mgd-pipeline predict`: masks of images, folders or standard input, overlays, the share of each class, and overlays of videos."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from mgd_pipeline.data.images import SUFFIXES, PhotoRules, read_photo
from mgd_pipeline.data.listing import UNREAD_SUFFIXES, check_name, image_files
from mgd_pipeline.durable import replace_file
from mgd_pipeline.errors import DataError, ParamsError, shell_command
from mgd_pipeline.networks.inference import OVERLAP
from mgd_pipeline.pictures.overlays import blend, is_png_of_mask, is_predicted, png_of_mask, png_of_overlay
from mgd_pipeline.students.student import Student, load_student
from mgd_pipeline.words import counted, verb
from mgd_stages.run.machine import require_writable
from mgd_stages.run.progress import console, progress, write_json
from mgd_stages.run.project import require_folder, short_of_memory
from mgd_stages.run.signals import stop_signals
from mgd_stages.tools.video import VIDEOS, WRITTEN, Source, is_overlay, is_video, opened, require_av, written

_STANDARD = Path("-")
_OF_MASKS = ("masks", "labels")


def predict(
    student_path: Path,
    inputs: list[Path],
    output: Path,
    *,
    overlays: bool,
    as_json: bool,
    window: tuple[int, int] | None,
    overlap: float = OVERLAP,
    device: torch.device,
) -> None:
    """Writes the masks of a student, on request overlays and predictions.json, see `write_masks`."""
    load = partial(_load, student_path, window, overlap, device)
    write_masks(load, inputs, output, overlays=overlays, about={"student": str(student_path)} if as_json else None)


def _load(student_path: Path, window: tuple[int, int] | None, overlap: float, device: torch.device) -> MaskMaker:
    student = load_student(student_path, device)
    remedy = "cut it into tiles" if window else "use --window 512x512"
    make, seen = partial(student.predict, window=window, overlap=overlap), seen_as(student, window, overlap)
    return MaskMaker(student.classes, student.palette, student.photo_rules, make, seen, remedy)


def video_of(inputs: list[Path], camera: str | None, output: Path, *, overlays: bool, as_json: bool) -> Source | None:
    """The video or the camera to read; None where the inputs are images. Raises ParamsError for what does not go with it."""
    videos = [place for place in inputs if is_video(place)]
    if camera is None and not videos:
        if not inputs:
            raise ParamsError("INPUT: name images, folders or a video; or a camera, such as --camera 0")
        if output.suffix.lower() in WRITTEN and not output.is_dir():
            if gone := next((place for place in inputs if place != _STANDARD and not place.exists()), None):
                raise ParamsError(f"{gone}: no such file or folder")
            told = f"a video's name ends in {', '.join(VIDEOS)}"
            raise ParamsError(f"--output {output}: is the name of a video, and no input is a video; name a folder ({told})")
        return None
    if camera is not None and not (camera.strip() and camera.isprintable()):
        raise ParamsError(f"--camera {camera!r}: is not the name of a camera; name one, such as --camera 0")
    source = Source(str(videos[0]), not videos[0].is_file()) if camera is None else Source(camera, True)
    if len(inputs) > (camera is None):
        kind = "camera" if source.camera else "video"
        raise ParamsError(f"{source.place}: is a {kind}, which excludes all other inputs; leave them out, or call predict for each")
    for option, given in (("--overlays", overlays), ("--json", as_json)):
        if given:
            raise ParamsError(f"{option}: is for images; a video becomes one video of overlays and nothing else")
    if output.suffix.lower() not in WRITTEN:
        raise ParamsError(f"--output {output}: the overlays of a video are a video; name a file that ends in {', '.join(WRITTEN)}")
    check_name(output)
    require_av()
    return source


def predict_video(
    student_path: Path,
    source: Source,
    output: Path,
    *,
    window: tuple[int, int] | None,
    overlap: float = OVERLAP,
    device: torch.device,
) -> None:
    """Writes a video of the masks over the frames of a video or a camera, frame by frame, at the times of the frames.

    Of a damaged video it writes the frames that can be read; then a DataError says where they end. Ctrl-C ends the video of a
    camera, and leaves nothing of a file's.
    """
    require_folder(output.parent)
    require_writable(files=[output])
    if not source.camera and is_overlay(Path(source.place)):
        raise ParamsError(f"{source.place}: is a video of overlays that predict made; name the video itself")
    if os.path.lexists(output) and not is_overlay(output):
        raise ParamsError(f"{output}: exists, and predict has not made it; name another file by --output")
    count, picture, began = 0, None, time.monotonic()
    with opened(source) as video, stop_signals() if source.camera else nullcontext(set()) as video.stopped:
        maker = _load(student_path, window, overlap, device)
        console.print(maker.said)
        if source.camera:
            console.print(f"camera {source.place}: Ctrl-C ends the video")
        with progress("predict", video.expected, "frame") as advance, written(output, video) as writer:
            for count, picture in enumerate(video.frames(), 1):
                mask = _mask(maker, picture.pixels, source.place)
                writer.add(picture._replace(pixels=blend(picture.pixels, mask, maker.palette)))
                advance(count, f"{count / max(time.monotonic() - began, 1e-9):.1f} frames/s")
            if picture is None:
                raise DataError(f"{source.place}: no frame can be read{f' ({video.fault})' if video.fault else ''}")
        at = f"{counted(count, 'frame')}, the last one at {float(picture.moment * video.time_base):.2f} s"
        console.print(f"{output}: {at}")
        if video.fault:
            raise DataError(f"{source.place}: {video.fault}; {output} has what can be read: {at}")


@dataclass(frozen=True)
class MaskMaker:
    """A student or a teacher that makes masks of photos."""

    classes: list[str]
    palette: Sequence[Sequence[int]]
    photo_rules: PhotoRules
    mask_of: Callable[[np.ndarray], np.ndarray]
    """(H, W, 3) uint8 to the class of each pixel, (H, W) uint8, IGNORE where there is none"""
    said: str
    """A line about how it sees images"""
    remedy: str
    """What helps if an image does not fit into the memory"""


def write_masks(
    load: Callable[[], MaskMaker],
    inputs: list[Path],
    output: Path,
    *,
    overlays: bool,
    about: dict[str, str] | None = None,
    keep: bool = False,
) -> list[dict[str, Any]]:
    """Writes masks/<name>.png below `output`, on request overlays/<name>.png, and predictions.json if its first entries are given.
    Returns the entries of the images in predictions.json. `keep`: a mask that a person made stays; otherwise it is an error.

    `output` may be `-` for one image, whose mask goes to standard output. An image that cannot be used is left out; at the end a
    DataError names each image without a mask.
    """
    as_json = about is not None
    _check(inputs, output, overlays or as_json)
    images = find_images(inputs, output)
    names = images.names
    if output == _STANDARD:
        if len(names) > 1:
            raise ParamsError(f"--output -: takes one image, and there are {len(names)}; name a folder")
        maker, image_path = load(), next(iter(names))
        mask = _predict(maker, image_path)[1]
        sys.stdout.buffer.write(png_of_mask(mask, maker.palette))
        sys.stdout.buffer.flush()
        return []
    if keep:
        kept = [path for path, name in names.items() if _is_of_a_person(output / "masks" / name)]
        names = {path: name for path, name in names.items() if path not in kept}
        if kept:
            are = verb(len(kept), "is not of this program and stays", "are not of this program and stay")
            console.print(f"{counted(len(kept), 'mask')} {are}")
    _check_results(output, names, overlays)
    # A mask whose name is too long fails alone, when it is written.
    require_writable([output, *_results(output)[: 1 + overlays]], [output / "predictions.json"] if as_json else [])
    maker = load()
    for line in [*_left_out(images, output), maker.said]:
        console.print(line)
    done: list[dict[str, Any]] = []
    failures: list[str] = []
    began = time.monotonic()
    with progress("label-images" if keep else "predict", len(names), "image") as advance:
        for count, (image_path, name) in enumerate(names.items(), 1):
            entry = {"image": str(image_path), "mask": f"masks/{name}.png"}
            try:
                image, mask = _predict(maker, image_path)
                replace_file(output / entry["mask"], png_of_mask(mask, maker.palette))
                if overlays:
                    entry["overlay"] = f"overlays/{name}.png"
                    replace_file(output / entry["overlay"], png_of_overlay(image, mask, maker.palette))
            except DataError as error:
                failures.append(str(error))
            else:
                done.append({**entry, "height": mask.shape[0], "width": mask.shape[1], "shares": shares(mask, maker.classes)})
            advance(count, f"{count / max(time.monotonic() - began, 1e-9):.1f} images/s")
    if as_json:
        content = {**about, "classes": maker.classes, "palette": maker.palette, "images": done}
        write_json(output / "predictions.json", {**content, "failed": failures})
    if done:
        console.print(f"{counted(len(done), 'mask')}: {output / 'masks'}")
    if failures:
        lacking = f"{len(failures)} of {counted(len(names), 'image')} {verb(len(failures), 'has', 'have')} no mask"
        raise DataError("\n".join([*failures, lacking]))
    return done


class Inputs(NamedTuple):
    """What the inputs hold."""

    names: dict[Path, str]
    """By image the name of its mask, without suffix"""
    passed_over: list[Path]
    """Further files in the folders, sorted"""
    made: int
    """Number of pictures in the folders that predict made, or that lie where it writes"""


def find_images(inputs: list[Path], output: Path) -> Inputs:
    """The images among the inputs and below them.

    Names are paths below the input folder, with the folder's own name in front where there are several inputs. Images that differ
    only by their suffix keep the suffix. Masks and overlays that any `predict` made are not inputs, nor is anything in the masks/
    and overlays/ of `output`.
    """
    results = [folder.resolve() for folder in _results(output)]

    def is_result(path: Path) -> bool:
        resolved = path.resolve()
        return any(resolved.is_relative_to(folder) for folder in results) or is_predicted(path)

    below_input: dict[Path, Path] = {}
    passed_over: set[Path] = set()
    made = 0
    for place in inputs:
        if not place.is_dir():
            if is_predicted(place):
                raise ParamsError(f"{place}: is a mask or an overlay that predict made; name photos, or a folder of them")
            below_input.setdefault(place, Path("stdin" if place == _STANDARD else place.name))
            continue
        images = image_files(place)
        inside = [path for path in images if not is_result(path)]
        files = (Path(top, name) for top, _, names in os.walk(place, followlinks=True) for name in names)
        passed_over |= set(files) - set(images)
        made += len(images) - len(inside)
        if not inside:
            besides = f" besides the results in {output}" if images else ""
            raise DataError(f"{place}: holds no images ({', '.join(SUFFIXES)}){besides}; name another folder")
        for path in inside:
            below = path.relative_to(place)
            below_input.setdefault(path, below if len(inputs) == 1 else place.resolve().name / below)
    names = {path: below.with_suffix("").as_posix() for path, below in below_input.items()}
    while doubles := {name for name, count in Counter(names.values()).items() if count > 1}:
        kept = {path: below_input[path].as_posix() if name in doubles else name for path, name in names.items()}
        if kept == names:
            clash = next(name for name in names.values() if name in doubles)
            one, other = [str(path) for path, name in names.items() if name == clash][:2]
            raise ParamsError(f"{one} and {other}: their masks would have the same name; predict them into different folders")
        names = kept
    return Inputs(names, sorted(passed_over), made)


def _left_out(images: Inputs, output: Path) -> Iterator[str]:
    """Lines about files that are not predicted."""
    if images.made:
        yield f"pictures that predict made, or that lie in {output}/masks and overlays, are not inputs: {images.made}"
    if masks := [path for path in images.names if _looks_like_mask(path)]:
        like = verb(len(masks), "looks like a label mask", "look like label masks")
        yield (
            f"warning: {len(masks)} of {counted(len(images.names), 'image')} {like}, such as {masks[0]} (an indexed PNG, or below "
            f"a folder called {' or '.join(_OF_MASKS)}): name the folder of the photos"
        )
    if images.passed_over:
        yield f"{counted(len(images.names), 'image')}; other files that are passed over: {len(images.passed_over)}"
    if unread := [path for path in images.passed_over if path.suffix.lower() in UNREAD_SUFFIXES]:
        them = f"{len(unread)} of the other files {verb(len(unread), 'is a picture', 'are pictures')}, such as {unread[0]}"
        yield f"{them}, in formats that are not read: save them as PNG or JPEG"


def _looks_like_mask(path: Path) -> bool:
    """Whether a file is an indexed PNG, or one of the three folders above it is called as folders of masks are."""
    if path == _STANDARD:
        return False
    if any(folder.name.lower() in _OF_MASKS for folder in list(path.parents)[:3]):
        return True
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return picture.mode == "P"
    except (OSError, SyntaxError, ValueError):  # no PNG, or damaged, which predicting it says
        return False


def seen_as(student: Student, window: tuple[int, int] | None, overlap: float) -> str:
    """A line about the size at which the student sees images, and whether it sees them whole or through windows."""
    scaled = "" if student.long_side is None else f"scaled down to a long side of {student.long_side} pixels (if larger), and "
    how = "as a whole" if window is None else f"through windows of {window[0]} x {window[1]} pixels, overlap {overlap:.3g}"
    return f"images are {scaled}seen {how}"


def shares(mask: np.ndarray, classes: list[str]) -> dict[str, float]:
    """The share of pixels of each class; classes with the same name, which students of 0.1.0 may have, are added up."""
    pixels = dict.fromkeys(classes, 0)
    counts = np.bincount(mask.ravel(), minlength=len(classes))[: len(classes)]  # without IGNORE
    for name, count in zip(classes, counts.tolist(), strict=True):
        pixels[name] += count
    return {name: round(count / mask.size, 6) for name, count in pixels.items()}


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
        if place.suffix.lower() in VIDEOS and place.is_file():
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


def _is_of_a_person(mask: Path) -> bool:
    """Whether there is a mask that this program has not made; `mask` has no suffix, and a person's may be of any format."""
    places = [mask.with_name(mask.name + written) for suffix in SUFFIXES for written in (suffix, suffix.upper())]
    return any(place.is_file() and not is_png_of_mask(place) for place in places)


def _check_results(output: Path, names: dict[Path, str], overlays: bool) -> None:
    """Raises ParamsError where results cannot be written, and where a result would replace a file that predict did not make."""
    for folder, wanted, is_ours in zip(_results(output), (True, overlays), (is_png_of_mask, is_predicted), strict=True):
        for path in (folder / f"{name}.png" for name in names.values()):
            require_folder(path.parent)
            if wanted and os.path.lexists(path) and not is_ours(path):
                raise ParamsError(f"{path}: exists, and predict has not made it; name another folder by --output")


def _predict(maker: MaskMaker, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The image as viewers show it and its mask, at the image's own size. Raises DataError."""
    standard = path == _STANDARD
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # about damaged EXIF blocks, which are ignored
        data = sys.stdin.buffer.read() if standard else None
        image = read_photo("standard input" if standard else path, maker.photo_rules, data=data)[0]
    return image, _mask(maker, image, str(path))


def _mask(maker: MaskMaker, image: np.ndarray, name: str) -> np.ndarray:
    try:
        return maker.mask_of(image)
    except RuntimeError as error:
        if not short_of_memory(error):
            raise
        size = f"{image.shape[1]} x {image.shape[0]}"
        raise DataError(f"{name}: {size} pixels do not fit into the device's memory; {maker.remedy}, or another device") from None
