"""What a check of `mgd-pipeline doctor` is, and how an error becomes one.

Checks are generators: they yield a Check for each thing that they look at, and return what later checks need to know.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from mgd_pipeline.access import is_there
from mgd_pipeline.errors import MGDError

Mark = Literal["ok", "warning", "problem"]
T = TypeVar("T")


@dataclass(frozen=True)
class Check:
    area: str
    """versions, devices, params, data, weights, disk or dvc."""
    mark: Mark
    found: str
    """What was found; `doctor --json` has it under this name."""
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.mark:<9}{self.area}: {self.found}{'; ' if self.remedy else ''}{self.remedy}"


Checks = Generator[Check, None, T]


def guarded(area: str, checks: Checks[T]) -> Checks[T | None]:
    """The checks; an error that stops them becomes a problem. Returns what they return, or None."""
    try:
        return (yield from checks)
    except (MGDError, OSError) as error:
        yield from of_error(area, error)
        return None


def of_error(area: str, error: MGDError | OSError | str, mark: Mark = "problem") -> list[Check]:
    """A check for each line. Our own errors say what is wrong, then "; ", then the remedy."""
    if isinstance(error, OSError):
        fact = f"{error.filename or 'this machine'}: {error.strerror or type(error).__name__}"
        return [Check(area, mark, fact, "check its permissions and the disk")]
    lines = [line.partition("; ") for line in str(error).splitlines()]
    return [Check(area, mark, fact, remedy) for fact, _, remedy in lines]


def nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if is_there(folder))
