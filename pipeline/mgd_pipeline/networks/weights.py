"""Weights files: safetensors with metadata and a hash, replaced in one step; and reading the files of other tools.

safetensors runs no code, but it does not notice damage: 293 of 300 flipped bits gave other weights without an error
(measured). Files written here carry the SHA-256 of their tensors and metadata, and every read compares it.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import pickle
import re
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from mgd_pipeline.access import access_error, is_there, says_nothing, stand_in
from mgd_pipeline.durable import replace_file
from mgd_pipeline.errors import WeightsError, shell_command
from mgd_pipeline.words import counted, listed

_METADATA = "mgd"
_HASH = "sha256"
_DAMAGED = "it is cut off, damaged or something else: copy or fetch it again, or make it again"
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""Parts that torch.compile, FSDP, activation checkpointing and Lightning Fabric put into a tensor's name."""


def save_weights(path: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes a safetensors file with a JSON text under "mgd" and a hash over everything; equal content gives equal bytes."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    # One text and not two: safetensors writes several in a random order.
    note = json.dumps({**metadata, _HASH: _sealed(tensors, metadata)}, sort_keys=True, allow_nan=False)
    replace_file(path, safetensors_bytes(tensors, {_METADATA: note}))


def size_of_state(network: torch.nn.Module) -> int:
    """Bytes of the file that `save_weights` makes of a network, without some kB of names."""
    return sum(value.numel() * value.element_size() for value in network.state_dict().values())


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that `save_weights` wrote; an empty dictionary for files without it.

    Raises WeightsError for a missing file and for a damaged header.
    """
    return {key: value for key, value in _notes(Path(path)).items() if key != _HASH}


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a safetensors or torch state-dict file, on the CPU; runs no code from the file.

    Raises WeightsError, naming the file, if it is missing, damaged, or holds anything but tensors; AccessError if it may not be
    read.
    """
    path = Path(path)
    require_access(path)
    try:
        if path.suffix == ".safetensors":
            tensors, metadata = load_file(path, device="cpu"), _notes(path)
            if metadata and metadata.pop(_HASH, None) != _sealed(tensors, metadata):
                raise WeightsError(f"{path}: is damaged (its SHA-256 differs from the one it carries); restore it or make it again")
            return tensors
        content = _checkpoint(path)
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise WeightsError(f"{path}: not a readable weights file: {' '.join(str(error).split())[:200]}; {_DAMAGED}") from None
    except pickle.UnpicklingError:
        raise WeightsError(
            f"{path}: holds Python objects beside tensors; `mgd-pipeline convert-weights` makes safetensors of it"
        ) from None
    state = _find_state_dict(content)
    if state is None:
        kept = [str(key) for key, value in content.items() if isinstance(value, dict)] if isinstance(content, dict) else []
        remedy = f"; it holds {', '.join(kept[:8])}: choose one by `mgd-pipeline convert-weights --key`" if kept else ""
        raise WeightsError(f"{path}: expected a state dict of tensors{remedy}")
    return state


def _checkpoint(path: Path) -> Any:
    return torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)


def choice_of_state_dict(path: Path) -> str | None:
    """A sentence about a checkpoint file that `read_state_dict` can read and that holds several state dicts: which one it takes."""
    return None if path.suffix == ".safetensors" else _choice(_checkpoint(path), path)


def _choice(content: object, path: Path) -> str | None:
    taken, others = "", list[str]()
    while isinstance(content, dict) and (under := _under(content)) is not None:
        others += [f"{taken}{key}" for key, value in content.items() if key != under and _find_state_dict(value) is not None]
        taken, content = f"{taken}{under}.", content[under]
    if not others:
        return None
    other = shell_command("mgd-pipeline", "convert-weights", path, "NEW.safetensors", "--key", others[0])
    return f"{path}: holds several state dicts; {taken[:-1]} is taken, not {listed(others)} (`{other}` takes {others[0]})"


def _find_state_dict(content: object) -> dict[str, Tensor] | None:
    """The state dict of a checkpoint: its content itself, under state_dict or model, or the only one under any key."""
    while isinstance(content, dict) and (under := _under(content)) is not None:
        content = content[under]
    return content if isinstance(content, dict) and _is_state_dict(content) else None


