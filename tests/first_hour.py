"""The first hour of a person with photos and labels, on six folders: `python tests/first_hour.py OUTPUT [FOLDER ...]`.

The same photos and labels lie in six folders, as CVAT, COCO, LabelMe, YOLO, masks of colours and a phone have them. Each
folder goes through `mgd-pipeline init --quick`, `mgd-pipeline run` and Chromium, as one types it. Then its masks must be the ones
that were drawn, and its photos must be upright. OUTPUT gets a project, what the commands print and a picture of the report for each
folder, and the times of all in times.md and times.json.

Photos are the built-in renderer's, or those of --photos, a folder of images/, masks/ of class ids and classes.txt; CamVid's
folder needs no classes.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from PIL.ImageColor import getrgb

import annotated
from annotated import Colour, Photo, shapes_of
from mgd_pipeline.data import shapes
from mgd_pipeline.data.images import IGNORE, read_photo
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.data.voc import voc_palette

_COLOURS = "steelblue dimgray gainsboro purple violet olivedrab gold rosybrown navy crimson darkorange"
_CLASSES = "sky building pole road pavement tree sign fence car pedestrian bicyclist"
STREETS: Mapping[str, Any] = dict(zip(_CLASSES.split(), map(getrgb, _COLOURS.split()), strict=True))
"""CamVid's classes in the order of their ids."""
PHOTOS, LABELLED = 40, 30
BROWSER = os.environ.get("CHROMIUM", "chromium")
_TURNS = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270, 3: Image.Transpose.ROTATE_180}
"""How a phone stores an upright photo, by the EXIF note of how to turn it back."""


@dataclass(frozen=True)
class Photos:
    """Photos with their labels, before they lie anywhere."""

    made: Sequence[Photo]
    """Without a folder."""
    pixels: Sequence[np.ndarray]
    """(H, W, 3) uint8 of each photo, upright."""
    labels: Mapping[str, Colour]
    """Without background, which is every pixel without a label."""

    @property
    def names(self) -> list[str]:
        return ["background", *self.labels]


def photos_of(samples: Sequence[tuple[np.ndarray, np.ndarray]], classes: Mapping[str, Colour], labelled: int) -> Photos:
    """`samples` are pixels and masks of ids in `classes`. The first ones are labelled as a person does: specks are left out."""
    made, names = [], [*classes, *["background"] * (256 - len(classes))]
    for number, (pixels, mask) in enumerate(samples):
        drawn = [shape for shape in shapes_of(mask, names) if shape.name != "background" and shape.inside.sum() >= mask.size / 2000]
        made.append(Photo(f"IMG_{number:04}", pixels.shape[:2], tuple(drawn) if number < labelled else (), ".jpg"))
    labels = {name: colour for name, colour in classes.items() if name != "background"}
    return Photos(made, [pixels for pixels, _ in samples], labels)


def rendered(count: int, labelled: int, size: tuple[int, int]) -> Photos:
    samples = [shapes.render_scene(0, "train", number, *size) for number in range(count)]
    return photos_of(samples, dict(zip(shapes.CLASSES, shapes.PALETTE, strict=True)), labelled)


def photographed(folder: Path, count: int, labelled: int) -> Photos:
    """Photos of a folder, evenly spread over it, in another order: the unlabelled ones shall not be of one street."""
    masks = {path.relative_to(folder / "masks").with_suffix(""): path for path in sorted((folder / "masks").rglob("*.png"))}
    images = {path.relative_to(folder / "images").with_suffix(""): path for path in (folder / "images").rglob("*.*")}
    places = [place for place in masks if place in images]
    chosen = np.random.default_rng(0).permutation(np.unique(np.linspace(0, len(places) - 1, count).astype(int)))
    pairs = [(images[places[one]], masks[places[one]]) for one in chosen]
    samples = [(read_photo(image)[0], np.asarray(Image.open(mask))) for image, mask in pairs]
    if not (folder / "classes.txt").exists():
        return photos_of(samples, STREETS, labelled)
    names = (folder / "classes.txt").read_text(encoding="utf-8").splitlines()
    return photos_of(samples, dict(zip(names, voc_palette(256)[1:], strict=False)), labelled)


FOLDERS: Mapping[str, tuple[str, Callable[[Path, Sequence[Photo], Mapping[str, Colour]], None]]] = {
    "cvat": ("images/", lambda root, made, labels: annotated.cvat(root, made, labels=labels)),
    "coco": ("images/", lambda root, made, labels: annotated.coco(root, made, rle="counts", labels=labels)),
    "labelme": ("", lambda root, made, labels: annotated.labelme(root, made)),
    "yolo": ("images/", annotated.yolo),
    "colour_masks": ("JPEGImages/", annotated.colour_masks),
    "phone": ("images/", annotated.masks_of_ids),
}
"""The folder of the photos, and who writes the labels."""


