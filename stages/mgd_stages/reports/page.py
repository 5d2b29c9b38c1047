"""`mgd-pipeline report`: one HTML page about what the stages wrote. Nothing is computed again, and the page fetches nothing."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from mgd_pipeline.data.manifest import Manifest, read_manifest
from mgd_pipeline.durable import replace_file
from mgd_pipeline.errors import DataError
from mgd_pipeline.networks.weights import read_metadata, read_state_dict, sha256_of_state
from mgd_pipeline.params import STUDENTS
from mgd_pipeline.words import counted, listed
from mgd_stages.projects.init import stage_commands
from mgd_stages.projects.presets import render_params
from mgd_stages.reports import figures, origins, sections
from mgd_stages.run.class_tables import read_confusion, read_numbers
from mgd_stages.run.machine import require_writable
from mgd_stages.run.progress import console
from mgd_stages.run.project import Project
from mgd_stages.run.verdicts import findings, unmeasured, verdicts, why_undefined


def report(project: Project, output: Path | None = None) -> Path:
    """Writes the page, by default data/results/report.html; same results, same bytes. Raises DataError where there are none."""
    page = output or project.results / "report.html"
    require_writable(files=[page])
    command = "mgd-pipeline report" + (f" --output {shlex.quote(str(output))}" if output else "")
    content = collect(project)
    content |= {"browser": browser_page(project, page, content["best_sha256"])}
    replace_file(page, render(content, command).encode())
    console.print(f"report: {page}")
    return page


def browser_page(project: Project, page: Path, student: str | None) -> dict[str, Any] | None:
    """Where the page for browsers is, seen from the report, and whether it shows the student of this `weights_sha256`; None if
    there is none."""
    folder = project.base / "demo"
    if student is None or not folder.is_dir():
        return None
    from mgd_pipeline.exports import web  # it imports all networks

    if not (folder / web.OFFLINE).is_file():
        return None
    return {"link": quote(os.path.relpath(folder / "index.html", page.parent)), "own": web.student_of(folder) == student}


def render(content: dict[str, Any], command: str) -> str:
    environment = Environment(
        loader=PackageLoader("mgd_stages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "points": points, "number": number, "sentence": sentence, "whole": whole}
    return environment.get_template("report.html").render(**content, command=command, figures=figures)


def collect(project: Project) -> dict[str, Any]:
    """All sections of the page, by the names that the template has for them. Raises DataError where no stage has left a result."""
    params, evaluation = project.params, read_numbers(project.results / "evaluation/metrics.json") or {}
    students = {name: read_metadata(project.student(name)) for name in STUDENTS if project.student(name).exists()}
    try:
        manifest: Manifest | str = read_manifest(project.manifest, project.base)
    except DataError as error:
        manifest = f"The data set cannot be read: {sections.plain(project, error)}."
    classes = () if isinstance(manifest, str) else manifest.classes
    networks, curves = sections.measured_networks(project, evaluation, students, classes), sections.curves_of(project)
    if not networks and isinstance(curves, str):
        raise DataError(f"{project.results}: holds no results yet; run `dvc repro`, or the stages up to `mgd-pipeline evaluate`")
    caches = {name: origins.open_teacher_cache(project, name) for name in params.teachers}
    lacking = {stage: ids for stage, ids in origins.left_out(manifest, caches).items() if ids}
    confusion = read_confusion(project.results / "evaluation/confusion.csv", classes)
    evaluated = findings(project)
    now = dict(zip(evaluated.confusion[0], confusion[0], strict=True)) if evaluated.confusion and confusion else {}
    rare = [now.get(name, name) for name in evaluated.rare]
    best = sha256_of_state(read_state_dict(project.best_student)) if project.best_student.exists() else None
    return {
        "params": params,
        "name": project.name,
        "split": evaluated.split,
        "measured_on": origins.measured_on(manifest, evaluated.split, evaluated.images, caches),
        "verdicts": verdicts(evaluated),
        "unmeasured": unmeasured(project),
        "undefined": why_undefined(evaluated.split),
        "crop": "x".join(str(side) for side in params.views.crop),
        "headline": sections.headline(networks, evaluated.best),
        "networks": networks,
        "rare_mious": evaluated.rare_mious,
        "rare": rare,
        "origins": origins.origins(project, manifest, caches, students),
        "classes": sections.class_rows(networks, confusion),
        "confusion": sections.confusion_rows(confusion, networks),
        "curves": curves,
        "pictures": sections.pictures(project, manifest),
        "disagreement": sections.disagreement(project, manifest),
        "cost": sections.cost(project),
        "storage": origins.storage(project, caches),
        "devices": sections.devices(project, best),
        "best_sha256": best,
        "provenance": origins.provenance(project, manifest, caches, students),
        "commands": [f"mgd-pipeline {stage}{' --on-error skip' if stage in lacking else ''}" for stage in stage_commands(params)],
        "left_out": [f"{stage} left out {counted(len(ids), 'image')}: {listed(ids, 20)}" for stage, ids in lacking.items()],
        "parameters": render_params(params),
    }


def number(value: float | None, form: str = "{:.3f}", scale: float = 1.0) -> Markup:
    """`value * scale` as text, with the exact value for programs; a dash for None."""
    if value is None or value != value:
        return Markup("–")
    text = form.format(value * scale)
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")  # a number that rounds to zero has no sign
    return Markup('<data value="{}">{}</data>').format(value, text.replace("-", "−"))


def percent(share: float | None) -> Markup:
    return number(share, "{:.1f}", 100)


def points(difference: float | None) -> Markup:
    """A difference of shares with its sign, in percentage points."""
    return number(difference, "{:+.1f}", 100)


def whole(text: str) -> str:
    """A line that a stage prints as a sentence of a page."""
    return (text if text.startswith("mIoU") else text[:1].upper() + text[1:]) + "."


def sentence(text: str) -> Markup:
    """Text in which `backticks` mark what is typed."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))
