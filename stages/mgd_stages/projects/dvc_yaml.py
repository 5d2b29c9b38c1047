"""`mgd-pipeline dvc-yaml`: the lists of `dvc.yaml` that follow from `params.yaml`.

A new file comes from the template. In a file that exists, only the lines of teachers, of the data set and of named files change.
All other lines stay byte for byte, with their comments.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError

from mgd_pipeline.data.annotated import CONVERTED, converts
from mgd_pipeline.durable import replace_file
from mgd_pipeline.errors import ParamsError, shell_command
from mgd_pipeline.params import ShapesData
from mgd_pipeline.params_file import merge_markers
from mgd_pipeline.words import listed
from mgd_stages.projects.dvc_file import IMAGES, LABELS, covered, disagreements, entry_path, filled, named_files, teacher_of
from mgd_stages.projects.presets import yaml_value
from mgd_stages.run.project import BEST, CLASSES, Project

CONFUSION = "dvc-confusion.json"
"""How `dvc plots` draws a confusion matrix: its own template counts rows, and ours hold pixels."""
_ENTRIES = ("deps", "outs", "metrics", "plots")


def render_dvc(project: Project) -> str:
    """A new dvc.yaml. The built-in data set is an output of prepare-data, any other a dependency."""
    template = (files("mgd_stages") / "templates/dvc-yaml.jinja").read_text(encoding="utf-8")
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    named: dict[str, list[str]] = {"prepare-data": [], "train-teacher": [], "train-student": []}
    for file in named_files(project):
        if (text := yaml_value(file.path)) not in named[file.stage]:
            named[file.stage].append(text)
    data = project.params.data
    return environment.from_string(template).render(
        teachers=list(project.params.teachers),
        heads=project.params.heads,
        rendered=isinstance(data, ShapesData),
        converted=converts(data),
        mean_teacher=project.params.student.without_teachers.uses_unlabelled,
        by_labels=project.params.retrain_teachers == "new-labels",
        root=yaml_value(data.root),
        files=named,
    )


def write_dvc(project: Project) -> list[str]:
    """Writes dvc.yaml where there is none, or its lists again; returns what changed and what still differs, a line each.

    Raises ParamsError for a file that is no YAML or whose lists are not written one entry a line; nothing is written then.
    """
    path = project.base / "dvc.yaml"
    if not (project.base / CONFUSION).exists():  # it may have been made to somebody's taste
        replace_file(project.base / CONFUSION, (files("mgd_stages") / "templates" / CONFUSION).read_bytes())
    if not path.exists():
        replace_file(path, render_dvc(project).encode())
        return [f"wrote {path}"]
    try:
        text = path.read_bytes().decode()
        if markers := merge_markers(text):
            raise ParamsError(f"{path}: {markers}; keep one version of each conflict and remove the marked lines")
        written, said = _updated(text, project)
    except ParamsError:
        raise
    except (YAMLError, ValueError) as error:
        raise ParamsError(f"{path}: not valid YAML: {' '.join(str(error).split())[:200]}; correct it") from None
    if written != text:
        replace_file(path, written.encode())
    trained = [f"train-teacher@{name}" for name in project.params.train_teachers if project.teacher(name).exists()]
    if trained and (project.base / "dvc.lock").exists() and any(LABELS in line and "train-teacher" in line for line in said):
        commit = shell_command("dvc", "commit", "--force", "prepare-data", *trained)
        said.append(
            "the next `dvc repro` trains the teachers again; if they were trained on the labels that are here now, keep them: "
            f"`mgd-pipeline prepare-data`, then `{commit}`"
        )
    left = [f"warning: {one.said}; correct it by hand" for one in disagreements(project)]
    return [*(said or [f"{path}: nothing to change"]), *left]


@dataclass(frozen=True)
class _Edit:
    """Lines of the file, from `line` on, that go, and lines that come in their place."""

    line: int
    removed: int
    added: tuple[str, ...]


def _updated(text: str, project: Project) -> tuple[str, list[str]]:
    """The text with the lines that follow from the parameters, and what changed."""
    ending = "\r\n" if "\r\n" in text else "\n"
    lines = text.split(ending)
    raw = YAML().load(text)
    stages = raw.get("stages") if isinstance(raw, CommentedMap) else None
    edits: list[_Edit] = []
    changes: dict[str, list[str]] = defaultdict(list)
    rendered = render_dvc(project)
    for edit, what in _stage_of_heads(rendered, lines, stages):
        edits.append(edit)
        changes[what].append("train-head")
    for name, wanted in YAML(typ="safe", pure=True).load(rendered)["stages"].items():
        body = _body(stages.get(name)) if isinstance(stages, CommentedMap) else None
        wanted_body = wanted.get("do", wanted)
        if body is None or os.path.normpath(str(body.get("wdir", "."))) != ".":
            continue
        lists = _Lists(name, body, project, lines)
        for kind in _ENTRIES:
            stale, missing = lists.differences(kind, wanted_body)
            edits += lists.edits(kind, stale, missing, wanted_body)
            for entry in stale:
                changes[f"removed {entry} from"].append(name)
            for entry in missing:
                changes[f"added {entry} to"].append(name)
        mixes = name == "train-student-supervised" and "cutmix" in wanted_body["params"]
        if mixes and "cutmix" not in (body.get("params") or []):
            edits += lists.edits("params", [], ["cutmix"], wanted_body)
            changes["added cutmix to"].append(name)
    # Stages may share a list by an anchor, and then each has the same edits.
    for edit in sorted(dict.fromkeys(edits), key=lambda one: one.line, reverse=True):
        lines[edit.line : edit.line + edit.removed] = edit.added
    return ending.join(lines), [f"{what} {listed(where)}" for what, where in changes.items()]


def _stage_of_heads(rendered: str, lines: list[str], stages: Any) -> Iterator[tuple[_Edit, str]]:
    """The stage of heads, which is in the file only if there are heads, and the heads that it trains."""
    wanted = YAML().load(rendered)["stages"]
    if not isinstance(stages, CommentedMap) or "precompute-teachers" not in stages:
        return
    there, right = stages.get("train-head"), wanted.get("train-head")
    if right is None and there is not None:
        first, end = stages.lc.key("train-head")[0], _end_of_key(stages, "train-head", lines)
        blank = end < len(lines) and not lines[end].strip()
        yield _Edit(first, end + blank - first, ()), "removed"
    elif right is not None and there is None:
        text, pad = rendered.split("\n"), " " * stages.lc.key("precompute-teachers")[1]
        block = text[wanted.lc.key("train-head")[0] : _end_of_key(wanted, "train-head", text)]
        added = (*(pad + line[2:] for line in block), "")
        line = stages.lc.key("precompute-teachers")[0]
        while lines[line - 1].lstrip().startswith("#"):  # a comment above that stage
            line -= 1
        yield _Edit(line, 0, added), "added"
    elif right is not None and isinstance(there, CommentedMap) and there.get("foreach") != right["foreach"]:
        first, column = there.lc.key("foreach")
        heads = tuple(f"{' ' * (column + 2)}{name}: {of}" for name, of in right["foreach"].items())
        edit = _Edit(first, _end_of_key(there, "foreach", lines) - first, (f"{' ' * column}foreach:", *heads))
        yield edit, f"wrote the heads {listed(list(right['foreach']))} into"


def _end_of_key(section: CommentedMap, key: str, lines: list[str]) -> int:
    """The line after the value of a key: after the last line that is indented deeper than the key."""
    first, column = section.lc.key(key)
    end = first + 1
    for number, line in enumerate(lines[end:], end):
        if line.strip() and not line.startswith(" " * (column + 1)):
            break
        if line.strip():
            end = number + 1
    return end


def _body(section: Any) -> CommentedMap | None:
    """The mapping that holds a stage's lists; None for what is no stage."""
    body = section.get("do") if isinstance(section, CommentedMap) and "foreach" in section else section
    return body if isinstance(body, CommentedMap) else None


