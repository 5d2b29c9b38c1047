"""Which classes of a teacher stand for which classes of the data set."""

from __future__ import annotations

from mgd_pipeline.data.classes import check_class_map, compare_names, nearest, some
from mgd_pipeline.errors import ParamsError
from mgd_pipeline.words import counted


def class_groups(
    key: str,
    class_map: dict[str, list[str | int]] | None,
    classes: tuple[str, ...],
    labels: tuple[str, ...] | None,
    count: int,
    *,
    own: bool = False,
) -> tuple[tuple[int, ...], ...] | None:
    """The teacher's classes behind each of the data set's, see `teacher.data_classes`; None if both have the same classes.

    `own`: the teacher was trained on a data set of these classes, so that other names in the same places are a renaming. Classes of
    another teacher are found by their names. Raises ParamsError, naming `key`, for a map that is missing, incomplete, or names
    classes that do not exist, and for a teacher of one's own whose classes were reordered.
    """
    known = labels or tuple(str(i) for i in range(count))
    if class_map is None:
        if own and labels is not None and count == len(classes):
            if fault := compare_names("the teacher", labels, classes).fault:
                raise ParamsError(
                    f"{key}: {fault}; write data.classes in the teacher's order, train the teacher again, or write {key}.class_map"
                )
        elif count != len(classes) or (labels is not None and labels != classes):
            twice = [name for name in dict.fromkeys(known) if known.count(name) > 1]
            numbers = f", {twice[0]!r} by its numbers {_numbers(twice[0], known)}" if twice else ""
            raise ParamsError(
                f"{key}.class_map: missing; this teacher has {counted(count, 'class', 'classes')} ({some(known)}), the data "
                f"set {len(classes)} ({some(classes)}): write for each of these what the teacher calls it{numbers}"
            )
        return None
    check_class_map(key, class_map, classes)
    groups = tuple(
        tuple(_number(f"{key}.class_map.{name}", member, known, count) for member in class_map[name]) for name in classes
    )
    members = [member for group in groups for member in group]
    twice = {member for member in members if members.count(member) > 1}
    if twice:
        raise ParamsError(f"{key}.class_map: names the teacher's class {known[min(twice)]!r} twice; it can mean one thing only")
    if not members:
        raise ParamsError(f"{key}.class_map: names no class of the teacher's; it has {some(known)}")
    return groups


def _number(key: str, member: str | int, known: tuple[str, ...], count: int) -> int:
    """The number of a teacher's class that a map names by its name or number."""
    if isinstance(member, str) and known.count(member) > 1:
        numbers = _numbers(member, known)
        raise ParamsError(
            f"{key}: the teacher calls several classes {member!r}, which are its numbers {numbers}; write the numbers that you mean"
        )
    number = known.index(member) if isinstance(member, str) and member in known else member
    if not isinstance(number, int) or not 0 <= number < count:
        remedy = nearest(member, known) if isinstance(member, str) else f"it has 0 to {count - 1}"
        raise ParamsError(f"{key}: the teacher has no class {member!r}; {remedy}")
    return number


def _numbers(name: str, known: tuple[str, ...]) -> str:
    return ", ".join(str(number) for number, label in enumerate(known) if label == name)
