"""`mgd-pipeline init`: a project for a data set, as files that a person reads and changes."""

from __future__ import annotations

import contextlib
import difflib
import os
import shlex
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mgd_pipeline.data.datasets import index_dataset
from mgd_pipeline.data.index import Note
from mgd_pipeline.data.listing import what_dvc_cannot_read
from mgd_pipeline.data.partition import partition_images
from mgd_pipeline.durable import replace_file
from mgd_pipeline.errors import DataError, MGDError, ParamsError
from mgd_pipeline.params import DATASETS, FolderData, Params, RetrainTeachers, ShapesData
from mgd_pipeline.params_file import override_params, parse_params
from mgd_pipeline.words import listed
from mgd_stages.projects.dvc_yaml import write_dvc
from mgd_stages.projects.labels import Seen, look_at_labels, read_names
from mgd_stages.projects.machines import (
    MACHINES,
    Scale,
    from_random_weights,
    gpu_is_here,
    on_scale,
    say_unavailable,
    unavailable_weights,
)
from mgd_stages.projects.presets import PROMPTED, preset, quick, read_preset, render_params, with_prompts
from mgd_stages.run.data_notes import few_labelled, few_to_compare_on, require_images_of, unused_pictures
from mgd_stages.run.labels_sheet import misaligned, save_labels_sheet
from mgd_stages.run.machine import require_writable
from mgd_stages.run.project import Project

_IGNORED = [
    *(f"/data/{name}/" for name in ("raw", "labels", "manifest", "teachers", "targets", "students", "results")),
    "/.mgd/",
    "/dvc_plots/",
    "/demo/",
]
"""What commands make again, DVC keeps, or both; demo is the page for browsers, of 42 MB that are npm's"""

QUICK = "quick"
"""The preset of --quick"""
Sized = Callable[[Params], tuple[Params, list[str]]]
"""Takes the parameters of a data set, whose root is where it lies now; returns other settings for it, and what to say of them."""


