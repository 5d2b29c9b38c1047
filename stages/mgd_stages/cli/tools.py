"""Commands that use students, compare variants and measure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mgd_pipeline.errors import MGDError
from mgd_stages.cli.common import Config, Device, Set, StudentFile, Threads, Workers, app, errors, set_threads


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
    with errors("what is written is whole; the same command begins again"):
        from mgd_stages.run.project import choose_device, parse_overlap, parse_window

        chosen, size = choose_device(device), parse_window(window)
        share = parse_overlap(overlap, size)
        set_threads(threads)
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
    with errors("nothing is written; the same command begins again"):
        from mgd_stages.run.project import open_project

        project = open_project(config, set_ or ()) if int8 and config.exists() else None
        set_threads(threads)
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
    with errors():
        import os

        from mgd_pipeline.errors import ParamsError
        from mgd_stages.run.project import open_project
        from mgd_stages.study.matrix import study
        from mgd_stages.study.results import write_results
        from mgd_stages.study.variants import parse_variant

        params = open_project(config, set_ or ()).params
        variants = list({one.name: one for one in (parse_variant(text, params) for text in variant)}.values())
        if reference and reference not in [one.name for one in variants]:
            raise ParamsError(f"--reference {reference}: must be one of the variants: {', '.join(one.name for one in variants)}")
        if not partition and not isinstance(params.data.partition, str):
            raise ParamsError("--partition: params.yaml has id lists, name a share such as 1/8")
        runs, failures = study(
            config,
            set_ or (),
            output,
            partitions=partition or [str(params.data.partition)],
            seeds=seeds,
            variants=variants,
            jobs=jobs,
            devices=device or ["auto"],
            threads=threads or max(1, (os.cpu_count() or 1) // jobs),
        )
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
    with errors():
        from mgd_stages.run.project import choose_device, open_project

        project = open_project(config, set_ or ())
        chosen = choose_device(device)
        set_threads(threads)
        from mgd_stages.tools.bench import bench

        bench(project, device=chosen, num_workers=num_workers, rounds=rounds, steps=steps)


@app.command("convert-weights")
def convert_weights_command(
    source: Annotated[Path, typer.Argument(metavar="OLD", help="A checkpoint of torch.save, such as best.pth.")],
    output: Annotated[Path, typer.Argument(metavar="NEW", help="The safetensors file to write.")],
    key: Annotated[
        str | None, typer.Option(metavar="NAME", help="The state dict in it, such as model_ema; looked for where left out.")
    ] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Run whatever code the file holds. Only for files of your own.")] = False,
) -> None:
    """Turn an old pickled checkpoint into safetensors.

    Once for each of a group's own teachers; nothing else here reads pickles that could run code.
    """
    with errors():
        from mgd_stages.run.machine import require_writable

        require_writable(files=[output])
        from mgd_pipeline.networks.weights import convert_weights

        count = convert_weights(source, output, key=key, trust=trust)
        typer.echo(f"{count} tensors -> {output}")
