"""docs/parameters.md: nothing that params.yaml may hold is missing there, and what is said of it is true."""

from __future__ import annotations

import re
import types
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from mgd_pipeline.errors import ParamsError
from mgd_pipeline.params import Params, Section
from mgd_pipeline.params_file import load_params, parse_params
from mgd_stages.projects.presets import preset
from mgd_stages.projects.reference import render_reference
from test_init import REPOSITORY

ROWS = [re.split(r" (?<!\\)\| ", line[2:-2]) for line in render_reference().splitlines() if line.startswith("| `")]
BY_KEY = {row[0].strip("`"): row for row in ROWS}


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """All models that a field may hold: unions, annotations and dictionaries opened."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Annotated, Union, types.UnionType, dict):
        return [model for part in get_args(annotation) for model in sections_of(part)]
    return []


def leaves(model: type[BaseModel], prefix: str = "") -> list[tuple[str, str | None]]:
    """Dotted keys of all values below a model, with their docstrings."""
    keys = []
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        inner = sections_of(field.annotation)
        of_any_name = ".<name>" if get_origin(field.annotation) is dict else ""
        keys += [leaf for section in inner for leaf in leaves(section, f"{key}{of_any_name}.")]
        if not inner:
            keys.append((key, field.description))
    return keys


def plain(cell: str) -> str:
    return cell.replace("\\", "").replace("&lt;", "<")


def test_every_key_of_every_model_is_on_the_page_with_its_meaning() -> None:
    wanted = {(key, " ".join((text or "").split())) for key, text in leaves(Params)}
    assert (
        len(wanted) > 90 and {"teachers.<name>.import", "data.partition.labelled", "student.ohem.min_kept"} <= dict(wanted).keys()
    )
    assert wanted <= {(row[0].strip("`"), plain(row[4])) for row in ROWS}
    assert all(len(row) == 5 and all(row) for row in ROWS)


def test_every_kind_of_section_has_its_own_rows() -> None:
    """`dataset` of four data sets and `weights` of five kinds of teachers, each with words of its own."""
    assert [plain(row[1]) for row in ROWS if row[0] == "`data.dataset`"] == ["`shapes`", "`voc`", "`cityscapes`", "`folder`"]
    assert sum(row[0] == "`teachers.<name>.weights`" for row in ROWS) == 5


def test_defaults_are_those_of_the_models() -> None:
    """A file with nothing but the required keys has, everywhere else, what the page says."""
    voc = preset("voc", "data/raw/voc", "1/8").model_dump()

    def required_alone(model: type[Section], made: dict[str, Any]) -> dict[str, Any]:
        kept = {name: made[name] for name, field in model.model_fields.items() if field.is_required()}
        for name, value in kept.items():
            inner = sections_of(model.model_fields[name].annotation)
            if len(inner) == 1 and isinstance(value, dict):
                kept[name] = required_alone(inner[0], value)  # type: ignore[arg-type]
        return kept

    params = parse_params(required_alone(Params, voc))
    compared = 0
    for key, row in BY_KEY.items():
        value: Any = params.model_dump()
        for part in key.split("."):
            value = value.get(part, ...) if isinstance(value, dict) else ...
        if value is not ... and row[2] != "required" and not key.startswith("data."):
            compared += 1
            assert YAML(typ="safe").load(row[2].strip("`")) == value, key
    assert compared > 35


@pytest.mark.parametrize(
    ("key", "said", "wrong", "right"),
    [
        ("views.flip", "number at least 0, at most 1", "1.1", "1"),
        ("student.momentum", "number at least 0, below 1", "1", "0.99"),
        ("student.labelled_batch", "whole number at least 2", "1", "2"),
        ("views.crop", "list of 2: whole number above 0", "[32]", "[32, 64]"),
        ("targets.stride", "`2`, `4`, `8`, `16`", "5", "8"),
        ("targets.top_k", "whole number above 0, or `null`", "0", "null"),
    ],
)
def test_what_a_key_may_be_is_what_is_accepted(key: str, said: str, wrong: str, right: str) -> None:
    assert BY_KEY[key][1] == said
    load_params(REPOSITORY / "params.yaml", [f"{key}={right}"])
    with pytest.raises(ParamsError, match=key):
        load_params(REPOSITORY / "params.yaml", [f"{key}={wrong}"])


def test_values_of_mgd() -> None:
    """The two experiments; what is the project's own, and what MGD has not, is a dash."""
    assert BY_KEY["losses.image"][3] == "V `0.004`, C `0.002`"
    assert BY_KEY["losses.region"][3] == "`100.0`"
    assert BY_KEY["student.ohem.min_kept"][3] == "C `800000`"
    assert BY_KEY["teachers.<name>.encoder"][3] == "wide `tu-wide_resnet50_2`, deep `resnet101`"
    assert BY_KEY["data.root"][3] == BY_KEY["data.classes"][3] == BY_KEY["teachers.<name>.timm"][3] == "–"
