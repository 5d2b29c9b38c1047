"""The stages as functions: `from mgd_stages import open_project, train_student`.

A stage takes the `Project` that `open_project` returns and the settings of the machine; it raises `mgd_pipeline.MGDError`.
Each name is loaded when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgd_stages.projects.init import init_project
    from mgd_stages.reports.page import report
    from mgd_stages.run.project import Project, open_project
    from mgd_stages.stages.compare_teachers import compare_teachers
    from mgd_stages.stages.evaluate import evaluate
    from mgd_stages.stages.precompute_teachers import precompute_teachers
    from mgd_stages.stages.prepare_data import prepare_data
    from mgd_stages.stages.train_student import train_student
    from mgd_stages.stages.train_teacher import train_teacher

__all__ = [
    "Project",
    "compare_teachers",
    "evaluate",
    "init_project",
    "open_project",
    "precompute_teachers",
    "prepare_data",
    "report",
    "train_student",
    "train_teacher",
]

_MODULES = {"Project": "run.project", "init_project": "projects.init", "open_project": "run.project", "report": "reports.page"}
"""Where the public names are defined that are no module of `mgd_stages.stages`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES.get(name, f'stages.{name}')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
