"""Where `dvc.yaml` and `params.yaml` disagree: `dvc.yaml` names teachers and files that DVC cannot take from the parameters.

DVC notices a wrong output only after its stage has run, and a missing dependency never: so `doctor` says it, and the first stage
that runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mgd_pipeline.errors import ParamsError
from mgd_pipeline.params import IdLists, ShapesData, SmpTeacher, TransformersTeacher
from mgd_pipeline.params_file import merge_markers
from mgd_stages.run.progress import console
from mgd_stages.run.project import Project


@dataclass(frozen=True)
class Disagreement:
    found: str
    remedy: str
    fails: bool
    """Whether `dvc repro` is bound to fail; otherwise DVC does not notice that something has changed."""


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml, one for each item where it is a foreach; paths relative to the file's folder."""

    name: str
    command: str
    dependencies: frozenset[str]
    outputs: frozenset[str]
    """Metrics and plots among them."""


_OF_A_TEACHER = re.compile(
    r"data/targets/(?P<a>[^/]+)\.zarr|data/results/teachers/(?P<b>[^/]+?)(?:\.json|-masks\.parquet|-confusion\.csv)"
    r"|data/results/compare-teachers/(?P<c>[^/]+)-confusion\.csv|data/teachers/(?P<d>[^/]+)\.safetensors"
)
"""What belongs to one teacher, by the names that the stages give their results."""


def check_dvc_file(project: Project) -> None:
    """Says in one line where dvc.yaml and params.yaml disagree.

    Raises ParamsError in a stage that DVC runs where `dvc repro` is bound to fail, with a line for each reason: nothing has been
    computed then.
    """
    found = disagreements(project)
    under_dvc = "DVC_STAGE" in os.environ and project.base == Path.cwd().resolve()
    if under_dvc and any(one.fails for one in found):
        raise ParamsError("\n".join(f"{one.found}; {one.remedy}" for one in found if one.fails))
    if found and os.environ.get("RANK", "0") == "0":  # torchrun starts many of us
        first = min(found, key=lambda one: not one.fails)
        more = f" (and {len(found) - 1} more: `mgd-pipeline doctor`)" if len(found) > 1 else ""
        console.print(f"warning: {first.found}; {first.remedy}{more}")


def disagreements(project: Project) -> list[Disagreement]:
    """All of a project; none where it has no dvc.yaml, or one whose stages are not ours."""
    path = project.base / "dvc.yaml"
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    if markers := merge_markers(text):
        return [Disagreement(f"{path}: {markers}", "keep one version of each conflict and remove the marked lines", True)]
    try:
        stages = read_stages(text, project)
    except (YAMLError, ValueError) as error:
        return [Disagreement(f"{path}: not valid YAML: {' '.join(str(error).split())[:200]}", "correct it", True)]
    foreign = list(_foreign_teachers(project, path, text, stages))
    return [
        *foreign,
        *_other_weights(project, path, stages),
        *_data_root(project, path, stages),
        # Where a teacher has another name, one line says so.
        *([] if foreign else _unnamed_stores(project, path, stages)),
        *_unnamed_files(project, path, stages),
    ]


# --- dvc.yaml ---------------------------------------------------------------------------------------------------------


def read_stages(text: str, project: Project) -> list[Stage]:
    """The stages of a dvc.yaml, with `foreach` unrolled and what stands in ${} taken from the parameters."""
    raw = YAML(typ="safe", pure=True).load(text)
    sections = raw.get("stages") if isinstance(raw, dict) else None
    params = project.params.model_dump(by_alias=True)
    found: list[Stage] = []
    for name, section in sections.items() if isinstance(sections, dict) else ():
        if not isinstance(section, dict):
            continue
        if "foreach" not in section:
            found.append(_stage(str(name), section, params))
            continue
        items, body = section["foreach"], section.get("do")
        if isinstance(items, str):
            items = _looked_up(items.removeprefix("${").removesuffix("}"), params)
        if isinstance(items, list):
            items = {str(item): item for item in items}
        if not isinstance(items, dict) or not isinstance(body, dict):
            continue
        for key, item in items.items():
            found.append(_stage(f"{name}@{key}", body, {**params, "key": key, "item": item}))
    return found


