"""Teachers that a group's own function builds (`import:` in params.yaml)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from mgd_pipeline.errors import ParamsError
from mgd_pipeline.params import ImportedTeacher
from mgd_pipeline.teachers.teacher import Teacher


def imported_teacher(name: str, params: ImportedTeacher, path: Path, classes: Sequence[str], base: Path) -> Teacher:
    """Raises ParamsError for a module or function that does not exist, and for a result that is no plain Teacher."""
    module, _, function = params.import_.partition(":")
    if str(base.resolve()) not in sys.path:  # a module beside params.yaml needs no installation
        sys.path.insert(0, str(base.resolve()))
    try:
        build = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the group's module exists, and another module that it imports does not
        raise ParamsError(f"teachers.{name}.import: no module {module!r}; install it, or put it beside params.yaml") from None
    if build is None:
        raise ParamsError(f"teachers.{name}.import: {module} has no {function!r}")
    teacher = build(weights=path, classes=tuple(classes), **params.options)
    if not isinstance(teacher, Teacher):
        kind = type(teacher).__name__
        raise ParamsError(f"teachers.{name}.import: {params.import_} returned {kind}, not mgd_pipeline.teachers.Teacher")
    if teacher.short_side is not None or teacher.groups is not None:  # the provenance would not record them
        raise ParamsError(
            f"teachers.{name}.import: {params.import_} sets short_side or groups; write short_side, class_map here instead"
        )
    return teacher
