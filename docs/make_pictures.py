"""The pictures of README.md and of the guide.

README.md's are made from a finished project: `make run`, then `python docs/make_pictures.py .`. overview.png shows the test image
whose scores lie nearest to the averages of all networks, so that it flatters none of them; report.png is the top of the report.

The guide's are made from what its first hour leaves: `python tests/first_hour.py HOUR`, then `python docs/make_pictures.py HOUR`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.pictures.overlays import blend
from mgd_stages.run.pictures import Predicted, read_masks
from mgd_stages.run.project import Project, open_project

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from first_hour import look_at

FOLDER = Path(__file__).parent / "images"
BYTES = 200_000
"""Pages are read on phones, too."""


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


def small(picture: Path) -> None:
    """Makes a picture small. Exits where it stays larger than `BYTES`."""
    pixels = Image.open(picture).convert("RGB")
    pixels.save(picture, quality=75) if picture.suffix == ".jpg" else pixels.quantize(128).save(picture, optimize=True)
    size = picture.stat().st_size
    print(f"{picture}: {size // 1000} KB")
    if size > BYTES:
        sys.exit(f"{picture}: {size} bytes, more than {BYTES}")


def main() -> None:
    folder = Path(sys.argv[1])
    if (folder / "params.yaml").is_file():
        project = open_project(folder / "params.yaml")
        made = [FOLDER / "overview.png", FOLDER / "report.png"]
        overview(project, made[0])
        look_at(project.results / "report.html", made[1])
    else:
        results = folder / "cvat-project/data/results"
        made = [FOLDER / "labels.jpg", FOLDER / "first-report.png"]
        Image.open(results / "labels.png").convert("RGB").save(made[0], quality=95)
        look_at(results / "report.html", made[1], 900)
    for picture in made:
        small(picture)


if __name__ == "__main__":
    main()
