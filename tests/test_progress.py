"""What is said along the way: on terminals of any width, and where there is none."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import mgd_stages.run.progress as module
from mgd_stages.run.progress import progress

NOTE = "loss 1.204, 93 ms a step, 171.2 images/s, 2% waiting for data, 3.1 GB"


def shown(monkeypatch: pytest.MonkeyPatch, width: int, steps: list[int], clock: list[float]) -> list[str]:
    """The last picture of the bar after these steps, line by line."""
    file = io.StringIO()
    console = Console(file=file, width=width, height=25, force_terminal=True, highlight=False, markup=False, soft_wrap=True)
    monkeypatch.setattr(module, "console", console)
    monkeypatch.setattr(console, "get_time", lambda: clock[0])
    with progress("train-student distilled", 3000, "step") as advance:
        for step in steps:
            clock[0] += 10
            advance(step, NOTE)
    last = file.getvalue().replace("\r", "").rpartition("train-student distilled")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last[1] + last[2])
    return [line.rstrip() for line in plain.splitlines() if line.strip()]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_bar_steps_time_left_and_the_whole_note_are_seen_on_any_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    *above, bar = shown(monkeypatch, width, [100, 200, 300], [0.0])
    assert re.search(r"^[━╸╺ ]{4,} *300/3000 steps \d+ (s|min \d\d s) left$", bar), bar
    assert "".join(above).replace(" ", "") == f"train-student distilled: {NOTE}".replace(" ", "")
    assert all(len(line) <= width for line in [*above, bar])


def test_the_end_says_what_it_took_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, 60, [1500, 3000], [0.0])[-1].endswith("3000/3000 steps took 20 s")


def test_without_a_terminal_a_stage_says_at_once_that_it_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(module, "console", Console(file=file, soft_wrap=True))
    with progress("evaluate distilled", 500, "image", done=3):
        assert file.getvalue() == "evaluate distilled: 3/500 images\n"
    with progress("study", 1, "run"):
        assert file.getvalue().endswith("\nstudy: 0/1 run\n")


def test_work_goes_on_where_nobody_reads_what_is_said_any_more(tmp_path: Path) -> None:
    """`train-student | head` or a pager that is left: hours of work do not end with it, and Python's own end is quiet."""
    code = """
import sys, time
from pathlib import Path
from mgd_stages.run.progress import console, progress
with progress("train-student", 3, "step") as advance:
    sys.stdin.read()  # until the reader has gone
    for done in (1, 2, 3):
        advance(done, "x" * 100_000)
    console.print("finished")
Path(sys.argv[1]).write_text("all of it")
"""
    place = tmp_path / "result"
    command, pipe = [sys.executable, "-c", code, str(place)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith(b"train-student: 0/3")
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b"" and process.wait() == 0
    assert place.read_text() == "all of it"


def test_names_that_a_terminal_has_no_letters_for_end_nothing(tmp_path: Path) -> None:
    """As of a locale of 8-bit letters; and JSON stays JSON."""
    (tmp_path / "日本").mkdir()
    (tmp_path / "日本/params.yaml").write_text("[]")
    code = """
from mgd_stages.cli import app, common_options
from mgd_stages.run.progress import *
common_options()
answer("café 日本")
answer_json({"日本": "é"})
sys.argv = ["mgd-pipeline", "evaluate", "--config", "日本/params.yaml"]
app()
"""
    for encoding in ("ascii", "latin-1", "utf-8"):
        command, settings = [sys.executable, "-c", code], {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run(command, capture_output=True, env=settings, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith(b"error: "), done.stderr
        assert "日本".encode() in done.stderr or rb"\u65e5\u672c" in done.stderr
        line, _, answered = done.stdout.decode(encoding).partition("\n")
        assert json.loads(answered) == {"日本": "é"} and line.startswith("caf")
