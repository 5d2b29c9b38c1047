"""Files of weights: safetensors with metadata and a hash, replaced in one step; and what others' files hold.

safetensors runs no code, but 293 of 300 flipped bits in such a file give other weights without an error (measured): files
that are written here carry the SHA-256 of their tensors and metadata, and it is compared whenever they are read.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from mgd_pipeline.access import access_error, says_nothing
from mgd_pipeline.durable import replace_file
from mgd_pipeline.errors import WeightsError

_METADATA = "mgd"
_HASH = "sha256"
_HEADER_BYTES = 100 * 2**20


def save_weights(path: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """A safetensors file whose metadata carries one JSON text under "mgd" and the hash of all; same content, same bytes."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    # One text and not two: safetensors writes several in an order of chance.
    note = json.dumps({**metadata, _HASH: _sealed(tensors, metadata)}, sort_keys=True, allow_nan=False)
    replace_file(path, safetensors_bytes(tensors, {_METADATA: note}))


def size_of_state(network: torch.nn.Module) -> int:
    """Bytes of the file that `save_weights` makes of a network, but for some kB of names."""
    return sum(value.numel() * value.element_size() for value in network.state_dict().values())


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `save_weights` noted; an empty dictionary for a file without such a note or of another format.

    Raises WeightsError if there is no such file or its header is damaged.
    """
    metadata = _notes(Path(path))
    metadata.pop(_HASH, None)
    return metadata


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a safetensors or torch state-dict file, on the CPU; runs no code from the file.

    Raises WeightsError naming the file where it is missing, damaged, not what `save_weights` wrote, or holds anything but
    tensors, AccessError where it may not be read.
    """
    path = Path(path)
    _require_access(path)
    try:
        if path.suffix == ".safetensors":
            tensors, metadata = load_file(path, device="cpu"), _notes(path)
            if metadata and metadata.pop(_HASH, None) != _sealed(tensors, metadata):
                raise WeightsError(f"{path}: is damaged (its SHA-256 differs from the one it carries); restore it or make it again")
            return tensors
        content = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise WeightsError(f"{path}: not a readable weights file: {' '.join(str(error).split())[:200]}") from None
    except pickle.UnpicklingError:
        raise WeightsError(
            f"{path}: holds Python objects beside tensors; `mgd-pipeline convert-weights` makes safetensors of it"
        ) from None
    state = find_state_dict(content)
    if state is None:
        raise WeightsError(f"{path}: expected a state dict of tensors")
    return state


def find_state_dict(content: object) -> dict[str, Tensor] | None:
    """The state dict in what a checkpoint file holds: itself, or under state_dict or model."""
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        return None
    return content


def convert_weights(source: Path, output: Path, *, key: str | None = None, trust: bool = False) -> int:
    """Makes a safetensors file of a group's old pickled checkpoint, once; returns how many tensors it has.

    `key` names the state dict where a checkpoint has several, with dots between levels. Options of argparse beside the
    tensors are passed over. Other Python objects are refused by name: unpickling runs their code, which `trust` allows.
    "module." of DataParallel is removed. Raises WeightsError.
    """
    if output.suffix != ".safetensors":
        raise WeightsError(f"{output}: name the result .safetensors")
    _require_access(source)
    try:
        data = source.read_bytes()
    except OSError as error:
        raise WeightsError(f"{source}: {error.strerror}") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        found = str(error).partition("GLOBAL ")[2].split(" ")[0] or "other Python objects"
        raise WeightsError(
            f"{source}: holds {found}, and reading that runs the code of whoever wrote the file; if you trust them, say --trust"
        ) from None
    except (RuntimeError, EOFError, ValueError, AttributeError, ImportError) as error:
        raise WeightsError(f"{source}: not a readable checkpoint: {' '.join(str(error).split())[:200]}") from None
    for part in key.split(".") if key else []:
        if not isinstance(content, dict) or part not in content:
            has = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
            raise WeightsError(f"{source}: has no {part!r} at {key}; it has {has[:200]}")
        content = content[part]
    state = find_state_dict(content)
    if state is None:
        has = ", ".join(map(str, list(content)[:8])) if isinstance(content, dict) else type(content).__name__
        raise WeightsError(f"{source}: no state dict of tensors found in {has}; name it by --key")
    save_weights(output, {name.removeprefix("module."): tensor for name, tensor in state.items()}, {})
    return len(state)


def sha256_of_state(state: dict[str, Tensor]) -> str:
    """One hash over names, shapes, dtypes and bytes of a state dict, whatever file it came from."""
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _sealed(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    return hashlib.sha256(f"{sha256_of_state(tensors)}{json.dumps(metadata, sort_keys=True, allow_nan=False)}".encode()).hexdigest()


def _require_access(path: Path) -> None:
    """Raises AccessError where a file cannot be read that may be sound: safetensors says of such a file that there is none."""
    try:
        open(path, "rb").close()
    except OSError as error:
        if says_nothing(error):
            raise access_error(path, error) from None


def _notes(path: Path) -> dict[str, Any]:
    """What `save_weights` noted in a safetensors file's header, and the hash; nothing for other files."""
    if path.suffix != ".safetensors":
        return {}
    _require_access(path)
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _HEADER_BYTES:
                raise WeightsError(f"{path}: not a safetensors file: its header claims {length} bytes")
            header = json.loads(file.read(length))
        return dict(json.loads(header.get("__metadata__", {}).get(_METADATA, "{}")))
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except (struct.error, ValueError, AttributeError, TypeError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file: {error}") from None