def _under(content: dict[Any, Any]) -> str | None:
    """The key under which a checkpoint has its state dict; None where it is a state dict itself, or nobody knows the key."""
    if _is_state_dict(content):
        return None
    named = next((key for key in ("state_dict", "model") if isinstance(content.get(key), dict)), None)
    others = [key for key, value in content.items() if _is_state_dict(value)]
    return named or (others[0] if len(others) == 1 else None)


def _is_state_dict(content: object) -> bool:
    if not isinstance(content, dict) or not content:
        return False
    return all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())


def _without_prefix(
    state: dict[str, Tensor], wanted: Collection[str], path: str | Path, unused: Collection[str]
) -> dict[str, Tensor]:
    """A state dict under a network's own names, `wanted`, without the prefix that wrappers put before them, such as "module." of
    DataParallel or "model." of Lightning: the prefix that covers most of the network's tensors. Callers name missing tensors.
    Raises WeightsError if several prefixes fit, or if the file holds tensors of other names than `unused`."""
    bare = _without_wrappers(state, wanted)
    needed = {key for key in wanted if not key.endswith("num_batches_tracked")}
    parts = {key: [0, *(dot.end() for dot in re.finditer(r"\.", key))] for key in bare}
    counts = Counter(key[:start] for key, starts in parts.items() for start in starts if key[start:] in needed)
    most = max(counts.values(), default=0)
    if most <= len(needed) / 2 or counts[""] == most:
        return bare
    prefixes = sorted(prefix for prefix, count in counts.items() if count == most)
    remedy = f"`{shell_command('mgd-pipeline', 'convert-weights', path, 'NEW.safetensors', '--key', prefixes[0][:-1])}`"
    if len(prefixes) > 1:
        sets = " and ".join(f"{prefix}*" for prefix in prefixes)
        raise WeightsError(f"{path}: holds the network several times, as {sets}; choose one, such as by {remedy}")
    inside = {key.removeprefix(prefixes[0]): value for key, value in bare.items() if key.startswith(prefixes[0])}
    # AveragedModel counts what it averages beside its "module.".
    outside = [key for key in bare if not key.startswith(prefixes[0]) and key not in {*unused, "n_averaged"}]
    if outside:
        raise WeightsError(
            f"{path}: holds {counted(len(outside), 'tensor')} besides {prefixes[0]}*: {', '.join(outside[:4])}"
            f"{', ...' if len(outside) > 4 else ''}; keep the network alone by {remedy}"
        )
    return inside


