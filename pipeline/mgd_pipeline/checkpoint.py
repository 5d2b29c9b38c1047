"""The state of an unfinished training, in files that are written once."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from mgd_pipeline.durable import replace_file

_FORMAT = 3
"""Of training checkpoints; those of another version of the code are not used."""
_KEPT = 2

Logged = dict[str, list[tuple[int, float]]]


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class TrainingCheckpoint:
    """The last states of an unfinished training, in a work folder; they belong to one `key`, the hash of all that decides the
    result.

    Each is a file of its own, written beside, synced and renamed; the last two are kept. One of another key or format, or a
    damaged one, is not used: the one before it is, or training starts from the beginning.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self.key = key

    def save(self, step: int, parts: Mapping[str, Stateful], log: Logged) -> None:
        """Saves the state of networks, optimisers and the like by name, and what was logged so far. OSError: nothing is lost."""
        buffer = io.BytesIO()
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save({"format": _FORMAT, "key": self.key, "step": step, "parts": states, "log": log}, buffer)
        data = buffer.getvalue()
        replace_file(self.folder / f"checkpoint-{self.key[:16]}-{step:08d}.pt", hashlib.sha256(data).digest() + data)
        for path in set(self.folder.glob("checkpoint-*.pt")) - set(self._files()[:_KEPT]):
            path.unlink(missing_ok=True)

    def restore(self, parts: Mapping[str, Stateful]) -> tuple[int, Logged] | None:
        """Brings all that `save` saved back to where it was; returns the step and the log, None where nothing is usable."""
        for path in self._files():
            state = self._load(path)
            if state is not None:
                for name, part in parts.items():
                    part.load_state_dict(state["parts"][name])
                return state["step"], state["log"]
        return None

    def remove(self) -> None:
        for path in self.folder.glob("checkpoint-*.pt"):
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """Those of this key, newest first."""
        return sorted(self.folder.glob(f"checkpoint-{self.key[:16]}-*.pt"), reverse=True)

    def _load(self, path: Path) -> dict[str, Any] | None:
        data = path.read_bytes()
        digest, data = data[:32], data[32:]
        if hashlib.sha256(data).digest() != digest:
            return None
        try:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError):
            return None
        return state if (state.get("format"), state.get("key")) == (_FORMAT, self.key) else None