def init_project(
    dataset: str | None,
    root: Path | None,
    partition: str | None,
    output: Path,
    *,
    preset_name: str | None = None,
    classes: str | None = None,
    sized: Sized | None = None,
    retrain_teachers: RetrainTeachers | Callable[[], RetrainTeachers] | None = None,
) -> list[str]:
    """Writes params.yaml, dvc.yaml with its template of plots, .gitignore, .dvcignore and a sheet of labelled photos; links the
    data set below data/raw/, or unpacks it there if `root` is a ZIP file.

    `dataset` is "folder" with a root and "shapes" without one, where None; `partition` is "1/1" for "folder" and "1/8" for others.
    `preset_name` is QUICK for a first try (see `presets.quick`), a machine of `machines.MACHINES`, or an experiment of
    `presets.read_preset`: its data set is taken if `dataset` is None and the folder is like it, and else all sections but data.
    `sized` chooses settings for the data set, as `mgd_stages.whole.budget` does; without a preset, too. `classes` names the classes
    of a data set of one's own: names between commas, or a file. `retrain_teachers` is the parameter of that name, or asks for it,
    which is done for a data set of one's own only.

    Returns what a user should read, a line each: what was seen, and the commands that come next. Nothing that exists is
    overwritten, and nothing is written unless all can be: raises ParamsError instead.
    """
    if dataset is not None:
        check_dataset(dataset)
    _require_free(output)
    way = _way_of(preset_name, sized)
    own = way.named if dataset is None else None  # the preset's own data set, or another one with the preset's settings
    dataset = _dataset_of(way, dataset, root, classes)
    link = Path("data/raw") / dataset if own is None else Path(own.data.root)
    _check_root(dataset, root, output / link)
    with contextlib.ExitStack() as undo:
        archive = root if root is not None and root.is_file() else None
        if archive is not None:
            root = _unpacked(archive, output / link, undo)
            undo.enter_context(_named_as(archive, root))
        seen = look_at_labels(root, classes and read_names(classes)) if dataset == "folder" and root else Seen({})
        head, notes = list(way.head), []
        if own is not None and isinstance(own.data, FolderData):
            if other := _unlike(own.data, seen, classes):
                own, notes = None, [f"--preset {preset_name}: {other}, so this is another data set; it gets the preset's settings"]
            else:
                notes = [f"read as the data set of --preset {preset_name}; if it is another one, add --dataset folder"]
        if own is not None:
            params = own if partition is None else override_params(own, [f"data.partition={partition}"])
        else:
            params = preset(dataset, link.as_posix(), partition or ("1/1" if dataset == "folder" else "1/8"), seen.data)
            if way.named is not None:
                head = [f"# Another data set with the settings of `init --preset {preset_name}`."]
                params = parse_params({**way.named.model_dump(), "data": params.model_dump()["data"]})
            elif way.machine is not None:
                params = on_scale(params, way.machine)
            notes += seen.said
            if seen.split not in (None, params.evaluation.split):
                notes.append(
                    f"no folder or list is of {params.evaluation.split}: networks are compared on {seen.split} (evaluation.split)"
                )
                params = override_params(params, [f"evaluation.split={seen.split}"])
        if root is not None and seen.labelled:
            notes += _look_at_data_set(params, root, output)
        require_writable([output] if root is None else [output, (output / link).parent])
        params, said = _fitted(way, params, root, seen.labelled)
        params, kept = _kept(
            params if seen.labelled else with_prompts(params), retrain_teachers, own=own is None and dataset == "folder"
        )
        notes = [_renamed(note, root, archive) for note in (*notes, *said, *kept)]
        output.mkdir(parents=True, exist_ok=True)
        if root is not None and not (output / link).exists():
            (output / link).parent.mkdir(parents=True, exist_ok=True)
            root.rename(output / link) if archive else os.symlink(root.resolve(), output / link)
        undo.pop_all()
    replace_file(output / "params.yaml", "\n".join([*head, *(["#"] if head else []), render_params(params)]).encode())
    write_dvc(Project(output.resolve(), params))
    for name, lines in ((".gitignore", _IGNORED), (".dvcignore", ["/.mgd/"])):
        _append_lines(output / name, lines)
    if root is not None and seen.labelled:
        notes += _sheet(output, params)
    return [f"wrote params.yaml and dvc.yaml to {output.resolve()}", *notes, *_next_commands(params, output, link, seen.labelled)]


def _kept(
    params: Params, retrain: RetrainTeachers | Callable[[], RetrainTeachers] | None, *, own: bool
) -> tuple[Params, list[str]]:
    """The parameters with the choice of what teachers are trained again for, and what a user should read of it. `own`: of a data
    set of one's own, to which photos are added."""
    said = []
    if own and retrain is None:
        retrain = "new-labels"
        said = ["teachers are kept when you add photos without labels (retrain_teachers in params.yaml is new-labels)"]
    elif callable(retrain):
        retrain = retrain() if own else None
    return params if retrain is None else params.model_copy(update={"retrain_teachers": retrain}), said


