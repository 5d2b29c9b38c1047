"""The command line: thin commands over the stages, in the order in which they run.

Nothing heavy is imported before a command needs it, so that --help answers at once. Longer than other modules on purpose: it is
read one command at a time, and options that several commands share are defined once, at the top.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from mgd_pipeline.access import access_error, gives_no_answer
from mgd_pipeline.errors import AccessError, MGDError

app = typer.Typer(
    help="Multi-granularity distillation in two stages: heavy teachers run once, light students train from their targets.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


_LITTLE = 6 * 10**9
"""Bytes of addresses that torch and its libraries take, about."""


@app.callback()
def common_options(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing along the way, only errors and answers.")] = False,
) -> None:
    """Multi-granularity distillation in two stages: heavy teachers run once, light students train from their targets."""
    from mgd_stages.run.machine import limit_text, memory_limit

    for stream in (sys.stdout, sys.stderr):  # None where it is closed
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # a name that has no letters there ends nothing
    if (limit := memory_limit()) is not None and limit < _LITTLE:
        # Said first: numpy's and torch's own libraries end the process without an exception.
        typer.echo(f"warning: {limit_text(limit)}", err=True)
    if quiet:
        from mgd_stages.run.progress import console

        console.quiet = True


Config = Annotated[Path, typer.Option("--config", help="Path of the parameters; its folder is the project.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a parameter, such as student.steps=500; repeatable."),
]
Device = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda or cuda:0.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode images; 0 decodes in the training process.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads of torch; 0 leaves torch's own choice.")]
OnError = Annotated[
    Literal["stop", "skip"], typer.Option(help="At an image that cannot be used: stop, or leave it out and record why.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else, for scripts.")]
CacheImages = Annotated[
    bool,
    typer.Option("--cache-images", help="Keep decoded images in .mgd/work/images, 4 bytes a pixel."),
]
StudentFile = Annotated[Path, typer.Argument(metavar="STUDENT", readable=False, help="A student.safetensors of train-student.")]
LogTo = Annotated[
    Literal["tensorboard", "wandb", "mlflow"] | None,
    typer.Option(help="Log the metrics there as well; left out, DVC's files alone have them."),
]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Go on from an interrupted run's checkpoint.")]


@contextmanager
def _errors(after_interrupt: str = "the same command goes on from the last checkpoint") -> Iterator[None]:
    """One line for each problem a user can mend; Ctrl-C says how to go on."""
    try:
        yield
    except MGDError as error:
        for line in str(error).splitlines():
            typer.echo(f"error: {line}", err=True)
        raise typer.Exit(error.exit_code) from None
    except (OSError, RuntimeError, MemoryError, ImportError, AttributeError) as error:
        # The latter two where a limit on memory lets a library load by halves.
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


def _later(resume: bool) -> str:
    return f"the same command{'' if resume else ' without --no-resume'} goes on from the last checkpoint"


@contextmanager
def _only_answers(wanted: bool) -> Iterator[None]:
    """Nothing along the way on standard output, where a script reads the answer from."""
    from mgd_stages.run.progress import console

    before, console.quiet = console.quiet, console.quiet or wanted
    try:
        yield
    finally:
        console.quiet = before


def _threads(count: int) -> None:
    if count:
        import torch

        torch.set_num_threads(count)


@app.command("init")
def init_command(
    dataset: Annotated[Literal["shapes", "voc", "cityscapes", "folder"], typer.Option(help="Kind of data set.")] = "shapes",
    root: Annotated[
        Path | None, typer.Option(help="Folder of the data set, linked below data/raw/; left out for shapes, which is built in.")
    ] = None,
    partition: Annotated[str, typer.Option(help="Labelled share of the training images, 1/n.")] = "1/8",
    output: Annotated[Path, typer.Option(help="Folder of the new project.")] = Path(),
    quick: Annotated[
        bool, typer.Option("--quick", help="Toy networks without downloads, small images, few steps: minutes on two cores.")
    ] = False,
) -> None:
    """Begin a project: write params.yaml and dvc.yaml.

    Links the data set below data/raw/ and prints the commands that come next. Nothing that exists is overwritten.
    """
    with _errors():
        from mgd_stages.projects.init import init_project

        for line in init_project(dataset, root, partition, output, small=quick):
            typer.echo(line)


@app.command("prepare-data")
def prepare_data_command(
    on_error: OnError = "stop",
    config: Config = Path("params.yaml"),
    set_: Set = None,
) -> None:
    """Stage 1: list and check images, draw the partition.

    Every image and mask is decoded once; the result is data/manifest/.
    """
    with _errors():
        from mgd_stages.run.project import open_project

        project = open_project(config, set_ or ())
        from mgd_stages.prepare_data import prepare_data
        from mgd_stages.projects.dvc_file import check_dvc_file

        check_dvc_file(project)

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
    """Stage 2: train one teacher; skip if you have it.

    By cross pseudo supervision with CutMix on the same partition. A teacher of your own goes where its `weights` say.
    """
    with _errors(_later(resume)):
        from mgd_stages.projects.dvc_file import check_dvc_file
        from mgd_stages.run.project import check_teacher, choose_device, open_project

        project = open_project(config, set_ or ())
        check_teacher(project, teacher)
        check_dvc_file(project)
        chosen = choose_device(device)
        _threads(threads)
        from mgd_stages.train_teacher import train_teacher

        train_teacher(
            project,
            teacher,
            device=chosen,
            num_workers=num_workers,
            resume=resume,
            cache_images=cache_images,
            log_to=log_to,
        )


@app.command("precompute-teachers")
def precompute_teachers_command(
    teacher: Annotated[str | None, typer.Option(help="Only this teacher; all of params.yaml where left out.")] = None,
    config: Config = Path("params.yaml"),
    set_: Set = None,
    device: Device = "auto",
    batch_size: Annotated[
        int, typer.Option(min=0, help="Images of one forward pass; 0 finds it: as many as fit a GPU's memory, 8 on a CPU.")
    ] = 0,
    on_error: OnError = "stop",
    min_miou: Annotated[float, typer.Option(min=0, max=1, help="Refuse a teacher below this mIoU on a few labelled images.")] = 0.0,
    threads: Threads = 0,
    workers: Annotated[
        str | None, typer.Option(metavar="N|gpus", help="Worker processes, or one for each GPU; none where left out.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Dask cluster that works, such as tcp://host:8786; none where left out.")
    ] = None,
    shards: Annotated[
        str | None, typer.Option(metavar="SLICE", help="Compute only these shards, such as 0::8; all of them where left out.")
    ] = None,
) -> None:
    """Stage 3: run each teacher once, store its targets.

    Over all training images, into data/targets/<teacher>.zarr; an interrupted run goes on where it was, new images are
    appended. Several processes may run this at the same time; docs/cluster.md shows several GPUs and machines.
    """
    with _errors():
        from mgd_stages.projects.dvc_file import check_dvc_file
        from mgd_stages.run.project import check_teacher, check_workers, choose_device, open_project, parse_shards

        project = open_project(config, set_ or ())
        names = list(project.params.teachers) if teacher is None else [teacher]
        for name in names:
            check_teacher(project, name)
        check_dvc_file(project)
        check_workers(workers, scheduler, device)
        chosen_shards = slice(None) if shards is None else parse_shards(shards)
        chosen = choose_device(device)
        _threads(threads)
        with ExitStack() as until_done:
            elsewhere = None
            if workers or scheduler:
                from mgd_stages.cluster import build_on_workers, local_workers, workers_of

                client = until_done.enter_context(workers_of(scheduler) if scheduler else local_workers(workers or "", threads))
                elsewhere = partial(
                    build_on_workers, client, device=device, batch_size=batch_size, on_error=on_error, threads=threads
                )
            from mgd_stages.precompute_teachers import precompute_teachers

            for name in names:
                precompute_teachers(
                    project,
                    name,
                    device=chosen,
                    batch_size=batch_size,
                    on_error=on_error,
                    min_miou=min_miou,
                    shards=chosen_shards,
                    elsewhere=elsewhere,
                )


@app.command("compare-teachers")
def compare_teachers_command(config: Config = Path("params.yaml"), set_: Set = None) -> None:
    """Know the teachers before you trust them.

    From the stored targets alone: mIoU, calibration and confusion on the labelled images, agreement per class, and pictures of
    the images on which the teachers disagree most, in data/results/compare-teachers/.
    """
    with _errors():
        from mgd_stages.run.project import open_project

        project = open_project(config, set_ or ())
        from mgd_stages.compare_teachers import compare_teachers

        compare_teachers(project)


@app.command("train-student")
def train_student_command(
    supervised_only: Annotated[
        bool, typer.Option("--supervised-only", help="Train on the labelled images alone, for comparison.")
    ] = False,
    config: Config = Path("params.yaml"),
    set_: Set = None,
    device: Device = "auto",
    num_workers: Workers = 0,
    threads: Threads = 0,
    resume: Resume = True,
    cache_images: CacheImages = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the network first: minutes at the start. Meant for GPUs.")
    ] = False,
    log_to: LogTo = None,
) -> None:
    """Stage 4: train the student from stored targets.

    No teacher is loaded. The result is data/students/<distilled or supervised>/student.safetensors. Under torchrun, the
    images of each step are shared out among its processes.
    """
    with _errors(_later(resume)):
        from mgd_stages.projects.dvc_file import check_dvc_file
        from mgd_stages.run.project import choose_device, open_project

        project = open_project(config, set_ or ())
        check_dvc_file(project)
        chosen = choose_device(device)
        _threads(threads)
        from mgd_stages.run.loop import check_compiler
        from mgd_stages.train_student import train_student

        if compiled:
            check_compiler(chosen)
        train_student(
            project,
            supervised_only=supervised_only,
            device=chosen,
            num_workers=num_workers,
            resume=resume,
            compiled=compiled,
            cache_images=cache_images,
            log_to=log_to,
        )


@app.command("evaluate")
def evaluate_command(
    last: Annotated[bool, typer.Option("--last", help="Print the table of the last evaluation; compute nothing.")] = False,
    config: Config = Path("params.yaml"),
    set_: Set = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Stage 5: mIoU of students and teachers.

    Also per class, with pictures of the worst, median and best images, in data/results/evaluation/.
    """
    with _errors():
        from mgd_stages.run.project import choose_device, open_project

        project = open_project(config, set_ or ())
        from mgd_stages.evaluate import evaluate, show_table

        if last:
            show_table(project)
            return
        _threads(threads)
        evaluate(project, device=choose_device(device))