def export(name: str, photos: Photos, output: Path) -> Path:
    """Makes the folder of that name, as a ZIP archive for CVAT."""
    folder, write = FOLDERS[name]
    made = [replace(photo, name=folder + photo.name) for photo in photos.made]
    (output / name / folder).mkdir(parents=True)
    for number, (photo, pixels) in enumerate(zip(made, photos.pixels, strict=True)):
        exif, orientation = Image.Exif(), (1, *_TURNS)[number % 4] if name == "phone" else 1
        exif[ExifTags.Base.Orientation] = orientation
        picture = Image.fromarray(pixels)
        stored = picture.transpose(_TURNS[orientation]) if orientation in _TURNS else picture
        stored.save(output / name / photo.file, quality=95, exif=exif)
    write(output / name, [photo for photo in made if photo.shapes], photos.labels)
    return Path(shutil.make_archive(str(output / name), "zip", output / name)) if name == "cvat" else output / name


def play(name: str, photos: Photos, output: Path, call: Callable[..., str], then: Sequence[str] = ("run",)) -> dict[str, float]:
    """From the folder of a name to the report, or as far as the command `then` goes; the seconds of each step. `call` runs a
    command in a folder and returns what it printed."""
    given, project = export(name, photos, output), output / f"{name}-project"
    began = time.monotonic()
    options = ["--root", given.name, "--quick", "--output", project.name]
    said = call(output, "mgd-pipeline", "init", *options)
    took = Counter({"init": time.monotonic() - began})
    said += call(project, "mgd-pipeline", *then)
    for stage, minutes, seconds in re.findall(
        r"^((?:train-student )?[\w-]+)(?: \w+)?: took (?:(\d+) min )?(\d+) s$", said, re.MULTILINE
    ):
        took[stage] += 60 * int(minutes or 0) + int(seconds)
    (output / f"{name}.txt").write_text(said, encoding="utf-8")
    check(project, photos)
    results = [project / "data" / name for name in ("results/labels.png", "results/report.html", "students/best.safetensors")]
    assert then[0] != "run" or all(path.is_file() for path in results), results
    return {**took, "together": time.monotonic() - began}


def check(project: Path, photos: Photos) -> None:
    """Raises AssertionError unless the project has these photos, upright, with these masks."""
    manifest = read_manifest(project / "data/manifest", project)
    rows = {Path(row.image_path).name: row for row in manifest.rows.values()}
    assert sorted(rows) == sorted(photo.file.name for photo in photos.made)
    ids = np.full(256, IGNORE)
    ids[: len(manifest.classes)] = [photos.names.index(name) for name in manifest.classes]
    for photo, pixels in zip(photos.made, photos.pixels, strict=True):
        shown = manifest.whole_image(row := rows[photo.file.name])
        assert shown.shape == pixels.shape and np.abs(shown.astype(int) - pixels).mean() < 10, f"{row.image_path} is turned"
        if photo.shapes:
            assert np.array_equal(ids[manifest.mask(row)], photo.mask(photos.names)), f"another mask of {row.image_path}"
        else:
            assert row.mask_path is None, row.image_path


def look_at(page: Path, picture: Path, height: int = 730) -> None:
    """Has Chromium draw the top of a page. CHROMIUM names another program."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size=1000,{height}"]
    with tempfile.TemporaryDirectory() as profile:
        files = [f"--user-data-dir={profile}", f"--screenshot={picture}", page.resolve().as_uri()]
        subprocess.run([BROWSER, *options, *files], check=True, stderr=subprocess.DEVNULL)
    assert len(Image.open(picture).convert("RGB").getcolors(1 << 24) or ()) > 50, f"{picture}: an empty page"


def table(times: Mapping[str, Mapping[str, float]]) -> str:
    steps = list(dict.fromkeys(step for took in times.values() for step in took))
    lines = [["seconds", *steps], ["---"] * (len(steps) + 1)]
    lines += [[name, *(f"{took[step]:.0f}" for step in steps)] for name, took in times.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def typed(folder: Path, *command: str) -> str:
    """A command in a process of its own."""
    paths = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    done = subprocess.run(command, cwd=folder, env=os.environ | paths, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"$ {' '.join(command)}\n{done.stdout}", flush=True)
    done.check_returncode()
    return done.stdout


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("output", type=Path, help="an empty folder")
    options.add_argument("folders", nargs="*", metavar="FOLDER", help=f"of {', '.join(FOLDERS)}; if left out, all")
    options.add_argument("--photos", type=Path)
    given = options.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    photos = rendered(PHOTOS, LABELLED, (180, 240)) if given.photos is None else photographed(given.photos, PHOTOS, LABELLED)
    times = {}
    for name in given.folders or FOLDERS:
        times[name] = play(name, photos, given.output, typed)
        if shutil.which(BROWSER):
            look_at(given.output / f"{name}-project/data/results/report.html", given.output / f"{name}.png")
    (given.output / "times.json").write_text(json.dumps(times, indent=2), encoding="utf-8")
    (given.output / "times.md").write_text(table(times), encoding="utf-8")
    print(table(times))


if __name__ == "__main__":
    main()
