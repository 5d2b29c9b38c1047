"""The matrix of a study: partitions, seeds and variants over shared teachers and teacher caches.

    <output>/
      1-16/                     a project for each partition: manifest, teachers, targets
        stores/<options>/       targets of the same teachers, stored with other options
        runs/<variant>/<seed>/  a project for each run, whose manifest, teachers and targets are links
      results.parquet  table.md  plot.png

Every run is an ordinary project: its params.yaml says what it was, and each stage can be called in it by hand.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgd_pipeline.durable import replace_file
from mgd_pipeline.errors import ParamsError
from mgd_pipeline.params import Params, ShapesData
from mgd_pipeline.params_file import load_params, override_params, parse_params
from mgd_pipeline.words import listed, verb
from mgd_stages.projects.presets import render_params
from mgd_stages.run.class_tables import read_numbers
from mgd_stages.study.variants import Variant

_SHARED = ("raw", "manifest", "teachers")


@dataclass(frozen=True)
class Matrix:
    """Every variant is run on every partition with every seed."""

    partitions: Sequence[str]
    seeds: int
    """How many, from the seed of params.yaml on."""
    variants: Sequence[Variant]


@dataclass(frozen=True)
class Run:
    """One student of the study."""

    partition: str
    variant: Variant
    seed: int
    folder: Path
    shared: Path
    """The project of its partition."""
    caching: Path
    """The project whose teacher caches it reads."""

    @property
    def key(self) -> tuple[str, str, int]:
        """Partition, variant and seed: no two runs of a study have the same."""
        return self.partition, self.variant.name, self.seed

    @property
    def done(self) -> Path:
        return self.folder / "data/results/run.json"

    @property
    def finished(self) -> bool:
        """Whether the results are there; where a part of them was removed, the run is evaluated again."""
        evaluation = self.folder / "data/results/evaluation"
        return self.done.exists() and all((evaluation / name).exists() for name in ("metrics.json", "class_iou.tsv"))


def _cached(base: Params, targets: Sequence[str]) -> Params:
    """The parameters of a project that makes teacher caches and trains nothing: the losses of the base may ask for more than these
    targets keep."""
    without = []
    if any("log-probability" in override for override in targets):
        without = ["losses.image=0", "losses.channel=0", "losses.pixel_distance=cross-entropy"]
    if base.losses.prior_adjustment and any("top_k" in override for override in targets):
        without.append("losses.prior_adjustment=0")
    return override_params(base, [*targets, *without])


def projects_and_runs(config: Path, overrides: Sequence[str], output: Path, matrix: Matrix) -> tuple[dict[Path, Params], list[Run]]:
    """The parameters of every project of the study, by its folder, and the runs among the projects."""
    projects: dict[Path, Params] = {}
    runs = []
    for share in dict.fromkeys(matrix.partitions):
        base = anchored(load_params(config, [*overrides, f"data.partition={share}"]), config.resolve().parent)
        shared = output / share.replace("/", "-")
        projects[shared] = base
        for variant in matrix.variants:
            caching, cached = shared, _cached(base, variant.targets)
            if cached.targets != base.targets:
                name = re.sub(r"[^a-z0-9.]+", "-", " ".join(variant.targets).replace("targets.", "").lower()).strip("-")
                caching = shared / "stores" / name
                projects[caching] = cached
            for seed in range(base.seed, base.seed + matrix.seeds):
                folder = shared / "runs" / variant.name / str(seed)
                projects[folder] = override_params(base, [*variant.overrides, f"seed={seed}"])
                runs.append(Run(share, variant, seed, folder, shared, caching))
    for folder, params in projects.items():
        path = folder / "params.yaml"
        if path.exists() and load_params(path) != params:
            raise ParamsError(f"{path}: holds other parameters than this study; choose another folder, or remove {folder}")
    return projects, runs


def earlier_runs(output: Path, projects: dict[Path, Params], runs: list[Run]) -> list[Run]:
    """The finished runs below `output` that are not among `runs`, by partition, variant and seed.

    Raises ParamsError for a run with other settings: one table never mixes settings.
    """
    earlier, base = [], projects[runs[0].shared]
    # The settings of each variant, without partition and seed; a run of the matrix decides them.
    settings = {run.variant.name: (_settings(projects[run.folder]), run.folder) for run in reversed(runs)}
    for path in output.glob("*/runs/*/*/params.yaml"):
        folder, shared, name = path.parent, path.parents[3], path.parents[1].name
        params, done = load_params(path), folder / "data/results/run.json"
        if folder in projects or not done.exists():
            continue
        student = (read_numbers(done) or {}).get("student", "distilled")
        # 0.1.0 did not say which student it is.
        alone = student == "supervised" or not (folder / "data/students" / student).exists()
        caching = (folder / "data/targets").resolve().parent.parent
        run = Run(str(params.data.partition), Variant(name, supervised_only=alone), params.seed, folder, shared, caching)
        if not run.finished:
            continue
        of_partition = load_params(shared / "params.yaml")
        if _settings(of_partition) != _settings(base) or of_partition.seed != base.seed:
            raise ParamsError(
                f"{shared / 'params.yaml'}: holds other parameters than this study, and one table would mix their runs; choose "
                f"another folder, or move {shared} away"
            )
        same, other = settings.setdefault(name, (_settings(params), folder))
        if _settings(params) != same:
            raise ParamsError(
                f"{path}: the variant {name} has other parameters than in {other}, and one table would mix their runs; give the "
                f"variant another name, or move {folder} away"
            )
        earlier.append(run)
    return sorted(earlier, key=lambda run: run.key)


def _settings(params: Params) -> dict[str, Any]:
    """What the runs of one variant have in common: everything but partition and seed."""
    raw = params.model_dump()
    raw["data"]["partition"], raw["seed"] = None, None
    return raw


def run_names(runs: Iterable[tuple[str, str, int]]) -> list[str]:
    """'1/8 distilled (seeds 0 and 1)' for each partition and variant of (partition, variant, seed)."""
    seeds: dict[str, list[str]] = {}
    for partition, variant, seed in runs:
        seeds.setdefault(f"{partition} {variant}", []).append(str(seed))
    return [f"{name} ({verb(len(of_name), 'seed', 'seeds')} {listed(of_name)})" for name, of_name in seeds.items()]


def anchored(params: Params, base: Path) -> Params:
    """Makes the paths absolute of what projects elsewhere read but do not make; `base` is the folder of params.yaml."""
    raw = params.model_dump()
    if not isinstance(params.data, ShapesData):
        raw["data"]["root"] = str(base / params.data.root)
    for name, teacher in raw["teachers"].items():
        trained = name in params.train_teachers
        teacher["weights"] = f"data/teachers/{name}.safetensors" if trained else str(base / teacher["weights"])
        if name in params.heads:  # runs whose caches have other options share their teachers, and heads belong to caches
            teacher["weights"] = f"data/targets/{name}.safetensors"
    for section in (*raw["teachers"].values(), raw["student"]["network"]):
        for key in ("encoder_weights", "transformers"):  # where these are paths, and not names on a hub
            if key in section and (base / section[key]).exists():
                section[key] = str(base / section[key])
    return parse_params(raw)


def write_projects(projects: dict[Path, Params], runs: list[Run]) -> None:
    """Writes every params.yaml that is missing and links what runs share."""
    for folder, params in projects.items():
        (folder / "data").mkdir(parents=True, exist_ok=True)
        path = folder / "params.yaml"
        if not path.exists():
            replace_file(path, render_params(params).encode())
    for run in runs:
        for name in _SHARED:
            link_folder(run.shared / "data" / name, run.folder / "data" / name)
            if run.caching != run.shared:
                link_folder(run.shared / "data" / name, run.caching / "data" / name)
        link_folder(run.caching / "data/targets", run.folder / "data/targets")


def link_folder(target: Path, link: Path) -> None:
    """A relative link to a folder, which may be there already. Raises ParamsError where something else is."""
    with suppress(FileExistsError):  # made by an earlier call, or by one that runs beside this one
        link.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
    if not link.is_symlink():
        raise ParamsError(
            f"{link}: must be a link to {target}; a copy that followed links lost it (`cp -a` and `rsync -a` keep links); "
            "move it away"
        )
