"""Checkpoints: the state of an unfinished training, in files that are written once."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from mgd_pipeline.durable import replace_file

_FORMAT = 3
"""Checkpoints of another format are not used."""
_KEPT = 2
_OTHERS = 3
"""How many unfinished trainings with other settings are kept; each has up to two states."""
_ASIDE = "set-aside-"
_NAME = re.compile(rf"(?:checkpoint-|{_ASIDE})(.+)-(\d+)\.pt")

Logged = dict[str, list[tuple[int, float]]]


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True)
class Unfinished:
    """The states of one unfinished training in a work folder."""

    files: tuple[Path, ...]
    """newest first"""
    note: Path
    """what `steps` and `settings` were read from"""
    step: int
    """how many steps the newest state has done"""
    steps: int | None
    """how many the training has; None if unknown: version 0.1 did not note it"""
    saved: float
    """when, in seconds since 1970"""
    settings: dict[str, Any] | None
    """what decides the result, by name; None if unknown"""

    @property
    def size(self) -> int:
        """Bytes of the files that still exist."""
        return sum(path.stat().st_size for path in self.files if path.exists())


class TrainingCheckpoint:
    """The last states of an unfinished training, in a work folder; they belong to one `key`, the hash of all that decides the
    result.

    Each state is a file of its own, written beside, synced and renamed; the last two are kept. A damaged file, or one of another
    key or format, is not used: the previous state is, or training starts from the beginning. `settings` and `steps` are noted
    beside the states, so that a training of another key can say in what it differs. `tidy` says which other keys are kept.
    """

    def __init__(self, folder: Path, key: str, settings: Mapping[str, Any] | None = None, steps: int | None = None) -> None:
        self.folder, self.key, self.settings, self.steps = folder, key, settings, steps

    def save(self, step: int, parts: Mapping[str, Stateful], log: Logged) -> None:
        """Saves the state of networks, optimisers and the like by name, and what was logged so far. OSError: nothing is lost."""
        buffer = io.BytesIO()
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save({"format": _FORMAT, "key": self.key, "step": step, "parts": states, "log": log}, buffer)
        data = buffer.getvalue()
        if self.settings is not None and not self._note.exists():
            note = {"key": self.key, "steps": self.steps, "settings": dict(self.settings)}
            replace_file(self._note, (json.dumps(note, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())
        replace_file(self.folder / f"checkpoint-{self.key[:16]}-{step:08d}.pt", hashlib.sha256(data).digest() + data)
        for path in self._files()[_KEPT:]:
            path.unlink(missing_ok=True)

    def restore(self, parts: Mapping[str, Stateful]) -> tuple[int, Logged] | None:
        """Restores everything that `save` saved; returns the step and the log, None if no state is usable."""
        for path in self._files():
            if (state := self._load(path)) is not None:
                for name, part in parts.items():
                    part.load_state_dict(state["parts"][name])
                return state["step"], state["log"]
        return None

    def remove(self) -> None:
        """Removes the states of this key, whose training is finished, and of no other key."""
        _remove([*self._files(), *self._aside(), self._note])

    def unfinished(self) -> list[Unfinished]:
        """Trainings of other keys whose states are kept here, most steps first."""
        files: dict[str, list[Path]] = {}
        # States that `set_aside` renamed come last: the command of their training does not go on with them.
        for path in [path for kind in ("checkpoint-", _ASIDE) for path in sorted(self.folder.glob(f"{kind}*.pt"), reverse=True)]:
            if (name := _NAME.fullmatch(path.name)) and name[1] != self.key[:16]:
                files.setdefault(name[1], []).append(path)
        runs = []
        for key, paths in files.items():
            with suppress(FileNotFoundError):  # another process has just finished it
                runs.append(_read(self.folder / f"checkpoint-{key}.json", paths))
        return sorted(runs, key=lambda run: (-run.step, -run.saved))

    def tidy(self) -> list[Unfinished]:
        """Removes trainings of other keys except the three with the most steps; returns what was removed."""
        surplus = self.unfinished()[_OTHERS:]
        for run in surplus:
            _remove([*run.files, run.note])
        return surplus

    def set_aside(self) -> Path | None:
        """Renames the state of this key with the most steps, so that a training from the beginning neither uses nor replaces it.

        Returns its new path. Other states of this key are removed. A later `remove` of this key removes it as well.
        """
        states = sorted([*self._files(), *self._aside()], key=lambda path: (_step(path), path.name), reverse=True)
        if not states:
            return None
        kept = self.folder / states[0].name.replace("checkpoint-", _ASIDE, 1)
        with suppress(FileNotFoundError):  # the same command, called without --no-resume, has just removed it
            states[0].rename(kept)
        _remove([path for path in states[1:] if path != kept])
        return kept

    @property
    def _note(self) -> Path:
        return self.folder / f"checkpoint-{self.key[:16]}.json"

    def _files(self) -> list[Path]:
        """The states of this key, newest first."""
        return sorted(self.folder.glob(f"checkpoint-{self.key[:16]}-*.pt"), reverse=True)

    def _aside(self) -> list[Path]:
        return list(self.folder.glob(f"{_ASIDE}{self.key[:16]}-*.pt"))

    def _load(self, path: Path) -> dict[str, Any] | None:
        # The same command runs twice, and the other process has just removed it; or another version of torch wrote it.
        with suppress(FileNotFoundError, pickle.UnpicklingError, RuntimeError):
            data = path.read_bytes()
            if hashlib.sha256(data[32:]).digest() == data[:32]:
                state = torch.load(io.BytesIO(data[32:]), map_location="cpu", weights_only=True)
                return state if (state.get("format"), state.get("key")) == (_FORMAT, self.key) else None
        return None


def _read(note: Path, newest_first: list[Path]) -> Unfinished:
    said: Any = None
    with suppress(OSError, ValueError):  # version 0.1 noted nothing, or the note is damaged
        said = json.loads(note.read_bytes())
    said, newest = said if isinstance(said, dict) else {}, newest_first[0]
    return Unfinished(tuple(newest_first), note, _step(newest), said.get("steps"), newest.stat().st_mtime, said.get("settings"))


def _step(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
