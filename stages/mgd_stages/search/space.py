"""What a search may change: a YAML file of params.yaml's own keys with ranges and choices, and the file that is written if none is.

losses.region: {low: 1.0, high: 100.0, log: true}
losses.pixel_labels: {choose: [hard, soft]}
student.labelled_batch, student.unlabelled_batch: {choose: [[2, 6], [4, 4]]}      keys that are chosen together
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mgd_pipeline.errors import ParamsError
from mgd_pipeline.params import Params, nearest
from mgd_pipeline.params_file import change_params
from mgd_stages.projects.presets import yaml_value

_ITS_OWN = ("losses.", "student.", "views.", "cutmix.")
_HEADER = """\
# What `mgd-pipeline search` may change: keys of params.yaml, each with a range or with choices. Edit this file before the search
# begins. {low, high} is a range, evenly tried; with log: true small values are tried as often as large ones. {choose: [...]} is a
# list of values; keys with a comma between them are chosen together. A key that is not here keeps its value.
"""


@dataclass(frozen=True)
class Axis:
    """One thing that differs between trials: a range of numbers, or one of several choices."""

    keys: tuple[str, ...]
    """Of params.yaml; several are chosen together."""
    low: float = math.nan
    high: float = math.nan
    log: bool = False
    whole: bool = False
    """Whether the range is of whole numbers."""
    choices: tuple[Any, ...] = ()
    """For several keys, each choice is a list of a value for each key. A range has no choices."""

    @property
    def name(self) -> str:
        return ", ".join(self.keys)

    def settings(self, value: Any) -> dict[str, Any]:
        """The values of params.yaml's keys for one value of this axis."""
        return {self.keys[0]: value} if len(self.keys) == 1 else dict(zip(self.keys, value, strict=True))

    def value_of(self, params: Params) -> Any:
        """The value that parameters have on this axis."""
        values = [functools.reduce(getattr, key.split("."), params) for key in self.keys]
        return values[0] if len(values) == 1 else values

    def has(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        return not isinstance(value, bool) and isinstance(value, (int, float)) and self.low <= value <= self.high


Space = tuple[Axis, ...]


def read_space(path: Path, params: Params) -> Space:
    """The space of a file. Raises ParamsError in the words of params.yaml's own parser for a key or a value that cannot be."""
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"--space {path}: no such file; leave --space out, and a file to edit is written") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path}: cannot be read ({error}); check the file and its permissions") from None
    except (YAMLError, ValueError) as error:
        raise ParamsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict) or not raw:
        raise ParamsError(f"{path}: names no key; write lines such as losses.region: {{low: 1, high: 100, log: true}}")
    axes = tuple(_axis(str(path), str(name), told, params) for name, told in raw.items())
    keys = [key for axis in axes for key in axis.keys]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ParamsError(f"{path}: {twice[0]} stands twice; keep one of both")
    return axes


def _axis(source: str, name: str, told: Any, params: Params) -> Axis:
    keys, said = tuple(key.strip() for key in name.split(",")), f"{source}: {name}"
    for key in keys:
        if key == "student.steps":
            raise ParamsError(f"{said}: the search itself decides how long a trial is trained; leave it out")
        if not key.startswith(_ITS_OWN):
            sections = ", ".join(section.removesuffix(".") for section in _ITS_OWN)
            raise ParamsError(f"{said}: all trials share data, teachers and teacher caches; a key begins with one of {sections}")
    if not isinstance(told, dict) or not (told.keys() == {"choose"} or {"low", "high"} <= told.keys() <= {"low", "high", "log"}):
        known = "write {choose: [...]}, {low: ..., high: ...} or {low: ..., high: ..., log: true}"
        near = "" if not isinstance(told, dict) else "".join(nearest(key, ["choose", "low", "high", "log"]) for key in told)
        raise ParamsError(f"{said}: is {yaml_value(told)}; {known}{near}")
    if "choose" in told:
        axis = _choices(said, keys, told["choose"])
    else:
        axis = _range(said, keys, told)
    ends = axis.choices or (axis.low, axis.high)
    checked = [change_params(params, axis.settings(end), source) for end in ends]
    if axis.choices:
        return axis
    whole = all(isinstance(axis.value_of(one), int) for one in checked)
    if whole and not (axis.low == int(axis.low) and axis.high == int(axis.high)):
        raise ParamsError(f"{said}: takes whole numbers; write whole numbers as low and high")
    return Axis(keys, axis.low, axis.high, axis.log, whole)


def _choices(said: str, keys: tuple[str, ...], choices: Any) -> Axis:
    if not isinstance(choices, list) or len(choices) < 2:
        raise ParamsError(f"{said}: choose must be a list of two values or more")
    if twice := [one for i, one in enumerate(choices) if one in choices[:i] and type(one) is not bool]:
        raise ParamsError(f"{said}: {yaml_value(twice[0])} stands twice; keep one of both")
    if len(keys) > 1:
        for choice in choices:
            if not isinstance(choice, list) or len(choice) != len(keys):
                raise ParamsError(
                    f"{said}: each choice must be a list of {len(keys)} values, one for each key; not {yaml_value(choice)}"
                )
    return Axis(keys, choices=tuple(choices))


