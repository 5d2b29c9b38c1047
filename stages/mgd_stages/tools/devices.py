"""`mgd-pipeline benchmark-device`: every exported form of a student on this machine, in one table.

A form runs in processes of its own, one for each number of threads, so that its peak of memory is its own. In every round each
process runs one image, one after another, so that other work of the machine affects all forms alike.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mgd_pipeline.data.classes import compare_names
from mgd_pipeline.data.manifest import ImageRow, Manifest, read_manifest
from mgd_pipeline.durable import replace_together
from mgd_pipeline.errors import DataError, ParamsError, WeightsError
from mgd_pipeline.exports.deployed import EXAMPLE, Size
from mgd_pipeline.exports.formats import FORMATS, Format, format_of, require
from mgd_pipeline.metrics import confusion_matrix, mean_iou
from mgd_pipeline.students.student import Student, load_student
from mgd_pipeline.words import counted, defined, per_cent
from mgd_stages.run.held_out import evaluated_rows
from mgd_stages.run.machine import cores, require_writable
from mgd_stages.run.progress import answer, console, json_text, progress, say_renamed
from mgd_stages.run.project import Project
from mgd_stages.tools.device_processes import FAULTS, Arm, Form, running
from mgd_stages.tools.export import AGREEMENT, calibration_images, photos, staging, typical_size

RESULT = "devices"
"""Name of the table (.md) and of the numbers (.json)"""


def benchmark_device(
    student_path: Path,
    files: Sequence[Path],
    *,
    sizes: Sequence[Size] = (),
    rounds: int = 30,
    project: Project | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Prints the table, and writes `devices.md` and `devices.json` into `output`, by default into the project's results.

    Without `files` the student is exported to every format whose runtime is installed. mIoU is measured on the project's
    evaluation split. Without `sizes` images have the sizes of the files that take one size, or else that of most images of the
    project. Returns what the JSON holds. Raises ParamsError for a file that takes none of the `sizes`; and, when the table is
    written, WeightsError for a file that has no figures.
    """
    output = output or (project.results if project else None)
    if output is not None:
        require_writable(files=[output / f"{RESULT}{end}" for end in (".md", ".json")])
    formats = [format_of(file, None) for file in files]
    for file, form in zip(files, formats, strict=True):
        if not file.exists():
            raise ParamsError(f"{file}: no such file")
        require(form)
        if sizes and (own := own_sizes([file], [form])) and own[0] not in sizes:
            raise ParamsError(f"{file}: takes images of {_named(own[0])} only; name --size {_named(own[0])}, or leave --size out")
    student = load_student(student_path)
    measured_on = None if project is None else _measured_on(project, student)
    typical = typical_size(student, measured_on[1] if measured_on else [])
    asked: tuple[Size, ...] = tuple(dict.fromkeys(sizes or own_sizes(files, formats))) or (typical,)
    threads = sorted({1, cores()})
    with staging() as folder:
        forms = [Form("torch", None, student_path, asked, len(student.classes))]
        forms += [Form(file.name, form, file, asked, len(student.classes)) for file, form in zip(files, formats, strict=True)]
        forms += [] if files else exported(student, asked, folder, project if measured_on else None)
        with running(forms, threads) as arms:
            in_turns(arms, rounds)
            by_form = [[arm for arm in arms if arm.form is form] for form in forms]
            memory = [ours[-1].ask("memory")[0] for ours in by_form]
            if files:
                doubt_files([ours[-1] for ours in by_form[1:]], student)
            mious = {} if measured_on is None else measure([ours[-1] for ours in by_form], *measured_on)
            rows = [
                _row(size, ours, held, mious.get((form.path, None if ours[-1].whole else size)))
                for form, ours, held in zip(forms, by_form, memory, strict=True)
                for size in form.sizes
            ]
    content = {
        "student": student_path.name,
        "weights_sha256": student.weights_sha256,
        "machine": {"processor": processor(), "system": platform.platform(), "cores": cores()},
        "versions": _versions(forms),
        "threads": threads,
        "rounds": rounds,
        "split": project.params.evaluation.split if project and measured_on else None,
        "images": len(measured_on[1]) if measured_on else None,
        "rows": rows,
    }
    text = markdown(content)
    answer(text)
    for row in rows:
        for fault in dict.fromkeys(row["faults"]):
            console.print(f"{row['form']}, {_named(row['size'])}: {fault}")
    if output is not None:
        written = {".md": text, ".json": json_text(content)}
        replace_together({output / f"{RESULT}{end}": f"{content}\n".encode() for end, content in written.items()})
        console.print(f"{output / RESULT}.md, {RESULT}.json")
    if project is not None and output == project.results:
        # DVC knows no file that may be missing: for it the report depends on none of this.
        kept = ", and `dvc commit --force report` keeps it there" if (project.base / "dvc.lock").exists() else ""
        console.print(f"`mgd-pipeline report` puts the table into the report{kept}")
    if lost := [file.name for file in files if not any(row["times"] for row in rows if row["form"] == file.name)]:
        raise WeightsError(f"{', '.join(lost)}: without figures, for the reasons above; export again, or leave out")
    return content


