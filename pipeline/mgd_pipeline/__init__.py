"""mgd-pipeline: multi-granularity distillation for light segmentation networks, from teachers that run once.

The names in `__all__` are public. Each is loaded when it is first asked for, so that `import mgd_pipeline` costs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgd_pipeline.caches.reader import TargetCache, open_cache
    from mgd_pipeline.errors import (
        AccessError,
        CacheError,
        CacheIncomplete,
        ClusterError,
        DataError,
        LoaderError,
        MemoryShortage,
        MGDError,
        NonFiniteError,
        OutputError,
        ParamsError,
        ProvenanceMismatch,
        StaleTarget,
        Stopped,
        WeightsError,
    )
    from mgd_pipeline.params import Params
    from mgd_pipeline.params_file import load_params
    from mgd_pipeline.students.student import Student, load_student
    from mgd_pipeline.teachers import Teacher, TeacherOutputs

__all__ = [
    "AccessError",
    "CacheError",
    "CacheIncomplete",
    "ClusterError",
    "DataError",
    "LoaderError",
    "MGDError",
    "MemoryShortage",
    "NonFiniteError",
    "OutputError",
    "Params",
    "ParamsError",
    "ProvenanceMismatch",
    "StaleTarget",
    "Stopped",
    "Student",
    "TargetCache",
    "Teacher",
    "TeacherOutputs",
    "WeightsError",
    "__version__",
    "load_params",
    "load_student",
    "open_cache",
]
__version__ = "0.1.0"

_MODULES = {
    "Params": "params",
    "Student": "students.student",
    "TargetCache": "caches.reader",
    "Teacher": "teachers",
    "TeacherOutputs": "teachers",
    "load_params": "params_file",
    "load_student": "students.student",
    "open_cache": "caches.reader",
}
"""Where the public names are defined; all other names of `__all__` are in errors."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
