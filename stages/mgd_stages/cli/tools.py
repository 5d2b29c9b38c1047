"""Commands that use students, compare variants and measure speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mgd_pipeline.errors import MGDError, ParamsError
from mgd_stages.cli.common import (
    Config,
    Device,
    OnError,
    Set,
    StudentFile,
    Threads,
    Workers,
    app,
    errors,
    opened,
    prepared_device,
    set_threads,
)

Jobs = Annotated[int, typer.Option(min=1, help="Number of processes that run at the same time.")]
Devices = Annotated[
    list[str] | None,
    typer.Option("--device", metavar="NAME", help="cpu or cuda:0; repeatable, tasks take turns. auto if left out."),
]
JobThreads = Annotated[int, typer.Option(min=0, help="CPU threads of each process; 0 shares the cores among the jobs.")]


@app.command("predict")
def predict_command(
    student: StudentFile,
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for the results, or the video to write (.mp4, .m4v, .mov, .mkv); - sends one mask to standard output."
        ),
    ],
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="INPUT...",
            readable=False,
            help="Images, folders (with subfolders), - for standard input; or one video; left out for --camera.",
        ),
    ] = None,
    camera: Annotated[
        str | None, typer.Option(metavar="NAME", help="Read a camera, such as 0, until Ctrl-C; if left out, INPUT is read.")
    ] = None,
    overlays: Annotated[bool, typer.Option("--overlays", help="Also write pictures of the masks over the images.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Also write predictions.json with sizes and class shares.")] = False,
    window: Annotated[
        str | None, typer.Option(metavar="HxW", help="Sliding window in pixels, such as 512x512; the whole image if left out.")
    ] = None,
    overlap: Annotated[
        float | None, typer.Option(help="Share of a window that overlaps with its neighbour, 0 to below 1; a third if left out.")
    ] = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Predict masks of new images with a student.

    Writes PNGs in the images' own sizes: pixel values are class ids, and the palette has the classes' colours. If an image
    cannot be used, the command does the rest, names the image at the end and exits with code 1. Of a video or a camera it writes
    a video of the masks over the frames.
    """
    with errors("what is written is whole; the same command begins again"):
        from mgd_stages.run.project import parse_overlap, parse_window

        chosen, size = prepared_device(device, threads), parse_window(window)
        share = parse_overlap(overlap, size)
        from mgd_stages.tools.predict import predict, predict_video, video_of

        images = inputs or []
        if (source := video_of(images, camera, output, overlays=overlays, as_json=as_json)) is not None:
            predict_video(student, source, output, window=size, overlap=share, device=chosen)
            return
        predict(student, images, output, overlays=overlays, as_json=as_json, window=size, overlap=share, device=chosen)


