"""`mgd-pipeline init`: a project for a data set, as files that a person reads and changes."""

from __future__ import annotations

import difflib
import os
import shlex
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from mgd_pipeline.data.datasets import index_dataset
from mgd_pipeline.data.folders import index_folder, scan_mask_values
from mgd_pipeline.data.images import IGNORE, ORIENTATIONS, read_header
from mgd_pipeline.data.index import SPLITS, Note, Sample, written_otherwise
from mgd_pipeline.data.listing import what_dvc_cannot_read
from mgd_pipeline.data.manifest import ImageRow
from mgd_pipeline.data.partition import partition_images
from mgd_pipeline.durable import replace_file
from mgd_pipeline.errors import DataError, ParamsError, shell_command
from mgd_pipeline.params import DATASETS, FolderData, Params
from mgd_pipeline.params_file import override_params, parse_params
from mgd_pipeline.words import listed
from mgd_stages.projects.dvc_yaml import write_dvc
from mgd_stages.projects.presets import preset, quick, read_preset, render_params
from mgd_stages.run.data_notes import few_labelled, grey_levels, missing_values, orientations, unused_pictures
from mgd_stages.run.machine import require_writable
from mgd_stages.run.project import Project

_IGNORED = [
    *(f"/data/{name}/" for name in ("raw", "manifest", "teachers", "targets", "students", "results")),
    "/.mgd/",
    "/dvc_plots/",
]
_LOOKED_AT = 200
"""Images whose headers are read."""
_LIKE_SPLITS = ("train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing")


def init_project(
    dataset: str | None,
    root: Path | None,
    partition: str | None,
    output: Path,
    *,
    small: bool = False,
    preset_name: str | None = None,
) -> list[str]:
    """Writes params.yaml, dvc.yaml with its template of plots, .gitignore and .dvcignore; links the data set below data/raw/.

    `small` is for a first try: see `presets.quick`. `preset_name` takes the parameters of `presets.read_preset`: all
    of them, or with a `dataset` all but the section data. Otherwise `dataset` and `partition` are "shapes" and "1/8" where None.

    Returns what a user should read, a line each: what was seen, and the commands that come next. Nothing that exists is
    overwritten, and nothing is written unless all can be: raises ParamsError instead.
    """
    if dataset is not None:
        check_dataset(dataset)
    if output.exists() and not output.is_dir():
        raise ParamsError(f"--output {output}: is a file; name a folder")
    for name in ("params.yaml", "dvc.yaml"):
        if (output / name).exists():
            raise ParamsError(f"{output / name}: exists already; remove it, or choose another folder with --output")
    head, named = ([], None) if preset_name is None else read_preset(preset_name)
    if named is not None and small:
        raise ParamsError(f"--quick --preset {preset_name}: choose one")
    whole = named if dataset is None else None  # the preset's own data set, or another one with the preset's settings
    dataset = whole.data.dataset if whole is not None else dataset or "shapes"
    if small and dataset == "shapes":
        raise ParamsError("--quick: the built-in data set is made for that; leave it out")
    link = Path("data/raw") / dataset if whole is None else Path(whole.data.root)
    _check_root(dataset, root, output / link)
    notes: list[str] = []
    if whole is None:
        data, notes = _look_at_folder(root) if dataset == "folder" and root is not None else ({}, [])
        params = preset(dataset, link.as_posix(), partition or "1/8", data)
        if named is not None:
            head = [f"# Another data set with the settings of `init --preset {preset_name}`."]
            params = parse_params({**named.model_dump(), "data": params.model_dump()["data"]})
    else:
        params = whole if partition is None else override_params(whole, [f"data.partition={partition}"])
    if root is not None:
        notes += _look_at_data_set(params, root)
        notes += [f"warning: {fault}" for fault in what_dvc_cannot_read(root)]
        if output.resolve().is_relative_to(root.resolve()):
            notes.append(
                f"warning: the project {output} lies inside the data set {root}, which everything that the project writes changes: "
                "`dvc repro` runs every stage again each time; choose an --output outside of the data set"
            )
    if small:
        params = quick(params)
        notes.append(
            "--quick: toy networks and few steps, to see the whole way; init again without it for networks that are worth it"
        )
    require_writable([output] if root is None else [output, (output / link).parent])
    output.mkdir(parents=True, exist_ok=True)
    if root is not None and not (output / link).exists():
        (output / link).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(root.resolve(), output / link)
    replace_file(output / "params.yaml", "\n".join([*head, *(["#"] if head else []), render_params(params)]).encode())
    write_dvc(Project(output.resolve(), params))
    for name, lines in ((".gitignore", _IGNORED), (".dvcignore", ["/.mgd/"])):
        _append_lines(output / name, lines)
    return [f"wrote params.yaml and dvc.yaml to {output.resolve()}", *notes, *_next_commands(params, output)]