def _stage(name: str, section: dict[str, Any], values: dict[str, Any]) -> Stage:
    folder = _filled(str(section.get("wdir", ".")), values)

    def paths(*kinds: str) -> frozenset[str]:
        entries = [entry for kind in kinds for entry in section.get(kind) or []]
        # An entry with options is a mapping from the path to them.
        texts = [_filled(str(next(iter(entry)) if isinstance(entry, dict) else entry), values) for entry in entries]
        return frozenset(os.path.normpath(os.path.join(folder, text)) for text in texts)

    command = section.get("cmd", "")
    return Stage(
        name,
        _filled(" ".join(map(str, command)) if isinstance(command, list) else str(command), values),
        paths("deps"),
        paths("outs", "metrics", "plots"),
    )


def _filled(text: str, values: dict[str, Any]) -> str:
    return re.sub(r"\$\{([^}]+)\}", lambda match: str(_looked_up(match[1].strip(), values) or match[0]), text)


def _looked_up(key: str, values: dict[str, Any]) -> Any:
    """The value of a dotted key; None where there is none, such as one of another file of variables."""
    found: Any = values
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _covered(path: str, by: frozenset[str]) -> bool:
    """Whether a path or a folder above it is among others."""
    return os.path.normpath(path) in by or any(str(above) in by for above in PurePosixPath(os.path.normpath(path)).parents)


def _running(stages: list[Stage], command: str, *, without: str = "--supervised-only") -> list[Stage]:
    """Stages that run a command of ours."""
    return [stage for stage in stages if re.search(rf"\b{command}(?![\w-])", stage.command) and without not in stage.command]


# --- what may disagree ------------------------------------------------------------------------------------------------


def _foreign_teachers(project: Project, path: Path, text: str, stages: list[Stage]) -> Iterator[Disagreement]:
    """Teachers that dvc.yaml names and params.yaml does not have: renamed or removed ones."""
    made = frozenset[str]().union(*(stage.outputs for stage in stages))
    weights = {teacher.weights for teacher in project.params.teachers.values()}
    foreign: dict[str, bool] = {}
    for stage in stages:
        for place in sorted(stage.outputs | stage.dependencies):
            match = _OF_A_TEACHER.fullmatch(place)
            name = next(filter(None, match.groups()), "") if match else ""
            if not name or name in project.params.teachers or place in weights:
                continue
            absent = place in stage.outputs or not (_covered(place, made) or (project.base / place).exists())
            foreign[name] = foreign.get(name, False) or absent
    stores = _named_stores(stages)
    unnamed = [name for name in project.params.teachers if name not in stores]
    for name, fails in foreign.items():
        lines = [
            str(number)
            for number, line in enumerate(text.splitlines(), 1)
            if any(name in match.groups() for match in _OF_A_TEACHER.finditer(line))
        ]
        where = f"{'line' if len(lines) == 1 else 'lines'} {', '.join(lines)}"
        remedy = (
            f"write {unnamed[0]} there" if len(unnamed) == 1 else "name the teachers of params.yaml there, or remove these lines"
        )
        found = f"{path}: {where}: the teacher {name} is not in params.yaml (teachers: {', '.join(project.params.teachers)})"
        yield Disagreement(found, remedy, fails)


def _named_stores(stages: list[Stage]) -> set[str]:
    """Teachers whose stores some stage depends on."""
    dependencies = frozenset[str]().union(*(stage.dependencies for stage in stages))
    return {match["a"] for place in dependencies if (match := _OF_A_TEACHER.fullmatch(place)) and match["a"]}


def _other_weights(project: Project, path: Path, stages: list[Stage]) -> Iterator[Disagreement]:
    """Weights that train-teacher writes elsewhere than dvc.yaml expects."""
    for name in project.params.train_teachers:
        weights = project.params.teachers[name].weights
        for stage in stages:
            if re.search(rf"train-teacher --teacher[ =]{re.escape(name)}(?!\S)", stage.command) is None:
                continue
            expected = sorted(place for place in stage.outputs if place.endswith((".safetensors", ".pth", ".pt")))
            if expected and not _covered(weights, stage.outputs):
                found = f"{path}: the stage {stage.name} makes {expected[0]}, and teachers.{name}.weights is {weights}"
                yield Disagreement(found, f"write weights: {expected[0]}", True)


