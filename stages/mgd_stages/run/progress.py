"""Live progress: a bar on a terminal, elsewhere a plain line every few seconds; and metrics as files that DVC reads."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from mgd_pipeline.data.classes import compare_names
from mgd_pipeline.durable import replace_file


class _Console(Console):
    """The work goes on if nobody reads its messages any more, as after `| head` or the end of a pager."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end


console = _Console(highlight=False, markup=False, soft_wrap=True)
"""For messages along the way; `--quiet` makes it silent."""
_SECONDS_BETWEEN_LINES = 10.0

Log = Callable[[int, Mapping[str, float]], None]
"""log(step, values): values of this step, by name."""
Advance = Callable[[int, str], None]
"""advance(done, note): how far a stage is, and one short remark such as the loss."""


@contextmanager
def silence(wanted: bool = True) -> Iterator[None]:
    """Prints no progress meanwhile."""
    before, console.quiet = console.quiet, console.quiet or wanted
    try:
        yield
    finally:
        console.quiet = before


def say_renamed(who: str, theirs: Sequence[str], ours: Sequence[str]) -> None:
    """Says which classes have another name in `ours`, the project's, than in a file that was made before they were renamed."""
    if line := compare_names(who, theirs, ours).renamed:
        console.print(line)


def answer(line: str, style: str = "") -> None:
    """Prints a line that the user asked for: --quiet does not silence it."""
    Console(highlight=False, markup=False, soft_wrap=True).print(line, style=style)


def answer_json(value: object) -> None:
    """The answer for a script: the whole standard output is one JSON value."""
    text = json_text(value)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(json.loads(text), indent=2, allow_nan=False)
    print(text)


class _Bar(Progress):
    """Stage and note stand above the bar and may wrap on a narrow terminal; bar, steps and time left keep one line."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            note = task.fields["note"]
            yield Text.assemble((task.description, "bold"), f": {note}" if note else "", no_wrap=False, overflow="fold")
        yield self.make_tasks_table(self.tasks)


class _Left(ProgressColumn):
    """The time left, or the time that a finished stage took."""

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text(f"took {duration(task.finished_time or 0)}")
        return Text("" if task.time_remaining is None else f"{duration(task.time_remaining)} left", no_wrap=True)


@contextmanager
def progress(stage: str, total: int | None, unit: str, done: int = 0) -> Iterator[Advance]:
    """Shows stage, steps done of total, the latest note and the time left; without a terminal as a line every few seconds.
    `unit` is the singular of what is counted. `total` may be a guess, and is None where nobody knows it, as of a camera."""
    unit = unit if total == 1 else f"{unit}s"
    if console.is_terminal:
        fixed = [Column(no_wrap=True) for _ in range(3)]  # the bar alone gives way
        columns = (
            BarColumn(bar_width=None),
            MofNCompleteColumn(table_column=fixed[0]),
            TextColumn(unit, table_column=fixed[1]),
            _Left(table_column=fixed[2]),
        )
        with _Bar(*columns, console=console, disable=console.quiet) as bar:
            task = bar.add_task(stage, total=total, completed=done, note="")
            yield lambda now, note: bar.update(task, completed=now, note=note)
        return
    of_total = "" if total is None else f"/{total}"
    console.print(f"{stage}: {done}{of_total} {unit}")
    began, last, first = time.monotonic(), time.monotonic(), done

    def line(now: int, note: str) -> None:
        nonlocal last
        moment = time.monotonic()
        if now != total and moment - last < _SECONDS_BETWEEN_LINES:
            return
        last = moment
        left = "" if total is None else f", {duration((moment - began) / max(now - first, 1) * max(total - now, 0))} left"
        console.print(f"{stage}: {now}{of_total} {unit}{left}{', ' + note if note else ''}")

    yield line


def duration(seconds: float) -> str:
    """90.2 -> '1 min 30 s'."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


class MetricsLog:
    """`<folder>/plots/<name>.tsv` with columns step and the name, for dvc plots; a file for each metric.

    `write` removes the files of other metrics, which an earlier run had. `restore` cuts the files back to a step, so that a resumed
    run writes each step once. `sink` gets the same values.
    """

    def __init__(self, folder: Path, sink: Log | None = None) -> None:
        self.folder, self.sink = folder / "plots", sink
        self.rows: dict[str, list[tuple[int, float]]] = {}

    def restore(self, rows: dict[str, list[tuple[int, float]]]) -> None:
        self.rows = {name: [(int(step), float(value)) for step, value in values] for name, values in rows.items()}

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.rows.setdefault(name, []).append((step, value))
        if self.sink is not None:
            self.sink(step, values)

    def write(self) -> None:
        for name, rows in self.rows.items():
            text = f"step\t{name}\n" + "".join(f"{step}\t{value:.6g}\n" for step, value in rows)
            replace_file(self.folder / f"{name}.tsv", text.encode())
        for file in self.folder.glob("*.tsv"):
            if file.stem not in self.rows:
                file.unlink()


def write_json(path: Path, content: object) -> None:
    replace_file(path, (json_text(content) + "\n").encode())


def json_text(content: object) -> str:
    """Strict JSON (RFC 8259), which has neither NaN nor infinity: both become null."""

    def plain(value: object) -> object:
        if isinstance(value, Mapping):
            return {key: plain(member) for key, member in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(member) for member in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False)
