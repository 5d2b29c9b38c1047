"""Commands that begin a project and look after it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from mgd_stages.cli.common import AsJson, Config, Device, OnError, Set, Threads, Workers, app, errors, opened, prepared_device


def _dataset(name: str | None) -> str | None:
    from mgd_pipeline.errors import ParamsError
    from mgd_stages.projects.init import check_dataset

    try:
        if name is not None:
            check_dataset(name)
    except ParamsError as error:
        raise typer.BadParameter(str(error)) from None
    return name


def _asked_to_retrain() -> Literal["new-labels", "new-images"]:
    again = typer.confirm("Train the teachers again after you add photos without labels? That takes as long as the first time")
    return "new-images" if again else "new-labels"


@app.command("init")
def init_command(
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="shapes|voc|cityscapes|folder",
            callback=_dataset,
            help="Kind of data set; if left out, the preset's, or folder with --root.",
        ),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(help="Folder of your photos and labels, or a ZIP file of them; left out for the built-in shapes."),
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option(
            metavar="1/N",
            help="Labelled share of the training images; if left out, 1/1 for your own photos, else the preset's or 1/8.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the new project.")] = Path(),
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C|FILE",
            help="Names of the classes, or a file with a name a line; if left out, what the labels say.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny networks, small images, few steps, no downloads: minutes on two cores.")
    ] = False,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Settings for a machine (cpu, small-gpu, large-gpu, modern) or of a known experiment; `list` describes them. If "
            "left out, those of large-gpu.",
        ),
    ] = None,
    hours: Annotated[
        float | None,
        typer.Option(
            metavar="H",
            help="Choose networks and steps that this machine trains in H hours, by measuring it for a minute or a few; if left "
            "out, nothing is measured.",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Of --hours: auto, cpu, cuda or cuda:0; if left out, auto (CUDA if available).")
    ] = None,
    retrain_teachers: Annotated[
        Literal["new-labels", "new-images"] | None,
        typer.Option(help="After what teachers are trained again; if left out, init asks in a terminal, or takes new-labels."),
    ] = None,
) -> None:
    """Start a project: write params.yaml and dvc.yaml.

    Links the data set below data/raw/ and prints the next commands. Existing files are never overwritten.
    """
    with errors("run the same command again"):
        from mgd_pipeline.errors import ParamsError

        if preset == "list":
            from mgd_stages.projects.presets import preset_heads

            for name, lines in preset_heads().items():
                typer.echo("\n".join([name, *(f"  {line}" for line in lines)]))
            return
        from mgd_stages.projects.init import QUICK, init_project

        given = {"--quick": quick or None, f"--preset {preset}": preset, "--hours": hours}
        if len(ways := [way for way, value in given.items() if value is not None]) > 1:
            raise ParamsError(f"{' '.join(ways)}: choose one")
        sized = None
        if hours is not None:
            chosen = prepared_device(device or "auto", 0)
            from mgd_stages.run.machine import Machine
            from mgd_stages.whole.budget import within

            sized = within(hours, Machine(chosen))
        elif device is not None:
            raise ParamsError(f"--device {device}: init computes nothing without --hours; leave it out")
        options = {
            "preset_name": QUICK if quick else preset,
            "classes": classes,
            "sized": sized,
            "retrain_teachers": retrain_teachers or (_asked_to_retrain if sys.stdin.isatty() and sys.stdout.isatty() else None),
        }
        for line in init_project(dataset, root, partition, output, **options):
            typer.echo(line)


@app.command("run")
def run_command(
    config: Config = Path("params.yaml"),
    set_: Set = None,
    device: Device = "auto",
    num_workers: Workers = 0,
    threads: Threads = 0,
    on_error: OnError = "stop",
) -> None:
    """Run all stages of a project, from images to the report.

    Says first how long they will take on this machine. Skips every stage whose parameters, inputs and outputs are what they
    were; run it again after a change, or to continue after an interruption. Needs no DVC.
    """
    with errors():
        from mgd_stages.projects.dvc_file import check_dvc_file

        project = opened(config, set_)
        check_dvc_file(project)
        chosen = prepared_device(device, threads)
        from mgd_stages.run.machine import Machine
        from mgd_stages.whole.run import run_project

        run_project(project, Machine(chosen, num_workers), on_error)


@app.command("dvc-yaml")
def dvc_yaml_command(config: Config = Path("params.yaml")) -> None:
    """Update dvc.yaml after a change of params.yaml.

    Run it after you change teachers, the data set or id lists. Your own stages, entries and comments stay.
    """
    with errors():
        from mgd_stages.projects.dvc_yaml import write_dvc

        for line in write_dvc(opened(config, None)):
            typer.echo(line)


@app.command("doctor")
def doctor_command(
    full: Annotated[bool, typer.Option("--full", help="Read all images and masks instead of a sample of 200.")] = False,
    as_json: AsJson = False,
    config: Config = Path("params.yaml"),
    set_: Set = None,
) -> None:
    """Check this machine and this project.

    Prints a line for each check: versions, devices, parameters, data set, weights, disk and DVC. Each problem comes with its
    remedy. Nothing is computed, fetched or changed. Exit code 0: no problem; 1: problems; 2: params.yaml is not valid.
    """
    with errors():
        from mgd_stages.doctor.run import doctor

        if code := doctor(config, set_ or (), full=full, as_json=as_json):
            raise typer.Exit(code)


@app.command("demo")
def demo_command(
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder for the demo's project.")],
    full: Annotated[
        bool, typer.Option("--full", help="Use the default parameters, about 10 minutes on 2 cores, instead of a short run.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of teachers and students.")] = 0,
    set_: Set = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Run all stages on the built-in data set.

    Needs no DVC and takes about 2 minutes on 2 cores. Run it again to continue after an interruption.
    """
    with errors():
        chosen = prepared_device(device, threads)
        from mgd_stages.demo import demo

        demo(output, full=full, seed=seed, overrides=set_ or [], device=chosen)
