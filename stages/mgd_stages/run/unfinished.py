"""Unfinished trainings: which training a checkpoint belongs to, and how the user continues another one that is kept."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from mgd_pipeline.errors import shell_command
from mgd_pipeline.networks.encoders import normalisation, unrecorded_normalisation
from mgd_pipeline.training.checkpoint import TrainingCheckpoint, Unfinished
from mgd_pipeline.words import counted
from mgd_stages.run.progress import console
from mgd_stages.run.project import Project, manifest_hash, settings_of

_OTHERS = 3
_SHOWN = 6
"""Settings of another training that are named, at most."""


def other_input(encoder: str) -> list[Any]:
    """The normalisation of an encoder as part of a checkpoint's key, if version 0.1.0 used another one.

    A training that version 0.1.0 began with its own normalisation must not continue with this one.
    """
    now = normalisation(encoder)
    return [now] if now != unrecorded_normalisation(encoder) else []


def settings_note(
    project: Project, sections: Mapping[str, Any], device: torch.device, ranks: int = 1, caches: Sequence[str] = ()
) -> dict[str, Any]:
    """Everything that decides a training's result, by names that `_remedy` knows. `caches`: fingerprints of the teacher caches."""
    return settings_of(**sections, seed=project.params.seed) | {
        "device": device.type,
        "processes": ranks,
        "data/manifest": manifest_hash(project)[:12],
        "data/targets": [fingerprint[:12] for fingerprint in caches],
    }


def say_what_is_kept(title: str, checkpoint: TrainingCheckpoint, resume: bool) -> None:
    """Says that a training begins at step 0, if a state of an unfinished training is kept, and how to continue that one."""
    if not resume and (kept := checkpoint.set_aside()) is not None:
        step = int(kept.stem.rpartition("-")[2])
        back = shlex.join(["mv", str(kept), str(kept.with_name(kept.name.replace("set-aside-", "checkpoint-", 1)))])
        console.print(
            f"{title}: begins at step 0 (--no-resume); the state of step {step} of an earlier run is kept: after `{back}` the same "
            "command without --no-resume goes on from there"
        )
    kept = checkpoint.unfinished()[:_OTHERS]
    if kept:
        console.print(f"{title}: begins at step 0. Kept: {counted(len(kept), 'unfinished training')} of other settings")
    for run in kept:
        give_up = f"{shell_command('rm', checkpoint.folder)}/*-{run.note.stem.removeprefix('checkpoint-')}*"
        console.print(f"{title}: kept: {_told(run)}; {_differences(run, checkpoint.settings or {})}; `{give_up}` gives it up")


def tidy(title: str, checkpoint: TrainingCheckpoint) -> None:
    """Deletes all but three unfinished trainings, and says so."""
    for run in checkpoint.tidy():
        console.print(f"{title}: only the three unfinished trainings with the most steps are kept; deleted: {_told(run)}")


def _told(run: Unfinished) -> str:
    total = "" if run.steps is None else f" of {run.steps}"
    return f"step {run.step}{total}, saved {time.strftime('%Y-%m-%d %H:%M', time.localtime(run.saved))}"


def _differences(run: Unfinished, now: Mapping[str, Any]) -> str:
    """How the settings of another training differ from this one's, and the command that continues it."""
    if run.settings is None:
        return "its settings were not noted; the command and the params.yaml that began it go on with it"
    then, now = run.settings, json.loads(json.dumps(now, allow_nan=False))
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if not names:
        return "it was begun by another version; that version goes on with it"
    shown = [f"{name} is {_short(then, name)} there, {_short(now, name)} here" for name in names[:_SHOWN]]
    more = [f"{len(names) - _SHOWN} more differ"] if len(names) > _SHOWN else []
    remedies = dict.fromkeys(_remedy(*place) for place in map(partial(_place, then, now), names))
    return f"{', '.join([*shown, *more])}; the same command {', '.join(remedies)} continues it"


def _short(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return "null" if _section_of(name, settings) else "unknown"
    text = json.dumps(settings[name], ensure_ascii=False, allow_nan=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _section_of(name: str, settings: Mapping[str, Any]) -> str | None:
    """The section around a name that the settings have as null, as `student.ohem` may be around `student.ohem.threshold`."""
    parts = name.split(".")
    sections = (".".join(parts[:depth]) for depth in range(len(parts) - 1, 0, -1))
    return next((section for section in sections if section in settings), None)


def _place(then: Mapping[str, Any], now: Mapping[str, Any], name: str) -> tuple[str, Any]:
    """The name to set, and its value there; empty for a name that only another version has."""
    if name not in then:
        section = _section_of(name, then)
        return ("", None) if section is None else (section, then[section])
    if name in now:
        return name, then[name]
    if (section := _section_of(name, now)) is None:
        # Settings of here may lie below a section that is null there.
        return (name, then[name]) if any(other.startswith(f"{name}.") for other in now) else ("", None)
    inner = {other.removeprefix(f"{section}."): value for other, value in then.items() if other.startswith(f"{section}.")}
    return section, inner


def _remedy(name: str, then: Any) -> str:
    if not name:
        return "in the version that began it"
    if name == "device":
        return f"with --device {then}"
    if name == "processes":
        return "without torchrun" if then == 1 else f"under torchrun with {then} processes"
    if name.startswith("data/"):
        return f"with the {name} of that time"
    return f"with --set {shlex.quote(f'{name}={json.dumps(then, ensure_ascii=False, allow_nan=False)}')}"
