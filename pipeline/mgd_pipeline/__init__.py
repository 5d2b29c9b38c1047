"""mgd-pipeline: multi-granularity distillation for light segmentation networks, from teachers that run once."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgd_pipeline.caches.reader import open_cache
    from mgd_pipeline.students.student import load_student

__all__ = ["load_student", "open_cache"]
_MODULES = {"load_student": "mgd_pipeline.students.student", "open_cache": "mgd_pipeline.caches.reader"}


def __getattr__(name: str) -> Any:
    # Lazily: `import mgd_pipeline` must not pull in torch, or --help would take seconds.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
