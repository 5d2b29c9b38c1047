"""What classes are called and in which colours they are drawn. Both are labels: only the ids decide what a class means.

    classes.json   {"classes": [name of id 0, ...], "palette": [[red, green, blue] of id 0, ...]}

The file lies beside images.parquet. Only stages that show classes depend on it, so another name or colour trains nothing again.
Teachers, teacher caches and students carry the names of the day on which they were made.
"""

from __future__ import annotations

import difflib
import json
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mgd_pipeline.access import access_error, says_nothing
from mgd_pipeline.data.index import Colour
from mgd_pipeline.durable import replace_file
from mgd_pipeline.errors import DataError, ParamsError
from mgd_pipeline.params import PromptsTeacher, TeacherParams
from mgd_pipeline.words import counted

CLASSES_FILE = "classes.json"
_REMEDY = "run `mgd-pipeline prepare-data`"
_SHOWN = 3
"""Renamed classes that a line names, at most."""


class Names(NamedTuple):
    """Of each class, in the order of their ids."""

    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    """RGB, 0 to 255."""


class Naming(NamedTuple):
    """How the names in a file differ from the project's; both texts are empty if they are equal."""

    fault: str = ""
    """Why the ids of the file mean something else than the project's."""
    renamed: str = ""
    """Which classes have another name now, as a line for the user."""


def compare_names(who: str, theirs: Sequence[str], ours: Sequence[str]) -> Naming:
    """Compares the names that a teacher, a teacher cache or a student carries (`theirs`) with the project's (`ours`).

    A name that stands at another id in the project means that classes were reordered: the ids of the file are wrong. Capitals do
    not count there, unless names differ in nothing else, so that a reordered and respelt list is no renaming. Any other difference
    is a renaming. `who` names the file, such as "teacher wide".
    """
    if len(theirs) != len(ours):
        return Naming(fault=f"{who} has {counted(len(theirs), 'class', 'classes')}, the project has {len(ours)}")
    place = {spell(name): number for spell in (_spelt, str) for number, name in enumerate(ours)}
    different = [number for number, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1]]
    for number in different:
        name = theirs[number]
        now = place.get(name, place.get(_spelt(name), number))
        if now != number and (name in ours or _spelt(name) != _spelt(ours[number])):
            return Naming(fault=f"{who} calls class {number} {theirs[number]!r}, which is class {now} of the project")
    shown = [f"class {number} {theirs[number]!r}, the project calls it {ours[number]!r}" for number in different[:_SHOWN]]
    more = [f"{len(different) - _SHOWN} more are renamed"] if len(different) > _SHOWN else []
    return Naming(renamed=f"{who} calls {'; '.join([*shown, *more])}" if shown else "")


def current_names(names: Sequence[str], classes: Sequence[str]) -> list[str]:
    """The names of an older result as the project's `classes`, where it was only renamed; else as they are."""
    return list(names if compare_names("", names, classes).fault else classes)


def check_classes_of(key: str, teacher: TeacherParams, classes: Sequence[str]) -> None:
    """Raises ParamsError, naming `key`, for a teacher whose class_map or prompts are of other classes than the data set's."""
    if teacher.class_map is not None:
        check_class_map(key, teacher.class_map, classes)
    if isinstance(teacher, PromptsTeacher):
        check_prompts(key, teacher.prompts, classes)


def check_class_map(key: str, class_map: Collection[str], classes: Sequence[str]) -> None:
    """Raises ParamsError, naming `key`, for a map that does not say something of each class of the data set, and of no other."""
    for name in class_map:
        if name not in classes:
            raise ParamsError(f"{key}.class_map: {name!r} is no class of the data set; {nearest(name, classes)}")
    absent = [name for name in classes if name not in class_map]
    if absent:
        raise ParamsError(f"{key}.class_map: says nothing of {some(absent)}; write [] where the teacher has no such class")


def check_prompts(key: str, prompts: Collection[str], classes: Sequence[str]) -> None:
    """Raises ParamsError, naming `key`, for prompts that do not say something of each class of the data set, and of no other."""
    for name in prompts:
        if name not in classes:
            raise ParamsError(f"{key}.prompts: {name!r} is no class of the data set; {nearest(name, classes)}")
    if absent := [name for name in classes if name not in prompts]:
        line = f"{absent[0]}: [{absent[0]}]"
        raise ParamsError(f"{key}.prompts: says nothing of {some(absent)}; write the phrases of each class, such as {line}")


def nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"nearest is {close[0]!r}" if close else f"there are {some(known)}"


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _spelt(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def write_names(names: Names, folder: Path) -> None:
    """Writes folder/classes.json; same content, same bytes."""
    replace_file(folder / CLASSES_FILE, (json.dumps(names._asdict(), ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_names(folder: Path, count: int, known: Names | None = None) -> Names:
    """The names and colours of `count` classes.

    `known` stands in for a file that is not there: DVC does not fetch it for a training, which does not depend on it. Raises
    DataError for a file that is missing, damaged or of other classes, AccessError without permission.
    """
    path = folder / CLASSES_FILE
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        if known is not None and len(known.classes) == count:
            return known
        raise DataError(f"{path}: no such file; {_REMEDY}") from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, OSError) and says_nothing(error):
            raise access_error(path, error) from None
        raise DataError(f"{path}: is not JSON; {_REMEDY}") from None
    names = parsed_names(path, content if isinstance(content, dict) else {})
    if len(names.classes) != count:
        raise DataError(f"{path}: names {counted(len(names.classes), 'class', 'classes')}, images.parquet has {count}; {_REMEDY}")
    return names


def parsed_names(path: Path, content: dict[str, Any]) -> Names:
    """Names and colours from the keys `classes` and `palette`. Raises DataError, naming `path`, for others than prepare-data's."""
    classes, palette = content.get("classes"), content.get("palette")
    if not (isinstance(classes, list) and len(classes) > 1 and all(isinstance(name, str) for name in classes)):
        raise DataError(f"{path}: 'classes' is not what prepare-data writes; {_REMEDY}")
    if not (isinstance(palette, list) and len(palette) == len(classes) and all(_is_colour(colour) for colour in palette)):
        raise DataError(f"{path}: 'palette' is not what prepare-data writes; {_REMEDY}")
    if repeated := [name for name in classes if classes.count(name) > 1]:  # 0.1.0 wrote it; numbers of the two would be mixed
        raise DataError(f"{path}: two classes are called {repeated[0]!r}; correct data.classes in params.yaml and {_REMEDY}")
    return Names(tuple(classes), tuple((red, green, blue) for red, green, blue in palette))


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(part) is int and 0 <= part <= 255 for part in value)
