"""`mgd-pipeline cache`: look into teacher caches."""

from __future__ import annotations

from glob import escape, glob
from pathlib import Path
from typing import Annotated

import typer

from mgd_stages.cli.common import AsJson, Config, Device, Set, Threads, app, errors, only_answers, set_threads

cache_app = typer.Typer(help="Inspect, check, compare and clean up teacher caches.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(cache_app, name="cache")


def _paths(incomplete: str) -> list[str]:
    """How a shell completes a place that is text, because a Path would lose a slash of a URL."""
    return sorted(glob(escape(incomplete) + "*"))


Caches = Annotated[
    list[str], typer.Argument(metavar="CACHE...", autocompletion=_paths, help="Teacher caches, folders of them, or URLs of caches.")
]
Sample = Annotated[str, typer.Option(metavar="PERCENT", help="Share of the rows to read, such as 5%.")]
_TARGETS = "data/targets"


@cache_app.command("info")
def cache_info_command(
    cache: Annotated[
        str,
        typer.Argument(metavar="CACHE", autocompletion=_paths, help="A teacher cache, such as data/targets/wide.zarr, or its URL."),
    ],
    config: Config = Path("params.yaml"),
    as_json: AsJson = False,
) -> None:
    """Show contents, teacher, images, size and quality.

    Quality needs a project: the mIoU of the stored targets on the labelled images.
    """
    with errors():
        from mgd_stages.run.project import open_project
        from mgd_stages.tools.caches import show_cache

        with only_answers(as_json):
            show_cache(cache, open_project(config) if config.exists() else None, as_json)


@cache_app.command("list")
def cache_list_command(caches: Caches = [_TARGETS], as_json: AsJson = False) -> None:  # noqa: B006
    """List teacher caches, one line each."""
    with errors():
        from mgd_stages.tools.caches import list_caches

        list_caches(caches, as_json)


@cache_app.command("verify")
def cache_verify_command(
    caches: Caches = [_TARGETS],  # noqa: B006
    quick: Annotated[bool, typer.Option("--quick", help="Check names, sizes, metadata and provenance; read no target.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Read every byte of every file.")] = False,
    sample: Sample = "5%",
    as_json: AsJson = False,
) -> None:
    """Name every damaged file, shard and row.

    Exit code 0: no damage; 3: damaged; 4: missing, unfinished or not an mgd-pipeline cache; 5: another format or version;
    7: you may not read it, or its disk does not answer.
    """
    with errors():
        from mgd_pipeline.errors import ParamsError
        from mgd_stages.tools.caches import parse_share, verify

        if quick and full:
            raise ParamsError("--quick --full: choose one")
        with only_answers(as_json):
            verify(caches, 0.0 if quick else 1.0 if full else parse_share(sample), as_json)


@cache_app.command("diff")
def cache_diff_command(
    a: Annotated[str, typer.Argument(metavar="A", autocompletion=_paths, help="A teacher cache, or its URL.")],
    b: Annotated[str, typer.Argument(metavar="B", autocompletion=_paths, help="Another teacher cache, or its URL.")],
    as_json: AsJson = False,
) -> None:
    """Compare two teacher caches field by field.

    Exit code 0: same teacher, same images, same targets; 1: there are differences.
    """
    with errors():
        from mgd_stages.tools.caches import diff

        if diff(a, b, as_json):
            raise typer.Exit(1)


@cache_app.command("recheck")
def cache_recheck_command(
    teacher: Annotated[str, typer.Option(help="Name of a teacher in params.yaml, such as wide or deep.")],
    sample: Sample = "1%",
    config: Config = Path("params.yaml"),
    set_: Set = None,
    device: Device = "auto",
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Run a teacher again over some images.

    Reports the largest and mean error of the stored targets, and how many cells have the same class.
    """
    with errors():
        from mgd_stages.run.project import open_project
        from mgd_stages.tools.caches import parse_share, recheck

        project, share = open_project(config, set_ or ()), parse_share(sample)
        set_threads(threads)
        with only_answers(as_json):
            recheck(project, teacher, share, device, as_json)


@cache_app.command("estimate")
def cache_estimate_command(
    images: Annotated[int, typer.Option(min=0, help="Number of images; 0 takes images and teachers from the project.")] = 0,
    size: Annotated[str, typer.Option(metavar="HxW", help="Height and width of the images, pixels.")] = "512x512",
    classes: Annotated[int, typer.Option(min=0, help="Classes of a teacher.")] = 21,
    features: Annotated[int, typer.Option(min=0, help="Channels of a teacher's features.")] = 256,
    stride: Annotated[int, typer.Option(help="Pixels between stored cells of the logits.")] = 4,
    region_stride: Annotated[int, typer.Option(help="Pixels between stored cells of the region embeddings.")] = 16,
    config: Config = Path("params.yaml"),
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Show what teacher caches will cost, before anything is built.

    Bytes, files and the time to send them, in each encoding: of the project's teachers, or with --images of a teacher that is
    described by numbers alone. --set changes the project's parameters; the other options belong to --images.
    """
    with errors():
        from mgd_stages.run.project import open_project
        from mgd_stages.tools.cache_sizes import Numbers, estimate_numbers, estimate_project

        with only_answers(as_json):
            if images:
                estimate_numbers(Numbers(images, size, classes, features, stride, region_stride), as_json)
            else:
                estimate_project(open_project(config, set_ or ()), as_json)


@cache_app.command("gc")
def cache_gc_command(
    days: Annotated[float, typer.Option(min=0, help="Grace period: only files that nobody has changed for this many days.")] = 14.0,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the files instead of listing them.")] = False,
    config: Config = Path("params.yaml"),
) -> None:
    """List or delete leftovers of killed builders.

    Looks in .mgd/work for files of killed builders and for shards of caches that this project no longer has.
    """
    with errors():
        from mgd_stages.run.project import open_project
        from mgd_stages.tools.caches import collect_garbage

        collect_garbage(open_project(config), days, delete)
