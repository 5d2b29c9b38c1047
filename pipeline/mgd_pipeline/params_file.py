"""Reads params.yaml strictly, and says in one line for each problem which key, which value, and what would be right."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from mgd_pipeline.access import access_error, says_nothing
from mgd_pipeline.errors import ParamsError
from mgd_pipeline.params import DATASETS, TEACHERS, IdLists, Params, Section, SmpTeacher, nearest
from mgd_pipeline.words import counted


def load_params(path: str | Path, overrides: list[str] | None = None) -> Params:
    """Reads and checks `params.yaml`; `overrides` are `dotted.key=value` texts, values in YAML.

    Raises ParamsError with one line for each problem.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file; write one with `mgd-pipeline init`, or name yours with --config") from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    except OSError as error:
        if says_nothing(error):
            raise ParamsError(str(access_error(path, error))) from None
        raise ParamsError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from None
    if markers := merge_markers(text):
        raise ParamsError(f"{path}: {markers}; keep one version of each conflict and remove the marked lines")
    try:
        raw = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError) as error:
        raise ParamsError(f"{path}: not valid YAML: {_where(error)}") from None
    if not isinstance(raw, dict):
        content = "nothing" if raw is None else repr(raw)[:40]
        raise ParamsError(f"{path}: expected sections such as data: and student:, found {content}; see `mgd-pipeline init`")
    for override in overrides or []:
        _set(raw, override)
    return parse_params(raw, source=str(path), overrides=overrides or [])


def override_params(params: Params, overrides: list[str]) -> Params:
    """Checked parameters with `dotted.key=value` texts applied to them. Raises ParamsError."""
    raw = params.model_dump()
    for override in overrides:
        _set(raw, override)
    return parse_params(raw, overrides=overrides)


def change_params(params: Params, values: Mapping[str, Any], source: str) -> Params:
    """Checked parameters with plain values at dotted keys. Raises ParamsError, whose lines begin with `source`."""
    raw = params.model_dump()
    for key, value in values.items():
        _put(raw, key, value, f"{source}: {key}")
    return parse_params(raw, source=source)


def parse_params(raw: dict[str, Any], source: str = "params.yaml", overrides: list[str] | None = None) -> Params:
    """Checks a plain dictionary, as parsed from YAML.

    `source` stands at the head of each error line, or `--set ...` where one of the `overrides`, which are already in `raw`,
    brought the value.
    """
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        problems = [line for problem in error.errors() for line in _explain(problem).splitlines()]
        raise ParamsError("\n".join(dict.fromkeys(_headed(line, source, overrides or []) for line in problems))) from None


def _headed(line: str, source: str, overrides: list[str]) -> str:
    key = re.split(r"[:\[ ]", line, maxsplit=1)[0]
    for override in reversed(overrides):
        if key == override.partition("=")[0]:
            return f"--set {override}: {line.partition(': ')[2]}"
    return f"{source}: {line}"


_MARKERS = ("<<<<<<<", "|||||||", "=======", ">>>>>>>")


def merge_markers(text: str) -> str | None:
    """'a merge left <<<<<<< in line 3, ...' for a text that git has left in conflict; None for any other."""
    markers = [
        (marker, number)
        for number, line in enumerate(text.splitlines(), 1)
        if (marker := line[:7]) in _MARKERS and (len(line) == 7 or line[7] == " ")
    ]
    if not {marker for marker, _ in markers} - {"======="}:  # which underlines a heading in other texts
        return None
    shown = ", ".join(f"{marker} in line {number}" for marker, number in markers[:4])
    return f"a merge left {shown}{f' and {len(markers) - 4} more markers' if len(markers) > 4 else ''}"


def _where(error: Exception) -> str:
    """One line of a YAML parser's report: place, problem, and the remedy where the parser's words do not hold it."""
    if isinstance(error, DuplicateKeyError) and error.problem_mark is not None:
        name = re.findall(r'duplicate key "(.*?)"', str(error.problem))
        return (
            f"line {error.problem_mark.line + 1}: the key {name[0] if name else '?'!r} stands there a second time; keep one of both"
        )
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        remedy = "; write spaces instead of tabs" if "'\\t'" in str(error.problem) else ""
        place = f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
        return f"{place}: {error.problem or error.context}{remedy}"
    return " ".join(str(error).replace('in "<unicode string>", ', "at ").split())


