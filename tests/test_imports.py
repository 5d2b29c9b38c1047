"""Imports run one way, and nothing heavy comes along where it is not needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = {"mgd_pipeline": REPOSITORY / "pipeline/mgd_pipeline", "mgd_stages": REPOSITORY / "stages/mgd_stages"}
LEVELS = (  # a module imports from lines above its own; within a line, from modules further left
    "words errors access ahead params durable tables shared_memory remote weights checkpoint",
    "params_file",
    "images listing id_lists image_cache shapes datasets partition manifest views targets",
    "networks losses scaling cache_format cache cache_shards cache_build cache_verify metrics",
    "stored prediction deployment drawing overlays",
    "teachers teacher_networks teacher_fetch provenance training batches loading live",
    "mgd_stages.machine",
    "mgd_stages.progress mgd_stages.project mgd_stages.dvc_file mgd_stages.presets mgd_stages.reference mgd_stages.data_notes",
    "mgd_stages.init mgd_stages.prepare_data",
    "mgd_stages.class_tables mgd_stages.pictures mgd_stages.verdicts mgd_stages.evaluate",
    "mgd_stages.report_figures mgd_stages.report_sections mgd_stages.report",
    "mgd_stages.teacher_quality mgd_stages.precompute_teachers mgd_stages.cluster mgd_stages.sinks mgd_stages.training_loop",
    "mgd_stages.train_teacher mgd_stages.train_student mgd_stages.demo",
    "mgd_stages.checks mgd_stages.doctor_machine mgd_stages.doctor_data mgd_stages.doctor_targets mgd_stages.doctor_dvc",
    "mgd_stages.bench mgd_stages.doctor mgd_stages.cache_tools mgd_stages.variants mgd_stages.study mgd_stages.study_results",
    "mgd_stages.predict mgd_stages.export",
    "mgd_stages.cli",
)
ORDER = [name if "." in name else f"mgd_pipeline.{name}" for level in LEVELS for name in level.split()]
MODULES = {f"{package}.{path.stem}": path for package, folder in PACKAGES.items() for path in folder.glob("*.py")}


def imports_of(path: Path) -> set[str]:
    """All modules that a file imports, anywhere in it: at the top, in functions, and for the type checker alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_its_place() -> None:
    assert sorted(ORDER) == sorted(name for name in MODULES if not name.endswith("__init__"))


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_what_comes_before_it(name: str) -> None:
    own = imports_of(MODULES[name]) & set(ORDER)
    later = own & set(ORDER[ORDER.index(name) :])
    assert not later, f"{name} imports {', '.join(sorted(later))}"


def test_the_library_knows_neither_stages_nor_dvc() -> None:
    for name, path in MODULES.items():
        tops = {imported.split(".")[0] for imported in imports_of(path)}
        assert "dvc" not in tops, name
        assert "conftest" not in tops and "tests" not in tops, name
        if name.startswith("mgd_pipeline"):
            assert "mgd_stages" not in tops and "typer" not in tops and "rich" not in tops, name


@pytest.mark.parametrize("name", ["mgd_stages.train_student", "mgd_stages.prepare_data"])
def test_stages_that_need_no_teacher_do_not_reach_its_code(name: str) -> None:
    reached, waiting = set(), {name}
    while waiting:
        reached |= waiting
        waiting = {other for module in waiting for other in imports_of(MODULES[module]) & set(ORDER)} - reached
    assert not {"mgd_pipeline.teachers", "mgd_pipeline.live"} & reached and "mgd_stages.precompute_teachers" not in reached


def modules_after(statement: str) -> set[str]:
    script = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("mgd_pipeline", {"torch", "numpy", "pydantic", "zarr"}),
        ("mgd_pipeline.params_file", {"torch", "numpy", "zarr", "PIL"}),
        ("mgd_pipeline.cache", {"torch", "zarr", "timm", "segmentation_models_pytorch"}),
        ("mgd_pipeline.cache_build", {"torch", "zarr", "timm", "segmentation_models_pytorch"}),
        ("mgd_pipeline.cache_shards", {"torch", "zarr", "timm", "segmentation_models_pytorch"}),
        ("mgd_pipeline.losses", {"zarr", "numcodecs", "pyarrow", "timm", "segmentation_models_pytorch"}),
        ("mgd_pipeline.manifest", {"torch", "zarr"}),
        ("mgd_pipeline.prediction", {"zarr", "pyarrow", "matplotlib"}),
        ("mgd_pipeline.deployment", {"zarr", "pyarrow", "matplotlib", "onnx", "onnxscript", "onnxruntime"}),
        ("mgd_stages.predict", {"zarr", "pyarrow", "matplotlib", "onnxruntime"}),
        ("mgd_stages.cli", {"torch", "numpy", "zarr", "pydantic", "PIL"}),
        ("mgd_stages.init", {"torch", "zarr"}),
        ("mgd_stages.doctor", {"torch", "zarr", "timm"}),
        ("mgd_stages.report", {"zarr", "matplotlib", "timm", "segmentation_models_pytorch"}),
        ("mgd_stages.project", {"torch", "numpy", "zarr"}),
    ],
)
def test_nothing_heavy_comes_along(module: str, unwanted: set[str]) -> None:
    """Directly or through others: the cache has no torch, the losses no zarr, a student no store."""
    assert not modules_after(f"import {module}") & unwanted
