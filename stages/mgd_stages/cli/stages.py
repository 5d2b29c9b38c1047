"""The stages, a command each, in the order in which they run."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mgd_pipeline.errors import ParamsError
from mgd_stages.cli.common import (
    CacheImages,
    Config,
    Device,
    LogTo,
    OnError,
    Resume,
    Set,
    Threads,
    Workers,
    app,
    errors,
    interrupted,
    opened,
    prepared_device,
)


@app.command("prepare-data")
def prepare_data_command(
    on_error: OnError = "stop",
    config: Config = Path("params.yaml"),
    set_: Set = None,
) -> None:
    """Stage 1: list and check images, draw the partition.

    Decodes every image and mask once and writes data/manifest/.
    """
    with errors():
        project = opened(config, set_)
        from mgd_stages.projects.dvc_file import check_dvc_file
        from mgd_stages.stages.prepare_data import prepare_data
        from mgd_stages.whole.records import noted

        check_dvc_file(project)
        with noted(project, "prepare-data"):
            prepare_data(project, on_error)


@app.command("train-teacher")
def train_teacher_command(
    teacher: Annotated[str, typer.Option(help="Name of a teacher in params.yaml, such as wide or deep.")],
    config: Config = Path("params.yaml"),
    set_: Set = None,
    device: Device = "auto",
    num_workers: Workers = 0,
    threads: Threads = 0,
    resume: Resume = True,
    cache_images: CacheImages = False,
    log_to: LogTo = None,
) -> None:
    """Stage 2: train one teacher; skip it if you have one.

    Cross pseudo supervision with CutMix, on the same partition. To use a teacher of your own, put its file at `weights`.
    """
    with errors(interrupted(resume)):
        from mgd_stages.projects.dvc_file import check_dvc_file
        from mgd_stages.run.project import check_teacher

        project = opened(config, set_)
        check_teacher(project, teacher)
        check_dvc_file(project)
        chosen = prepared_device(device, threads)
        from mgd_stages.run.machine import Machine
        from mgd_stages.stages.train_teacher import train_teacher
        from mgd_stages.whole.records import noted

        machine = Machine(chosen, num_workers=num_workers, resume=resume, cache_images=cache_images, log_to=log_to)
        with noted(project, f"{'train-head' if teacher in project.params.heads else 'train-teacher'}@{teacher}"):
            train_teacher(project, teacher, machine)


@app.command("precompute-teachers")
def precompute_teachers_command(
    teacher: Annotated[str | None, typer.Option(help="Only this teacher; if left out, all teachers of params.yaml.")] = None,
    config: Config = Path("params.yaml"),
    set_: Set = None,
    device: Device = "auto",
    batch_size: Annotated[
        int, typer.Option(min=0, help="Images per forward pass; 0 picks as many as fit into a GPU's memory, or 8 on a CPU.")
    ] = 0,
    on_error: OnError = "stop",
    min_miou: Annotated[
        float, typer.Option(min=0, max=1, help="Refuse a teacher whose mIoU on a few labelled images is lower.")
    ] = 0.0,
    threads: Threads = 0,
    workers: Annotated[
        str | None, typer.Option(metavar="N|gpus", help="Worker processes, or one per GPU; none if left out.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Address of a Dask cluster, such as tcp://host:8786; none if left out.")
    ] = None,
    shards: Annotated[
        str | None, typer.Option(metavar="SLICE", help="Compute only these shards, such as 0::8; all if left out.")
    ] = None,
) -> None:
    """Stage 3: run each teacher once, write its cache.

    Runs over all training images and writes data/targets/<teacher>.zarr. An interrupted run continues, and new images are
    appended. Several processes may run this command at the same time: see the page Cluster of the documentation.
    """
    with errors():
        from mgd_stages.projects.dvc_file import check_dvc_file
        from mgd_stages.run.project import check_teacher, check_workers, parse_shards

        project = opened(config, set_)
        names = project.params.bases_first if teacher is None else [teacher]
        for name in names:
            check_teacher(project, name)
        check_dvc_file(project)
        check_workers(workers, scheduler, device)
        chosen_shards = slice(None) if shards is None else parse_shards(shards)
        chosen = prepared_device(device, threads)
        with ExitStack() as until_done:
            elsewhere = None
            if workers or scheduler:
                from mgd_stages.cluster import Asked, build_on_workers, check_present, local_workers, workers_of

                client = until_done.enter_context(workers_of(scheduler) if scheduler else local_workers(workers or "", threads))
                if scheduler:
                    check_present(client)
                elsewhere = partial(build_on_workers, client, Asked(device, batch_size, on_error, threads))
            from mgd_stages.stages.precompute_teachers import precompute_teachers
            from mgd_stages.whole.records import noted

            options = {"batch_size": batch_size, "on_error": on_error, "min_miou": min_miou, "shards": chosen_shards}
            for name in names:
                with noted(project, f"precompute-teachers@{name}") if shards is None else nullcontext():
                    precompute_teachers(project, name, device=chosen, elsewhere=elsewhere, **options)


@app.command("compare-teachers")
def compare_teachers_command(config: Config = Path("params.yaml"), set_: Set = None) -> None:
    """Compare the teachers before you trust them.

    Reads teacher caches only and writes data/results/compare-teachers/: mIoU, calibration and confusion on the labelled
    images, agreement per class, and pictures of the images on which the teachers disagree most.
    """
    with errors():
        project = opened(config, set_)
        from mgd_stages.stages.compare_teachers import compare_teachers
        from mgd_stages.whole.records import noted

        with noted(project, "compare-teachers"):
            compare_teachers(project)


@app.command("train-student")
def train_student_command(
    supervised_only: Annotated[
        bool, typer.Option("--supervised-only", help="Train on the labelled images only, for comparison.")
    ] = False,
    quantised: Annotated[
        bool, typer.Option("--quantised", help="Fine-tune the finished student so that int8 exports keep its accuracy.")
    ] = False,
    config: Config = Path("params.yaml"),
    set_: Set = None,
    device: Device = "auto",
    num_workers: Workers = 0,
    threads: Threads = 0,
    resume: Resume = True,
    cache_images: CacheImages = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the network first, which takes minutes; for GPUs.")] = False,
    log_to: LogTo = None,
    cache_from: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="Read the caches URL/<teacher>.zarr shard by shard: s3://, gs://, az://, http://, or a folder. TEACHER=URL names "
            "the cache of one teacher; repeatable. From data/targets if left out.",
        ),
    ] = None,
    cache_folder: Annotated[
        Path | None, typer.Option(help="Folder for copies of shards; mgd-pipeline/shards in your cache directory if left out.")
    ] = None,
    cache_size: Annotated[str, typer.Option(help="Limit of that folder; copies used longest ago go first.")] = "20GB",
) -> None:
    """Stage 4: train the student from teacher caches.

    Loads no teacher and writes data/students/distilled/student.safetensors (or supervised/). Under torchrun, the processes
    share the images of each step. With --quantised, the finished student is trained for a further tenth of the steps, in
    simulated 8-bit arithmetic, and data/students/quantised/student.safetensors (or quantised-supervised/) is written.
    """
    with errors(interrupted(resume)):
        from mgd_stages.projects.dvc_file import check_dvc_file

        project = opened(config, set_)
        check_dvc_file(project)
        if cache_from and supervised_only:
            raise ParamsError("--cache-from --supervised-only: a training without teachers reads no teacher cache; choose one")
        chosen = prepared_device(device, threads)
        from mgd_stages.run.cache_from import CacheFrom, parse_size
        from mgd_stages.run.machine import Machine, check_compiler
        from mgd_stages.stages.train_student import train_student
        from mgd_stages.whole.records import noted

        if compiled:
            check_compiler(chosen)
        machine = Machine(chosen, num_workers, resume, compiled, cache_images, log_to)
        places = CacheFrom(cache_from, cache_folder, parse_size(cache_size)) if cache_from else None
        # A record names what lies in data/targets, and this student has not read that.
        recorded = places is None and not quantised
        with noted(project, f"train-student{'-supervised' if supervised_only else ''}") if recorded else nullcontext():
            train_student(project, machine, supervised_only=supervised_only, quantised=quantised, cache_from=places)


@app.command("evaluate")
def evaluate_command(
    last: Annotated[bool, typer.Option("--last", help="Print the table of the last evaluation without computing.")] = False,
    config: Config = Path("params.yaml"),
    set_: Set = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Stage 5: mIoU of students and teachers.

    Also copies the better student to data/students/best.safetensors, and writes IoU per class and pictures of the worst,
    median and best images to data/results/evaluation/.
    """
    with errors():
        project = opened(config, set_)
        from mgd_stages.stages.evaluate import evaluate, show_table
        from mgd_stages.whole.records import noted

        if last:
            show_table(project)
            return
        chosen = prepared_device(device, threads)
        with noted(project, "evaluate"):
            evaluate(project, device=chosen)


@app.command("report")
def report_command(
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page to write; data/results/report.html if left out.")
    ] = None,
    config: Config = Path("params.yaml"),
    set_: Set = None,
) -> None:
    """One HTML page of all results.

    Shows what was trained from what, teachers and students, classes, curves, pictures, costs and provenance. The page needs
    no network and no server. It names what the stages have not made yet.
    """
    with errors("the page is as it was"):
        project = opened(config, set_)
        from mgd_stages.reports.page import report
        from mgd_stages.whole.records import noted

        with noted(project, "report") if output is None else nullcontext():
            report(project, output)