def own_sizes(files: Sequence[Path], formats: Sequence[Format]) -> list[Size]:
    """Of the files that take images of one size, that size; a file that cannot be read has none."""
    found: list[Size] = []
    for file, form in zip(files, formats, strict=True):
        with suppress(*FAULTS):
            if size := form.read_notes(file).get("size"):
                found.append((size[0], size[1]))
    return found


def exported(student: Student, sizes: Sequence[Size], folder: Path, project: Project | None = None) -> list[Form]:
    """The student in every format whose runtime is installed, below `folder`; a file for each size where a file takes one size.

    In a project also in int8, calibrated on its labelled images.
    """
    forms = []
    for one in FORMATS.values():
        if not one.suffix:  # a folder for another program, not a runtime
            continue
        try:
            require(one)
        except ParamsError as error:
            console.print(f"{one.name} is left out: {error}")
            continue
        for some in [(size,) for size in sizes] if one.fixed else [tuple(sizes)]:
            path = folder / one.name / _named(some[0] if one.fixed else None) / f"student{one.suffix}"
            path.parent.mkdir(parents=True)
            console.print(f"exporting to {one.name}{f' for images of {_named(some[0])}' if one.fixed else ''}")
            try:
                if one.fixed and max(some[0]) > (student.long_side or max(some[0])):
                    raise WeightsError(f"the student sees at most {student.long_side} pixels along the longer side")
                one.write(student, path, some[0] if one.fixed else None)
            except WeightsError as error:
                console.print(f"{one.name} is left out: {error}")
                continue
            forms.append(Form(one.name, one, path, some, len(student.classes)))
            if project is not None and one.quantise is not None:
                forms += _quantised(forms[-1], student, project)
    return forms


def _quantised(form: Form, student: Student, project: Project) -> list[Form]:
    """The same form in int8; none, with a line that says why, where that cannot be made."""
    one, name = form.format, f"{form.name} int8"
    assert one is not None and one.quantise is not None
    path, size = form.path.parent / "int8" / form.path.name, form.sizes[0] if one.fixed else None
    path.parent.mkdir()
    console.print(f"quantising for {form.name}")
    try:
        require(one, int8=True)
        one.quantise(student, form.path, path, size, calibration_images(one, student, size, None, project))
    except (ParamsError, WeightsError) as error:
        console.print(f"{name} is left out: {error}")
        return []
    return [Form(name, one, path, form.sizes, form.classes)]


def in_turns(arms: Sequence[Arm], rounds: int) -> None:
    """Notes the seconds of each arm for each size. The first round, in which everything gets warm, does not count."""
    for arm in arms:
        if arm.form.format is None or not arm.form.format.fixed:
            # A file may be for images of one size.
            arm.whole = all(arm.ask("time", size)[1] is None for size in ((EXAMPLE[2], EXAMPLE[3]), (EXAMPLE[3], EXAMPLE[2])))
        for size in arm.form.sizes:
            if (fault := arm.ask("time", size)[1]) is None:
                arm.seconds[size] = []
            else:
                arm.faults[size] = fault
    with progress("benchmark-device", rounds, "round") as advance:
        for done in range(1, rounds + 1):
            for arm in arms:
                for size, seconds in arm.seconds.items():
                    taken, fault = arm.ask("time", size)
                    if fault is None:
                        seconds.append(taken)
                    else:
                        arm.faults[size] = fault
            advance(done, "")


def doubt_files(arms: Sequence[Arm], student: Student) -> None:
    """Notes as a fault that a file says that it is of another student, or has other masks of a picture than the student."""
    own = student.weights_sha256
    for arm in arms:
        notes = arm.ask("notes")[0] if arm.seconds else None
        named = (notes or {}).get("weights_sha256", own)
        for size in arm.seconds:
            if named != own:
                arm.faults[size] = f"was exported from another student (SHA-256 of its weights: {named[:12]}..., not {own[:12]}...)"
                continue
            picture = next(photos(student.long_side, size))
            mask, fault = arm.ask("mask", picture, None)
            if fault is None and (same := float((mask == student.predict(picture)).mean())) < AGREEMENT:
                arm.faults[size] = f"{100 * same:.0f} % of a test picture have the student's class; is it another student's file?"


def _measured_on(project: Project, student: Student) -> tuple[Manifest, list[ImageRow]] | None:
    """What mIoU is measured on; None, with a line that says why, where the project has no such images. Raises DataError for a
    student of other classes."""
    try:
        manifest = read_manifest(project.manifest, project.base)
        rows = evaluated_rows(project, manifest)
    except DataError as error:
        console.print(f"mIoU is left out: {error}")
        return None
    if fault := compare_names("the student", student.classes, manifest.classes).fault:
        raise DataError(f"{project.base}: has other classes than the student ({fault}); name the student's own project by --config")
    say_renamed("the student", student.classes, manifest.classes)
    return manifest, rows