def _data_root(project: Project, path: Path, stages: list[Stage]) -> Iterator[Disagreement]:
    """A dvc.yaml of another kind of data set than params.yaml has."""
    data = project.params.data
    for stage in _running(stages, "prepare-data"):
        made, read = _covered(data.root, stage.outputs), _covered(data.root, stage.dependencies)
        if isinstance(data, ShapesData) and not made:
            found = f"{path}: the stage {stage.name} does not make {data.root}, which the built-in data set is written to"
            yield Disagreement(found, f"write {data.root} under its outs, and remove it from its deps", True)
        elif made and not isinstance(data, ShapesData):
            found = (
                f"{path}: the stage {stage.name} makes {data.root}, and DVC removes what a stage makes before the stage runs: the "
                f"data set, or the link to it"
            )
            yield Disagreement(found, "take that path from its outs and write it under its deps, before the next `dvc repro`", True)
        elif not made and not read:
            found = f"{path}: {stage.name} must depend on {data.root}: DVC does not notice new images otherwise"
            yield Disagreement(found, f"write {data.root} under its deps", False)


def _unnamed_stores(project: Project, path: Path, stages: list[Stage]) -> Iterator[Disagreement]:
    """Teachers whose results a stage reads without depending on them: DVC may run it too early, and not again."""
    params = project.params
    for name in params.teachers:
        store, measured = f"data/targets/{name}.zarr", f"data/results/teachers/{name}.json"
        readers = {"compare-teachers": store, "evaluate": measured, "report": store}
        if name in params.losses.used_teachers:
            readers["train-student"] = store
        lacking = [
            (stage.name, place)
            for command, place in readers.items()
            for stage in _running(stages, command)
            if not _covered(place, stage.dependencies)
        ]
        if lacking:
            places = " and ".join(dict.fromkeys(place for _, place in lacking))
            who = ", ".join(stage for stage, _ in lacking)
            found = f"{path}: {who} must depend on {places}: DVC does not notice a change otherwise"
            yield Disagreement(found, "write it under deps, where another teacher's stands", False)


def _unnamed_files(project: Project, path: Path, stages: list[Stage]) -> Iterator[Disagreement]:
    """Files of params.yaml that dvc.yaml cannot know of: id lists, weights to start from, the folder of a published network."""
    for key, file, command in _named_files(project):
        for stage in stages:
            here = stage.command.partition("mgd-pipeline ")[2]
            if not re.match(rf"{command}(?!\S)", here) or _covered(file, stage.dependencies | stage.outputs):
                continue
            found = f"{path}: {stage.name} must depend on {file} ({key}): DVC does not notice a change otherwise"
            yield Disagreement(found, f"write {file} under its deps", False)


def _named_files(project: Project) -> Iterator[tuple[str, str, str]]:
    """(key, path, command of the stage that reads it) of what is there."""
    params, found = project.params, list[tuple[str, str | None, str]]()
    if isinstance(params.data.partition, IdLists):
        found += [(f"data.partition.{key}", value, "prepare-data") for key, value in params.data.partition.model_dump().items()]
    for name in params.train_teachers:
        teacher = params.teachers[name]
        read_by = f"train-teacher --teacher[ =]{re.escape(name)}"
        if isinstance(teacher, SmpTeacher):
            found.append((f"teachers.{name}.encoder_weights", teacher.encoder_weights, read_by))
        elif isinstance(teacher, TransformersTeacher):
            found.append((f"teachers.{name}.transformers", teacher.transformers, read_by))
    found.append(("student.network.encoder_weights", params.student.network.encoder_weights, "train-student"))
    for key, file, command in found:
        if file is not None and file not in ("none", "imagenet") and (project.base / file).exists():
            yield key, file, command


def not_in_a_copy(project: Project) -> list[str]:
    """Folders that DVC's copies of a project for experiments lack: below data/, which git ignores, and made by no stage."""
    params = project.params
    root = [] if isinstance(params.data, ShapesData) else [Path(params.data.root)]
    files = [teacher.weights for name, teacher in params.teachers.items() if name not in params.train_teachers]
    files += [file for _, file, _ in _named_files(project)]
    folders = [path for path in [*root, *(Path(file).parent for file in files)] if path.parts[:1] == ("data",)]
    return list(dict.fromkeys("data/raw" if path.parts[:2] == ("data", "raw") else str(path) for path in folders))
