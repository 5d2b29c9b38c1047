"""`mgd-pipeline export`: a student for another runtime, compared with the student there before anything is written."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mgd_pipeline.data.classes import compare_names
from mgd_pipeline.data.images import SUFFIXES, read_photo, resize_image, scaled_size
from mgd_pipeline.data.listing import check_name, image_files
from mgd_pipeline.data.manifest import ImageRow, read_manifest
from mgd_pipeline.durable import copy_folder, naming, private_name, remove_left, replace_together, uninterrupted, was_killed
from mgd_pipeline.errors import DataError, OutputError, ParamsError, WeightsError
from mgd_pipeline.exports import smp as smp_folders
from mgd_pipeline.exports.coreml import NOT_RUN
from mgd_pipeline.exports.deployed import Calibration, Run, Size, describe, to_batch
from mgd_pipeline.exports.formats import FORMATS, Format, format_of, require
from mgd_pipeline.metrics import confusion_matrix, mean_iou
from mgd_pipeline.networks.inference import resize_logits
from mgd_pipeline.pictures.overlays import is_predicted
from mgd_pipeline.students.student import Student, load_student
from mgd_pipeline.words import counted, per_cent, signed, size_text
from mgd_stages.run.held_out import evaluated_rows
from mgd_stages.run.machine import require_room, require_writable
from mgd_stages.run.progress import console, progress, say_renamed
from mgd_stages.run.project import Project, require_folder
from mgd_stages.run.verdicts import why_undefined

SIZES = ((1, 3, 97, 130), (2, 3, 64, 64), (1, 3, 333, 257), (3, 3, 33, 32))
"""Batches and sizes that are compared. Most are not multiples of 32, and none is the size that was traced."""
PHOTOS = ((0.6, 0.45), (1.0, 1.0), (1.13, 1.5), (1.37, 0.8), (0.3, 1.6), (1.8, 0.5), (0.01, 0.2))
"""Height and width of the photos whose masks are compared with `predict`'s, in long sides of the student: smaller and larger."""
AGREEMENT = 0.8
"""Least share of pixels that keep their class in int8; below it the ranges are wrong, not just coarse."""

_STAGING = "mgd-export"
_DEFAULT_SIDE = 512
_LARGEST_SIDE = 8192
_EXAMPLE = (512, 512)
_CALIBRATION_IMAGES = 64
_AGREEMENT_IMAGES = 16
_LARGE_LOSS = 0.005
"""mIoU from which a line says what mends the loss."""


def export(
    student_path: Path,
    output: Path,
    name: str | None,
    *,
    size: Size | None,
    int8: bool,
    images: Path | None,
    project: Project | None,
) -> None:
    """Writes `output`. Raises WeightsError, and writes nothing, where the exported network differs from the student.

    `name` is a format's, None for the one that the suffix tells. `size` makes a file for one image of this height and width; None
    is any size, or for a format that needs one the size of most images of the project, 512 x 512 without a project. `int8`:
    calibrated on the images of the folder `images`, or on the project's labelled images where `images` is None. The loss is
    measured in the project's mIoU, or without a project in pixels of `images` that change their class.
    """
    form = format_of(output, name)
    _check(form, output, size, int8, images, project)
    require(form, int8=int8)
    student = load_student(student_path)
    size = _size(form, student, size, project)
    calibration = calibration_images(form, student, size, images, project) if int8 else None
    with staging() as folder:
        staged = folder / "float32" / output.name
        staged.parent.mkdir()
        console.print(f"exporting to {form.name}")
        with converting_to(folder, student_path):
            form.write(student, staged, size)
        runs = {"torch": torch.no_grad()(student.forward), form.name: form.load(staged)}
        compare(student, runs[form.name], form, size)
        if form.name == "coreml" and sys.platform != "darwin":
            console.print(f"not run: {NOT_RUN}")
            del runs[form.name]  # the time that torch takes says nothing about Core ML
        facts = describe(student, size)
        if calibration is not None:
            assert form.quantise is not None
            console.print(f"int8: calibrating on {counted(len(calibration), 'image')}")
            written, staged = staged, folder / "int8" / output.name
            staged.parent.mkdir()
            with converting_to(folder, student_path):
                form.quantise(student, written, staged, size, calibration)
            facts["int8"] = calibration.note
            runs["int8"] = form.load(staged)
            if project is not None:
                show_cost(project, student, runs[form.name], runs["int8"], size)
            check_agreement(runs[form.name], runs["int8"], calibration)
        show_latency(runs, size or _EXAMPLE)
        if "+.json" in form.beside:
            package = form.modules[0].partition(".")[0].replace("_", "-")
            facts["made_by"] = f"{package} {version(package)}"
            note = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
            Path(f"{staged}.json").write_text(note, encoding="utf-8")
        said = _said(form, student, size, staged.parent)
        _publish(form, staged, output)
    console.print(f"{output}: {said}")


