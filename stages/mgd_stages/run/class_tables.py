"""Measured numbers as files that DVC shows and other stages read: metrics (JSON), confusion matrices (CSV) and IoU (TSV).

DVC's metrics files hold what fits a table of experiments; numbers of each class are in the CSV and TSV files.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mgd_pipeline.data.classes import current_names
from mgd_pipeline.errors import DataError, shell_command

Value = TypeVar("Value")
_MADE_BY = {
    "evaluation": "evaluate",
    "teachers": "precompute-teachers",
    "compare-teachers": "compare-teachers",
    "train-student-distilled": "train-student",
    "train-student-supervised": "train-student --supervised-only",
}
_TEACHER = "train-teacher-"
"""Folders of results, and which command writes into them."""


def confusion_csv(confusion: np.ndarray, classes: Sequence[str]) -> bytes:
    """A confusion matrix, (K, K) pixels, rows = truth, as DVC plots it: actual, predicted, pixels."""
    cells = [[actual, predicted, confusion[i, j]] for i, actual in enumerate(classes) for j, predicted in enumerate(classes)]
    return _written([["actual", "predicted", "pixels"], *cells], ",")


def read_confusion(path: Path, classes: Sequence[str] = ()) -> tuple[list[str], np.ndarray] | None:
    """Classes and matrix that `confusion_csv` wrote; None without the file. `classes`: the project's, see `current_names`."""

    def parse(text: str) -> tuple[list[str], np.ndarray]:
        rows = list(csv.reader(io.StringIO(text, newline="")))[1:]
        cells = {(actual, predicted): int(pixels) for actual, predicted, pixels in rows}
        if not cells or len(cells) < len(rows):
            raise ValueError("cut off, or two classes of one name")
        names = list(dict.fromkeys(actual for actual, _ in cells))
        return current_names(names, classes), np.array([[cells[a, b] for b in names] for a in names], np.int64)

    return _parsed(path, parse, "is not a confusion matrix any more")


def class_tsv(columns: Mapping[str, Mapping[str, float]], classes: Sequence[str]) -> bytes:
    """Shares from 0 to 1 of each class, written in per cent, a column for each network or pair; a missing share is empty."""
    rows = [[name, *(f"{100 * of[name]:.4f}" if name in of else "" for of in columns.values())] for name in classes]
    return _written([["class", *columns], *rows], "\t")


def read_class_tsv(path: Path, classes: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """What `class_tsv` wrote, 0 to 1; empty without the file. `classes`: the project's, see `current_names`."""

    def parse(text: str) -> dict[str, dict[str, float]]:
        (_, *columns), *rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t")
        values = {name: dict(zip(columns, cells, strict=True)) for name, *cells in rows}
        if len(values) < len(rows):
            raise ValueError("two classes of one name")
        values = dict(zip(current_names(list(values), classes), values.values(), strict=True))
        return {
            column: {name: round(float(cells[column]) / 100, 6) for name, cells in values.items() if cells[column]}
            for column in columns
        }

    return _parsed(path, parse, "is no table of classes any more") or {}


def read_numbers(path: Path) -> dict[str, Any] | None:
    """A stage's metrics; None without the file. Undefined numbers are None: null, or the NaN that version 0.1.0 wrote."""
    return _parsed(path, lambda text: dict(json.loads(text, parse_constant=lambda _: None)), "is not what a stage wrote")


def make_again(path: Path) -> str:
    """The remedy for a damaged result of a stage: the command that writes it again."""
    for folder in path.parents:
        command = _MADE_BY.get(folder.name)
        if command is None and folder.name.startswith(_TEACHER):
            command = shell_command("train-teacher", "--teacher", folder.name.removeprefix(_TEACHER))
        if command is not None:
            return f"remove it, and run `mgd-pipeline {command}`"
    return "remove it, and run the stage again that makes it"


def read_text(path: Path) -> str | None:
    """A file's text; None without the file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not text; {make_again(path)}") from None


def _parsed(path: Path, parse: Callable[[str], Value], fault: str) -> Value | None:
    """What `parse` makes of a file's text; None without the file."""
    text = read_text(path)
    try:
        return None if text is None else parse(text)
    except (ValueError, TypeError, KeyError):
        raise DataError(f"{path}: {fault}; {make_again(path)}") from None


def _written(rows: Sequence[Sequence[object]], delimiter: str) -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows(rows)  # a class may be called "car, parked"
    return text.getvalue().encode()