def check_dataset(name: str) -> None:
    """Raises ParamsError for a kind of data set that there is not."""
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        known = f"nearest is {near[0]}" if near else f"there are {listed(list(DATASETS))}"
        raise ParamsError(f"--dataset {name}: unknown; {known}; folder is for data sets of any other kind, as images/ and masks/")


def _check_root(dataset: str, root: Path | None, link: Path) -> None:
    if dataset == "shapes":
        if root is not None:
            raise ParamsError(f"--root {root}: the built-in data set is rendered, not read; leave --root out or choose a --dataset")
        return
    if root is None:
        raise ParamsError(f"--root: name the folder of the {dataset} data set, such as --root /path/to/{dataset}")
    if not root.is_dir():
        raise ParamsError(f"--root {root}: no such folder")
    if (link.exists() or link.is_symlink()) and link.resolve() != root.resolve():
        present = f"a link to {os.readlink(link)}" if link.is_symlink() else "there"
        raise ParamsError(f"{link}: is {present} already; remove it, or choose another folder with --output")


def _look_at_folder(root: Path) -> tuple[dict[str, Any], list[str]]:
    """What params.yaml needs to know of a data set of one's own, and what its owner should be told."""
    for name in (name for name in ("images", "masks") if not (root / name).is_dir()):
        if other := written_otherwise(root / name):
            raise ParamsError(f"--root {root}: {other} must be called {name}; rename it: {shell_command('mv', other, root / name)}")
        raise ParamsError(
            f"--root {root}: holds no folder {name}/; expected images/<split>/ and masks/<split>/ with splits "
            f"{', '.join(SPLITS)}, or images/ and masks/ without splits (a mask is called like its image)"
        )
    split = (root / "masks/val").is_dir()
    images, masks = (None, None) if split else ("images/**/*", "masks/**/*")
    looked_for = FolderData(dataset="folder", root=str(root), partition="1/1", classes=["not", "known"], images=images, masks=masks)
    index = index_folder(root, looked_for)  # what prepare-data would refuse is said here already
    values = scan_mask_values(root, index)
    classes = [value for value in values if value != IGNORE]
    if not classes or (classes == [0] and IGNORE in values):
        raise ParamsError(
            f'--root {root}: the masks hold only the values {", ".join(map(str, values))}, and {IGNORE} means "no class"; '
            "save class ids, such as 0 for background and 1 for foreground"
        )
    if max(classes) > 253:
        raise ParamsError(
            f"--root {root}: a mask holds the value {max(classes)}; class ids must be 0 to 253, and {IGNORE} is no class"
        )
    if why := grey_levels(values):
        raise ParamsError(f"--root {root}: {why}")
    data: dict[str, Any] = {"classes": [f"class_{value}" for value in range(max(2, max(classes) + 1))]}
    notes = [
        f"the masks hold the values {', '.join(map(str, values))}: give the classes their names in params.yaml, data.classes",
        *(f"warning: {note}" for note in missing_values(values)),
    ]
    if not split:
        data |= {"images": images, "masks": masks}
        notes.append(
            "there is no masks/val/, so a tenth each of the images with a mask is drawn for validation and test: "
            "see params.yaml, data.val_fraction and data.test_fraction"
        )
        folders = sorted({path.name for kind in ("images", "masks") for path in (root / kind).iterdir() if path.is_dir()})
        if named := [name for name in folders if name.lower() in _LIKE_SPLITS]:
            notes.append(
                f"warning: the folders {', '.join(named)} do not count as splits, because there is no masks/val/: all splits are "
                "drawn anew; to keep your own splits, call the folders train, val and test, then init again"
            )
    return data, notes


