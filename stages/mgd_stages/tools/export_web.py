"""`mgd-pipeline export --format web`: a student as a folder with a web page, compared with the student before it gets its name."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from mgd_pipeline.data.listing import check_name
from mgd_pipeline.durable import copy_folder
from mgd_pipeline.errors import ParamsError, WeightsError, shell_command
from mgd_pipeline.exports import web
from mgd_pipeline.exports.formats import FORMATS, SAME_MASK, require
from mgd_pipeline.students.student import Student, load_student
from mgd_pipeline.words import size_text
from mgd_stages.run.progress import console
from mgd_stages.run.project import require_folder
from mgd_stages.tools.export import compare, converting_to, photos, require_renewable, staging


def export_web(student_path: Path, output: Path, runtime: Path | None) -> None:
    """Writes the folder `output`. `runtime`: onnxruntime-web's package, a folder or tarball; npm fetches it if None.

    Raises ParamsError where the package is missing, and WeightsError where the network gives other masks than `predict`.
    """
    check_name(output)
    if os.path.lexists(output):
        if not (output / web.OFFLINE).is_file():
            raise ParamsError(f"{output}: exists, and this command has not made it; name another folder")
        if strange := web.strange_files(output):
            raise ParamsError(
                f"{output}: is written anew as a whole, and this command has not made {strange[0]} in it; move it away"
            )
    require_folder(output.parent)
    require_renewable(output)
    form = FORMATS["onnx"]
    require(replace(form, name="web"))  # what it names if something is missing
    files = web.runtime_files(runtime, console.print)
    student = load_student(student_path)
    with staging() as folder:
        console.print("exporting for browsers")
        with converting_to(folder, student_path):
            form.write(student, folder / "student.onnx", None)
        compare(student, form.load(folder / "student.onnx"), form, None)
        model = web.web_model((folder / "student.onnx").read_bytes())
        compare_masks(student, web.run_web(model))
        web.write_web(student, model, files, folder / "page")
        size = sum(path.stat().st_size for path in (folder / "page").rglob("*") if path.is_file())
        copy_folder(folder / "page", output, replace=True)
    serve = shell_command("python", "-m", "http.server", "--directory", output)
    console.print(f"{output}: {size_text(size)}; `{serve}` shows it at http://localhost:8000")


def compare_masks(student: Student, mask_of: web.MaskOf) -> None:
    """Raises WeightsError where too many pixels of a photo have another class than in `predict`."""
    for image in photos(student.long_side):
        share = float((mask_of(image) == student.predict(image)).mean())
        if share < SAME_MASK:
            size = f"{image.shape[1]} x {image.shape[0]}"
            said = f"{100 * share:.3f} % of the pixels of a photo of {size} have the class that predict gives them"
            raise WeightsError(f"export: {said}, fewer than {100 * SAME_MASK:g} %, so nothing is written")