def _size(form: Format, student: Student, size: Size | None, project: Project | None) -> Size | None:
    """The size of the images of a file for one size; None for any size. Raises ParamsError for a size that is too large."""
    if size is None and form.fixed:
        rows = _own_images(student, project)
        size = typical_size(student, rows)
        named, scaled = f"{size[0]}x{size[1]}", "" if student.long_side is None else f", scaled to {student.long_side} pixels"
        whose = f"most of the project's images{scaled}" if rows else "a square, to which photos of other shapes are squeezed"
        console.print(f"--size is left out, and a file of --format {form.name} takes images of one size: {named}, {whose}")
        return size
    if size is not None and max(size) > (student.long_side or _LARGEST_SIDE):
        limit = f"the student sees at most {student.long_side} pixels along the longer side" if student.long_side else "too large"
        height, width = scaled_size(*size, student.long_side or _LARGEST_SIDE)
        raise ParamsError(f"--size {size[0]}x{size[1]}: {limit}; name {height}x{width}")
    return size


def _own_images(student: Student, project: Project | None) -> list[ImageRow]:
    """The images of a project that has the student's classes; none of another one, in whose folder the command may be called."""
    if project is None or not project.manifest.exists():
        return []
    manifest = read_manifest(project.manifest, project.base)
    return [] if compare_names("the student", student.classes, manifest.classes).fault else list(manifest.rows.values())


def typical_size(student: Student, rows: Sequence[ImageRow]) -> Size:
    """The most frequent size at which the student sees the images, since a file for another size loses mIoU for its size alone; a
    square without images."""
    if not rows:
        side = student.long_side or _DEFAULT_SIDE
        return side, side
    [(size, _)] = Counter(scaled_size(row.height, row.width, student.long_side) for row in rows).most_common(1)
    return size


@contextmanager
def staging() -> Iterator[Path]:
    """A folder for files that have not been compared yet, away from the output, so that a killed export leaves nothing there.

    The next export removes what a killed one left. Converters' own temporary files lie in it, too, for the same reason.
    """
    try:
        place = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise OutputError(f"{error.strerror}; make room in one of them, or name another folder by TMPDIR") from None
    remove_left(place, _STAGING)
    folder, before = place / private_name(_STAGING), tempfile.tempdir
    folder.mkdir(mode=0o700)
    try:
        (folder / "temporary").mkdir()
        tempfile.tempdir = str(folder / "temporary")
        yield folder
    finally:
        with uninterrupted():
            tempfile.tempdir = before
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def converting_to(folder: Path, student_path: Path) -> Iterator[None]:
    """Raises OutputError where a converter failed because the disk of `folder` is full, which few converters say in clear words."""
    try:
        with naming(folder):
            yield
    except (OSError, WeightsError):
        require_room(folder, student_path.stat().st_size)
        raise


def _publish(form: Format, staged: Path, output: Path) -> None:
    """Gives finished files their names."""
    if form.folder:
        if not copy_folder(staged, output, replace=bool(form.suffix)):
            raise ParamsError(f"{output}: exists; remove it, or name another folder")
    else:
        files = sorted(staged.parent.iterdir(), key=lambda file: file == staged)
        replace_together({output.with_name(file.name): file.read_bytes() for file in files})