def _without_wrappers(state: dict[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """Names without the parts that compiling and sharding insert; unchanged if two names would become one."""
    pattern = re.compile(rf"(?<![^.])(?:{'|'.join(_WRAPPERS)})\.")
    bare = {key: key if key in wanted else pattern.sub("", key) for key in state}
    if len(set(bare.values())) < len(bare):
        return state
    return {bare[key]: value for key, value in state.items()}


def fitting_state(
    wanted: dict[str, Tensor],
    state: dict[str, Tensor],
    path: str | Path,
    network: str,
    *,
    unused: Collection[str] = (),
    optional: Collection[str] = (),
) -> dict[str, Tensor]:
    """The tensors of a file under the names of `wanted`, without a wrapper's prefix (`_without_prefix`) and without `unused` names.

    Raises WeightsError that names the tensors which are missing (unless `optional`), foreign or of another shape.
    """
    named = _without_prefix(state, wanted, path, unused)
    state = {key: value for key, value in named.items() if key in wanted or key not in unused}
    problems = {
        "lacks": [key for key in wanted if key not in state and key not in optional],
        "holds foreign": [key for key in state if key not in wanted],
        "has another shape for": [key for key in wanted if key in state and state[key].shape != wanted[key].shape],
    }
    for problem, keys in problems.items():
        if keys:
            some = f"{counted(len(keys), 'tensor')}: {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}"
            raise WeightsError(f"{path}: does not fit {network}: {problem} {some}")
    return state


def convert_weights(
    source: Path, output: Path, *, key: str | None = None, trust: bool = False, say: Callable[[str], object] | None = None
) -> int:
    """Converts a pickled checkpoint to a safetensors file; returns how many tensors it has.

    `key` chooses one of several state dicts, or the tensors whose names begin so; dots separate levels. argparse options in the
    checkpoint are skipped. Other Python objects are refused by name, because unpickling runs their code; `trust` allows that.
    `say` is told which of several state dicts is taken if `key` is None.
    "module." of DataParallel and "_orig_mod." of torch.compile are removed. Raises WeightsError.
    """
    if output.suffix != ".safetensors":
        raise WeightsError(f"{output}: name the result .safetensors")
    require_access(source)
    content = read_state_dict(source) if source.suffix == ".safetensors" else _unpickled(source, trust)
    if say is not None and key is None and (choice := _choice(content, source)) is not None:
        say(choice)
    for part in key.split(".") if key else []:
        content = _part(content, part, key or "", source)
    state = _find_state_dict(content)
    if state is None:
        has = ", ".join(map(str, list(content)[:8])) if isinstance(content, dict) else type(content).__name__
        raise WeightsError(f"{source}: no state dict of tensors found in {has}; name it by --key")
    bare = _without_wrappers(state, ())
    names = {name: re.sub(r"^(?:module\.)+", "", name) for name in bare}
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise WeightsError(f"{source}: holds {twice[0]} with and without module. before it; choose one, such as by --key module")
    # Copies: safetensors takes no two names of one tensor, as tied weights are.
    save_weights(output, {names[name]: tensor.clone() for name, tensor in bare.items()}, read_metadata(source))
    return len(state)


def _unpickled(source: Path, trust: bool) -> Any:
    try:
        data = source.read_bytes()
    except OSError as error:
        raise WeightsError(f"{source}: {error.strerror}") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        objects = str(error).partition("GLOBAL ")[2].split(" ")[0] or "other Python objects"
        raise WeightsError(
            f"{source}: holds {objects}, and reading that runs the code of whoever wrote the file; if you trust them, say --trust"
        ) from None
    except (RuntimeError, EOFError, ValueError, AttributeError, ImportError) as error:
        raise WeightsError(f"{source}: not a readable checkpoint: {' '.join(str(error).split())[:200]}; {_DAMAGED}") from None


def _part(content: Any, part: str, key: str, source: Path) -> Any:
    """The content of a checkpoint under a key, or the tensors of its state dict whose names begin with it."""
    if isinstance(content, dict) and part in content:
        return content[part]
    state = _find_state_dict(content) or {}
    inside = {name.removeprefix(f"{part}."): tensor for name, tensor in state.items() if name.startswith(f"{part}.")}
    if not inside:
        has = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise WeightsError(f"{source}: has no {part!r} at {key}; it has {has[:200]}")
    return inside


def sha256_of_state(state: dict[str, Tensor]) -> str:
    """One hash over names, shapes, dtypes and bytes of a state dict; the file format does not matter."""
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _sealed(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    return hashlib.sha256(f"{sha256_of_state(tensors)}{json.dumps(metadata, sort_keys=True, allow_nan=False)}".encode()).hexdigest()


def require_access(path: Path) -> None:
    """Raises AccessError for a file that exists but cannot be read (safetensors would call it missing), and WeightsError for a
    stand-in such as a dead link or a Git LFS pointer."""
    if os.path.islink(path) and not is_there(path):
        raise WeightsError(
            f"{path}: is a link to {os.readlink(path)}, which does not exist; restore what it links to, or remove the link"
        )
    if is_there(path) and path.is_dir():
        raise WeightsError(f"{path}: is a folder; name the file of weights in it")
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        if says_nothing(error):
            raise access_error(path, error) from None
        return
    if why := stand_in(start):
        raise WeightsError(f"{path}: holds no weights; {why}")
    if path.suffix == ".safetensors" and start.startswith((b"PK\3\4", b"\x80\2")):
        remedy = shell_command("mgd-pipeline", "convert-weights", path.with_suffix(".pt"), path)
        raise WeightsError(f"{path}: is a file of PyTorch under the name of safetensors; rename it, then call `{remedy}`")


def _notes(path: Path) -> dict[str, Any]:
    """The metadata and the hash that `save_weights` wrote into a safetensors file's header; empty for other files."""
    if path.suffix != ".safetensors":
        return {}
    require_access(path)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads((file.metadata() or {}).get(_METADATA, "{}")))
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file: {error}; {_DAMAGED}") from None