def _require_free(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise ParamsError(f"--output {output}: is a file; name a folder")
    for name in ("params.yaml", "dvc.yaml"):
        if (output / name).exists():
            raise ParamsError(f"{output / name}: exists already; remove it, or choose another folder with --output")


@dataclass(frozen=True)
class _Way:
    """How settings are chosen: at most one of these; without any they are general ones."""

    small: bool
    sized: Sized | None
    machine: Scale | None
    named: Params | None
    """An experiment"""
    head: Sequence[str] = ()
    """First lines of params.yaml"""


def _way_of(preset_name: str | None, sized: Sized | None) -> _Way:
    if preset_name is None or preset_name == QUICK:
        return _Way(preset_name == QUICK, sized, None, None)
    if (machine := MACHINES.get(preset_name)) is not None:
        return _Way(False, None, machine, None, [f"# {line}" for line in machine.about])
    head, named = read_preset(preset_name)
    return _Way(False, None, None, named, head)


def _dataset_of(way: _Way, dataset: str | None, root: Path | None, classes: str | None) -> str:
    for_machine = way.machine is not None or way.sized is not None
    if dataset is None:
        of_root = "shapes" if root is None and not for_machine else "folder"
        dataset = of_root if way.named is None else way.named.data.dataset
    if classes is not None and dataset != "folder":
        raise ParamsError(f"--classes: the classes of {dataset} have names; leave it out")
    if way.small and dataset == "shapes":
        raise ParamsError("--quick: the built-in data set is made for that; leave it out")
    if for_machine and dataset == "shapes":
        raise ParamsError("--dataset shapes: the built-in data set has settings of its own; leave out --hours and --preset")
    return dataset


def _fitted(way: _Way, params: Params, root: Path | None, labelled: bool) -> tuple[Params, list[str]]:
    """The settings for this machine: in the wanted time, and without weights that cannot be had; and what to say of them."""
    data = params.data
    if way.small:
        said = "--quick: toy networks and few steps, to see the whole way; init again without it for networks that are worth it"
        return quick(params), [said]
    if way.sized is not None and not labelled:
        raise ParamsError(
            "--hours: measures trainings, and there are no labels to train on; take --preset cpu, small-gpu or large-gpu"
        )
    if way.sized is not None and root is not None:
        there = params.model_copy(update={"data": data.model_copy(update={"root": root.resolve().as_posix()})})
        made, said = way.sized(there)
        return made.model_copy(update={"data": made.data.model_copy(update={"root": data.root})}), said
    absent = unavailable_weights(params)
    kept = way.named is not None or (way.machine is None and not isinstance(data, FolderData))
    said = say_unavailable(absent, kept=kept)
    if way.named is None and way.machine is None and not isinstance(data, ShapesData) and not gpu_is_here():
        said.append(
            "these settings are meant for a GPU, and torch sees none: take --preset cpu, or --hours 2 for what this machine learns "
            "in 2 hours"
        )
    return params if kept else from_random_weights(params, absent), said


def _unlike(data: FolderData, seen: Seen, classes: str | None) -> str | None:
    """How labels differ from a preset's own data set, as a clause; None if they do not."""
    read = {"labels": "masks", "images": None, "masks": None, **seen.data}
    if classes is not None:
        return "--classes names other classes"
    if any(read[key] != getattr(data, key) for key in ("labels", "images", "masks")):
        return f"the labels are not {data.labels} in images/ and masks/"
    if len(read["classes"]) != len(data.classes):
        return f"the masks have {len(read['classes'])} classes and not {len(data.classes)}"
    return None


def _unpacked(archive: Path, link: Path, undo: contextlib.ExitStack) -> Path:
    """A folder beside `link` with the files of a ZIP archive; `undo` removes it."""
    folder = link.with_name(f".{archive.name}")  # so that what is said of it names the archive
    if not zipfile.is_zipfile(archive):
        raise ParamsError(f"--root {archive}: is neither a folder nor a ZIP archive; unpack it and name the folder")
    made = next((place for place in (folder, *folder.parents) if not place.exists() and place.parent.exists()), folder)
    undo.callback(shutil.rmtree, made, ignore_errors=True)
    try:
        _extract(archive, folder)
    except (OSError, zipfile.BadZipFile, RuntimeError) as error:  # a password is a RuntimeError
        raise ParamsError(f"--root {archive}: cannot be unpacked ({error}); unpack it yourself and name the folder") from None
    return folder


@contextlib.contextmanager
def _named_as(archive: Path, folder: Path) -> Iterator[None]:
    """Errors name the archive that the user gave, and not the folder that is gone after an error."""
    try:
        yield
    except MGDError as error:
        raise type(error)(_renamed(str(error), folder, archive)) from None


def _renamed(said: str, folder: Path | None, archive: Path | None) -> str:
    """A line about the folder of an unpacked archive, if there is one, with the archive's own name."""
    if folder is None or archive is None:
        return said
    return said.replace(str(folder.resolve()), str(archive)).replace(str(folder), str(archive))


def _extract(archive: Path, folder: Path) -> None:
    """Names are UTF-8 if all of them can be: macOS and others do not say so, and Python would take each for cp437."""
    try:
        with zipfile.ZipFile(archive, metadata_encoding="utf-8") as opened:
            opened.extractall(folder)
    except UnicodeDecodeError:
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(folder)


def _sheet(output: Path, params: Params) -> list[str]:
    """Writes the sheet of labelled photos, and says where it is."""
    try:
        index = index_dataset(params.data, output)
    except DataError:  # said already
        return []
    sheet = save_labels_sheet(output, params.data, index)
    return [] if sheet is None else [f"look at {sheet}: does each mask lie on its photo, in the colours of the right classes?"]


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
    if not root.exists():
        raise ParamsError(f"--root {root}: no such folder")
    if (link.exists() or link.is_symlink()) and link.resolve() != root.resolve():
        present = f"a link to {os.readlink(link)}" if link.is_symlink() else "there"
        raise ParamsError(f"{link}: is {present} already; remove it, or choose another folder with --output")


def _look_at_data_set(params: Params, root: Path, output: Path) -> list[str]:
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
        return _refused(error)
    labelled = sum(subset == "labelled" for subset in subsets.values())
    notes = [*index.notes, *few_labelled(data, samples, labelled), *unused_pictures(root, data, index)]
    notes += misaligned(Path(), data.model_copy(update={"root": str(root)}), index)
    if output.resolve().is_relative_to(root.resolve()):
        fault = f"the project {output} lies inside the data set {root}, which everything that the project writes changes"
        notes.append(Note(fault, "`dvc repro` runs every stage again each time; choose an --output outside of the data set"))
    lines = [f"warning: {note}" for note in (*notes, *what_dvc_cannot_read(root))]
    split = params.evaluation.split
    lines += [f"warning: {note}" for note in few_to_compare_on(split, data, sum(sample.split == split for sample in samples))]
    try:
        require_images_of(params.evaluation.split, data, samples)
    except DataError as error:
        lines += _refused(error)
    return lines


def _refused(error: DataError) -> list[str]:
    return [f"warning: prepare-data will refuse this data set: {line}" for line in str(error).splitlines()]


def _next_commands(params: Params, output: Path, root: Path, labelled: bool) -> list[str]:
    """The commands from here to a student, as one pastes them into a shell. `root`: of the data set, below the project."""
    here = output.resolve()
    enter = [] if here == Path.cwd() else [f"cd {shlex.quote(str(output))}"]
    versioned = any((folder / ".git").exists() for folder in (here, *here.parents))
    if not versioned:
        initial = ["git init", "dvc init"]
    else:
        initial = [] if (here / ".dvc").exists() else ["dvc init" if (here / ".git").exists() else "dvc init --subdir"]
    if not labelled:
        masks = f"mgd-pipeline label-images {root / 'images'} --teacher {PROMPTED} --output {root} --overlays"
        return [
            f"next, after a look at teachers.{PROMPTED}.prompts in params.yaml:",
            *(f"  {command}" for command in [*enter, f"mgd-pipeline train-teacher --teacher {PROMPTED}", masks]),
            f"then look at {root / 'overlays'}, correct or delete wrong masks in {root / 'masks'}, and:",
            "  mgd-pipeline run",
        ]
    return [
        "next:",
        *(f"  {command}" for command in [*enter, "mgd-pipeline run"]),
        "or with DVC (pip install 'mgd-pipeline[dvc]'), which also keeps versions of the data:",
        *(f"  {command}" for command in [*enter, *initial, "dvc repro"]),
        "or stage by stage: `mgd-pipeline --help` lists the stages in their order",
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
