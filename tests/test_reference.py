"""docs/parameters.md: nothing that params.yaml may hold is missing there, and what is said of it is true."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from mgd_pipeline.errors import ParamsError
from mgd_pipeline.params import TEACHERS, Params
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


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """Dotted keys of all values below a model, with their docstrings."""
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        of_any_name = ".<name>" if get_origin(field.annotation) is dict else ""
        for section in (inner := sections_of(field.annotation)):
            yield from leaves(section, f"{key}{of_any_name}.")
        if not inner:
            yield key, field.description


def test_every_key_of_every_model_is_on_the_page_with_its_meaning() -> None:
    wanted = {(key, " ".join((text or "").split())) for key, text in leaves(Params)}
    assert len(wanted) > 90
    assert {"teachers.<name>.import", "data.partition.labelled", "student.ohem.min_kept"} <= dict(wanted).keys()
    assert wanted <= {(row[0].strip("`"), row[4].replace("\\", "").replace("&lt;", "<")) for row in ROWS}
    assert all(len(row) == 5 and all(row) for row in ROWS)


def test_defaults_are_those_of_the_models() -> None:
    """A file without a key has what the page says, or is refused where the page says so."""
    compared = 0
    for key, row in BY_KEY.items():
        made = preset("voc", "data/raw/voc", "1/8").model_dump()
        *parents, last = key.replace("<name>", "wide").split(".")
        section: Any = made
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if not isinstance(section, dict) or last not in section or key == "data.dataset":
            continue
        compared += 1
        del section[last]
        if row[2] == "required":
            with pytest.raises(ParamsError, match=f"{last}: missing; add it"):
                parse_params(made)
            continue
        value: Any = parse_params(made).model_dump()
        for part in [*parents, last]:
            value = value[part]
        assert YAML(typ="safe").load(row[2].strip("`")) == value, key
    assert compared > 60


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


def test_sections_of_several_kinds_and_values_of_mgd() -> None:
    """Each data set and kind of teacher has rows of its own. What is the project's own, and what MGD has not, is a dash."""
    assert [row[1] for row in ROWS if row[0] == "`data.dataset`"] == ["`shapes`", "`voc`", "`cityscapes`", "`folder`"]
    assert sum(row[0] == "`teachers.<name>.weights`" for row in ROWS) == len(TEACHERS)
    assert BY_KEY["losses.image"][3] == "V `0.004`, C `0.002`"
    assert BY_KEY["losses.region"][3] == "`100.0`"
    assert BY_KEY["student.ohem.min_kept"][3] == "C `800000`"
    assert BY_KEY["teachers.<name>.encoder"][3] == "wide `tu-wide_resnet50_2`, deep `resnet101`"
    assert BY_KEY["data.root"][3] == BY_KEY["data.classes"][3] == BY_KEY["teachers.<name>.timm"][3] == "–"