def _said(form: Format, student: Student, size: Size | None, folder: Path) -> str:
    """What was written and what goes in."""
    scaled = f"scaled down to a long side of {student.long_side} pixels"
    if form.name == "smp":
        steps = "its input is normalised" if student.long_side is None else f"images are {scaled} before, and normalised"
        return f"a folder for smp.from_pretrained, the network alone; {smp_folders.NOTE} says how {steps}"
    stored = size_text(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
    if size is not None:
        return f"{stored}; an image is RGB, 0 to 255, of {size[0]} x {size[1]} pixels (height x width)"
    larger = "" if student.long_side is None else f"; larger ones are {scaled} inside, as predict does"
    return f"{stored}; images are RGB, 0 to 255, of any size{larger}"


def compare(student: Student, run: Run, form: Format, size: Size | None) -> None:
    """Prints how far the logits of `run` are from the student's, and its masks of whole photos from `predict`'s.

    `size` is the only one that `run` takes, None for any. Raises WeightsError where they are too far.
    """
    generator = torch.Generator().manual_seed(0)
    for shape in SIZES if size is None else 2 * [(1, 3, *size)]:
        _, said = _compare_logits(student, run, torch.randint(0, 256, shape, generator=generator).float(), form.tolerance)
        console.print(said)
    for image in photos(student.long_side, size):
        logits, _ = _compare_logits(student, run, to_batch(image), form.tolerance)
        share = float((logits.argmax(1)[0].numpy() == student.predict(image)).mean())
        named = f"{image.shape[1]} x {image.shape[0]}"
        said = f"photo of {named} pixels: {100 * share:.3f} % of them have the class that predict gives them"
        if share < form.same_mask:
            raise WeightsError(f"export: {said}, fewer than {100 * form.same_mask:g} %, so nothing is written")
        console.print(said)


def photos(long_side: int | None, size: Size | None = None) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8 images with smooth colours, edges and grain, of the sizes in PHOTOS, where 256 stands for no long side; or
    three of one size."""
    random = np.random.default_rng(0)
    side = 256 if long_side is None else long_side
    varied = [(max(1, round(side * height)), max(1, round(side * width))) for height, width in PHOTOS]
    for height, width in varied if size is None else 3 * [size]:
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        ways = (Image.Resampling.BICUBIC, Image.Resampling.NEAREST)
        smooth, edges = (np.asarray(coarse.resize((width, height), way)).astype(int) for way in ways)
        yield ((smooth + edges) // 2 + random.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)


def _compare_logits(student: Student, run: Run, images: torch.Tensor, tolerance: float) -> tuple[torch.Tensor, str]:
    """The logits of `run`, and a line about their distance from the student's. Raises WeightsError where they are too far."""
    with torch.no_grad():
        expected = student(images)
    logits = run(images)
    named = " x ".join(map(str, images.shape))
    if logits.shape != expected.shape:
        raise WeightsError(f"export: {named} gives {tuple(logits.shape)}, not {tuple(expected.shape)}; nothing is written")
    difference, largest = float((logits - expected).abs().max()), float(expected.abs().max())
    same = float((logits.argmax(1) == expected.argmax(1)).double().mean())
    said = f"{named}: logits up to {largest:.3g}, largest difference {difference:.2g}, {100 * same:.3f} % the same class"
    if not difference <= tolerance * largest:
        raise WeightsError(f"export: {said}; more than {tolerance:g} of the largest logit, so nothing is written")
    return logits, said


def check_agreement(run: Run, other: Run, calibration: Calibration) -> None:
    """Prints the share of the first photos' pixels that have the same class in both; raises WeightsError below AGREEMENT."""
    same = pixels = 0
    few = replace(calibration, paths=calibration.paths[:_AGREEMENT_IMAGES], long_side=None)
    for images in few:
        equal = run(images).argmax(1) == other(images).argmax(1)
        same += int(equal.sum())
        pixels += equal.numel()
    said = f"int8: {100 * same / pixels:.2f} % of the pixels of {counted(len(few), 'image')} keep their class"
    if same / pixels < AGREEMENT:
        raise WeightsError(f"{said}, fewer than {100 * AGREEMENT:g} %; calibrate on more images, or do without --int8")
    console.print(said)


def show_cost(project: Project, student: Student, run: Run, other: Run, size: Size | None) -> None:
    """Prints the mIoU of both on the project's evaluation split, and what mends a large loss.

    Images are seen as a whole; with `size` they are scaled to it, and their logits are scaled back.
    """
    manifest = read_manifest(project.manifest, project.base)
    rows = evaluated_rows(project, manifest)
    totals = [np.zeros((len(manifest.classes),) * 2, np.int64) for _ in range(2)]
    with progress("int8", len(rows), "image") as advance:
        for done, row in enumerate(rows, 1):
            image, truth = manifest.whole_image(row), manifest.mask(row)
            images = to_batch(image if size is None else resize_image(image, *size))
            for total, one in zip(totals, (run, other), strict=True):
                mask = resize_logits(one(images)[0], (image.shape[0], image.shape[1])).argmax(0).numpy()
                total += confusion_matrix(truth, mask, len(manifest.classes))
            advance(done, "")
    before, after = (mean_iou(total) for total in totals)
    split, where = project.params.evaluation.split, counted(len(rows), "image")
    said = f"mIoU {per_cent(after, 2)} %, {signed(100 * (after - before), 2)} points from the {per_cent(before, 2)} % of float32"
    if not totals[0].sum():
        said = f"what it costs in mIoU is undefined: {why_undefined(split)}"
    seen = "as a whole" if size is None else f"scaled to {size[0]} x {size[1]}"
    console.print(f"int8: {said} (split {split}, {where}, {'each ' if len(rows) > 1 else ''}{seen})")
    if before - after > _LARGE_LOSS:
        mends = "`mgd-pipeline train-student --quantised` makes a student that loses less"
        if "int8_fine_tuning" in student.metadata:
            mends = "this student is fine-tuned for int8 already; calibrate on more images, or do without --int8"
        console.print(f"int8: that is more than {100 * _LARGE_LOSS:g} points; {mends}")


def show_latency(runs: dict[str, Run], size: Size) -> None:
    """Prints the time of one image of a size in each runtime, taken in turns, and its ratio to the first one's."""
    images = torch.rand(1, 3, *size)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(1 + 5):
        for name, run in runs.items():
            began = time.perf_counter()
            run(images)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first turn allocates
    first = next(iter(medians.values()))
    said = ", ".join(f"{name} {1000 * value:.0f} ms ({value / first:.2f})" for name, value in medians.items())
    console.print(f"one {size[0]} x {size[1]} image on this CPU, threads {torch.get_num_threads()}: {said}")


def _check(form: Format, output: Path, size: Size | None, int8: bool, images: Path | None, project: Project | None) -> None:
    """Raises ParamsError, and DataError for a name, before anything is loaded."""
    check_name(output)
    if int8 and form.quantise is None:
        able = [one.name for one in FORMATS.values() if one.quantise]
        raise ParamsError(f"--int8: is for --format {' or '.join(able)}, not {form.name}")
    if images is not None and not int8:
        raise ParamsError(f"--images {images}: are for --int8 alone")
    if images is not None and not images.is_dir():
        raise ParamsError(f"--images {images}: no such folder")
    if int8 and images is None and project is None:
        raise ParamsError("--int8: needs images to calibrate on; name a folder by --images, or a project by --config")
    if size is not None and not form.suffix:
        raise ParamsError(f"--size: is not for --format {form.name}, whose network takes any size")
    if not form.suffix and os.path.lexists(output):
        raise ParamsError(f"{output}: exists; remove it, or name another folder")
    if not form.folder and output.is_dir():
        raise ParamsError(f"{output}: is a folder; name a file")
    if form.folder and output.is_file():
        raise ParamsError(f"{output}: is a file, and --format {form.name} writes a folder; move it away, or name another")
    if form.folder and output.is_dir() and not (output / "Manifest.json").is_file():
        raise ParamsError(f"{output}: is a folder, and not one that this command made; name another")
    require_folder(output.parent)
    if form.folder:
        require_renewable(output)
    else:
        beside = form.files_beside(output)
        known = output.exists() or was_killed(output)  # a kill may have come between the files
        if others := [] if known else [file for file in beside if os.path.lexists(file)]:
            raise ParamsError(
                f"{others[0]}: exists without {output.name}, and --format {form.name} would replace it; name another file"
            )
        require_writable([], [output, *beside])


def require_renewable(folder: Path) -> None:
    """Raises OutputError where a folder cannot be made, or where the one that is there could not be removed."""
    there = [] if folder.is_symlink() else [folder, *folder.rglob("*")]
    require_writable([folder.parent, *(place for place in there if place.is_dir() and not place.is_symlink())])


def calibration_images(
    form: Format, student: Student, size: Size | None, folder: Path | None, project: Project | None
) -> Calibration:
    """At most 64 photos, evenly from all. Raises DataError."""
    if project is not None:
        manifest = read_manifest(project.manifest, project.base)
        if fault := compare_names("the student", student.classes, manifest.classes).fault:
            raise DataError(
                f"{project.base}: has other classes than the student ({fault}); name the student's own project by --config"
            )
        say_renamed("the student", student.classes, manifest.classes)
    if folder is not None:
        paths = [path for path in image_files(folder) if not is_predicted(path)]
        if not paths:
            raise DataError(f"{folder}: holds no images ({', '.join(SUFFIXES)})")
    else:
        paths = [manifest.image_file(row) for row in manifest.labelled]
    few = tuple(paths[:: -(-len(paths) // _CALIBRATION_IMAGES)])
    if folder is not None:  # prepare-data has read the project's own
        for path in few:
            read_photo(path, student.photo_rules, student.long_side)
    source = "the labelled images of the project" if folder is None else "images of a folder"
    note = f"calibrated on {counted(len(few), 'image')} ({source}) by {form.quantiser} {version(form.quantiser)}"
    return Calibration(few, student.photo_rules, student.long_side, size, note)
