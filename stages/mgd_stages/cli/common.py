"""What all commands share: the program itself, options with one meaning everywhere, and errors in one line.

Nothing heavy is imported before a command needs it: --help answers at once, and so does the shell's completion.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mgd_pipeline import __version__
from mgd_pipeline.access import access_error, gives_no_answer
from mgd_pipeline.errors import AccessError, MGDError

if TYPE_CHECKING:
    import torch

    from mgd_stages.run.project import Project

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

_LITTLE = 6 * 10**9
"""Bytes of address space that torch and its libraries take, roughly."""


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mgd-pipeline {__version__}")
        raise typer.Exit


@app.callback()
def common_options(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only results and errors, no progress.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Multi-granularity distillation in two stages: large teachers run once, small students train from their stored outputs."""
    from mgd_stages.run.machine import limit_text, memory_limit

    for stream in (sys.stdout, sys.stderr):  # None if it is closed
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # a file name that the encoding lacks must not end a command
    if (limit := memory_limit()) is not None and limit < _LITTLE:
        # Printed before any import, because libraries of numpy and torch end the process without an exception.
        typer.echo(f"warning: {limit_text(limit)}", err=True)
    if quiet:
        from mgd_stages.run.progress import console

        console.quiet = True


Config = Annotated[Path, typer.Option("--config", help="The parameter file; its folder is the project.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a parameter, such as student.steps=500; repeatable."),
]
Device = Annotated[str, typer.Option(help="auto (CUDA if available), cpu, cuda or cuda:0.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode images; 0 decodes in the training process.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads for torch; 0 keeps torch's default.")]
OnError = Annotated[
    Literal["stop", "skip"], typer.Option(help="What to do with an image that cannot be used: stop, or skip it and record why.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else, for scripts.")]
CacheImages = Annotated[bool, typer.Option("--cache-images", help="Keep decoded images in .mgd/work/images, 4 bytes per pixel.")]
StudentFile = Annotated[
    Path,
    typer.Argument(metavar="STUDENT", readable=False, help="A student file, such as data/students/best.safetensors of evaluate."),
]
LogTo = Annotated[
    Literal["tensorboard", "wandb", "mlflow"] | None,
    typer.Option(help="Also log metrics to this service; if left out, only to DVC's files."),
]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Continue from the checkpoint of an interrupted run.")]


@contextmanager
def errors(after_interrupt: str = "the same command goes on from the last checkpoint") -> Iterator[None]:
    """Prints one line for each problem that a user can mend; Ctrl-C says how to continue."""
    try:
        yield
    except MGDError as error:
        for line in str(error).splitlines():
            typer.echo(f"error: {line}", err=True)
        raise typer.Exit(error.exit_code) from None
    except (OSError, RuntimeError, MemoryError, ImportError, AttributeError) as error:
        # A limit on memory can stop a library halfway through its import, which raises the last two.
        from mgd_stages.run.machine import explain

        if isinstance(error, OSError) and error.filename and gives_no_answer(error):
            typer.echo(f"error: {access_error(error.filename, error)}", err=True)
            raise typer.Exit(AccessError.exit_code) from None
        if (line := explain(error)) is None:
            raise
        typer.echo(f"error: {line}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo(f"interrupted; {after_interrupt}", err=True)
        raise typer.Exit(130) from None


def interrupted(resume: bool) -> str:
    return f"the same command{'' if resume else ' without --no-resume'} goes on from the last checkpoint"


@contextmanager
def only_answers(wanted: bool) -> Iterator[None]:
    """Silences progress: a script reads the answer from standard output."""
    from mgd_stages.run.progress import silence

    with silence(wanted):
        yield


def opened(config: Path, set_: list[str] | None) -> Project:
    """The project of a parameter file with what --set changes."""
    from mgd_stages.run.project import open_project

    return open_project(config, set_ or ())


def prepared_device(name: str, threads: int) -> torch.device:
    """The device of --device; torch then computes with --threads."""
    from mgd_stages.run.project import choose_device

    device = choose_device(name)
    set_threads(threads)
    return device


def set_threads(count: int) -> None:
    if count:
        import torch

        torch.set_num_threads(count)
