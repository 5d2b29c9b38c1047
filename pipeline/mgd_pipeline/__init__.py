"""mgd-pipeline: multi-granularity distillation for light segmentation networks, from teachers that run once."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgd_pipeline.students.student import load_student

__all__ = ["load_student"]


def __getattr__(name: str) -> Any:
    # Lazily: `import mgd_pipeline` must not pull in torch, or --help would take seconds.
    if name == "load_student":
        from mgd_pipeline.students.student import load_student

        return load_student
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
