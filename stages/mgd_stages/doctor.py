"""`mgd-pipeline doctor`: looks at this machine and this project, and prints a line a check: what was found, and what to do.

It computes, fetches and changes nothing. What it can share with the stages it shares: a teacher is refused here in the words
in which precompute-teachers would refuse it. torch and all that needs it is imported late: that fails, too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mgd_pipeline.cache import open_cache
from mgd_pipeline.datasets import SPLITS, DatasetIndex, Sample, index_dataset
from mgd_pipeline.errors import MGDError, ParamsError
from mgd_pipeline.images import IGNORE, read_mask
from mgd_pipeline.manifest import ImageRow, Manifest, Skipped, check_sample, read_manifest
from mgd_pipeline.params import NetworkParams, ShapesData, SmpTeacher
from mgd_pipeline.partition import partition_images
from mgd_stages.progress import console, progress
from mgd_stages.project import Project, open_project

Mark = Literal["ok", "warning", "problem"]
T = TypeVar("T")
_SAMPLE = 200
"""Images that are read without --full; half of them labelled, where there are so many."""
_NAMED = 10
"""Bad files that are named one by one."""
_SHOWN = ("torch", "torchvision", "zarr", "segmentation-models-pytorch", "timm", "numpy", "dask", "dvc")
_FICLONE = 0x40049409
"""ioctl of Linux: let a file share the blocks of another, which DVC calls a reflink."""
_STYLES: dict[Mark, str] = {"ok": "", "warning": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class Check:
    area: str
    """versions, devices, params, data, weights, disk or dvc."""
    mark: Mark
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.mark:<9}{self.area}: {self.found}{'; ' if self.remedy else ''}{self.remedy}"


Checks = Generator[Check, None, T]


def doctor(config: Path, overrides: Sequence[str], *, full: bool, as_json: bool) -> int:
    """Prints all checks, or one JSON object of them; returns the exit code: 0, 1 for a problem, 2 for an invalid params.yaml."""
    found: list[Check] = []
    for check in look(config, overrides, full=full, quiet=as_json):
        found.append(check)
        if not as_json:
            console.print(str(check), style=_STYLES[check.mark])
    count = {mark: sum(check.mark == mark for check in found) for mark in _STYLES}
    if as_json:
        console.print(json.dumps({**count, "checks": [asdict(check) for check in found]}, ensure_ascii=False))
    else:
        console.print(f"{len(found)} checks, warnings: {count['warning']}, problems: {count['problem']}")
    if any(check.area == "params" and check.mark == "problem" for check in found):
        return ParamsError.exit_code
    return 1 if count["problem"] else 0


def look(config: Path, overrides: Sequence[str], *, full: bool = False, quiet: bool = False) -> Iterator[Check]:
    """All checks in the order in which they are made; without a valid params.yaml only those of the machine."""
    yield from versions()
    try:
        import torch  # noqa: F401

        import mgd_pipeline.networks  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        reason = " ".join(str(error).split())[:200]
        yield Check("devices", "problem", f"torch cannot be imported ({reason})", "install torch and torchvision again, together")
        return
    yield from devices()
    try:
        project = open_project(config, overrides)
    except ParamsError as error:
        yield from _of_error("params", error)
        return
    data = project.params.data
    shown = data.partition if isinstance(data.partition, str) else "by id lists"
    yield Check(
        "params", "ok", f"{config} is valid: {data.dataset}, partition {shown}, teachers {', '.join(project.params.teachers)}"
    )

    manifest = yield from _guarded("data", recorded(project))
    sight = yield from _guarded("data", data_set(project, manifest, full=full, quiet=quiet))
    known = manifest or (sight.manifest if sight else None)
    usable = yield from weights(project, known, partition=manifest is not None)
    scale = sight.training / max(1, len(sight.manifest.training)) if sight and not manifest else 1.0
    yield from _guarded("disk", disk(project, known, usable, scale))
    yield from _guarded("dvc", dvc(project))


# --- the machine ------------------------------------------------------------------------------------------------------


def versions() -> Iterator[Check]:
    """The installed packages against what mgd-pipeline's own metadata (pyproject.toml) asks for."""
    try:
        wanted = metadata.requires("mgd-pipeline") or []
        python = metadata.metadata("mgd-pipeline")["Requires-Python"]
    except metadata.PackageNotFoundError:
        yield Check("versions", "warning", "mgd-pipeline is not installed, so its requirements are unknown", "pip install -e .")
        return
    here = platform.python_version()
    if here not in SpecifierSet(python, prereleases=True):
        yield Check(
            "versions", "problem", f"Python {here} is here, {python} is needed", "make a new environment with such a Python"
        )
    shown = {"Python": here}
    for text in dict.fromkeys(wanted):
        requirement = Requirement(text)
        core = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        command = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            if core:
                yield Check("versions", "problem", f"{requirement.name} is not installed", command)
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            found = f"{requirement.name} {installed} is here, {requirement.specifier} is needed"
            yield Check("versions", "problem" if core else "warning", found, command)
        if requirement.name in _SHOWN:
            shown[requirement.name] = installed
    yield Check("versions", "ok", ", ".join(f"{name} {version}" for name, version in shown.items()))


