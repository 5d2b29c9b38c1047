"""Imports run one way between folders, and nothing heavy comes along where it is not needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import mgd_pipeline
import mgd_stages
from mgd_pipeline import errors

REPOSITORY = Path(__file__).parents[1]
PACKAGES = {"mgd_pipeline": REPOSITORY / "pipeline/mgd_pipeline", "mgd_stages": REPOSITORY / "stages/mgd_stages"}
ROWS = (
    "mgd_pipeline.params",
    "mgd_pipeline",  # the modules at its top that no row below names
    "mgd_pipeline.data",
    "mgd_pipeline.views mgd_pipeline.metrics",
    "mgd_pipeline.networks mgd_pipeline.caches mgd_pipeline.pictures mgd_pipeline.distillation",
    "mgd_pipeline.students mgd_pipeline.teachers",
    "mgd_pipeline.exports",
    "mgd_pipeline.training",
    "mgd_stages.run",
    "mgd_stages.projects",
    "mgd_stages",  # the modules at its top that no row below names
    "mgd_stages.stages",  # which do not import each other
    "mgd_stages.reports mgd_stages.study mgd_stages.doctor mgd_stages.tools",
    "mgd_stages.whole mgd_stages.search",
    "mgd_stages.demo",
    "mgd_stages.cli",
)
"""A folder imports from rows above its own. Two folders of one row do not know each other."""
RANKS = {folder: rank for rank, row in enumerate(ROWS) for folder in row.split()}


def folder_of(module: str) -> str:
    """The longest name in ROWS that a module's name begins with; the packages themselves stand for modules at their top."""
    package, _, rest = module.partition(".")
    within = f"{package}.{rest.partition('.')[0]}"
    assert "." not in rest or within in RANKS, f"{module} lies in a folder that ROWS does not name"
    return within if within in RANKS else package


def module_of(package: str, path: Path) -> str:
    parts = path.relative_to(PACKAGES[package]).with_suffix("").parts
    return ".".join((package, *(part for part in parts if part != "__init__")))


