"""The state of an unfinished training, in files that are replaced in one step."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from mgd_pipeline.durable import replace_file

_FORMAT = 2
"""Of training checkpoints; those of another version of the code are not used."""


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class TrainingCheckpoint:
    """The state of an unfinished training, in a work folder; it belongs to one `key`, the hash of all that decides the result.

    A checkpoint of another key or format, or a damaged one, is not used: training then starts from the beginning.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.path = folder / "checkpoint.pt"
        self.key = key

    def save(self, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save({"format": _FORMAT, "key": self.key, **state}, buffer)
        data = buffer.getvalue()
        replace_file(self.path, hashlib.sha256(data).digest() + data)

    def load(self) -> dict[str, Any] | None:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        digest, data = data[:32], data[32:]
        if hashlib.sha256(data).digest() != digest:
            return None
        try:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError):
            return None
        return state if (state.get("format"), state["key"]) == (_FORMAT, self.key) else None

    def save_parts(self, step: int, parts: Mapping[str, Stateful], log: dict[str, list[tuple[int, float]]]) -> None:
        """Saves the state of networks, optimisers and the like by name, torch's random state, and what was logged so far."""
        states = {name: part.state_dict() for name, part in parts.items()}
        self.save({"step": step, "parts": states, "rng": torch.get_rng_state(), "log": log})

    def restore_parts(self, parts: Mapping[str, Stateful]) -> tuple[int, dict[str, list[tuple[int, float]]]] | None:
        """Brings all that `save_parts` saved back to where it was; returns the step and the log, None where nothing is usable."""
        state = self.load()
        if state is None:
            return None
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        torch.set_rng_state(state["rng"])
        return state["step"], state["log"]

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
