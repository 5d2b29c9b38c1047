"""The two pictures of README.md, from a finished project: `make run`, then `python docs/make_pictures.py .`.

overview.png shows the test image whose scores lie nearest to the averages of all networks, so that it flatters none of them.
report.png is the top of the report, as headless Chromium draws it (CHROMIUM names another program than `chromium`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.pictures.overlays import blend
from mgd_stages.run.pictures import Predicted, read_masks
from mgd_stages.run.project import Project, open_project

FOLDER = Path(__file__).parent / "images"
BYTES = 200_000
"""README.md is read on phones, too."""


def overview(project: Project, output: Path) -> None:
    """One row: image, truth, labels alone, distilled, the better teacher; masks in the colours of their classes, over the image."""
    manifest = read_manifest(project.manifest, project.base)
    networks: dict[str, dict[str, Predicted]] = {}
    for path in (project.results / "evaluation/masks.parquet", *project.results.glob("teachers/*-masks.parquet")):
        for predicted in read_masks(path):
            networks.setdefault(predicted.network, {})[predicted.image_id] = predicted
    mean = {name: np.nanmean([predicted.score for predicted in images.values()]) for name, images in networks.items()}
    teacher = max((name for name in networks if name in project.params.teachers), key=mean.__getitem__)
    shown = {"labels alone": "supervised", "distilled": "distilled", f"teacher {teacher}": teacher}
    rows = [row for row in manifest.split(project.params.evaluation.split) if row.image_id in networks["distilled"]]
    away = [np.max([abs(networks[name][row.image_id].score - mean[name]) for name in shown.values()]) for row in rows]
    row = rows[int(np.nanargmin(away))]
    image = manifest.image(row)
    masks = {"truth": manifest.mask(row), **{label: networks[name][row.image_id].mask for label, name in shown.items()}}
    panels = {"image": image, **{label: blend(image, mask, manifest.palette) for label, mask in masks.items()}}
    figure = Figure(figsize=(10, 2), layout="constrained")
    for axis, (label, pixels) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axis.imshow(pixels, interpolation="nearest")
        axis.set_title(label, fontsize=15)
        axis.set_axis_off()
    figure.savefig(output, dpi=150, facecolor="white", bbox_inches="tight", pad_inches=0.05)


def top_of_report(report: Path, output: Path) -> None:
    browser = os.environ.get("CHROMIUM", "chromium")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,730"]
    with tempfile.TemporaryDirectory() as profile:
        call = [browser, *options, f"--user-data-dir={profile}", f"--screenshot={output}", report.resolve().as_uri()]
        subprocess.run(call, check=True, stderr=subprocess.DEVNULL)


def main() -> None:
    project = open_project(Path(sys.argv[1]) / "params.yaml")
    FOLDER.mkdir(exist_ok=True)
    overview(project, FOLDER / "overview.png")
    top_of_report(project.results / "report.html", FOLDER / "report.png")
    for picture in (FOLDER / "overview.png", FOLDER / "report.png"):
        Image.open(picture).convert("RGB").quantize(128).save(picture, optimize=True)
        size = picture.stat().st_size
        print(f"{picture}: {size // 1000} KB")
        if size > BYTES:
            sys.exit(f"{picture}: {size} bytes, more than {BYTES}")


if __name__ == "__main__":
    main()