def _range(said: str, keys: tuple[str, ...], told: Mapping[str, Any]) -> Axis:
    low, high, log = told["low"], told["high"], told.get("log", False)
    if len(keys) > 1:
        raise ParamsError(f"{said}: several keys have no range; write {{choose: [[...], [...]]}}")
    for name, bound in (("low", low), ("high", high)):
        if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not math.isfinite(bound):
            raise ParamsError(f"{said}: {name} is {yaml_value(bound)}, not a number")
    if not isinstance(log, bool):
        raise ParamsError(f"{said}: log is {yaml_value(log)}; write true or false")
    if not low < high:
        raise ParamsError(f"{said}: low is {low}, and high is {high}; low must be smaller")
    if log and low <= 0:
        raise ParamsError(f"{said}: low is {low}; with log: true it must be above 0")
    return Axis(keys, low, high, log)


def default_space(params: Params) -> dict[str, dict[str, Any]]:
    """The space that is written where there is none, around the parameters' own values. It suits few labels: what teachers say
    counts for more or less, and nothing changes the student's network or what a step costs. It has no value that contradicts the
    other parameters, or needs a teacher that the student does not hear yet: its cache may not be there."""
    losses, student = params.losses, params.student
    sampled = student.labelled_batch + student.unlabelled_batch
    shares = sorted({max(2, min(sampled - 2, round(sampled * share))) for share in (0.125, 0.25, 0.5)})
    rate = student.learning_rate
    space: dict[str, dict[str, Any]] = {
        "losses.pixel": {"low": 0.1, "high": 3.0, "log": True},
        "losses.region": {"choose": _around(losses.region or 10.0)},
        "losses.image": {"choose": _around(losses.image or 0.004)},
        "losses.confidence": {"choose": [0.0, 0.5, 0.8, 0.95]},
        "losses.prior_adjustment": {"low": 0.0, "high": 1.0},
        "losses.pixel_labels": {"choose": ["hard", "soft"]},
    }
    several, weights = len(losses.pixel_teachers) > 1, [[], ["correct"], ["edges"], ["balance"]]
    if len(losses.pixel_teachers) == 2:
        weights.append(["agreement"])
    space |= {
        **({"losses.pixel_choice": {"choose": ["each", "ensemble", "by-class"]}} if several else {}),
        "losses.pixel_distance": {"choose": ["cross-entropy", "kl", "cauchy-schwarz", "ttm"]},
        "losses.pixel_weights": {"choose": weights},
        "losses.region_distance": {"choose": ["mse", "kl"]},
        "losses.channel": {"choose": [0.0, 1.0, 3.0]},
    }
    heard = sorted(losses.used_teachers, key=lambda name: name not in losses.region_teacher)
    teachers = [name for name in heard if name not in params.heads][:1]  # heads give no embeddings
    space["losses.feature, losses.feature_teachers"] = {"choose": [[0.0, []], [0.3, teachers], [1.0, teachers]]}
    space["cutmix.boxes"] = {"choose": [0, 1, 3]}
    space["cutmix.partner"] = {"choose": ["same", "other"]}
    if len(shares) > 1:
        both = [[share, sampled - share] for share in shares]
        space["student.labelled_batch, student.unlabelled_batch"] = {"choose": both}
    space["student.learning_rate"] = {"low": _short(rate / 4), "high": _short(rate * 4), "log": True}
    space["student.logit_adjustment"] = {"low": 0.0, "high": 1.0}
    possible: dict[str, dict[str, Any]] = {}
    for name, told in space.items():
        values = [value for value in told.get("choose", [told.get("low"), told.get("high")]) if _fits(params, name, value)]
        if len(values) > 1:
            possible[name] = {"choose": values} if "choose" in told else told
    return possible


def _fits(params: Params, name: str, value: Any) -> bool:
    try:
        changed = change_params(params, Axis(tuple(name.split(", "))).settings(value), "space")
    except ParamsError:
        return False
    return {*changed.losses.used_teachers} <= {*params.losses.used_teachers}


def _around(value: float) -> list[float]:
    return [0.0, *(_short(value * factor) for factor in (0.3, 1.0, 3.0))]


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def render_space(space: Mapping[str, Mapping[str, Any]]) -> str:
    lines = (
        f"{name}: {{{', '.join(f'{key}: {yaml_value(value)}' for key, value in told.items())}}}" for name, told in space.items()
    )
    return _HEADER + "\n".join(lines) + "\n"


def plain(space: Space) -> dict[str, Any]:
    """The space as JSON, for the note of what a search is."""
    return {
        axis.name: list(axis.choices) if axis.choices else {"low": axis.low, "high": axis.high, "log": axis.log} for axis in space
    }


def choice_text(value: Any) -> str:
    """A choice as text, by which Optuna knows it."""
    return json.dumps(value, allow_nan=False)
