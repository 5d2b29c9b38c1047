"""The stages as functions: `from mgd_stages import open_project, train_student`.

A stage takes the `Project` that `open_project` returns and the settings of the machine; it raises `mgd_pipeline.MGDError`.
Each name is loaded when it is first asked for.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgd_stages.compare_teachers import compare_teachers
    from mgd_stages.evaluate import evaluate
    from mgd_stages.precompute_teachers import precompute_teachers
    from mgd_stages.prepare_data import prepare_data
    from mgd_stages.projects.init import init_project
    from mgd_stages.report.page import report
    from mgd_stages.run.project import Project, open_project
    from mgd_stages.train_student import train_student
    from mgd_stages.train_teacher import train_teacher

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

_MODULES = {
    "Project": "run.project",
    "compare_teachers": "compare_teachers",
    "evaluate": "evaluate",
    "init_project": "projects.init",
    "open_project": "run.project",
    "precompute_teachers": "precompute_teachers",
    "prepare_data": "prepare_data",
    "report": "report.page",
    "train_student": "train_student",
    "train_teacher": "train_teacher",
}


def _public(name: str) -> Any:
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


class _Stage(ModuleType):
    """A module with the name of its stage, which can be called as the stage."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return _public(self.__name__.rpartition(".")[2])(*arguments, **options)

    def __reduce__(self) -> Any:
        return import_module, (self.__name__,)


class _Stages(ModuleType):
    """Python binds `mgd_stages.evaluate` to the module of that name as soon as anything imports it, so the module can be called."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _MODULES and type(value) is ModuleType:
            value.__class__ = _Stage
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = _public(name)
        return self.__dict__.setdefault(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *__all__})


sys.modules[__name__].__class__ = _Stages