def _set(raw: dict[str, Any], override: str) -> None:
    """Puts one override into the raw dictionary; sections that are left to their defaults come into being."""
    key, equals, text = override.partition("=")
    *parents, last = key.split(".")
    if not equals or not all([*parents, last]):
        raise ParamsError(f"--set {override}: write key=value, such as student.steps=500")
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError):
        raise ParamsError(f"--set {override}: {text!r} is not a YAML value") from None
    _put(raw, key, value, f"--set {override}")


def _put(raw: dict[str, Any], key: str, value: Any, said: str) -> None:
    """Puts a value at a dotted key; `said` is what an error line begins with."""
    *parents, last = key.split(".")
    section = raw
    for depth, parent in enumerate(parents, 1):
        _, outer = _walk(tuple(parents[: depth - 1]))
        if parent not in section and _section_of(outer, parent) is not None:
            section[parent] = {}
        if parent not in section:
            known = list(dict.fromkeys([*section, *_fields(outer)]))
            remedy = nearest(parent, known) or f"; there are {', '.join(known)}"
            raise ParamsError(f"{said}: no section {'.'.join(parents[:depth])!r}{remedy}")
        if not isinstance(section[parent], dict):
            here, inner = ".".join(parents[:depth]), ".".join([*parents[depth:], last])
            shown = "null" if section[parent] is None else repr(section[parent])
            raise ParamsError(f"{said}: {here} is {shown}, not a section that could hold {inner}")
        section = section[parent]
    section[last] = value


def _walk(location: tuple[Any, ...]) -> tuple[str, type[Section] | None]:
    """(dotted key, the model there or none) of a pydantic location, whose union tags are no part of the key."""
    key, model = "", Params
    for depth, part in enumerate(location):
        if location[:depth] == ("data",) and part in DATASETS:
            model = DATASETS[part]
        elif depth == 2 and location[0] == "teachers" and part in TEACHERS:
            model = TEACHERS[part]
        elif depth == 3 and location[2] == "partition":
            model = IdLists
        elif isinstance(part, int):
            key, model = f"{key}[{part}]", None
        else:
            key = f"{key}.{part}" if key else str(part)
            model = SmpTeacher if location[:depth] == ("teachers",) else _section_of(model, str(part))
    return key, model


def _section_of(model: type[Section] | None, key: str) -> type[Section] | None:
    """The section that a field holds: its type, or the type beside None."""
    if model is None or key not in model.model_fields:
        return None
    annotation = model.model_fields[key].annotation
    kinds = (annotation,) if get_origin(annotation) in (None, dict) else get_args(annotation)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _fields(model: type[Section] | None) -> list[str]:
    return [] if model is None else [field.alias or name for name, field in model.model_fields.items()]


