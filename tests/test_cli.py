"""The command line as a user meets it: help at once, one line for each problem, and nothing done before all is checked."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from mgd_pipeline import __version__
from mgd_stages.cli import app
from mgd_stages.projects.init import init_project

STAGES = ["prepare-data", "train-teacher", "precompute-teachers", "compare-teachers", "train-student", "evaluate", "report"]
AFTER = ["predict", "label-images", "export", "study", "search", "bench", "benchmark-device", "convert-weights", "cache"]
NAMES = ["init", "run", "dvc-yaml", "doctor", "demo", *STAGES, *AFTER]
COMMANDS: dict[str, Any] = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
RUNS = {name: ["--teacher", "wide"] if name == "train-teacher" else [] for name in STAGES}
"""The stages, with their required options."""


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project as init leaves it."""
    init_project("shapes", None, "1/8", tmp_path)
    return tmp_path


def names_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_help_lists_the_stages_in_their_order_and_cuts_no_summary() -> None:
    said = run("--help").stdout
    listed = re.findall(r"^  ([a-z-]+) {2,}(\S.*)$", said.split("Commands:")[1], re.MULTILINE)
    assert [name for name, _ in listed] == NAMES
    for name, summary in listed:
        assert summary.endswith(".") and not summary.endswith("..."), name


def test_help_and_mistakes_in_params_come_before_heavy_imports(folder: Path) -> None:
    """On a cluster's network disk these take many seconds."""
    script = (
        "import sys, typer\n"
        "from typer.testing import CliRunner\n"
        "from mgd_stages.cli import app\n"
        "heavy = {'torch', 'numpy', 'zarr', 'timm', 'segmentation_models_pytorch', 'PIL', 'pyarrow', 'matplotlib'}\n"
        "for command in ([], *([name] for name in typer.main.get_command(app).commands)):\n"
        "    result = CliRunner().invoke(app, [*command, '--help'])\n"
        "    assert result.exit_code == 0 and 'Usage' in result.output, result.output\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "for arguments in (['prepare-data'], ['train-teacher', '--teacher', 'wide'], ['precompute-teachers'], ['train-student'],\n"
        "                  ['evaluate'], ['init', '--partition', '1-8', '--output', 'new']):\n"
        "    extra = [] if arguments[0] == 'init' else ['--set', 'seed=-1']\n"
        "    assert CliRunner().invoke(app, [*arguments, *extra]).exit_code == 2, arguments\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert not (folder / "new").exists()


def test_the_version_is_the_package_s() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"mgd-pipeline {__version__}\n")
    assert metadata.version("mgd-pipeline") == __version__


@pytest.mark.parametrize(
    ("words", "completed"),
    [("pre", ["prepare-data", "precompute-teachers", "predict"]), ("train-student --sup", ["--supervised-only"])],
)
def test_the_shell_completes_commands_and_options(words: str, completed: list[str]) -> None:
    asked = {
        "_MGD_PIPELINE_COMPLETE": "complete_bash",
        "COMP_WORDS": f"mgd-pipeline {words}",
        "COMP_CWORD": str(len(words.split())),
    }
    assert CliRunner().invoke(app, [], env=asked, prog_name="mgd-pipeline").stdout.split() == completed
    assert {"--install-completion", "--show-completion"} <= set(re.findall(r"--[a-z-]+", run("--help").stdout))


@pytest.mark.parametrize("name", NAMES)
def test_every_option_says_what_it_means_and_what_it_is_left_alone(name: str) -> None:
    """A default is shown by typer itself where it is a value; the help text says it where the default is none."""
    for option in COMMANDS[name].params:
        text = option.help or ""
        assert len(text) > 10, f"{name} {option.name} has no help"
        assert text.endswith("."), f"{name} {option.name}: {text}"
        shown = option.required or option.default not in (None, (), [])
        assert shown or re.search(r"left out|repeatable", text), f"{name} {option.name}: what happens without it?"
        assert option.show_default or option.required, f"{name} {option.name} hides its default"


def test_commands_share_the_meaning_of_their_options() -> None:
    helps: dict[str, set[str]] = {}
    for name in RUNS:
        for option in COMMANDS[name].params:
            if option.name != "teacher":
                helps.setdefault(option.name, set()).add(option.help)
    assert {name: texts for name, texts in helps.items() if len(texts) > 1} == {}


@pytest.mark.parametrize("command", RUNS)
def test_mistakes_in_params_exit_2_with_a_line_each_and_leave_no_trace(folder: Path, command: str) -> None:
    before = names_below(folder)
    path = str(folder / "params.yaml")
    result = run(command, *RUNS[command], "--config", path, "--set", "studet=1", "--set", "student.steps=0")
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: --set student.steps=0: must be greater than 0",
        "error: --set studet=1: unknown key; nearest is 'student'",
    ]
    assert names_below(folder) == before


@pytest.mark.parametrize("command", ["train-teacher", "precompute-teachers"])
def test_unknown_teachers_exit_2_with_the_known_ones(folder: Path, command: str) -> None:
    result = run(command, "--teacher", "wid", "--config", str(folder / "params.yaml"))
    assert result.exit_code == 2
    assert result.stderr == "error: --teacher wid: must be one of wide, deep\n"


@pytest.mark.parametrize("command", ["train-teacher", "precompute-teachers", "train-student", "evaluate"])
def test_a_missing_manifest_names_the_command_that_makes_it(folder: Path, command: str) -> None:
    (folder / "data/teachers").mkdir(parents=True)
    result = run(command, *RUNS[command], "--config", str(folder / "params.yaml"), "--device", "cpu")
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "`mgd-pipeline prepare-data`" in lines[0]


@pytest.mark.parametrize("command", ["train-teacher", "precompute-teachers", "train-student", "evaluate", "demo"])
def test_a_device_that_is_not_there_exits_2(folder: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = names_below(folder)
    where = [str(folder / "demo")] if command == "demo" else [*RUNS[command], "--config", str(folder / "params.yaml")]
    result = run(command, *where, "--device", "cuda")
    assert result.exit_code == 2
    assert result.stderr == "error: --device cuda: torch sees no CUDA device here; use cpu or auto\n"
    wrong = run(command, *where, "--device", "gpu")
    assert wrong.exit_code == 2 and wrong.stderr == "error: --device gpu: write auto, cpu, cuda or cuda:0\n"
    assert names_below(folder) == before


FULL = r"error: data/manifest/images\.parquet: No space left on device; the disk at /.* free; make room there, then run the same "


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from the last checkpoint"),
        (OSError(28, "No space left on device", "data/manifest/images.parquet"), 1, FULL),
        (OSError(22, "Invalid argument"), 1, None),
    ],
    ids=["interrupt", "full disk", "bug"],
)
def test_what_ends_a_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str | None
) -> None:
    """One line where a user can do something; a bug is a traceback."""

    def ends(project: object, on_error: str) -> None:
        raise error

    monkeypatch.setattr("mgd_stages.stages.prepare_data.prepare_data", ends)
    result = run("prepare-data", "--config", str(folder / "params.yaml"))
    if said is None:
        assert result.exception is error
    else:
        assert result.exit_code == code and result.stderr.count("\n") == 1 and re.match(said, result.stderr)
