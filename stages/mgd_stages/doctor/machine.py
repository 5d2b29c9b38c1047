"""What `mgd-pipeline doctor` checks of the machine: installed versions, cores, memory and GPUs."""

from __future__ import annotations

import contextlib
import os
import platform
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mgd_pipeline.training.shared_memory import free_shared_memory, shared_memory_shortage
from mgd_stages.doctor.checks import Check, of_error
from mgd_stages.run.machine import cores, limit_text, memory_limit

_SHOWN = ("torch", "torchvision", "zarr", "segmentation-models-pytorch", "timm", "numpy", "dask", "dvc")


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
        remedy = "make a new environment with such a Python"
        yield Check("versions", "problem", f"Python {here} is here, {python} is needed", remedy)
    shown = {"Python": here}
    for requirement in map(Requirement, dict.fromkeys(wanted)):
        core = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        command = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            if core:
                yield Check("versions", "problem", f"{requirement.name} is not installed", command)
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            fact = f"{requirement.name} {installed} is here, {requirement.specifier} is needed"
            yield Check("versions", "problem" if core else "warning", fact, command)
        if requirement.name in _SHOWN:
            shown[requirement.name] = installed
    yield Check("versions", "ok", ", ".join(f"{name} {version}" for name, version in shown.items()))


def devices() -> Iterator[Check]:
    import torch

    memory = min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_cgroup_limits()])
    shared = free_shared_memory()
    workers = "" if shared is None else f", {shared / 1e9:.1f} GB of shared memory for --num-workers"
    threads = f"{cores()} CPU cores (torch uses {torch.get_num_threads()})"
    yield Check("devices", "ok", f"{threads}, {memory / 1e9:.1f} GB of memory{workers}")
    limit = memory_limit()
    for short in (None if limit is None else limit_text(limit), shared_memory_shortage()):
        yield from of_error("devices", short or "", "warning")

    gpus, complaints = _gpus()
    for number, gpu in enumerate(gpus):
        yield Check("devices", "ok", f"cuda:{number}: {gpu.name}, {gpu.total_memory / 1e9:.1f} GB")
    for text in complaints:
        yield Check("devices", "warning", f"torch says: {text}", "install a torch that fits driver and GPU")
    if not gpus and not complaints:
        yield _why_no_gpu()


def _cgroup_limits() -> list[int]:
    """Bytes of memory that the container, or the queue's group of processes and each group above it, may use."""
    group, limits = Path("/"), []
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        group = Path(next((line.split(":", 2)[2] for line in lines if line.startswith("0::")), "/"))
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # "max" where there is none
            limits.append(int((Path("/sys/fs/cgroup") / folder.relative_to("/") / "memory.max").read_text()))
    return limits


def _gpus() -> tuple[list[Any], list[str]]:
    """What torch knows about each GPU, and its complaints about old drivers and about GPUs that it does not support or reach."""
    import torch

    gpus, complaints = [], []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            if torch.cuda.is_available():
                gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        except RuntimeError as error:
            complaints = [error]
    texts = [" ".join(str(text).split())[:300] for text in (*(warning.message for warning in told), *complaints)]
    return gpus, list(dict.fromkeys(texts))


def _why_no_gpu() -> Check:
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else ""
    driver = Path("/proc/driver/nvidia/version").exists()
    masked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if built and masked is not None:
        return Check("devices", "warning", f"no GPU: CUDA_VISIBLE_DEVICES is {masked!r}", "unset it, or go on with the CPU")
    if built:
        why = "a driver but no GPU" if driver else "no driver"
        remedy = "install NVIDIA's driver, or go on with the CPU, on which all stages run, more slowly"
        return Check("devices", "warning", f"torch is built for {built}, but finds {why}", remedy)
    if driver:
        remedy = "install a torch for CUDA (pytorch.org has the command)"
        return Check("devices", "warning", "an NVIDIA driver is here, but torch is built for the CPU only", remedy)
    return Check("devices", "ok", "no GPU, and torch is built for the CPU: all stages run, heavy networks slowly")