def devices() -> Iterator[Check]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container; "max" where there is none
    with contextlib.suppress(OSError, ValueError):
        memory = min(memory, int(limit.read_text()))
    yield Check("devices", "ok", f"{cores} CPU cores (torch uses {torch.get_num_threads()}), {memory / 1e9:.1f} GB of memory")

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else ""
    with warnings.catch_warnings(record=True) as told:  # torch warns of old drivers and of GPUs that it has no code for
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
        gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())] if usable else []
    for number, gpu in enumerate(gpus):
        yield Check("devices", "ok", f"cuda:{number}: {gpu.name}, {gpu.total_memory / 1e9:.1f} GB")
    for text in dict.fromkeys(" ".join(str(warning.message).split()) for warning in told):
        yield Check("devices", "warning", f"torch says: {text[:300]}", "install a torch that fits driver and GPU")
    if gpus or (told and built):
        return
    driver = Path("/proc/driver/nvidia/version").exists()
    masked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if built and masked is not None:
        yield Check("devices", "warning", f"no GPU: CUDA_VISIBLE_DEVICES is {masked!r}", "unset it, or go on with the CPU")
    elif built:
        why = "a driver but no GPU" if driver else "no driver"
        remedy = "install NVIDIA's driver, or go on with the CPU, on which all stages run, more slowly"
        yield Check("devices", "warning", f"torch is built for {built}, but finds {why}", remedy)
    elif driver:
        remedy = "install a torch for CUDA (pytorch.org has the command)"
        yield Check("devices", "warning", "an NVIDIA driver is here, but torch is built for the CPU only", remedy)
    else:
        yield Check("devices", "ok", "no GPU, and torch is built for the CPU: all stages run, heavy networks slowly")


# --- the data set -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sight:
    """What was seen of a data set."""

    manifest: Manifest
    """Of the images that were read and can be used, with the partition that params.yaml asks for."""
    training: int
    """Labelled and unlabelled images of the whole data set."""


def recorded(project: Project) -> Checks[Manifest | None]:
    if not (project.manifest / "images.parquet").exists():
        yield Check("data", "ok", "there is no manifest yet: `mgd-pipeline prepare-data` makes it")
        return None
    return read_manifest(project.manifest, project.base)


