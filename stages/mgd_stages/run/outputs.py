"""Where a training writes, checked before its first step."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from mgd_pipeline.data.manifest import Manifest
from mgd_pipeline.errors import DataError
from mgd_stages.run.machine import require_writable
from mgd_stages.run.progress import console
from mgd_stages.run.project import Project


def check_outputs(project: Project, run: str, weights: Path) -> None:
    """Raises OutputError if a training could not write its weights, its numbers or its checkpoints."""
    results = project.results / run
    require_writable([results, results / "plots", project.work(run)], [weights, results / "speed.json", results / "metrics.json"])


def image_cache(project: Project, manifest: Manifest, *, unlabelled: bool) -> Path:
    """The folder of this machine's decoded images. Says how large it becomes; raises DataError if the disk is too small."""
    folder = project.work("images")
    require_writable([folder])
    folder.mkdir(parents=True, exist_ok=True)
    rows = [*((row, 4) for row in manifest.labelled), *((row, 3) for row in manifest.unlabelled if unlabelled)]
    needed = sum(math.prod(manifest.size(row)) * channels for row, channels in rows)
    kept = sum(path.stat().st_size for path in folder.glob("*/*"))
    free = shutil.disk_usage(folder).free
    console.print(
        f"decoded images: at most {needed / 1e6:,.0f} MB in {folder} ({kept / 1e6:,.0f} MB there, {free / 1e9:,.1f} GB free)"
    )
    if needed > free + kept:
        raise DataError(
            f"{folder}: decoded images need {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "make room, or train without --cache-images"
        )
    return folder