def _explain(problem: Any) -> str:
    """One line of pydantic's report: key, value, and what would be right."""
    location, value, kind, context = problem["loc"], problem["input"], problem["type"], problem.get("ctx", {})
    key, model = _walk(location)
    name = str(location[-1]) if location else ""
    shown = "" if isinstance(value, (dict, list, Section)) and len(str(value)) > 60 else f" = {_yaml(value)}"
    if name == "[key]":
        return f"teachers: the name {_yaml(value)} must be text; put it in quotes"
    match kind:
        case "extra_forbidden":
            return f"{key}{shown}: unknown key; {_known_instead(location, name)}"
        case "missing":
            meaning = _meaning(_walk(location[:-1])[1], name)
            return f"{key}: missing; add it{f': {meaning}' if meaning else ' (`mgd-pipeline init` writes a complete file)'}"
        case "value_error":
            text = str(context["error"])
            return text if not key else f"{key}: {text}" if isinstance(value, dict) else f"{key}{shown}: {text}"
        case "union_tag_not_found":
            return f"{key}.dataset: missing; must be one of {', '.join(DATASETS)}"
        case "union_tag_invalid" | "literal_error":
            expected = re.findall(r"'([^']+)'", context.get("expected") or context["expected_tags"])
            if kind == "union_tag_invalid":
                value = problem["input"]["dataset"]
                key, shown = f"{key}.dataset", f" = {_yaml(value)}"
            return f"{key}{shown}: must be one of {', '.join(expected)}{_value_instead(location, value, expected)}"
        case "string_type":
            quotable = value is not None and not isinstance(value, (dict, list))
            return f"{key}{shown}: must be text{'; put it in quotes' if quotable else ''}"
        case "list_type":
            example = f"{value}, {value}" if isinstance(value, int) and key.endswith((".crop", ".window")) else value
            return f"{key}{shown}: must be a list{f'; write [{example}]' if isinstance(value, (str, int, float)) else ''}"
        case "model_type" | "model_attributes_type" | "dict_type":
            if key == "teachers":
                return f"{key}{shown}: must hold a section for each teacher, such as wide: and deep:"
            keys = ["dataset", "root", "partition"] if key == "data" else _fields(model)[:3]
            return f"{key}{shown}: must be a section with keys such as {', '.join(keys)}"
        case "too_short" if key == "teachers":
            return f"{key}{shown}: name at least one teacher"
        case "too_short" | "too_long":
            word, bound = ("least", context["min_length"]) if kind == "too_short" else ("most", context["max_length"])
            return f"{key}{shown}: must have at {word} {counted(bound, 'entry', 'entries')}, not {context['actual_length']}"
    plain = {
        "int_type": "must be a whole number",
        "int_from_float": "must be a whole number",
        "float_type": "must be a number",
        "finite_number": "must be finite",
        "string_too_short": "must not be empty",
        "string_pattern_mismatch": "write package.module:function",
    }
    text = plain.get(kind) or problem["msg"].replace("Input should be", "must be").replace("greater than or equal to", "at least")
    return f"{key}{shown}: {text.replace('less than or equal to', 'at most')}"


def _known_instead(location: tuple[Any, ...], name: str) -> str:
    """What to do about an unknown key: where it belongs, the nearest known key, or all known ones."""
    owners = [dataset for dataset, other in DATASETS.items() if name in other.model_fields and location[0] == "data"]
    if owners:
        return f"it belongs to dataset {' and '.join(owners)}, not {location[1]}; remove it"
    outer, model = _walk(location[:-1])
    sections = {section: _section_of(Params, section) for section in Params.model_fields if section != outer}
    if places := [f"{section}.{name}" for section, other in sections.items() if name in _fields(other)]:
        return f"there is {' and '.join(places)}"
    if valued := _keys_with_value(model, name):
        return f"{name} is a value of {' and '.join(f'{outer}.{key}' for key in valued)}"
    known = _fields(model)
    return nearest(name, known).removeprefix("; ") or f"known keys: {', '.join(known)}"


def _value_instead(location: tuple[Any, ...], value: object, expected: list[str]) -> str:
    """What to do about a value that is none of the `expected` ones: the key beside it that has this name or knows this value, the
    nearest value, or what the key means."""
    depth = max((at for at, part in enumerate(location) if isinstance(part, str)), default=0)
    outer, model = _walk(location[:depth])
    known = _fields(model)
    if not isinstance(value, str) or not value or model is None or location[0] == "data":
        return nearest(value, expected)
    if named := [key for key in known if key == value] or [key for key in known if key.startswith(f"{value}_")]:
        return "".join(f"; {outer}.{key} is a key of its own: {_meaning(model, key)}" for key in named[:1])
    if near := nearest(value, expected):
        return near
    if valued := _keys_with_value(model, value):
        return f"; {value} is a value of {' and '.join(f'{outer}.{key}' for key in valued)}"
    return f": {meaning}" if (meaning := _meaning(model, str(location[depth]))) else ""


def _keys_with_value(model: type[Section] | None, value: str) -> list[str]:
    """The keys of a section that take a value, or a list of such values."""
    fields = {} if model is None else model.model_fields
    return [name for name, field in fields.items() if value in re.findall(r"'([^']+)'", str(field.annotation))]


def _meaning(model: type[Section] | None, name: str) -> str:
    """The first sentence of what the documentation says of a key, in one line; empty where it says nothing."""
    if model is None or name not in model.model_fields:
        return ""
    text = " ".join((model.model_fields[name].description or "").split())
    return re.split(r"(?<=\.) ", text)[0]


def _yaml(value: Any) -> str:
    """A value as params.yaml has it."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case _:
            return repr(value)
