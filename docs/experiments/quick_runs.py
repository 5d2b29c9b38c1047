"""Is the distilled student of a quick run as good as its twin? Ten small folders of photos, cut from a larger data set.

python docs/experiments/quick_runs.py CAMVID OUTPUT
python docs/experiments/quick_runs.py CAMVID OUTPUT --folders 3 8 --set losses.prior_adjustment=0

CAMVID has images/ and masks/, each with train/ and val/. Folders have 20 to 60 images of train, 10 to 40 of them with masks; every
third folder is one stretch of the film. Each goes through `mgd-pipeline init --quick` and `mgd-pipeline run`. Both students are
then measured on 60 images of train that the folder does not have, and on every second image of val. mIoU in %, at the size of the
masks.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mgd_pipeline.data.images import read_raw_mask
from mgd_pipeline.metrics import confusion_matrix, mean_iou
from mgd_pipeline.students.student import load_student
from mgd_stages.run.project import open_project

FOLDERS = [(20, 10), (24, 20), (30, 15), (30, 30), (36, 12), (40, 20), (45, 40), (50, 25), (60, 20), (60, 40)]
"""Images and masks of each"""
CLASSES = "sky,building,pole,road,pavement,tree,sign,fence,car,pedestrian,bicyclist"
COLUMNS = [f"{where}, {who}" for where in ("same streets", "another street") for who in ("labels alone", "distilled")]


def draw(number: int, names: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Images and masks of a folder, and the images on which its students are measured."""
    drawn, (count, labelled) = random.Random(100 + number), FOLDERS[number]
    if number % 3 == 2:
        start = drawn.randrange(len(names) - 3 * count)
        images = list(names[start : start + 3 * count : 3])
    else:
        images = drawn.sample(names, count)
    masks = drawn.sample(images, labelled)
    return images, masks, drawn.sample([name for name in names if name not in images], 60)


def play(number: int, camvid: Path, output: Path, settings: Sequence[str]) -> list[float]:
    """mIoU in % of both students, on both kinds of images; begins where it was interrupted."""
    names = sorted(path.stem for path in (camvid / "images/train").iterdir())
    images, masks, held_out = draw(number, names)
    photos, base = output / f"photos{number}", output / f"project{number}"
    for kind, chosen, suffix in (("images", images, "jpg"), ("masks", masks, "png")):
        (photos / kind).mkdir(parents=True, exist_ok=True)
        for name in chosen:
            shutil.copy(camvid / kind / f"train/{name}.{suffix}", photos / kind)
    if not (base / "params.yaml").exists():
        options = ["--root", photos, "--output", base, "--quick", "--classes", CLASSES, "--retrain-teachers", "new-labels"]
        subprocess.run(["mgd-pipeline", "init", *options], check=True)
    config = ["--config", base / "params.yaml", *(part for setting in settings for part in ("--set", setting))]
    subprocess.run(["mgd-pipeline", "run", *config], check=True)
    others = sorted(path.stem for path in (camvid / "images/val").iterdir())[::2]
    measured = [(camvid, "train", held_out), (camvid, "val", others)]
    project = open_project(base / "params.yaml")
    return [miou(project.student(who), *where) for where in measured for who in ("supervised", "distilled")]


def miou(student: Path, camvid: Path, split: str, names: Iterable[str]) -> float:
    network, classes = load_student(student), len(CLASSES.split(","))
    total = np.zeros((classes, classes), np.int64)
    for name in names:
        prediction = network.predict(camvid / f"images/{split}/{name}.jpg")
        total += confusion_matrix(read_raw_mask(camvid / f"masks/{split}/{name}.png"), prediction, classes)
    return 100 * mean_iou(total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("camvid", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--folders", type=int, nargs="+", default=range(len(FOLDERS)), help="numbers of folders, from 0")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="of params.yaml")
    given = parser.parse_args()
    rows = {number: play(number, given.camvid.resolve(), given.output.resolve(), given.settings) for number in given.folders}
    rows["mean"] = list(np.mean([*rows.values()], axis=0))
    print("| folder | " + " | ".join(COLUMNS) + " |" + "\n" + "|---" * (len(COLUMNS) + 1) + "|")
    for number, values in rows.items():
        print(f"| {number} | " + " | ".join(f"{value:.1f}" for value in values) + " |")


if __name__ == "__main__":
    main()
