"""Where `dvc.yaml` and `params.yaml` disagree: `dvc.yaml` names teachers and files that DVC cannot take from the parameters.

DVC notices a wrong output only after the stage has run, and never notices a missing dependency. `doctor` and the first stage that
runs report both.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mgd_pipeline.data.manifest import LABELLED
from mgd_pipeline.errors import ParamsError
from mgd_pipeline.params import IdLists, PromptsTeacher, ShapesData, SmpTeacher, TransformersTeacher
from mgd_pipeline.params_file import merge_markers
from mgd_pipeline.words import verb
from mgd_stages.run.progress import console
from mgd_stages.run.project import CLASSES, Project


@dataclass(frozen=True)
class Disagreement:
    said: str
    """The file, what differs, and what follows from it."""
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
    params: frozenset[str]
    """Dotted keys of params.yaml: sections, or single values."""


_OF_A_TEACHER = re.compile(
    r"data/targets/([^/]+)\.zarr|data/results/teachers/([^/]+?)(?:\.json|-masks\.parquet|-confusion\.csv)"
    r"|data/results/compare-teachers/([^/]+)-confusion\.csv|data/teachers/([^/]+)\.safetensors"
)
_AGAIN = "run `mgd-pipeline dvc-yaml`"
LABELS = f"data/manifest/{LABELLED}"
IMAGES = ("data/manifest/images.parquet", "data/manifest/partition.parquet")


def check_dvc_file(project: Project) -> None:
    """Says in one line where dvc.yaml and params.yaml disagree.

    Raises ParamsError in a stage that DVC runs where `dvc repro` is bound to fail, with a line for each reason: nothing has been
    computed then.
    """
    differences = disagreements(project)
    under_dvc = "DVC_STAGE" in os.environ and project.base == Path.cwd().resolve()
    if under_dvc and any(one.fails for one in differences):
        raise ParamsError("\n".join(f"{one.said}; {one.remedy}" for one in differences if one.fails))
    if differences and os.environ.get("RANK", "0") == "0":  # torchrun starts many of us
        first = min(differences, key=lambda one: not one.fails)
        more = f" (and {len(differences) - 1} more: `mgd-pipeline doctor`)" if len(differences) > 1 else ""
        console.print(f"warning: {first.said}; {first.remedy}{more}")


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
        *_labels(project, path, stages),
        *_heads(project, path, stages),
        *_mean_teacher(project, path, stages),
        # Where a teacher has another name, one line says so.
        *([] if foreign else _unnamed_caches(project, path, stages)),
        *_unnamed_files(project, path, stages),
        *_unnamed_classes(path, stages),
    ]


def read_stages(text: str, project: Project) -> list[Stage]:
    """The stages of a dvc.yaml, with `foreach` unrolled and what stands in ${} taken from the parameters."""
    raw = YAML(typ="safe", pure=True).load(text)
    sections = raw.get("stages") if isinstance(raw, dict) else None
    params = project.params.model_dump(by_alias=True)
    read: list[Stage] = []
    for name, section in sections.items() if isinstance(sections, dict) else ():
        if not isinstance(section, dict):
            continue
        if "foreach" not in section:
            read.append(_stage(str(name), section, params))
            continue
        items, body = section["foreach"], section.get("do")
        if isinstance(items, str):
            items = looked_up(items.removeprefix("${").removesuffix("}"), params)
        if isinstance(items, list):
            items = {str(item): item for item in items}
        if not isinstance(items, dict) or not isinstance(body, dict):
            continue
        for key, item in items.items():
            read.append(_stage(f"{name}@{key}", body, {**params, "key": key, "item": item}))
    return read


def _stage(name: str, section: dict[str, Any], values: dict[str, Any]) -> Stage:
    folder = filled(str(section.get("wdir", ".")), values)

    def paths(*kinds: str) -> frozenset[str]:
        texts = [filled(entry_path(entry), values) for kind in kinds for entry in section.get(kind) or []]
        return frozenset(os.path.normpath(os.path.join(folder, text)) for text in texts)

    command = section.get("cmd", "")
    command = filled(" ".join(map(str, command)) if isinstance(command, list) else str(command), values)
    keys = frozenset(filled(str(key), values) for key in section.get("params") or [])
    return Stage(name, command, paths("deps"), paths("outs", "metrics", "plots"), keys)


def entry_path(entry: Any) -> str:
    """An entry with options is a mapping from the path to them."""
    return str(next(iter(entry)) if isinstance(entry, dict) else entry)


def teacher_of(place: str) -> str | None:
    """The teacher to which a file belongs, by the names that the stages give their results."""
    match = _OF_A_TEACHER.fullmatch(place)
    return match[match.lastindex] if match and match.lastindex else None


def filled(text: str, values: dict[str, Any]) -> str:
    return re.sub(r"\$\{([^}]+)\}", lambda match: str(looked_up(match[1].strip(), values) or match[0]), text)


def looked_up(key: str, values: dict[str, Any]) -> Any:
    """The value of a dotted key; None where there is none, such as one of another file of variables."""
    value: Any = values
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def covered(path: str, by: frozenset[str]) -> bool:
    """Whether a path or a folder above it is among others."""
    return os.path.normpath(path) in by or any(str(above) in by for above in PurePosixPath(os.path.normpath(path)).parents)


def _running(stages: list[Stage], command: str) -> list[Stage]:
    """Stages that run a command of ours, but not for a student without teachers."""
    running = [stage for stage in stages if re.search(rf"\b{command}(?![\w-])", stage.command)]
    return [stage for stage in running if "--supervised-only" not in stage.command]


def _foreign_teachers(project: Project, path: Path, text: str, stages: list[Stage]) -> Iterator[Disagreement]:
    """Teachers that dvc.yaml names and params.yaml does not have: renamed or removed ones."""
    made = frozenset[str]().union(*(stage.outputs for stage in stages))
    weights = {teacher.weights for teacher in project.params.teachers.values()}
    foreign: dict[str, bool] = {}
    for stage in stages:
        for place in sorted(stage.outputs | stage.dependencies):
            name = teacher_of(place)
            if name is None or name in project.params.teachers or place in weights:
                continue
            absent = place in stage.outputs or not (covered(place, made) or (project.base / place).exists())
            foreign[name] = foreign.get(name, False) or absent
    for name, fails in foreign.items():
        named = [any(name in match.groups() for match in _OF_A_TEACHER.finditer(line)) for line in text.splitlines()]
        lines = [str(number) for number, names_it in enumerate(named, 1) if names_it]
        where = f"{verb(len(lines), 'line', 'lines')} {', '.join(lines)}"
        said = f"{path}: {where}: the teacher {name} is not in params.yaml (teachers: {', '.join(project.params.teachers)})"
        yield Disagreement(said, _AGAIN, fails)


def _other_weights(project: Project, path: Path, stages: list[Stage]) -> Iterator[Disagreement]:
    """Weights that train-teacher writes elsewhere than dvc.yaml expects."""
    for name in [*project.params.train_teachers, *project.params.heads]:
        weights = project.params.teachers[name].weights
        for stage in stages:
            if re.search(rf"train-teacher --teacher[ =]{re.escape(name)}(?!\S)", stage.command) is None:
                continue
            expected = sorted(place for place in stage.outputs if place.endswith((".safetensors", ".pth", ".pt")))
            if expected and not covered(weights, stage.outputs):
                said = f"{path}: the stage {stage.name} makes {expected[0]}, and teachers.{name}.weights is {weights}"
                yield Disagreement(said, f"write weights: {expected[0]} in params.yaml", True)


def _data_root(project: Project, path: Path, stages: list[Stage]) -> Iterator[Disagreement]:
    """A dvc.yaml of another kind of data set than params.yaml has."""
    data = project.params.data
    for stage in _running(stages, "prepare-data"):
        made, read = covered(data.root, stage.outputs), covered(data.root, stage.dependencies)
        if isinstance(data, ShapesData) and not made:
            said = f"{path}: the stage {stage.name} does not make {data.root}, which the built-in data set is written to"
            yield Disagreement(said, _AGAIN, True)
        elif made and not isinstance(data, ShapesData):
            said = (
                f"{path}: the stage {stage.name} makes {data.root}, and DVC removes what a stage makes before the stage runs: the "
                f"data set, or the link to it"
            )
            yield Disagreement(said, f"before the next `dvc repro`, {_AGAIN}", True)
        elif not made and not read:
            said = f"{path}: {stage.name} must depend on {data.root}: DVC does not notice new images otherwise"
            yield Disagreement(said, _AGAIN, False)


def _labels(project: Project, path: Path, stages: list[Stage]) -> Iterator[Disagreement]:
    """Teachers that DVC trains again after other changes than params.yaml says."""
    choice = project.params.retrain_teachers
    for stage in _running(stages, "train-teacher")[:1]:
        of_labels, of_images = (any(covered(place, stage.dependencies) for place in of) for of in ((LABELS,), IMAGES))
        made = any(covered(LABELS, one.outputs) for one in stages)
        said = None
        if choice == "new-images" and of_labels and not of_images:
            said = f"{stage.name} depends on labels only: DVC does not notice new images"
        elif choice == "new-labels" and of_images:
            said = f"{stage.name} depends on all images: DVC trains it again after every new image"
        elif choice == "new-labels" and not (of_labels and made):
            said = f"prepare-data must make, and {stage.name} depend on, {LABELS}: DVC does not notice new labels otherwise"
        if said is not None:
            yield Disagreement(f"{path}: retrain_teachers is {choice}, but {said}", _AGAIN, False)


def _heads(project: Project, path: Path, stages: list[Stage]) -> Iterator[Disagreement]:
    """Heads that no stage trains, or that a stage trains without depending on the cache that they read."""
    for name, of in project.params.heads.items() if _running(stages, "precompute-teachers") else ():
        cache = f"data/targets/{of}.zarr"
        training = _running(stages, f"train-teacher --teacher[ =]{re.escape(name)}")
        if not training:
            yield Disagreement(f"{path}: no stage trains the head {name}", _AGAIN, True)
        for stage in training:
            if not covered(cache, stage.dependencies):
                said = f"{path}: {stage.name} must depend on {cache}: DVC does not notice a change otherwise"
                yield Disagreement(said, _AGAIN, True)


def _mean_teacher(project: Project, path: Path, stages: list[Stage]) -> Iterator[Disagreement]:
    """A student without teachers that mixes unlabelled images, in a file from before it did so."""
    for stage in stages if project.params.student.without_teachers.uses_unlabelled else ():
        if "train-student --supervised-only" in stage.command and "cutmix" not in stage.params:
            said = f"{path}: {stage.name} must have cutmix among its params: DVC does not notice a change otherwise"
            yield Disagreement(said, _AGAIN, False)


def _unnamed_caches(project: Project, path: Path, stages: list[Stage]) -> Iterator[Disagreement]:
    """Teachers whose results a stage reads without depending on them: DVC may run it too early, and not again."""
    params = project.params
    for name in params.teachers:
        cache, measured = f"data/targets/{name}.zarr", f"data/results/teachers/{name}.json"
        readers = {"compare-teachers": cache, "evaluate": measured, "report": cache}
        if name in params.losses.used_teachers:
            readers["train-student"] = cache
        lacking = [
            (stage.name, place)
            for command, place in readers.items()
            for stage in _running(stages, command)
            if not covered(place, stage.dependencies)
        ]
        if lacking:
            places = " and ".join(dict.fromkeys(place for _, place in lacking))
            who = ", ".join(stage for stage, _ in lacking)
            said = f"{path}: {who} must depend on {places}: DVC does not notice a change otherwise"
            yield Disagreement(said, _AGAIN, False)


def _unnamed_classes(path: Path, stages: list[Stage]) -> Iterator[Disagreement]:
    """A file of version 0.1.0, in which the names of the classes are no output."""
    for stage in _running(stages, "prepare-data"):
        if not covered(CLASSES, stage.outputs):
            said = f"{path}: the stage {stage.name} must make {CLASSES}: DVC neither shares it nor notices other names"
            yield Disagreement(said, _AGAIN, False)


def _unnamed_files(project: Project, path: Path, stages: list[Stage]) -> Iterator[Disagreement]:
    """Files of params.yaml that dvc.yaml cannot know of: id lists, weights to start from, the folder of a published network."""
    for file in named_files(project):
        reader = file.stage if file.teacher is None else f"{file.stage} --teacher[ =]{re.escape(file.teacher)}"
        for stage in stages:
            here = stage.command.partition("mgd-pipeline ")[2]
            if not re.match(rf"{reader}(?!\S)", here) or covered(file.path, stage.dependencies | stage.outputs):
                continue
            said = f"{path}: {stage.name} must depend on {file.path} ({file.key}): DVC does not notice a change otherwise"
            yield Disagreement(said, _AGAIN, False)


@dataclass(frozen=True)
class NamedFile:
    """A file or folder that params.yaml names, and that is there."""

    key: str
    path: str
    stage: str
    """The stage that reads it."""
    teacher: str | None = None
    """The teacher for which that stage reads it."""


def named_files(project: Project) -> list[NamedFile]:
    """Id lists, weights to start from, folders of published networks; without those that a hub has."""
    params, named = project.params, list[tuple[str, str | None, str, str | None]]()
    if isinstance(params.data.partition, IdLists):
        named += [(f"data.partition.{key}", path, "prepare-data", None) for key, path in params.data.partition]
    for name in params.train_teachers:
        teacher = params.teachers[name]
        if isinstance(teacher, SmpTeacher):
            named.append((f"teachers.{name}.encoder_weights", teacher.encoder_weights, "train-teacher", name))
        elif isinstance(teacher, (TransformersTeacher, PromptsTeacher)):
            named.append((f"teachers.{name}.transformers", teacher.transformers, "train-teacher", name))
    named.append(("student.network.encoder_weights", params.student.network.encoder_weights, "train-student", None))
    return [
        NamedFile(key, path, stage, teacher)
        for key, path, stage, teacher in named
        if path is not None and path not in ("none", "imagenet") and (project.base / path).exists()
    ]


def not_in_a_copy(project: Project) -> list[str]:
    """Folders that DVC's copies of a project for experiments lack: below data/, which git ignores, and made by no stage."""
    params = project.params
    root = [] if isinstance(params.data, ShapesData) else [Path(params.data.root)]
    trained = [*params.train_teachers, *params.heads]
    files = [teacher.weights for name, teacher in params.teachers.items() if name not in trained]
    files += [file.path for file in named_files(project)]
    folders = [path for path in [*root, *(Path(file).parent for file in files)] if path.parts[:1] == ("data",)]
    return list(dict.fromkeys("data/raw" if path.parts[:2] == ("data", "raw") else str(path) for path in folders))


def dvc_command() -> str | None:
    """The path of the command `dvc`, best the one beside this Python; None if it is not installed."""
    return shutil.which("dvc", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}")
