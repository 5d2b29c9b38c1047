"""docs/parameters.md: every key of params.yaml with what it may be, its default, MGD's own value and its meaning.

Everything comes from the typed models and the presets, so that the page cannot say anything else than the program does.
"""

from __future__ import annotations

import re
from typing import Any

from mgd_pipeline.params import TEACHERS, Params
from mgd_stages.projects.presets import preset, yaml_value

_HEADER = """\
# Parameters

`params.yaml` holds every setting that affects results. `mgd-pipeline init` writes a complete file. A key that is left out has the
default below, and a key without a default is required. An unknown key, a wrong type or an impossible value is refused in one line.
Any key can be set for one call: `--set student.steps=500`.

**Values** says what a key may be. **MGD** is the value in MGD's experiments on PASCAL VOC 2012 (V) and Cityscapes (C), as
[the presets](../stages/mgd_stages/presets/voc-resnet18.yaml) and `mgd-pipeline init` have it: one value if both are equal, a
dash if there is none. The values are from MGD's paper and code. Learning rates and weight decay are
as MGD's gradients effectively see them.
Keys that only caches and machines need (`targets`, `precision`) are ours, and their values change as little as possible. Keys that
MGD does not have say so, and are off by default.

This page is generated from the typed models (`pipeline/mgd_pipeline/params/`) by `python tests/test_init.py`.
"""
_TEACHERS = {
    "head": "`head`: on the cached embeddings of another teacher",
    "smp": "`encoder`: segmentation-models-pytorch",
    "torchvision": "`torchvision`",
    "prompts": "`prompts`, `transformers`: text-prompted networks",
    "transformers": "`transformers`: Hugging Face's",
    "timm": "`timm`: backbones",
    "import": "`import`: a function of your own",
}
_AT_THE_TOP = ("seed", "train_teachers", "retrain_teachers")
_OF_THE_PROJECT = {"dataset", "root", "partition", "partition_seed", "weights", *_AT_THE_TOP}
"""Keys whose value in the presets is not one of MGD's."""


def render_reference() -> str:
    """The page, Markdown."""
    schema = Params.model_json_schema()
    models, top = schema["$defs"], schema["properties"]
    mgd = {name: preset(name, f"data/raw/{name}", "1/8").model_dump(by_alias=True) for name in ("voc", "cityscapes")}
    lines = [*_HEADER.splitlines(), "", "## Top level", ""]
    lines += _table({key: top[key] for key in _AT_THE_TOP}, "", models, mgd)
    for name in Params.model_fields:
        about = top[name]
        if name in _AT_THE_TOP:
            continue
        lines += ["", f"## `{name}`", "", _text(about["description"]), ""]
        if name == "data":
            kinds = [models[_model(kind["$ref"])]["properties"] for kind in about["oneOf"]]
            shared = {key: value for key, value in kinds[0].items() if all(kind.get(key) == value for kind in kinds)}
            lines += ["### Every data set", "", *_table(shared, "data.", models, mgd)]
            for kind in kinds:
                own = {key: value for key, value in kind.items() if key not in shared}
                lines += ["", f"### `dataset: {kind['dataset']['const']}`", "", *_table(own, "data.", models, mgd)]
        elif name == "teachers":
            lines += ["What the kinds are, and which to take: [teachers.md](teachers.md)."]
            for kind, model in TEACHERS.items():
                keys = models[model.__name__]["properties"]
                ordered = dict(sorted(keys.items(), key=lambda item: item[0] in ("class_map", "short_side", "fixed_size")))
                lines += ["", f"### {_TEACHERS[kind]}", "", *_table(ordered, "teachers.<name>.", models, mgd)]
        else:
            lines += _table(models[_model(about["$ref"])]["properties"], f"{name}.", models, mgd)
    return "\n".join(lines) + "\n"


def _table(keys: dict[str, Any], prefix: str, models: dict[str, Any], mgd: dict[str, dict[str, Any]]) -> list[str]:
    return ["| Key | Values | Default | MGD | Meaning |", "|---|---|---|---|---|", *_rows(keys, prefix, models, mgd)]


def _rows(keys: dict[str, Any], prefix: str, models: dict[str, Any], mgd: dict[str, dict[str, Any]]) -> list[str]:
    """A row for each key, followed by those of the section that it is or may be."""
    rows = []
    for key, about in keys.items():
        inner = _section(about)
        if "$ref" not in about:
            default = f"`{yaml_value(about['default'])}`" if "default" in about else "required"
            own = "–" if key in _OF_THE_PROJECT else _values_of_mgd(f"{prefix}{key}", mgd)
            cells = [f"`{prefix}{key}`", _allowed(about), default, own, _text(about["description"])]
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        if inner:
            rows += _rows(models[inner]["properties"], f"{prefix}{key}.", models, mgd)
    return rows


def _values_of_mgd(key: str, mgd: dict[str, dict[str, Any]]) -> str:
    """What the two presets have at a dotted key; for teachers, what their `wide` and `deep` have."""
    if key.startswith("teachers."):
        values = {name: _value_at(key.replace("<name>", name), mgd["voc"]) for name in mgd["voc"]["teachers"]}
    else:
        values = {name[0].upper(): _value_at(key, made) for name, made in mgd.items()}
    values = {name: value for name, value in values.items() if value is not None}
    if not values:
        return "–"
    if len(values) == 2 and len(set(values.values())) == 1:
        return f"`{next(iter(values.values()))}`"
    return ", ".join(f"{name} `{value}`" for name, value in values.items())


def _value_at(key: str, made: Any) -> str | None:
    for part in key.split("."):
        if not isinstance(made, dict) or part not in made:
            return None
        made = made[part]
    return yaml_value(made)


def _section(about: dict[str, Any]) -> str | None:
    """The model of the section that a key is or may be."""
    references = [kind["$ref"] for kind in (about, *about.get("anyOf", ()), *about.get("oneOf", ())) if "$ref" in kind]
    return _model(references[0]) if references else None


def _model(reference: str) -> str:
    return reference.rpartition("/")[2]


def _allowed(about: dict[str, Any]) -> str:
    """What a key may be, in words: type, bounds and choices."""
    if "const" in about:
        return f"`{about['const']}`"
    if "enum" in about:
        return ", ".join(f"`{yaml_value(choice)}`" for choice in about["enum"])
    if alternatives := about.get("anyOf") or about.get("oneOf"):
        return ", or ".join(_allowed(kind) for kind in alternatives)
    if "$ref" in about:
        return "section"
    match about["type"]:
        case "null":
            return "`null`"
        case "boolean":
            return "`true`, `false`"
        case "string":
            return "package.module:function" if "pattern" in about else "text"
        case "array":
            low, high = about.get("minItems", 0), about.get("maxItems")
            count = f" of {low}" if low == high else f" of {low} to {high}" if high else f" of {low} or more" if low else ""
            return f"list{count}: {_allowed(about['items'])}"
        case "object":
            return f"section of any keys: {_allowed(about['additionalProperties'])}"
    bounds = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}
    limits = [f"{word} {about[bound]:g}" for bound, word in bounds.items() if bound in about]
    return " ".join(["whole number" if about["type"] == "integer" else "number", ", ".join(limits)]).strip()


def _text(description: str) -> str:
    """A docstring as Markdown: one line, and nothing of it taken for markup outside of `code`."""
    parts = re.split(r"(`[^`]*`)", " ".join(description.split()))
    return "".join(part if part.startswith("`") else part.replace("*", "\\*").replace("<", "&lt;") for part in parts)