class _Lists:
    """The lists of one stage as they stand in the file."""

    def __init__(self, name: str, body: CommentedMap, project: Project, lines: list[str]) -> None:
        self.name, self.body, self.lines = name, body, lines
        self.params, self.values = project.params, project.params.model_dump(by_alias=True)
        self.by_labels = self.params.retrain_teachers == "new-labels"
        self.root = os.path.normpath(self.params.data.root)
        self.named = {os.path.normpath(file.path) for file in named_files(project)}
        self.named |= {os.path.normpath(teacher.weights) for teacher in self.params.teachers.values()}

    def place(self, entry: Any) -> str:
        return os.path.normpath(filled(entry_path(entry), self.values))

    def differences(self, kind: str, wanted: dict[str, Any]) -> tuple[list[str], list[str]]:
        """Entries of ours that no longer belong here, and entries that are missing."""
        mine, right = self.body.get(kind) or [], wanted.get(kind, [])
        places = {self.place(entry) for entry in right}
        stale = [entry_path(entry) for entry in mine if self.place(entry) not in places and self.is_stale(kind, entry)]
        kept = frozenset(self.place(entry) for entry in mine if entry_path(entry) not in stale)
        if kind != "deps":
            kept |= {self.place(entry) for other in _ENTRIES[1:] if other != kind for entry in self.body.get(other) or []}
        missing = [entry_path(entry) for entry in right if self.is_managed(entry) and not covered(self.place(entry), kept)]
        return stale, missing

    def is_stale(self, kind: str, entry: Any) -> bool:
        """Of an entry that the template does not have: whether an older state of params.yaml wrote it, not a user."""
        place = self.place(entry)
        if (teacher := teacher_of(place)) is not None:
            return teacher not in self.params.teachers and place not in self.named
        if self.name in ("prepare-data", "train-teacher") and (place == LABELS or (place in IMAGES and self.by_labels)):
            return True
        of_prepare_data = self.name == "prepare-data" and (place == self.root or (kind == "outs" and place.startswith("data/raw/")))
        return of_prepare_data or entry_path(entry) == "${data.root}" or (kind == "outs" and place == str(CONVERTED))

    def is_managed(self, entry: Any) -> bool:
        """Whether an entry of the template follows from the parameters."""
        place = self.place(entry)
        if place in IMAGES:  # an owner may have removed them
            return self.name == "train-teacher" and LABELS in map(self.place, self.body.get("deps") or [])
        known = (self.root, str(CONVERTED), BEST, CLASSES, LABELS)
        return teacher_of(place) is not None or place in known or place in self.named

    def edits(self, kind: str, stale: list[str], missing: list[str], wanted: dict[str, Any]) -> Iterator[_Edit]:
        if not stale and not missing:
            return
        entries = self.body.get(kind)
        if not entries:
            line, column = min([self.body.lc.key(key) for key in self.body if key != "cmd"] or [self.body.lc.key("cmd")])
            pad = " " * column
            yield _Edit(line, 0, (f"{pad}{kind}:", *self.texts(f"{pad}  ", missing, wanted[kind])))
            return
        if not isinstance(entries, CommentedSeq) or entries.fa.flow_style():
            raise ParamsError(f"dvc.yaml: stages.{self.name}.{kind}: write one entry a line, each after a dash")
        starts = [entries.lc.item(index)[0] for index in range(len(entries))]
        pad = self.lines[starts[0]][: -len(self.lines[starts[0]].lstrip())]
        ends = {self.place(entry): self.end_of(start, len(pad)) for entry, start in zip(entries, starts, strict=True)}
        if len(stale) == len(entries) and not missing:
            first = self.body.lc.key(kind)[0]
            yield _Edit(first, max(ends.values()) - first, ())
            return
        for entry, start in zip(entries, starts, strict=True):
            if entry_path(entry) in stale:
                yield _Edit(start, ends[self.place(entry)] - start, ())
        # A missing entry comes after its neighbour in the template, the first ones before all others.
        at, groups = starts[0], dict[int, list[str]]()
        for entry in wanted[kind]:
            if entry_path(entry) in missing:
                groups.setdefault(at, []).append(entry_path(entry))
            elif self.place(entry) in ends:
                at = ends[self.place(entry)]
        for line, group in groups.items():
            yield _Edit(line, 0, self.texts(pad, group, wanted[kind]))

    def end_of(self, start: int, indent: int) -> int:
        """The line after an entry: after the last line that is indented deeper than its dash, blank lines between them included."""
        end = start + 1
        for number, line in enumerate(self.lines[end:], end):
            if line.startswith(" " * (indent + 1)) and line.strip():
                end = number + 1
            elif line.strip():
                break
        return end

    def texts(self, pad: str, paths: Iterable[str], wanted: list[Any]) -> tuple[str, ...]:
        """Entries as the file has them, with their options."""
        options = {entry_path(entry): entry[entry_path(entry)] if isinstance(entry, dict) else {} for entry in wanted}
        return tuple(
            line
            for path in paths
            for line in (
                f"{pad}- {yaml_value(path)}{':' if options[path] else ''}",
                *(f"{pad}    {key}: {yaml_value(value)}" for key, value in options[path].items()),
            )
        )
