"""Which stages of a project are up to date.

What a stage reads and makes stands in the template of dvc.yaml. When a stage has finished, .mgd/run/<stage>.json notes the
parameters and files that it read and the files that it made, so that no DVC is needed to see a change. Commands of single stages
write the notes, too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, get_args

from mgd_pipeline.caches.format import sha256_file
from mgd_pipeline.data.listing import list_files
from mgd_pipeline.durable import replace_file
from mgd_pipeline.errors import MGDError
from mgd_pipeline.params import Params, RetrainTeachers, ShapesData
from mgd_stages.projects.dvc_file import Stage, looked_up, read_stages
from mgd_stages.projects.dvc_yaml import render_dvc
from mgd_stages.run.progress import console
from mgd_stages.run.project import Project, settings_of

_PARTS = ("inputs", "outputs")
_WHOLE_FILE = "params.yaml"
"""The report depends on all parameters; --set counts, so the file itself is not read."""

_Files = dict[str, list[Any]]
"""[bytes, time of the last change in ns, SHA-256], each None if it does not count, by the path below an input or output, which is
'' for a file."""


class Records:
    """What is known of the stages of a project, in the order in which they run."""

    def __init__(self, project: Project) -> None:
        self.project, self.folder = project, project.base / ".mgd/run"
        self.stages = {stage.name: stage for stage in _in_order(read_stages(render_dvc(project), project))}
        # A record has the inputs under each choice: another choice alone makes no stage run again.
        choices = [project.params.model_copy(update={"retrain_teachers": choice}) for choice in get_args(RetrainTeachers)]
        every = [stage for params in choices for stage in read_stages(render_dvc(Project(project.base, params)), project)]
        self._inputs = {name: frozenset[str]().union(*(s.dependencies for s in every if s.name == name)) for name in self.stages}
        self._hashed: dict[Path, list[Any]] = {}
        for name in self.stages:
            for part in _PARTS:
                for place, files in self._read(name).get(part, {}).items():
                    self._hashed |= {project.base / place / below: file for below, file in (files or {}).items()}

    def has(self, stage: Stage) -> bool:
        """Whether there is a record of a stage, up to date or not."""
        return bool(self._read(stage.name))

    def outdated(self, stage: Stage) -> str | None:
        """Why a stage must run, as a clause; None if it is up to date."""
        record = self._read(stage.name)
        if not record:
            return "it has not run yet"
        for key, value in self._settings(stage).items():
            if value != record["settings"].get(key):
                changed = _differing({key: record["settings"].get(key)}, {key: value})
                return f"{', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''} changed"
        for part, what in zip(_PARTS, ("changed", "is not what this stage made"), strict=True):
            for place, files in self._files(stage.dependencies if part == "inputs" else stage.outputs).items():
                if files is None:
                    return f"{place} is missing"
                if _contents(files) != _contents(record[part].get(place) or {}):
                    return f"{place} {what}"
        return None

    def waiting(self) -> set[str]:
        """Names of the stages that must run, and of stages that read what such a stage makes."""
        waiting, remade = set[str](), set[str]()
        for stage in self.stages.values():
            if stage.dependencies & remade or self.outdated(stage) is not None:
                waiting.add(stage.name)
                remade |= stage.outputs
        return waiting

    @contextmanager
    def noting(self, stage: Stage) -> Iterator[None]:
        """Writes the record of a stage that the body runs. A stage that raises leaves none, nor does one that lacks an output.

        The inputs count as they were before the stage: what changes while it runs makes it run again.
        """
        settings, inputs = self._settings(stage), self._files(self._inputs[stage.name])
        yield
        outputs = self._files(stage.outputs)
        if None in outputs.values():
            return
        record, path = {"settings": settings, "inputs": inputs, "outputs": outputs}, self._path(stage.name)
        try:
            replace_file(path, json.dumps(record, allow_nan=False).encode())
        except OSError as error:  # the stage itself has done its work
            console.print(f"warning: {path}: {error.strerror}; `mgd-pipeline run` will run {shown(stage.name)} again")

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _read(self, name: str) -> dict[str, Any]:
        """The record of a stage; empty if there is none, or none that can be read."""
        with suppress(OSError, ValueError):
            record = json.loads(self._path(name).read_bytes())
            if isinstance(record, dict) and all(isinstance(record.get(part), dict) for part in ("settings", *_PARTS)):
                return record
        return {}

    def _settings(self, stage: Stage) -> dict[str, Any]:
        """The values of the keys that a stage depends on. Defaults are left out: a key that a version adds changes nothing."""
        values = self.project.params.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        keys = sorted(Params.model_fields if _WHOLE_FILE in stage.dependencies else stage.params)
        settings = {key: looked_up(key, values) for key in keys}
        if stage.name.removeprefix("precompute-teachers@") in self.project.params.heads.values():
            settings["heads on its embeddings"] = True  # its cache then holds the evaluation split, too
        return settings

    def _files(self, places: frozenset[str]) -> dict[str, _Files | None]:
        """The files of inputs or outputs; None for one that is missing or cannot be read."""
        return {place: self._below(place) for place in sorted(places - {_WHOLE_FILE})}

    def _below(self, place: str) -> _Files | None:
        top = self.project.base / place
        try:
            paths = list_files(top) if top.is_dir() else [top]
            return {path.relative_to(top).as_posix() if path != top else "": self._file(place, top, path) for path in paths}
        except (OSError, MGDError):  # the stage itself says what is wrong
            return None

    def _file(self, place: str, top: Path, path: Path) -> list[Any]:
        facts, data = path.stat(), self.project.params.data
        now = [facts.st_size, facts.st_mtime_ns]
        if place == os.path.normpath(data.root) and not isinstance(data, ShapesData):
            return [*now, None]  # there may be many photos, and the manifest that prepare-data makes has their hashes
        if top.suffix == ".zarr" and path.parent != top.parent and path.name != "commit.json":
            return [facts.st_size, None, None]  # caches may be large, and their commit.json has the hashes
        known = self._hashed.get(path)
        if known is None or known[:2] != now or known[2] is None:
            known = self._hashed[path] = [*now, sha256_file(path)]
        return known


def _in_order(stages: list[Stage]) -> list[Stage]:
    """The stages so that each comes after the stages that make what it reads, otherwise as they are."""
    ordered: list[Stage] = []
    while waiting := [stage for stage in stages if stage not in ordered]:
        ordered.append(next(one for one in waiting if not any(one.dependencies & other.outputs for other in waiting)))
    return ordered


def shown(stage: str) -> str:
    """A stage as its own progress calls it: train-teacher@wide is `train-teacher wide`."""
    names = {"train-student": "train-student distilled", "train-student-supervised": "train-student supervised"}
    return names.get(stage, stage.replace("@", " "))


def _contents(files: _Files) -> dict[str, Any]:
    """What decides whether files are the same: the hash, or size and time without a hash."""
    return {below: sha256 or [size, changed] for below, (size, changed, sha256) in files.items()}


def _differing(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Dotted names of values that differ; a section that is None has defaults only."""
    before, after = (settings_of(**{key: value for key, value in both.items() if value is not None}) for both in (then, now))
    return [name for name in {**before, **after} if before.get(name) != after.get(name)] or list(now)


@contextmanager
def noted(project: Project, name: str) -> Iterator[None]:
    """Writes the record of a stage that the body runs as a command of its own."""
    if os.environ.get("RANK", "0") != "0":  # torchrun starts many of us
        yield
        return
    records = Records(project)
    if (stage := records.stages.get(name)) is None:
        yield
        return
    with records.noting(stage):
        yield