def _look_at_data_set(params: Params, root: Path) -> list[str]:
    """What the names of the files and the headers of the images tell of the data set that params.yaml describes."""
    data = params.data
    try:
        index = index_dataset(data.model_copy(update={"root": str(root)}), Path())
        samples = index.samples
        subsets = partition_images(data, samples)
    except DataError as error:
        if not isinstance(data, FolderData):
            raise
        # params.yaml is written all the same: of a data set of one's own it is often what has to be changed
        return [f"warning: prepare-data will refuse this data set: {line}" for line in str(error).splitlines()]
    labelled = sum(subset == "labelled" for subset in subsets.values())
    notes = [*index.notes, *few_labelled(data, samples, labelled), *unused_pictures(root, data, index)]
    return [f"warning: {note}" for note in (*notes, *_orientations(root, samples))]


def _orientations(root: Path, samples: list[Sample]) -> list[Note]:
    """The EXIF orientations of up to 200 images, spread evenly over all of them, and of their masks."""
    noted: dict[str, int] = {}
    rows = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # of damaged EXIF blocks, which count as none
        for place in np.unique(np.linspace(0, len(samples) - 1, _LOOKED_AT).astype(int)):
            sample = samples[place]
            image, mask = sample.image.as_posix(), sample.mask.as_posix() if sample.mask else None
            try:
                height, width, orientation = read_header(root / image)
                of_mask = read_header(root / mask)[2] if mask else 1
            except DataError:  # prepare-data names all files that cannot be read
                continue
            both = {image: orientation, **({mask: of_mask} if mask else {})}
            noted |= {path: value for path, value in both.items() if value in ORIENTATIONS}
            rows.append(ImageRow(sample.image_id, image, "", height, width, mask, None, sample.split))
    sampled = f"of {len(rows)} images that were looked at, " if len(samples) > _LOOKED_AT else ""
    return [Note(f"{sampled}{note.text}", note.remedy) for note in orientations(noted, rows)]


def _next_commands(params: Params, output: Path) -> list[str]:
    """The commands from here to a student, as one pastes them into a shell."""
    here = output.resolve()
    enter = [] if here == Path.cwd() else [f"cd {shlex.quote(str(output))}"]
    versioned = any((folder / ".git").exists() for folder in (here, *here.parents))
    if not versioned:
        initial = ["git init", "dvc init"]
    else:
        initial = [] if (here / ".dvc").exists() else ["dvc init" if (here / ".git").exists() else "dvc init --subdir"]
    return [
        "next, with DVC (pip install 'mgd-pipeline[dvc]'):",
        *(f"  {command}" for command in [*enter, *initial, "dvc repro"]),
        "or stage by stage, without it:",
        *(f"  {command}" for command in [*enter, *(f"mgd-pipeline {stage}" for stage in stage_commands(params))]),
    ]


def stage_commands(params: Params) -> list[str]:
    """All stages in the order in which they run, each as the arguments of `mgd-pipeline`."""
    return [
        "prepare-data",
        *(f"train-teacher --teacher {name}" for name in params.train_teachers),
        "precompute-teachers",
        "compare-teachers",
        "train-student",
        "train-student --supervised-only",
        "evaluate",
        "report",
    ]


def _append_lines(path: Path, lines: list[str]) -> None:
    present = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if missing := [line for line in lines if line not in present]:
        replace_file(path, ("\n".join([*present, *missing]) + "\n").encode())
