"""Where things are in a project, and the command line's options as values."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgd_pipeline.errors import ParamsError
from mgd_pipeline.params import NetworkParams, Params, SmpTeacher
from mgd_pipeline.params_file import load_params

if TYPE_CHECKING:
    import torch

    from mgd_pipeline.data.manifest import Manifest


BEST = "data/students/best.safetensors"
CLASSES = "data/manifest/classes.json"


@dataclass(frozen=True)
class Project:
    """A folder with params.yaml. Results are written below its data/, work in progress below its .mgd/work/."""

    base: Path
    params: Params

    @property
    def name(self) -> str:
        """What the output and the report call the data set: one's own has the name of the project's folder."""
        dataset = self.params.data.dataset
        return self.base.name or dataset if dataset == "folder" else dataset

    @property
    def manifest(self) -> Path:
        return self.base / "data/manifest"

    @property
    def results(self) -> Path:
        return self.base / "data/results"

    def teacher(self, name: str) -> Path:
        return self.base / self.params.teachers[name].weights

    def targets(self, name: str) -> Path:
        return self.base / f"data/targets/{name}.zarr"

    def student(self, name: str) -> Path:
        return self.base / f"data/students/{name}/student.safetensors"

    @property
    def best_student(self) -> Path:
        """A copy of the better student, which `evaluate` writes."""
        return self.base / BEST

    def work(self, name: str) -> Path:
        """A folder for unfinished work. It must be on the file system of the results: finished work is moved by one rename."""
        return self.base / ".mgd/work" / name


def open_project(config: Path, overrides: Sequence[str] = ()) -> Project:
    return Project(config.resolve().parent, load_params(config, list(overrides)))


def output_folders(project: Project) -> list[Path]:
    """Every folder that a stage writes to, whether it exists or not."""
    data = project.base / "data"
    trained = [project.teacher(name).parent for name in [*project.params.train_teachers, *project.params.heads]]
    known = [project.manifest, *trained, data / "targets", data / "students", project.results, project.base / ".mgd/work"]
    below = [folder for top in known[-3:] if top.is_dir() for folder in top.glob("*/") if folder.suffix != ".zarr"]
    return list(dict.fromkeys([*known, *below]))


def check_teacher(project: Project, name: str) -> None:
    """Raises ParamsError for a teacher that params.yaml does not have."""
    if name not in project.params.teachers:
        raise ParamsError(f"--teacher {name}: must be one of {', '.join(project.params.teachers)}")


def networks_of(params: Params) -> dict[str, NetworkParams]:
    """The networks that this project builds itself, by their keys in params.yaml: the student, and teachers with a decoder."""
    teachers = {f"teachers.{name}": teacher for name, teacher in params.teachers.items() if isinstance(teacher, SmpTeacher)}
    return {"student.network": params.student.network, **teachers}


def seen_sizes(params: Params, key: str, manifest: Manifest | None) -> list[tuple[int, int]]:
    """Height and width of inputs that a network of `networks_of` will see, pixels: a training view and, where images are seen
    whole, three of the manifest's: the smallest, the largest, and one whose sides are odd multiples of 32 if there is one."""
    name, targets = key.removeprefix("teachers."), params.targets
    student = name == key
    sizes = [(params.views.crop[0], params.views.crop[1])] if student or name in params.train_teachers else []
    if student:
        whole = params.evaluation.window is None
    else:
        whole = targets.window is None and targets.tta is None and params.teachers[name].short_side is None
    if manifest is not None and whole:
        rows = [*manifest.split(params.evaluation.split), *([] if student else manifest.training)]
        few = few_sizes(manifest.size(row) for row in rows)
        sizes += [(-(-height // 32) * 32, -(-width // 32) * 32) for height, width in few]
    return list(dict.fromkeys(sizes))


def few_sizes(sizes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The smallest size, the largest, and one whose sides, padded, are odd multiples of 32 where there is one."""
    if not (known := sorted(set(sizes))):
        return []
    odd = max(known, key=lambda size: sum((side - 1) % 64 < 32 for side in size))
    return list(dict.fromkeys([known[0], known[-1], odd]))


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; under torchrun each process has a GPU of its own."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ParamsError(f"--device {name}: write auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ParamsError(f"--device {name}: torch sees no CUDA device here; use cpu or auto")
    return device


def require_folder(place: Path) -> None:
    """Raises ParamsError if a folder cannot be made, because it or a folder above it is a file."""
    there = next(path for path in (place, *place.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise ParamsError(f"{there}: is not a folder, so nothing can be written below it; name another place")


def short_of_memory(error: RuntimeError) -> bool:
    """Whether an error means that a device has too little memory; not every library has an error class for it."""
    return re.search("out of memory|can't allocate memory", str(error), re.IGNORECASE) is not None


def check_workers(workers: str | None, scheduler: str | None, device: str) -> None:
    """Raises ParamsError for --workers that is neither a number nor gpus, --scheduler that is no address, and contradictions."""
    if workers is not None and scheduler is not None:
        raise ParamsError(f"--workers {workers} --scheduler {scheduler}: choose one")
    if workers is not None and workers != "gpus" and not re.fullmatch(r"[1-9]\d*", workers):
        raise ParamsError(f"--workers {workers}: write a number of processes, or gpus for one on each GPU")
    # Protocols by which Dask reaches a scheduler; tcp if none is named.
    if scheduler is not None and not re.fullmatch(r"((tcp|tls|wss?|ucxx?)://)?[^/\s]+:\d{1,5}/?", scheduler):
        raise ParamsError(
            f"--scheduler {scheduler}: write protocol, host and port of a Dask scheduler that runs, such as tcp://host:8786, or "
            "tls://host:8786 where it has certificates"
        )
    if workers == "gpus" and device not in ("auto", "cuda"):
        raise ParamsError(f"--workers gpus --device {device}: choose one; CUDA_VISIBLE_DEVICES says which GPUs")


def parse_shards(text: str) -> slice:
    """'0::8' -> slice(0, None, 8), as Python writes it; ParamsError for anything else."""
    if not re.fullmatch(r"(-?\d+)?:(-?\d+)?(:([1-9]\d*)?)?", text):
        raise ParamsError(f"--shards {text}: write a slice, such as 0::8 for every eighth shard, or 3:4 for one")
    return slice(*(int(part) if part else None for part in text.split(":")))


def parse_window(text: str | None, option: str = "--window") -> tuple[int, int] | None:
    """'512x768' to (512, 768), height and width in pixels. Raises ParamsError."""
    if text is None:
        return None
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ParamsError(f"{option} {text}: write height x width in pixels, such as 512x512")
    return int(height), int(width)


def parse_overlap(overlap: float | None, window: tuple[int, int] | None) -> float:
    """The share by which windows overlap, by default a third. Raises ParamsError."""
    if overlap is None:
        return 1 / 3
    if window is None:
        raise ParamsError(f"--overlap {overlap:g}: applies only to windows; give --window, too")
    if not 0 <= overlap < 1:
        raise ParamsError(f"--overlap {overlap:g}: write a share from 0 to below 1, such as 0.5")
    return overlap


def key_of(*parts: Any) -> str:
    """A hash of everything that decides a result; unfinished work belongs to one key."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str, allow_nan=False).encode()).hexdigest()


def settings_of(**sections: Any) -> dict[str, Any]:
    """Sections of the parameters, as `model_dump` gives them, by dotted names such as "student.steps"; for notes in JSON."""
    settings: dict[str, Any] = {}
    for name, value in sections.items():
        inner = {f"{name}.{key}": part for key, part in settings_of(**value).items()} if isinstance(value, dict) else {name: value}
        settings |= inner
    return settings


def manifest_hash(project: Project) -> str:
    files = [project.manifest / name for name in ("images.parquet", "partition.parquet")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
