"""A folder with a web page in which the student segments photos and the pictures of a camera, without a server that computes.

ONNX Runtime Web runs the network in the browser. Its files come from its npm package and lie in the folder, so the page fetches
nothing from elsewhere.

Letters: H W pixels.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
from PIL import Image

from mgd_pipeline.data.images import MAX_ASPECT, MAX_PIXELS
from mgd_pipeline.durable import replace_file, write_synced
from mgd_pipeline.errors import ParamsError
from mgd_pipeline.pictures.overlays import VOID
from mgd_pipeline.students.student import Student

RUNTIME, VERSION = "onnxruntime-web", "1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""Of the package's tarball, as npm and lock files write it."""
RUNTIME_FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
"""Of the package's dist/: the library and what it loads, for WebAssembly and for WebGPU."""

ABOUT = "student.json"
"""The file of the folder that describes the student."""
OFFLINE = "offline.js"
"""The file of the folder that keeps the others in browsers, hence lists them."""

Say = Callable[[str], None]
MaskOf = Callable[[np.ndarray], np.ndarray]
"""(H, W, 3) uint8 RGB to (H, W) uint8 class ids."""


# --- ONNX Runtime Web


def runtime_files(place: Path | None, say: Say) -> dict[str, bytes]:
    """The files of ONNX Runtime Web by name, from `place`, an unpacked npm package or its tarball, or from npm.

    npm's tarball is kept in the user's cache. Raises ParamsError where there is neither, or for another version than VERSION.
    """
    if place is None:
        return _unpacked(_tarball(say), f"{RUNTIME} {VERSION}")
    if place.is_file():
        data = place.read_bytes()
        if integrity(data) != INTEGRITY:
            raise ParamsError(f"--runtime {place}: is not the tarball of {RUNTIME} {VERSION} (its SHA-512 differs); {_by_npm()}")
        return _unpacked(data, f"--runtime {place}")
    if not place.is_dir():
        raise ParamsError(f"--runtime {place}: no such file or folder; {_by_npm()}")
    return _from_folder(place)


def integrity(data: bytes) -> str:
    """The SHA-512 of a package as npm writes it."""
    return f"sha512-{base64.b64encode(hashlib.sha512(data).digest()).decode()}"


def cache_folder() -> Path:
    """Where this user's programs keep what they can fetch again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mgd-pipeline"


def _by_npm() -> str:
    return f"`npm pack {RUNTIME}@{VERSION}` fetches it"


def _from_folder(place: Path) -> dict[str, bytes]:
    places = (place, place / "package", place / "node_modules" / RUNTIME)
    root = next((one for one in places if (one / "package.json").is_file()), None)
    if root is None:
        raise ParamsError(f"--runtime {place}: holds no package.json, so it is no unpacked npm package; {_by_npm()}")
    try:
        about = json.loads((root / "package.json").read_text(encoding="utf-8"))
        named = about["name"], about["version"]
    except (ValueError, KeyError, TypeError):
        named = ("another package", "")
    if named != (RUNTIME, VERSION):
        raise ParamsError(f"--runtime {place}: holds {' '.join(named).strip()}, not {RUNTIME} {VERSION}; {_by_npm()}")
    if missing := [name for name in RUNTIME_FILES if not (root / "dist" / name).is_file()]:
        raise ParamsError(f"--runtime {place}: lacks dist/{missing[0]}; {_by_npm()}")
    return {name: (root / "dist" / name).read_bytes() for name in RUNTIME_FILES}


def _unpacked(data: bytes, name: str) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = {name: archive.extractfile(f"package/dist/{name}") for name in RUNTIME_FILES}
        return {name: member.read() for name, member in members.items() if member is not None}


def _tarball(say: Say) -> bytes:
    """npm's tarball: the one in the cache, or a new one."""
    kept = cache_folder() / f"{RUNTIME}-{VERSION}.tgz"
    if kept.is_file() and integrity(data := kept.read_bytes()) == INTEGRITY:
        return data
    npm = which("npm")
    remedy = f"install Node.js, or fetch the package elsewhere ({_by_npm()}) and name it by --runtime"
    if npm is None:
        raise ParamsError(f"npm: not installed, and needed for {RUNTIME} {VERSION}; {remedy}")
    say(f"fetching {RUNTIME} {VERSION} by npm, once")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", f"{RUNTIME}@{VERSION}", "--pack-destination", folder, "--ignore-scripts"]
        done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        packed = list(Path(folder).glob("*.tgz"))
        if done.returncode or not packed:
            reason = " ".join(line.removeprefix("npm error").strip() for line in done.stderr.splitlines()[:2]) or "no reason given"
            raise ParamsError(f"npm: cannot fetch {RUNTIME} {VERSION} ({reason}); check the network, or {remedy.split(', or ')[1]}")
        data = packed[0].read_bytes()
    if integrity(data) != INTEGRITY:
        raise ParamsError(f"npm: gave another {RUNTIME} {VERSION} than the one known here (its SHA-512 differs); {remedy}")
    try:
        replace_file(kept, data)
    except OSError as error:
        say(f"warning: {RUNTIME} is not kept for the next time ({error.filename}: {error.strerror})")
    return data


# --- the network