@app.command("report")
def report_command(
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page to write; data/results/report.html where left out.")
    ] = None,
    config: Config = Path("params.yaml"),
    set_: Set = None,
) -> None:
    """One HTML page of all results.

    What was trained from what, teachers against student, classes, curves, pictures, costs and provenance, from what the stages
    have written. It needs no network and no server; what has not been made is left out, and the page says so.
    """
    with _errors("the page is as it was"):
        from mgd_stages.run.project import open_project

        project = open_project(config, set_ or ())
        from mgd_stages.report.page import report

        report(project, output)


@app.command("predict")
def predict_command(
    student: StudentFile,
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="INPUT...", readable=False, help="Images, folders and all below them, or - for standard input."),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the results; - writes the mask of one image to standard output.")],
    overlays: Annotated[bool, typer.Option("--overlays", help="Also pictures of the masks over the images.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Also predictions.json: sizes, and the share of each class.")] = False,
    window: Annotated[
        str | None, typer.Option(metavar="HxW", help="Sliding window in pixels, such as 512x512; the whole image where left out.")
    ] = None,
    overlap: Annotated[
        float | None, typer.Option(help="Share of the window by which neighbours overlap, 0 to below 1; a third where left out.")
    ] = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Masks of new images, by a student.

    PNGs in the images' own sizes, whose pixel values are class ids and whose palette shows the classes' colours. An image
    that cannot be used is named at the end, with exit code 1, and the others are done.
    """
    with _errors("what is written is whole; the same command begins again"):
        from mgd_stages.run.project import choose_device, parse_overlap, parse_window

        chosen, size = choose_device(device), parse_window(window)
        share = parse_overlap(overlap, size)
        _threads(threads)
        from mgd_stages.tools.predict import predict

        predict(student, inputs, output, overlays=overlays, as_json=as_json, window=size, overlap=share, device=chosen)


@app.command("export")
def export_command(
    student: StudentFile,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The file to write, .onnx or .pt; for smp a new folder.")],
    format_: Annotated[
        Literal["onnx", "torchscript", "smp"],
        typer.Option("--format", help="Runtime; smp is the plain segmentation-models-pytorch network."),
    ] = "onnx",
    int8: Annotated[bool, typer.Option("--int8", help="Whole numbers of 8 bits, calibrated on images; for onnx.")] = False,
    images: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Images to calibrate on; the project's labelled ones where left out.")
    ] = None,
    config: Config = Path("params.yaml"),
    set_: Set = None,
    threads: Threads = 0,
) -> None:
    """A student as ONNX, TorchScript or smp files.

    An ONNX or TorchScript file takes RGB images of any size and number as they are, 0 to 255, and gives `predict`'s masks; an
    smp folder is the network alone. It is compared with the student before it is written.
    With --int8 in a project, the loss of mIoU is measured.
    """
    with _errors("nothing is written; the same command begins again"):
        from mgd_stages.run.project import open_project

        project = open_project(config, set_ or ()) if int8 and config.exists() else None
        _threads(threads)
        from mgd_stages.tools.export import export

        export(student, output, format_, int8=int8, images=images, project=project)


@app.command("study")
def study_command(
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the study's projects and results.")],
    variant: Annotated[
        list[str],
        typer.Option(
            metavar="NAME", help="What to compare: supervised, distilled, ..., or 'name: [variant] key=value'; repeatable."
        ),
    ],
    partition: Annotated[
        list[str] | None, typer.Option(metavar="1/N", help="Labelled share; repeatable; that of params.yaml where left out.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant, with seeds from params.yaml's upwards.")] = 3,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Variant that differences are taken from; where left out the first, and of another network its twin without "
            "teachers.",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that run at the same time.")] = 1,
    device: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="cpu or cuda:0; repeatable, tasks take turns; auto where left out.")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of each process; 0 shares the cores among the jobs.")] = 0,
    config: Config = Path("params.yaml"),
    set_: Set = None,
) -> None:
    """Compare variants over partitions and seeds.

    Teachers and targets are made once for each partition. Called again, it goes on where it was, and may be given more
    partitions, seeds or variants. The results are a Parquet file, a table with paired differences, and a plot.
    """
    with _errors():
        import os

        from mgd_pipeline.errors import ParamsError
        from mgd_stages.run.project import open_project
        from mgd_stages.study.matrix import Matrix
        from mgd_stages.study.results import write_results
        from mgd_stages.study.run import study
        from mgd_stages.study.tasks import Workers
        from mgd_stages.study.variants import parse_variant

        params = open_project(config, set_ or ()).params
        variants = list({found.name: found for found in (parse_variant(text, params) for text in variant)}.values())
        if reference and reference not in [found.name for found in variants]:
            raise ParamsError(
                f"--reference {reference}: must be one of the variants: {', '.join(found.name for found in variants)}"
            )
        if not partition and not isinstance(params.data.partition, str):
            raise ParamsError("--partition: params.yaml has id lists, name a share such as 1/8")
        matrix = Matrix(partition or [str(params.data.partition)], seeds, variants)
        workers = Workers(jobs, device or ["auto"], threads or max(1, (os.cpu_count() or 1) // jobs))
        runs, failures = study(config, set_ or (), output, matrix, workers)
        if runs:
            write_results(output, runs, reference)
        if failures:
            raise MGDError("\n".join([*failures, "these runs have no result; the same command tries them again"]))


@app.command("bench")
def bench_command(
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each measurement; the median counts.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of one turn.")] = 4,
    config: Config = Path("params.yaml"),
    set_: Set = None,
    device: Device = "auto",
    num_workers: Workers = 0,
    threads: Threads = 0,
) -> None:
    """Measure reading and training steps on this machine.

    With this project's stores, images and networks: each reader against the raw file, each step against one whose targets
    are in memory and one with live teachers. Numbers go to data/results/bench.json.
    """
    with _errors():
        from mgd_stages.run.project import choose_device, open_project

        project = open_project(config, set_ or ())
        chosen = choose_device(device)
        _threads(threads)
        from mgd_stages.tools.bench import bench

        bench(project, device=chosen, num_workers=num_workers, rounds=rounds, steps=steps)


@app.command("doctor")
def doctor_command(
    full: Annotated[bool, typer.Option("--full", help="Read every image and mask, not a sample of 200.")] = False,
    as_json: AsJson = False,
    config: Config = Path("params.yaml"),
    set_: Set = None,
) -> None:
    """Look at this machine and this project.

    A line for each check: versions, devices, parameters, data set, weights, disk and DVC; what is not well has its remedy.
    Nothing is computed, fetched or changed. Exit code 0: no problem; 1: there are some; 2: params.yaml is not valid.
    """
    with _errors():
        from mgd_stages.doctor.run import doctor

        code = doctor(config, set_ or (), full=full, as_json=as_json)
        if code:
            raise typer.Exit(code)


cache_app = typer.Typer(help="Look into, check, compare and clean up target caches.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(cache_app, name="cache")
Stores = Annotated[list[Path], typer.Argument(metavar="STORE...", readable=False, help="Stores, or folders of stores.")]
Sample = Annotated[str, typer.Option(metavar="PERCENT", help="Share of the rows, such as 5%.")]
_TARGETS = Path("data/targets")


@cache_app.command("info")
def cache_info_command(
    store: Annotated[Path, typer.Argument(metavar="STORE", readable=False, help="A store, such as data/targets/wide.zarr.")],
    config: Config = Path("params.yaml"),
    as_json: AsJson = False,
) -> None:
    """What, by which teacher, from which images, how large.

    In a project also how good: mIoU of the stored targets against the masks of the labelled images.
    """
    with _errors():
        from mgd_stages.run.project import open_project
        from mgd_stages.tools.caches import show_store

        with _only_answers(as_json):
            show_store(store, open_project(config) if config.exists() else None, as_json)


@cache_app.command("list")
def cache_list_command(stores: Stores = [_TARGETS], as_json: AsJson = False) -> None:  # noqa: B006
    """One line for each store."""
    with _errors():
        from mgd_stages.tools.caches import list_stores

        list_stores(stores, as_json)


@cache_app.command("verify")
def cache_verify_command(
    stores: Stores = [_TARGETS],  # noqa: B006
    quick: Annotated[bool, typer.Option("--quick", help="Only names, sizes, metadata and provenance; no target is read.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Every byte of every file, every record.")] = False,
    sample: Sample = "5%",
    as_json: AsJson = False,
) -> None:
    """Name every damaged file, shard and row.

    Exit code 0: no damage found; 3: damaged; 4: missing, not finished or no target cache; 5: of another format or version;
    7: you may not read it, or its disk does not answer.
    """
    with _errors():
        from mgd_pipeline.errors import ParamsError
        from mgd_stages.tools.caches import parse_share, verify

        if quick and full:
            raise ParamsError("--quick --full: choose one")
        with _only_answers(as_json):
            verify(stores, 0.0 if quick else 1.0 if full else parse_share(sample), as_json)


@cache_app.command("diff")
def cache_diff_command(
    a: Annotated[Path, typer.Argument(metavar="A", readable=False, help="A store.")],
    b: Annotated[Path, typer.Argument(metavar="B", readable=False, help="Another store.")],
    as_json: AsJson = False,
) -> None:
    """Compare two stores field by field.

    Exit code 0: the same targets of the same images by the same teacher; 1: there are differences.
    """
    with _errors():
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
    with _errors():
        from mgd_stages.run.project import open_project
        from mgd_stages.tools.caches import parse_share, recheck

        project, share = open_project(config, set_ or ()), parse_share(sample)
        _threads(threads)
        with _only_answers(as_json):
            recheck(project, teacher, share, device, as_json)


@cache_app.command("gc")
def cache_gc_command(
    days: Annotated[float, typer.Option(min=0, help="Grace period: only what nobody has changed for so many days.")] = 14.0,
    delete: Annotated[bool, typer.Option("--delete", help="Delete it; without this it is only listed.")] = False,
    config: Config = Path("params.yaml"),
) -> None:
    """List or delete what builders left behind.

    In .mgd/work: stages of killed builders, and shards of stores that this project has no more.
    """
    with _errors():
        from mgd_stages.run.project import open_project
        from mgd_stages.tools.caches import collect_garbage

        collect_garbage(open_project(config), days, delete)


@app.command("convert-weights")
def convert_weights_command(
    source: Annotated[Path, typer.Argument(metavar="OLD", help="A checkpoint of torch.save, such as best.pth.")],
    output: Annotated[Path, typer.Argument(metavar="NEW", help="The safetensors file to write.")],
    key: Annotated[
        str | None, typer.Option(metavar="NAME", help="The state dict in it, such as model_ema; found by itself where left out.")
    ] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Run whatever code the file holds. Only for files of your own.")] = False,
) -> None:
    """Turn an old pickled checkpoint into safetensors.

    Once for each of a group's own teachers; nothing else here reads pickles that could run code.
    """
    with _errors():
        from mgd_stages.run.machine import require_writable

        require_writable(files=[output])
        from mgd_pipeline.networks.weights import convert_weights

        count = convert_weights(source, output, key=key, trust=trust)
        typer.echo(f"{count} tensors -> {output}")


@app.command("demo")
def demo_command(
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder for the project that the demo makes.")],
    full: Annotated[bool, typer.Option("--full", help="Default parameters (10 minutes on 2 cores), not a short run.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of teachers and students.")] = 0,
    set_: Set = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Run all stages on the built-in data set.

    In one go and without DVC, about 2 minutes on 2 cores. Called again, it goes on where it was.
    """
    with _errors():
        from mgd_stages.run.project import choose_device

        chosen = choose_device(device)
        _threads(threads)
        from mgd_stages.demo import demo

        demo(output, full=full, seed=seed, overrides=set_ or [], device=chosen)
