"""The lines of docs/devices.md run as they are written, without this package; their masks are those of `predict`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import tiny_student
from mgd_pipeline.errors import ParamsError
from mgd_pipeline.exports.deployed import describe
from mgd_pipeline.exports.formats import FORMATS, require
from mgd_pipeline.exports.openvino import kept_signal_stack
from mgd_pipeline.students.student import Student, load_student
from test_guide import PAGES, blocks
from test_predict import photo, save

SIZE = (64, 96)
NAME = re.compile(r'"student({})"'.format("|".join(re.escape(one.suffix) for one in FORMATS.values() if one.suffix)))


def exported(name: str, folder: Path) -> Student:
    """A student, its file for photos of SIZE and `photo.jpg`, in the working folder of the lines."""
    one = FORMATS[name]
    try:
        require(one)
    except ParamsError as error:
        pytest.skip(str(error))
    student = load_student(tiny_student(folder / "any.safetensors"))
    one.write(student, folder / f"student{one.suffix}", SIZE)
    if "+.json" in one.beside:
        (folder / f"student{one.suffix}.json").write_text(json.dumps(describe(student, SIZE)))
    save(folder / "photo.jpg", photo(*SIZE))
    return student


@pytest.mark.parametrize("name", ["onnx", "openvino", "executorch", "litert", "torch-export"])
def test_the_lines_in_python_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = exported(name, tmp_path)
    lines = {NAME.findall(block)[0]: block for block in blocks(PAGES["docs/devices.md"], "python")}[FORMATS[name].suffix]
    monkeypatch.chdir(tmp_path)
    assert "mgd" not in lines
    with kept_signal_stack():
        exec(compile(lines, "docs/devices.md", "exec"), done := {})
    assert (done["mask"] == student.predict("photo.jpg")).mean() > 0.999


@pytest.mark.parametrize(
    ("name", "libraries"),
    [("openvino", ["openvino"]), ("executorch", ["executorch", "executorch_backend_xnnpack", "executorch_kernels_optimized"])],
)
def test_the_lines_in_c_plus_plus_run(name: str, libraries: list[str], tmp_path: Path) -> None:
    """By the headers and libraries of the runtime's own wheel."""
    if (compiler := shutil.which("c++")) is None:
        pytest.skip("no C++ compiler on this machine")
    student = exported(name, tmp_path)
    written = blocks(PAGES["docs/devices.md"], "cpp")
    (planes,) = [block for block in written if "bgr" in block]
    (lines,) = [block for block in written if f'"student{FORMATS[name].suffix}"' in block]
    (mask,) = [block for block in written if "mask[i]" in block]
    headers = [line for line in lines.splitlines() if line.startswith("#include")]
    read = 'std::ifstream("bgr", std::ios::binary).read(bytes.data(), bytes.size());'
    source = [
        *headers,
        *(f"#include <{header}>" for header in ("fstream", "vector")),
        f"int main() {{ const int height = {SIZE[0]}, width = {SIZE[1]};",
        "std::vector<char> bytes(3 * height * width);",
        read,
        "const unsigned char* bgr = reinterpret_cast<unsigned char*>(bytes.data());",
        *(line for line in (planes + lines + mask).splitlines() if line not in headers),
        'std::ofstream("mask", std::ios::binary).write(reinterpret_cast<char*>(mask.data()), count); }',
    ]
    (tmp_path / "robot.cpp").write_text("\n".join(source))
    np.ascontiguousarray(np.asarray(Image.open(tmp_path / "photo.jpg"))[:, :, ::-1]).tofile(tmp_path / "bgr")
    spec = find_spec(name)
    assert spec is not None and spec.submodule_search_locations
    package = Path(spec.submodule_search_locations[0])
    folder = next(path for path in (package / "libs", package / "lib") if path.is_dir())
    command = [compiler, "-std=c++17", "-w", "robot.cpp", "-o", "robot", f"-I{package / 'include'}", f"-Wl,-rpath,{folder}"]
    if name == "executorch":  # as its CMake package sets them
        command += [f"-I{package / 'include/executorch/runtime/core/portable_type/c10'}", "-DC10_USING_CUSTOM_GENERATED_MACROS"]
    command += ["-Wl,--no-as-needed", *(str(next(folder.glob(f"lib{library}.so*"))) for library in libraries)]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    for call in (command, [str(tmp_path / "robot")]):
        done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
    found = np.fromfile(tmp_path / "mask", np.uint8).reshape(SIZE)
    assert (found == student.predict(tmp_path / "photo.jpg")).mean() > 0.999
