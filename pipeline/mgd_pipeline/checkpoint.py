"""Files of weights (safetensors with metadata) and of training state (torch.save), each replaced in one step."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from mgd_pipeline.durable import replace_file
from mgd_pipeline.errors import WeightsError

_METADATA_KEY = "mgd"
_FORMAT = 2
"""Of training checkpoints; those of another version of the code are not used."""


def save_weights(path: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """A safetensors file whose metadata carries one JSON text under "mgd"; same state and metadata, same bytes."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    replace_file(path, safetensors_bytes(tensors, {_METADATA_KEY: json.dumps(metadata, sort_keys=True)}))


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `save_weights` noted; an empty dictionary for a file without such a note or of another format.

    Raises WeightsError if there is no such file or its header is damaged.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return {}
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > 100 * 2**20:
                raise WeightsError(f"{path}: not a safetensors file: its header claims {length} bytes")
            header = json.loads(file.read(length))
        return json.loads(header.get("__metadata__", {}).get(_METADATA_KEY, "{}"))
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except (struct.error, ValueError, AttributeError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file: {error}") from None


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