def measure(arms: Sequence[Arm], manifest: Manifest, rows: Sequence[ImageRow]) -> dict[tuple[Path, Size | None], float]:
    """mIoU by file, and by size where a file is for images of one size. An image is seen as a whole: at its own size, or scaled to
    the file's. A file that fails on an image has none."""
    totals = {(arm.form.path, size): np.zeros((len(manifest.classes),) * 2, np.int64) for arm in arms for size in _views(arm)}
    with progress("mIoU", len(rows), "image") as advance:
        for done, row in enumerate(rows, 1):
            image, truth = manifest.whole_image(row), manifest.mask(row)
            for arm in arms:
                for size in _views(arm):
                    mask, fault = arm.ask("mask", image, size) if (arm.form.path, size) in totals else (None, None)
                    if mask is not None:
                        totals[arm.form.path, size] += confusion_matrix(truth, mask, len(manifest.classes))
                    elif totals.pop((arm.form.path, size), None) is not None:
                        arm.faults[size or arm.form.sizes[0]] = f"{row.image_id}: {fault}"
            advance(done, "")
    return {key: mean_iou(total) for key, total in totals.items()}


def _views(arm: Arm) -> list[Size | None]:
    """The sizes at which images are seen; None is their own."""
    return [None] if arm.whole else list(arm.seconds)


def _row(size: Size, arms: Sequence[Arm], memory: int | None, miou: float | None) -> dict[str, Any]:
    """A line of the table: a form at a size; `arms` are its processes, by threads."""
    form, times = arms[0].form, {}
    for arm in arms:
        if seconds := arm.seconds.get(size):
            median, late = (round(1000 * float(np.percentile(seconds, share)), 3) for share in (50, 95))
            times[str(arm.threads)] = {"median_ms": median, "p95_ms": late}
    return {
        "form": form.name,
        "file": form.path.name,
        "bytes": form.bytes,
        "size": list(size),
        "times": times,
        "memory_mb": None if memory is None else round(memory / 1e6, 1),
        "miou": defined(miou),
        "seen": "whole" if arms[-1].whole else "scaled",
        "faults": list(dict.fromkeys(arm.faults[size] for arm in arms if size in arm.faults)),
    }


def markdown(content: dict[str, Any]) -> str:
    """The table, with what its columns are."""
    threads = [str(count) for count in content["threads"]]
    titles = ["form", "file, MB", "image", *(f"{counted(int(count), 'thread')}, ms" for count in threads), "memory, MB"]
    lines = [titles + (["mIoU, %"] if content["split"] else [])]
    for row in content["rows"]:
        times = [row["times"].get(count) for count in threads]
        cells = [row["form"], f"{row['bytes'] / 1e6:.2f}", _named(row["size"])]
        cells += ["-" if time is None else f"{time['median_ms']:.1f} ({time['p95_ms']:.1f})" for time in times]
        cells += ["-" if row["memory_mb"] is None else f"{row['memory_mb']:.0f}"]
        if content["split"]:
            cells += [per_cent(row["miou"], 2) + (" *" if row["seen"] == "scaled" and row["miou"] is not None else "")]
        lines.append([cell.replace("|", "/") for cell in cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]  # the table is read in terminals, too
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    justified = [
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))] for line in lines
    ]
    machine, notes = content["machine"], []
    rounds = counted(content["rounds"], "round")
    notes.append(f"One image on {machine['processor']}, median (95th percentile) of {rounds} in turns.")
    notes.append("Memory is what loading and running add to a process that has imported torch.")
    if content["split"]:
        notes.append(f"mIoU on {counted(content['images'], 'image')} of {content['split']}, each seen as a whole.")
        if any(row["seen"] == "scaled" and row["miou"] is not None for row in content["rows"]):
            notes.append("Files with * see it scaled to the only size that they take.")
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in justified), "", *notes])


def _named(size: Sequence[int] | None) -> str:
    """As --size takes it, height first."""
    return "any" if size is None else f"{size[0]}x{size[1]}"


def processor() -> str:
    """Its name, or its family where the system does not say it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() in ("model name", "Model"))
    return next(names, platform.processor() or platform.machine())


def _versions(forms: Sequence[Form]) -> dict[str, str]:
    """Of Python, torch and the packages of the runtimes."""
    packages = packages_distributions()
    modules = {module.partition(".")[0] for form in forms if form.format for module in form.format.modules}
    names = {name for module in modules for name in packages.get(module, [])}
    return {"python": platform.python_version(), "torch": torch.__version__, **{name: version(name) for name in sorted(names)}}