def imports_of(source: str) -> set[str]:
    """All modules that a text imports, anywhere in it: at the top, in functions, and for the type checker alone."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
            if node.module in PACKAGES:  # public names stand for the modules that define them
                public = (getattr(sys.modules[node.module], alias.name, None) for alias in node.names)
                names |= {value.__module__ for value in public if hasattr(value, "__module__")}
    return names


FILES = {module_of(package, path): path for package, folder in PACKAGES.items() for path in folder.rglob("*.py")}
IMPORTS = {name: imports_of(path.read_text()) for name, path in FILES.items()}
PUBLIC = set(PACKAGES)
"""They load names of every folder, and only when asked for one."""


def upwards(imports: Mapping[str, Iterable[str]]) -> list[str]:
    """Imports from a row that is not above. Modules of one folder may import each other, but stages may not."""
    return [
        f"{name} imports {other}"
        for name, names in imports.items()
        if name not in PUBLIC
        for other in sorted(names)
        if other in imports
        and other not in PUBLIC
        and ((mine := folder_of(name)) != (theirs := folder_of(other)) or mine == "mgd_stages.stages")
        if RANKS[theirs] >= RANKS[mine]
    ]


def circle(imports: Mapping[str, Iterable[str]]) -> list[str]:
    """Modules that import each other in a circle; none where there is no circle."""
    graph = {name: {other for other in names if other in imports and other != name} - PUBLIC for name, names in imports.items()}
    try:
        TopologicalSorter({name: others for name, others in graph.items() if name not in PUBLIC}).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_imports_run_one_way_between_folders_and_never_in_a_circle() -> None:
    assert not upwards(IMPORTS) and not circle(IMPORTS)


@pytest.mark.parametrize(
    ("module", "planted"),
    [
        ("mgd_pipeline.caches.reader", "from mgd_pipeline.networks.weights import save_weights"),
        ("mgd_pipeline.data.images", "def late():\n    import mgd_stages.run.project"),
        ("mgd_stages.run.project", "from mgd_stages import evaluate"),
        ("mgd_stages.stages.evaluate", "from mgd_stages.stages.train_student import train_student"),
    ],
)
def test_planted_imports_are_seen(module: str, planted: str) -> None:
    """Upwards; and in a circle, within one folder."""
    assert upwards({**IMPORTS, module: IMPORTS[module] | imports_of(planted)})
    circular = {**IMPORTS, "mgd_pipeline.caches.format": {"mgd_pipeline.caches.build"}}
    assert {"mgd_pipeline.caches.format", "mgd_pipeline.caches.build"} <= set(circle(circular)) and not upwards(circular)


def test_the_library_knows_neither_stages_nor_dvc() -> None:
    for name, names in IMPORTS.items():
        tops = {imported.split(".")[0] for imported in names}
        assert not {"dvc", "conftest", "tests"} & tops, name
        if name.startswith("mgd_pipeline"):
            assert not {"mgd_stages", "typer", "rich"} & tops, name


@pytest.mark.parametrize("name", ["mgd_stages.stages.train_student", "mgd_stages.stages.prepare_data"])
def test_stages_that_need_no_teacher_do_not_reach_its_code(name: str) -> None:
    reached, waiting = set(), {name}
    while waiting:
        reached |= waiting
        waiting = {other for module in waiting for other in IMPORTS[module] if other in FILES} - reached - PUBLIC
    assert not {"mgd_pipeline.teachers", "mgd_pipeline.training.live", "mgd_stages.run.loaded_teacher"} & reached


LIGHT = {
    "mgd_pipeline": "torch zarr pydantic numpy",
    "mgd_stages": "torch zarr pydantic numpy typer rich",
    "mgd_stages.cli": "torch zarr pydantic numpy PIL",
    "mgd_pipeline.params_file": "torch zarr numpy PIL",
    "mgd_stages.run.project": "torch zarr numpy",
    "mgd_pipeline.data.manifest": "torch zarr",
    "mgd_stages.projects.init": "torch zarr",
    "mgd_pipeline.caches.reader": "torch zarr timm segmentation_models_pytorch",
    "mgd_pipeline.caches.build": "torch zarr timm segmentation_models_pytorch",
    "mgd_pipeline.caches.shards": "torch zarr timm segmentation_models_pytorch",
    "mgd_stages.doctor.run": "torch zarr timm",
}
LOSSES = {
    "mgd_pipeline.distillation": "zarr numcodecs pyarrow timm segmentation_models_pytorch",
    "mgd_stages.reports.page": "zarr matplotlib timm segmentation_models_pytorch",
}
STUDENTS = {
    "mgd_pipeline.students.student": "zarr pyarrow matplotlib",
    "mgd_pipeline.exports.formats": "zarr pyarrow matplotlib onnx onnxscript onnxruntime openvino coremltools",
    "mgd_stages.tools.predict": "zarr pyarrow matplotlib onnxruntime",
}


@pytest.mark.parametrize("chain", [LIGHT, LOSSES, STUDENTS], ids=["light", "losses", "students"])
def test_nothing_heavy_comes_along(chain: dict[str, str]) -> None:
    """Directly or through others, one module after the other: the cache has no torch, the losses no zarr, a student no cache."""
    script = (
        "import sys\nfrom importlib import import_module\n"
        f"for module, unwanted in {chain}.items():\n"
        "    import_module(module)\n"
        "    heavy = set(unwanted.split()) & {name.split('.')[0] for name in sys.modules}\n"
        "    if heavy: sys.exit(f'{module} imports {heavy}')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_are_all_there_and_typed() -> None:
    """Each name of `__all__` can be had, says where it comes from to type checkers, too, and is what it says."""
    for package in (mgd_pipeline, mgd_stages):
        path = FILES[package.__name__]
        typed = {
            alias.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        assert set(package.__all__) - {"__version__"} <= typed and path.with_name("py.typed").is_file()
        for name in package.__all__:
            assert not isinstance(getattr(package, name), ModuleType) and name in dir(package)
        with pytest.raises(AttributeError, match="has no attribute 'absent'"):
            package.absent  # noqa: B018
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.MGDError)}
    assert kinds <= set(mgd_pipeline.__all__)