@app.command("label-images")
def label_images_command(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", readable=False, help="Photos, or folders (with subfolders).")],
    teacher: Annotated[str, typer.Option(help="Name of a teacher in params.yaml, such as words.")],
    output: Annotated[Path, typer.Option(help="Folder that gets masks/, such as the one that holds images/.")],
    confidence: Annotated[
        float, typer.Option(min=0, max=1, help="Pixels whose largest probability is below this get no class (255).")
    ] = 0.5,
    overlays: Annotated[bool, typer.Option("--overlays", help="Also write pictures of the masks over the photos.")] = False,
    config: Config = Path("params.yaml"),
    set_: Set = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Draw first labels of photos with a teacher.

    For photos without any label: masks of class ids, such as a text-prompted teacher sees them. Look at them, correct or delete
    some, and use them as any other masks. Masks that you corrected are never overwritten.
    """
    with errors("what is written is whole; the same command begins again"):
        from mgd_stages.run.project import check_teacher

        project = opened(config, set_)
        check_teacher(project, teacher)
        chosen = prepared_device(device, threads)
        from mgd_stages.tools.label_images import label_images

        label_images(project, teacher, inputs, output, confidence=confidence, overlays=overlays, device=chosen)


@app.command("export")
def export_command(
    student: StudentFile,
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT",
            help="A file, whose suffix tells the format (.onnx, .pte, .xml, .mlpackage, .tflite, .pt2), or a folder.",
        ),
    ],
    format_: Annotated[
        Literal["onnx", "executorch", "openvino", "coreml", "litert", "torch-export", "smp", "web"] | None,
        typer.Option(
            "--format",
            help="If left out, the suffix tells it. Folders need it: smp, a new folder with the network; web, a page for browsers.",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="HxW",
            help="Height and width of a file's one image. If left out, any size; if a format needs one, the project's or a square.",
        ),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Quantise to 8 bits, calibrated on images.")] = False,
    images: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Images to calibrate on; the project's labelled images if left out.")
    ] = None,
    runtime: Annotated[
        Path | None,
        typer.Option(metavar="PACKAGE", help="For web: onnxruntime-web from npm, a folder or .tgz; fetched by npm if left out."),
    ] = None,
    config: Config = Path("params.yaml"),
    set_: Set = None,
    threads: Threads = 0,
) -> None:
    """Export a student for another runtime.

    The formats are ONNX, ExecuTorch, OpenVINO, Core ML, LiteRT, torch.export, smp and web. A file takes RGB images, values 0 to
    255, and gives the masks of `predict`. Files for ONNX, OpenVINO and torch.export take images of any size and number; files for
    ExecuTorch, Core ML and LiteRT, and all files with --size, take one image of a fixed size. An smp folder holds the network
    only, a web folder a page that runs it in browsers. Each is compared with the student before it is written, in its own runtime
    where this machine has it (Core ML's is on a Mac only).
    With --int8 in a project, the command also measures how much mIoU is lost.
    """
    with errors("what is written is whole; the same command begins again"):
        from mgd_stages.run.project import parse_window

        shape = parse_window(size, "--size")
        if format_ == "web":
            for option, given in (("--size", shape), ("--int8", int8), ("--images", images)):
                if given:
                    raise ParamsError(f"{option}: is not for --format web")
            set_threads(threads)
            from mgd_stages.tools.export_web import export_web

            return export_web(student, output, runtime)
        if runtime is not None:
            raise ParamsError(f"--runtime {runtime}: is for --format web alone")
        from mgd_pipeline.exports.formats import format_of

        asked = int8 or (shape is None and format_of(output, format_).fixed)
        project = opened(config, set_) if asked and config.exists() else None
        set_threads(threads)
        from mgd_stages.tools.export import export

        export(student, output, format_, size=shape, int8=int8, images=images, project=project)


@app.command("study")
def study_command(
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder for the study's projects and results.")],
    variant: Annotated[
        list[str],
        typer.Option(
            metavar="NAME", help="What to compare: supervised, distilled, ..., or 'name: [variant] key=value'; repeatable."
        ),
    ],
    partition: Annotated[
        list[str] | None, typer.Option(metavar="1/N", help="Labelled share; repeatable. The share of params.yaml if left out.")
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Runs of each variant, with consecutive seeds from the seed of params.yaml.")
    ] = 3,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Variant to compare with; if left out the first one, and for another network its twin without teachers.",
        ),
    ] = None,
    jobs: Jobs = 1,
    device: Devices = None,
    threads: JobThreads = 0,
    on_error: OnError = "stop",
    config: Config = Path("params.yaml"),
    set_: Set = None,
) -> None:
    """Compare variants over partitions and seeds.

    Makes teachers and their caches once for each partition. Run the command again to continue, also with more partitions,
    seeds or variants. The results are a Parquet file, a table with paired differences and a plot.
    """
    with errors():
        import os

        from mgd_stages.run.processes import Workers
        from mgd_stages.study.matrix import Matrix
        from mgd_stages.study.results import write_results
        from mgd_stages.study.run import study
        from mgd_stages.study.variants import parse_variant

        params = opened(config, set_).params
        variants = list({one.name: one for one in (parse_variant(text, params) for text in variant)}.values())
        if reference and reference not in [one.name for one in variants]:
            raise ParamsError(f"--reference {reference}: must be one of the variants: {', '.join(one.name for one in variants)}")
        if not partition and not isinstance(params.data.partition, str):
            raise ParamsError("--partition: params.yaml has id lists, name a share such as 1/8")
        matrix = Matrix(partition or [str(params.data.partition)], seeds, variants)
        workers = Workers(jobs, device or ["auto"], threads or max(1, (os.cpu_count() or 1) // jobs))
        runs, failures = study(config, set_ or (), output, matrix, workers, on_error)
        if runs:
            write_results(output, runs, reference)
        if failures:
            raise MGDError("\n".join([*failures, "these runs have no result; the same command tries them again"]))


@app.command("search")
def search_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The project's folder, whose teacher caches are finished.")],
    trials: Annotated[
        int | None, typer.Option(min=1, help="How many recipes to try, the project's own among them; if left out, --hours counts.")
    ] = None,
    hours: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="H", help="Try as many as fit into H hours, the final comparison included; if left out, --trials counts."
        ),
    ] = None,
    space: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What may change; space.yaml of the output folder if left out, which is written there."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for trials and results; data/search if left out.")] = None,
    objective: Annotated[
        Literal["miou", "miou+rare"],
        typer.Option(help="What a trial is ranked by on val: mIoU, or its mean with that of the rare third of the classes."),
    ] = "miou",
    self_teach: Annotated[
        bool, typer.Option("--self-teach", help="Let the best finished students become teachers of later trials.")
    ] = False,
    small_val: Annotated[
        bool, typer.Option("--small-val", help="Halve val where there is no test split, even if a half has fewer than 10 images.")
    ] = False,
    jobs: Jobs = 1,
    device: Devices = None,
    threads: JobThreads = 0,
    set_: Set = None,
) -> None:
    """Search the recipe that suits a project best.

    Trains many students for a short time and the better ones for longer. Then compares the winner with the project's own
    parameters on images that the search never saw. Run the command again to continue. Without --trials and --hours it only writes
    space.yaml, for you to edit.
    """
    with errors("the same command continues; finished trials are kept"):
        import os

        from mgd_stages.run.processes import Workers

        if trials is not None and hours is not None:
            raise ParamsError(f"--trials {trials} --hours {hours:g}: choose one")
        project = opened(folder / "params.yaml", set_)
        from mgd_stages.search.results import write_search_results
        from mgd_stages.search.run import Asked, search

        place = output or project.base / "data/search"
        asked = Asked(place, space, trials, hours, objective, small_val, self_teach)
        workers = Workers(jobs, device or ["auto"], threads or max(1, (os.cpu_count() or 1) // jobs))
        outcome = search(project, asked, workers)
        if outcome is None:
            return
        write_search_results(outcome)
        if outcome.failures:
            remedy = "remove the folders of these trainings, and the same command tries them again"
            raise MGDError("\n".join([*outcome.failures, remedy]))


@app.command("bench")
def bench_command(
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions of each measurement; the median counts.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Training steps per repetition.")] = 4,
    config: Config = Path("params.yaml"),
    set_: Set = None,
    device: Device = "auto",
    num_workers: Workers = 0,
    threads: Threads = 0,
) -> None:
    """Measure the speed of this machine.

    Uses this project's teacher caches, images and networks. Compares each reader with the raw file, and a training step with
    one whose targets are in memory and one with live teachers. Writes data/results/bench.json.
    """
    with errors():
        project = opened(config, set_)
        chosen = prepared_device(device, threads)
        from mgd_stages.tools.bench import bench

        bench(project, device=chosen, num_workers=num_workers, rounds=rounds, steps=steps)


@app.command("benchmark-device")
def benchmark_device_command(
    student: StudentFile,
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE]...", help="Files that export made; if left out, every format whose runtime is installed."),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HxW",
            help="Height and width of the images; repeatable. If left out, what files take, or the project's, or 512x512.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Images of each size that each form runs.")] = 30,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder for devices.md and devices.json; the project's results if left out."),
    ] = None,
    config: Config = Path("params.yaml"),
    set_: Set = None,
) -> None:
    """Compare a student's exported forms on this machine.

    Measures the time of an image with one thread and with all, the size of the file, memory, and in a project mIoU. All figures
    come from one run, in which the forms take turns, each in a process of its own. The project's report shows the table.
    """
    with errors("what is written is whole; the same command begins again"):
        from mgd_stages.run.project import parse_window

        sizes = [shape for text in size or [] if (shape := parse_window(text, "--size")) is not None]
        project = opened(config, set_) if config.exists() else None
        from mgd_stages.tools.devices import benchmark_device

        benchmark_device(student, files or [], sizes=sizes, rounds=rounds, project=project, output=output)


@app.command("convert-weights")
def convert_weights_command(
    source: Annotated[Path, typer.Argument(metavar="OLD", help="A checkpoint of torch.save, such as best.pth.")],
    output: Annotated[Path, typer.Argument(metavar="NEW", help="The safetensors file to write.")],
    key: Annotated[
        str | None, typer.Option(metavar="NAME", help="The state dict inside, such as model_ema; detected if left out.")
    ] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Run the code that the file contains. Only for your own files.")] = False,
) -> None:
    """Turn an old pickled checkpoint into safetensors.

    Needed once for each teacher of your own. No other command reads pickles that can run code.
    """
    with errors():
        from mgd_stages.run.machine import require_writable

        require_writable(files=[output])
        from mgd_pipeline.networks.weights import convert_weights
        from mgd_pipeline.words import counted

        count = convert_weights(source, output, key=key, trust=trust, say=typer.echo)
        typer.echo(f"{counted(count, 'tensor')} -> {output}")
