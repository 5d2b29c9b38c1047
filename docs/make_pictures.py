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

from mgd_pipeline.data.images import read_image
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
    by_network: dict[str, dict[str, Predicted]] = {}
    for path in (project.results / "evaluation/masks.parquet", *project.results.glob("teachers/*-masks.parquet")):
        for predicted in read_masks(path):
            by_network.setdefault(predicted.network, {})[predicted.image_id] = predicted
    scores = {name: np.array([one.score for one in images.values()]) for name, images in by_network.items()}
    teacher = max((name for name in scores if name in project.params.teachers), key=lambda name: np.nanmean(scores[name]))
    shown = {"labels alone": "supervised", "distilled": "distilled", f"teacher {teacher}": teacher}
    rows = [row for row in manifest.split(project.params.evaluation.split) if row.image_id in by_network["distilled"]]
    means = np.array([np.nanmean(scores[name]) for name in shown.values()])
    each = np.array([[by_network[name][row.image_id].score for name in shown.values()] for row in rows])
    row = rows[int(np.nanargmin(np.abs(each - means).max(axis=1)))]
    image = read_image(project.base / manifest.root / row.image_path, manifest.long_side)
    panels = {"image": image, "truth": blend(image, manifest.mask(row), manifest.palette)}
    panels |= {label: blend(image, by_network[name][row.image_id].mask, manifest.palette) for label, name in shown.items()}
    figure = Figure(figsize=(10, 2), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (label, pixels) in zip(axes, panels.items(), strict=True):
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