def web_model(model: bytes) -> bytes:
    """The model of `onnx.to_onnx` between a canvas and a mask.

    `pixels`, (H, W, 4) uint8 RGBA as canvases have them, to `mask`, (H, W) uint8 class ids. Logits, which take four bytes for each
    pixel and class, never leave the runtime.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    proto = onnx.load_from_string(model)
    graph = proto.graph
    constants = {"web_start": [0], "web_end": [3], "web_axis": [2], "web_front": [0]}
    graph.initializer.extend(numpy_helper.from_array(np.array(values, np.int64), name) for name, values in constants.items())
    before = [
        helper.make_node("Slice", ["pixels", "web_start", "web_end", "web_axis"], ["web_rgb"]),
        helper.make_node("Transpose", ["web_rgb"], ["web_channels"], perm=[2, 0, 1]),
        helper.make_node("Cast", ["web_channels"], ["web_float"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["web_float", "web_front"], ["images"]),
    ]
    after = [
        helper.make_node("ArgMax", ["logits"], ["web_classes"], axis=1, keepdims=0),
        helper.make_node("Squeeze", ["web_classes", "web_front"], ["web_ids"]),
        helper.make_node("Cast", ["web_ids"], ["mask"], to=TensorProto.UINT8),
    ]
    nodes = [*before, *graph.node, *after]
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    graph.input.append(helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["height", "width", 4]))
    graph.output.append(helper.make_tensor_value_info("mask", TensorProto.UINT8, ["height", "width"]))
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    metadata |= {
        "input": json.dumps("pixels: uint8 (height, width, 4), RGBA of any size; alpha is not read", allow_nan=False),
        "output": json.dumps("mask: uint8 (height, width), the class of each pixel", allow_nan=False),
    }
    helper.set_model_props(proto, metadata)
    return proto.SerializeToString()


def run_web(model: bytes) -> MaskOf:
    """The page's network in ONNX Runtime here."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    def mask_of(image: np.ndarray) -> np.ndarray:
        pixels = np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])
        return np.asarray(session.run(["mask"], {"pixels": pixels})[0])

    return mask_of


# --- the folder


def write_web(student: Student, model: bytes, runtime: Mapping[str, bytes], folder: Path) -> None:
    """Writes the page, `model` of `web_model`, and `runtime_files` into a new folder."""
    image = test_picture(student.long_side)
    picture = io.BytesIO()
    Image.fromarray(image).save(picture, "PNG")
    contents: dict[str, bytes] = {
        **{source.name: source.read_bytes() for source in files("mgd_pipeline.exports").joinpath("page").iterdir()},
        **{f"runtime/{name}": data for name, data in runtime.items()},
        "student.onnx": model,
        ABOUT: (json.dumps(about(student, len(model)), ensure_ascii=False, allow_nan=False) + "\n").encode(),
        "check.png": picture.getvalue(),
        "check.mask": student.predict(image).tobytes(),
    }
    contents[OFFLINE] = _offline(contents)
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_synced(folder / name, data)


def strange_files(folder: Path) -> list[str]:
    """The files of a page's folder that `write_web` has not written there, sorted."""
    listed = re.findall(r'^  "(.+)",$', (folder / OFFLINE).read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return sorted(present - {*listed, OFFLINE})


def student_of(folder: Path) -> str | None:
    """The `weights_sha256` of the student in a page's folder; None where it is no such folder, or one of an older version."""
    try:
        said = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return said.get("weights_sha256") if isinstance(said, dict) else None


def about(student: Student, size: int) -> dict[str, Any]:
    """What the page knows of the student, as plain JSON; `size` of its network in bytes."""
    rules = student.photo_rules
    network = student.metadata["network"]
    return {
        "network": f"{network['encoder'].removeprefix('tu-')} with {network['decoder']}",
        "bytes": size,
        "weights_sha256": student.weights_sha256,
        "classes": student.classes,
        "palette": student.palette,
        "void": VOID,
        "photos": {
            "apply_orientation": rules.apply_orientation,
            "background_colour": rules.background_colour,
            "most_pixels": MAX_PIXELS,
            "longest_strip": MAX_ASPECT,
        },
    }


def test_picture(long_side: int | None) -> np.ndarray:
    """(H, W, 3) uint8: smooth colours, edges and grain. A little larger than the student's long side, but flat, which is quick."""
    random = np.random.default_rng(1)
    height, width = (96, 160) if long_side is None else (max(1, long_side // 5), max(2, round(1.13 * long_side)))
    coarse = Image.fromarray(random.integers(0, 256, (4, 12, 3), dtype=np.uint8))
    ways = (Image.Resampling.BICUBIC, Image.Resampling.NEAREST)
    smooth, edges = (np.asarray(coarse.resize((width, height), way)).astype(int) for way in ways)
    return ((smooth + edges) // 2 + random.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)


def _offline(contents: Mapping[str, bytes]) -> bytes:
    """offline.js with the names of all files, and a version that is new where any file is."""
    digest = hashlib.sha256()
    for name in sorted(contents):
        digest.update(hashlib.sha256(name.encode() + contents[name]).digest())
    listed = ",\n  ".join(json.dumps(name, allow_nan=False) for name in ["./", *sorted(set(contents) - {OFFLINE})])
    text = contents[OFFLINE].decode().replace('["@FILES@"]', f"[\n  {listed},\n]")
    return text.replace("@VERSION@", digest.hexdigest()[:16]).encode()