def data_set(project: Project, manifest: Manifest | None, *, full: bool, quiet: bool) -> Checks[Sight | None]:
    """The data set as it lies there: against the manifest, where there is one, and a sample of its files in full."""
    data, root = project.params.data, project.base / project.params.data.root
    if isinstance(data, ShapesData) and not root.exists():
        scenes = data.train + data.val + data.test
        yield Check(
            "data", "ok", f"the built-in data set of {scenes} scenes is not there yet: `mgd-pipeline prepare-data` renders it"
        )
        return None
    index = index_dataset(data, project.base)
    subsets = partition_images(data, index.samples, project.base)
    if manifest is not None:
        yield from _against(project, manifest, index, subsets)

    # --- how many
    left_out = {bad.image_id for bad in manifest.skipped} if manifest else set()
    samples = [sample for sample in index.samples if sample.image_id not in left_out]
    splits = {split: sum(sample.split == split for sample in samples) for split in SPLITS}
    labelled = [sample for sample in samples if subsets.get(sample.image_id) == "labelled"]
    unlabelled = sum(subsets.get(sample.image_id) == "unlabelled" for sample in samples)
    train = f"{splits['train']} train images ({len(labelled)} labelled, {unlabelled} unlabelled)"
    counts = f"{train}, {splits['val']} val, {splits['test']} test{f', {len(left_out)} left out' if left_out else ''}"
    yield Check("data", "ok", f"{data.dataset}, {len(index.classes)} classes: {counts}")
    if not splits[project.params.evaluation.split]:
        found = f"evaluation.split is {project.params.evaluation.split}, which has no images"
        yield Check("data", "problem", found, "choose the other split, or add images and masks to it")

    # --- files, read in full
    chosen = samples if full else _sample(samples, labelled)
    lookup = np.array(index.lookup, np.int16)
    rows: dict[str, ImageRow] = {}
    bad: list[Check] = []
    pixels = np.zeros(256, np.int64)
    masks = 0
    with (
        contextlib.nullcontext(lambda done, note: None) if quiet else progress("doctor: read", len(chosen), "images") as advance,
        ThreadPoolExecutor(2) as pool,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", module="PIL")  # what it warns of and matters is an error of ours
        outcomes = pool.map(lambda sample: _read(root, sample, lookup, subsets), chosen)
        for done, (sample, (outcome, counted)) in enumerate(zip(chosen, outcomes, strict=True), start=1):
            advance(done, "")
            if isinstance(outcome, Skipped):
                bad += _of_error("data", f"{root / outcome.path}: {outcome.reason}")
                continue
            rows[sample.image_id] = outcome
            if counted is not None:
                pixels += counted
                masks += 1
            if manifest and sample.image_id in manifest.rows and outcome != manifest.rows[sample.image_id]:
                found = f"{root / outcome.image_path}: image or mask has changed since the manifest was made"
                bad.append(Check("data", "problem", found, "restore it, or run `mgd-pipeline prepare-data` again"))
    yield from bad[:_NAMED]
    if len(bad) > _NAMED:
        yield Check(
            "data",
            "problem",
            f"... and {len(bad) - _NAMED} more files",
            "`mgd-pipeline prepare-data --on-error skip` leaves them out",
        )
    how = f"all {len(chosen)} images" if len(chosen) == len(samples) else f"a sample of {len(chosen)} of the {len(samples)} images"
    more = "" if len(chosen) == len(samples) else " (--full reads all)"
    if not bad:
        yield Check("data", "ok", f"{how} and their masks were read in full, nothing is wrong with them{more}")

    # --- sizes and classes
    seen = list((manifest or _manifest_of(data, index, rows, subsets)).rows.values())
    if seen:
        heights, widths = [row.height for row in seen], [row.width for row in seen]
        small, large = f"{min(widths)} x {min(heights)}", f"{max(widths)} x {max(heights)}"
        yield Check("data", "ok", f"images of {small}{f' to {large}' if small != large else ''} pixels (width x height)")
    if masks:
        yield from _class_shares(index.classes, pixels, masks, len(labelled))
    return Sight(_manifest_of(data, index, rows, subsets), len(labelled) + unlabelled)


def _manifest_of(data: Any, index: DatasetIndex, rows: dict[str, ImageRow], subsets: dict[str, str]) -> Manifest:
    """A manifest of some images only."""
    kept = {image_id: subset for image_id, subset in subsets.items() if image_id in rows}
    return Manifest(Path(data.root), data.long_side, index.classes, index.palette, index.lookup, rows, kept)


def _against(project: Project, manifest: Manifest, index: DatasetIndex, subsets: dict[str, str]) -> Iterator[Check]:
    """What has changed since the manifest was made."""
    data, again = project.params.data, "run `mgd-pipeline prepare-data` again"
    settings = {
        "data.root": (manifest.root, Path(data.root)),
        "data.long_side": (manifest.long_side, data.long_side),
        "data.classes": (list(manifest.classes), list(index.classes)),
        "data.ignore": (manifest.lookup, index.lookup),
    }
    stale = [key for key, (then, now) in settings.items() if then != now]
    left_out = {bad.image_id for bad in manifest.skipped}
    known, here = {*manifest.rows, *left_out}, {sample.image_id for sample in index.samples}
    gone, new = sorted(known - here), sorted(here - known)
    if stale:
        yield Check("data", "warning", f"the manifest was made with another {', '.join(stale)} than params.yaml has now", again)
    if gone:
        found = f"{len(gone)} images of the manifest are not in the data set, such as {gone[0]!r}"
        yield Check("data", "problem", found, f"restore them, or {again}")
    if new:
        yield Check("data", "warning", f"{len(new)} images of the data set are not in the manifest, such as {new[0]!r}", again)
    drawn = {image_id: subset for image_id, subset in subsets.items() if image_id not in left_out}
    if not gone and not new and drawn != manifest.subsets:
        yield Check("data", "warning", "the manifest has another partition than params.yaml asks for now", again)
    if manifest.declared:
        found = f"{len(manifest.declared)} val or test images train as unlabelled, as a list declares"
        yield Check("data", "warning", found, "say so beside every result")


def _sample(samples: list[Sample], labelled: list[Sample]) -> list[Sample]:
    """At most 200, seeded, half of them labelled where there are so many, in the order of their ids."""
    rng = np.random.default_rng(0)

    def some(of: list[Sample], count: int) -> list[Sample]:
        return [of[i] for i in rng.permutation(len(of))[:count]]

    with_labels = {sample.image_id for sample in labelled}
    others = [sample for sample in samples if sample.image_id not in with_labels]
    first = some(labelled, max(_SAMPLE // 2, _SAMPLE - len(others)))
    return sorted([*first, *some(others, _SAMPLE - len(first))], key=lambda sample: sample.image_id)


def _read(root: Path, sample: Sample, lookup: np.ndarray, subsets: dict[str, str]) -> tuple[ImageRow | Skipped, np.ndarray | None]:
    """What the manifest would say of an image, and how many pixels of each train id its mask has where it is labelled."""
    outcome = check_sample(root, sample, lookup)
    if isinstance(outcome, Skipped) or sample.mask is None or subsets.get(sample.image_id) != "labelled":
        return outcome, None
    return outcome, np.bincount(read_mask(root / sample.mask, lookup).ravel(), minlength=256)


def _class_shares(classes: tuple[str, ...], pixels: np.ndarray, masks: int, labelled: int) -> Iterator[Check]:
    of = f"all {masks} labelled masks" if masks == labelled else f"{masks} of the {labelled} labelled masks"
    total = max(1, int(pixels.sum()))
    shares = [f"{name} {100 * count / total:.3g} %" for name, count in zip(classes, pixels.tolist(), strict=False)]
    yield Check("data", "ok", f"pixels of {of}: {', '.join(shares)}, no class {100 * int(pixels[IGNORE]) / total:.3g} %")
    never = [name for name, count in zip(classes, pixels.tolist(), strict=False) if not count]
    if never:
        remedy = "--full reads all of them" if masks < labelled else "label images with it, or draw others by data.partition_seed"
        read = "" if masks == labelled else " that were read"
        noun = "the class" if len(never) == 1 else "the classes"
        found = f"none of the {masks} labelled masks{read} holds {noun} {', '.join(never)}"
        yield Check("data", "warning", found, remedy)


# --- weights ----------------------------------------------------------------------------------------------------------


Usable = tuple[dict[str, Any], tuple[int, int]]
"""Provenance of the targets of a teacher whose weights are there, and classes and features of its store."""


def weights(project: Project, manifest: Manifest | None, *, partition: bool) -> Checks[dict[str, Usable]]:
    """Weights of the student's encoder and of the teachers; returns what is known of each usable teacher.

    `partition` says whether `manifest` has the whole partition.
    """
    usable: dict[str, Usable] = {}
    yield from _guarded("weights", _encoder(project, "student.network", project.params.student.network))
    for name in project.params.teachers:
        found = yield from _guarded("weights", _teacher(project, name, manifest, partition))
        if found:
            usable[name] = found
    return usable


def _encoder(project: Project, key: str, network: NetworkParams) -> Checks[None]:
    from mgd_pipeline.networks import check_encoder, resolve_encoder_weights

    check_encoder(network.encoder)
    path = resolve_encoder_weights(network.encoder, network.encoder_weights, project.base, fetch=False)
    if path is not None:
        yield Check("weights", "ok", f"{key}: {network.encoder} starts from {path}")
    elif network.encoder_weights == "none":
        yield Check("weights", "ok", f"{key}: {network.encoder} starts from random weights")
    else:
        offline = bool(os.environ.get("HF_HUB_OFFLINE", "0").strip("0"))
        remedy = (
            "the training fetches them where the hub can be reached; elsewhere copy a connected machine's hub cache, or write the "
            "path of a file as encoder_weights"
        )
        found = f"{key}: ImageNet weights of {network.encoder} are not on this machine"
        yield Check("weights", "problem" if offline else "warning", found, remedy)


def _teacher(project: Project, name: str, manifest: Manifest | None, partition: bool) -> Checks[Usable | None]:
    import torch

    from mgd_pipeline.teacher_networks import stored_channels
    from mgd_pipeline.weights import read_metadata, read_state_dict
    from mgd_stages.precompute_teachers import load_teacher

    params, path = project.params, project.teacher(name)
    teacher = params.teachers[name]
    if not path.exists():
        if name not in params.train_teachers:
            remedy = f"put it there, or name {name} in train_teachers"
            yield Check("weights", "problem", f"teachers.{name}.weights: {path}: no such file", remedy)
            return None
        yield Check(
            "weights", "ok", f"teachers.{name} is not trained yet: `mgd-pipeline train-teacher --teacher {name}` makes {path}"
        )
        if isinstance(teacher, SmpTeacher):
            yield from _encoder(project, f"teachers.{name}", teacher)
        return None
    if manifest is None:
        tensors, classes = len(read_state_dict(path)), read_metadata(path).get("classes")
        known = f"for the classes {', '.join(classes)}" if classes else "whose classes it does not say"
        yield Check("weights", "ok", f"teachers.{name}: {path} holds {tensors} tensors, {known}")
        return None
    built, provenance = load_teacher(project, name, manifest, torch.device("cpu"))
    trained_on = provenance["teacher"]["trained_on"]
    network = " with ".join(str(value) for value in list(teacher.identity.values())[:2])
    here = f"{path} fits {network} and the {len(manifest.classes)} classes"
    if partition and trained_on not in (None, manifest.partition_fingerprint) and not params.losses.other_partition:
        train = f"run `mgd-pipeline train-teacher --teacher {name}`" if name in params.train_teachers else "train it on this one"
        found = f"teachers.{name}: {here}, but was trained on the labels of another partition"
        yield Check("weights", "problem", found, f"{train}, or set losses.other_partition if that is what you study")
    else:
        yield Check("weights", "ok", f"teachers.{name}: {here}")
    return provenance, stored_channels(name, built)


# --- disk -------------------------------------------------------------------------------------------------------------


def disk(project: Project, manifest: Manifest | None, usable: dict[str, Usable], scale: float) -> Checks[None]:
    """The size of what precompute-teachers still has to make; `scale` for a manifest of some images only."""
    from mgd_pipeline.provenance import expected_provenance
    from mgd_stages.precompute_teachers import MORE_SPACE, estimate_store

    params, work, data = project.params, project.base / ".mgd/work", project.base / "data"
    places = {".mgd/work": work, "data": data, "data/targets": data / "targets"}
    free = {name: shutil.disk_usage(_there(path)).free for name, path in places.items()}
    shown = f"{free['.mgd/work'] / 1e9:,.1f} GB are free in .mgd/work, {free['data'] / 1e9:,.1f} GB in data"
    if manifest is None or not manifest.training:
        yield Check("disk", "ok", f"{shown}; the size of the targets is known when the data set is there")
    else:
        needed: dict[str, float] = {}
        for name, teacher in params.teachers.items():
            if name in usable:
                provenance, channels = usable[name]
            elif isinstance(teacher, SmpTeacher):
                # Without weights the store has no identity yet: none that is there can be it, so all is to be made.
                provenance = expected_provenance(teacher, params.targets, manifest.classes, manifest.long_side)
                channels = len(manifest.classes), teacher.decoder_channels
            else:
                yield Check("disk", "ok", f"the size of the targets of {name} is known when its weights are there")
                continue
            needed[name] = estimate_store(project, name, manifest, provenance, channels).new_bytes * scale
        total = sum(needed.values())
        each = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in needed.items())
        found = f"targets to make: {'about ' if scale != 1 else ''}{total / 1e6:,.1f} MB ({each}); {shown}"
        if total > min(free.values()):
            yield Check("disk", "problem", found, MORE_SPACE)
        else:
            yield Check("disk", "ok", found if total else f"no targets are left to compute; {shown}")
    for name in params.teachers:
        if os.path.lexists(project.targets(name)):
            yield from _guarded("disk", _store(project.targets(name)))
    if file_system(work) != file_system(data / "targets"):
        found = ".mgd/work and data/targets are on different file systems, and finished stores are moved by renaming"
        yield Check("disk", "problem", found, "do not link or mount one of them elsewhere; move the whole project instead")
    else:
        yield Check("disk", "ok", ".mgd/work and data/targets are on one file system")


def _store(path: Path) -> Checks[None]:
    """Nothing for a store that can be opened; what it holds is for `mgd-pipeline cache verify`."""
    open_cache(path)
    yield from ()


def file_system(path: Path) -> int:
    """The device that holds a path, or would hold it."""
    return os.stat(_there(path)).st_dev


def _there(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


# --- DVC --------------------------------------------------------------------------------------------------------------


def dvc(project: Project) -> Checks[None]:
    """Whether `dvc repro` can run here, and how DVC will store the targets; docs/sharing.md explains the settings."""
    without = "or run the stages by their own commands"
    if not (project.base / "dvc.yaml").is_file():
        remedy = f"take the one that `mgd-pipeline init` writes into a new folder, {without}"
        yield Check("dvc", "warning", f"{project.base / 'dvc.yaml'}: no such file", remedy)
    above = (project.base, *project.base.parents)
    if not any((folder / ".git").exists() for folder in above):
        yield Check("dvc", "warning", f"{project.base} is in no git repository", f"git init && dvc init, {without}")
        return
    repository = next((folder for folder in above if (folder / ".dvc").is_dir()), None)
    if repository is None:
        init = "dvc init" if (project.base / ".git").exists() else "dvc init --subdir"
        yield Check("dvc", "warning", f"{project.base} is in a git repository, but in no DVC repository", f"{init}, {without}")
        return
    command = shutil.which("dvc", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}")
    if command is None:
        yield Check("dvc", "warning", "DVC is not installed", f"pip install 'mgd-pipeline[dvc]', {without}")
        return
    code, text = _ask(command, project.base, "config", "--list")
    config = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    if code:
        reason = text.splitlines()[-1] if text else "cannot be read"
        yield Check("dvc", "problem", f"{repository / '.dvc/config'}: {reason}", "correct it")
        return
    yield from dvc_cache(project, repository, Path(config.get("cache.dir", repository / ".dvc/cache")), config)


def _ask(command: str, folder: Path, *words: str) -> tuple[int, str]:
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run([command, *words], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, (done.stderr if done.returncode else done.stdout).strip()


def dvc_cache(project: Project, repository: Path, cache: Path, config: dict[str, str]) -> Checks[None]:
    types = re.findall("[a-z]+", config.get("cache.type", "reflink,copy"))  # DVC shows a list as it finds it in the file
    place = f"cache {cache}, cache.type {','.join(types)}{'' if 'cache.type' in config else ' (the default)'}"
    if not os.access(_there(cache), os.W_OK):
        yield Check("dvc", "problem", f"{place}: you may not write there", "ask its owner, or `dvc cache dir --local .dvc/cache`")
        return
    works = link_types(_there(cache), _there(project.base / ".mgd/work"))
    used = next((kind for kind in types if kind in works), None)
    links = "dvc config cache.type hardlink,symlink"
    if used is None:
        yield Check("dvc", "problem", f"{place}: none of them works between cache and project, only {', '.join(works)}", links)
    elif used == "copy":
        yield Check("dvc", "warning", f"{place}: only copy works here, so every store takes its space twice", links)
    else:
        yield Check("dvc", "ok", f"{place}: files are linked by {used}")
    if cache.resolve().is_relative_to(repository.resolve()):
        return

    # --- others use it, too
    mode = _there(cache).stat().st_mode
    if config.get("cache.shared") != "group":
        found = f"{cache} lies outside of the project, but what you put there others may not change or remove"
        yield Check("dvc", "warning", found, "if a group shares it: dvc config cache.shared group")
    elif mode & 0o2070 != 0o2070:
        found = f"{cache} is shared by a group, but its mode is {mode & 0o7777:o}, so what one member adds others may not read"
        yield Check("dvc", "warning", found, f"chmod -R 2775 {cache}, as docs/sharing.md says")
    else:
        yield Check("dvc", "ok", f"{cache} is shared by its group")
    if types == ["hardlink"]:
        found = "cache.type hardlink alone: the kernel forbids links to files of other members"
        yield Check("dvc", "warning", found, links)


def link_types(cache: Path, project: Path) -> list[str]:
    """Which of DVC's ways to bring a file from the cache into the project work here: tried with files that vanish again."""
    found = []
    with (
        tempfile.TemporaryDirectory(prefix=".doctor-", dir=cache) as a,
        tempfile.TemporaryDirectory(prefix=".doctor-", dir=project) as b,
    ):
        source, target = Path(a, "source"), Path(b)
        source.write_bytes(b"doctor")
        with contextlib.suppress(OSError), open(source, "rb") as old, open(target / "reflink", "wb") as new:
            if sys.platform != "linux":
                raise OSError(errno.ENOTSUP, "only tried on Linux")
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
            found.append("reflink")
        for kind, link in (("hardlink", os.link), ("symlink", os.symlink)):
            with contextlib.suppress(OSError):
                link(source, target / kind)
                found.append(kind)
    return [*found, "copy"]


# --- errors as checks -------------------------------------------------------------------------------------------------


def _guarded(area: str, checks: Checks[T]) -> Checks[T | None]:
    """The checks, and what stops them as a problem of its own; returns what they return, or None."""
    try:
        return (yield from checks)
    except (MGDError, OSError) as error:
        yield from _of_error(area, error)
        return None


def _of_error(area: str, error: MGDError | OSError | str) -> Iterator[Check]:
    """A problem for each line; errors say what is wrong, then "; ", then the remedy."""
    text = f"{error.filename or 'this machine'}: {error.strerror}" if isinstance(error, OSError) else str(error)
    for line in text.splitlines():
        found, _, remedy = line.partition("; ")
        yield Check(area, "problem", found, remedy)
