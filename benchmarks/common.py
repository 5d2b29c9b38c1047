"""What the benchmarks share: their command line, Markdown tables, processes of their own, and projects with random teachers."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from mgd_stages.projects.init import init_project
from mgd_stages.run.project import Project, open_project


class Table(NamedTuple):
    """A Markdown table and the notes below it."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: Sequence[str]

    def markdown(self) -> str:
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        return "\n".join([f"## {self.title}", "", *(f"| {' | '.join(line)} |" for line in lines), "", "\n\n".join(self.notes), ""])


class Setting(NamedTuple):
    """Where a part of a benchmark works, and how long."""

    folder: Path
    """empty, and its own"""
    device: str = "cpu"
    quick: bool = False
    newest: Path | None = None
    """another Python, for the newest zarr in an environment of its own; None for the zarr of this environment"""


Part = Callable[[Setting], list[Table]]


def parser(description: str | None) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="seconds instead of minutes; shows that it runs, not how fast")
    options.add_argument("--device", default="auto", help="of networks: cpu or cuda")
    options.add_argument("--folder", type=Path, help="an empty folder to work in, on the disk to be measured (4 GB)")
    options.add_argument("--newest", type=Path, help="a Python for the newest zarr, in an environment made in build/peers")
    return options


def newest_python(setting: Setting) -> str:
    """The Python of an environment with the newest zarr and zarrs and what our reader needs, made anew in build/peers."""
    if setting.newest is None:
        return sys.executable
    folder = Path(__file__).parents[1] / "build/peers"
    subprocess.run([setting.newest, "-m", "venv", "--clear", folder], check=True)
    needed = ["zarr", "zarrs", "numpy", "pyarrow", "google-crc32c", "pydantic", "ruamel.yaml", "pillow"]
    subprocess.run([folder / "bin/python", "-m", "pip", "install", "--quiet", "--upgrade", *needed], check=True)
    return str(folder / "bin/python")


def measure(arguments: argparse.Namespace, *parts: Part) -> Iterator[Table]:
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for part in parts:
            place = Path(folder, part.__name__)
            place.mkdir()
            yield from part(Setting(place, arguments.device, arguments.quick, arguments.newest))


def print_tables(description: str | None, *parts: Part) -> None:
    """The command line of a benchmark."""
    for table in measure(parser(description).parse_args(), *parts):
        print(table.markdown(), flush=True)


def in_child(function: Callable[..., dict[str, float]], *arguments: object) -> dict[str, float]:
    """Calls a function in a new process, so that memory is that of this call alone."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def memory(field: str) -> float:
    """MB of memory that this process has now (VmRSS), or had at most (VmHWM; ru_maxrss would include the parent's)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def random_project(folder: Path, overrides: list[str], teachers: Sequence[str]) -> Project:
    """A prepared project of shapes whose teachers have random weights."""
    from mgd_pipeline.data.manifest import read_manifest
    from mgd_pipeline.networks.segmentation import build_network
    from mgd_pipeline.networks.weights import save_weights
    from mgd_pipeline.params import SmpTeacher
    from mgd_stages.stages.prepare_data import prepare_data

    init_project("shapes", None, "1/4", folder)
    project = open_project(folder / "params.yaml", overrides)
    prepare_data(project)
    classes = len(read_manifest(project.manifest, project.base).classes)
    for name in teachers:
        params = project.params.teachers[name]
        assert isinstance(params, SmpTeacher)
        save_weights(project.teacher(name), build_network(params, classes, base=project.base).model.state_dict(), {})
    return project
