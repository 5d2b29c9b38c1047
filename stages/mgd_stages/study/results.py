"""The results of a study: a tidy Parquet file, a Markdown table with paired differences, and a plot."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from mgd_pipeline.durable import replace_file
from mgd_pipeline.metrics import iou_by_class
from mgd_pipeline.pictures.drawing import load_matplotlib, plain_style, png_of_figure
from mgd_pipeline.tables import open_parquet, parquet_bytes, read_parquet
from mgd_pipeline.words import defined, listed, per_cent, signed
from mgd_stages.run.class_tables import read_class_tsv, read_confusion, read_numbers
from mgd_stages.run.progress import console
from mgd_stages.run.project import open_project
from mgd_stages.run.verdicts import of_rare, rare_classes, what_is_rare, why_undefined
from mgd_stages.study.matrix import Run, run_names

_SCHEMA = pa.schema(
    [
        ("partition", pa.string()),
        ("variant", pa.string()),
        ("seed", pa.int64()),
        ("split", pa.string()),
        ("metric", pa.string()),
        ("class", pa.string()),
        ("value", pa.float64()),
    ]
)
"""One measured number a row, null where an mIoU is undefined. Metrics: miou, rare_miou (of the rare third), iou (of a class),
pixel_accuracy, all 0 to 1; seconds_per_step; peak_memory_mb. Teachers are variants called `teacher <name>`, and
`teacher <name>, <options>` where their targets were stored with other options (`tta`, `stride-8`, ...)."""
_TEACHER = "teacher "
_NO_GAP = (
    "Gap closed: - where the variant is below the student without teachers, or the better teacher is not above that student: "
    "a share of such a gap has no meaning."
)


class Difference(NamedTuple):
    """Difference of paired runs in the unit of the values; the bounds are NaN with fewer than two pairs."""

    mean: float
    low: float
    high: float


def write_results(output: Path, runs: Sequence[Run], reference: str | None) -> None:
    """Writes results.parquet, table.md and plot.png below `output`, and prints the table, whose differences are from `compared`.

    An earlier results.parquet with runs that no longer exist is kept as results.earlier.parquet.
    """
    table = collect(runs)
    _keep_lost_runs(output, runs)
    replace_file(output / "results.parquet", parquet_bytes(table))
    alone = {run.variant.name for run in runs if run.variant.supervised_only}
    text = markdown(table, compared(runs, reference), alone, taught(runs), rare_of_partitions(runs))
    replace_file(output / "table.md", text.encode())
    console.print(text)
    plot(table, output / "plot.png")
    console.print(f"{output / 'results.parquet'}  {output / 'table.md'}  {output / 'plot.png'}")


def _keep_lost_runs(output: Path, runs: Sequence[Run]) -> None:
    path, kept = output / "results.parquet", output / "results.earlier.parquet"
    if not path.exists():
        return
    try:
        rows = read_parquet(open_parquet(path.read_bytes())).select(["partition", "variant", "seed"]).to_pylist()
    except (pa.ArrowException, KeyError):  # damaged: nothing in it can be lost
        return
    keys = dict.fromkeys((row["partition"], row["variant"], row["seed"]) for row in rows if not row["variant"].startswith(_TEACHER))
    if lost := [key for key in keys if key not in {run.key for run in runs}]:
        replace_file(kept, path.read_bytes())
        console.print(
            f"warning: the results had runs that are no longer below {output}: {listed(run_names(lost))}; {kept} has them"
        )


def collect(runs: Sequence[Run]) -> pa.Table:
    """Every number of the runs, and of the teachers of their partitions and teacher caches, in the schema above."""
    rows: list[dict[str, Any]] = []

    def add(run: Run, variant: str, seed: int, split: str, measured: dict[str, Any], class_iou: dict[str, float]) -> None:
        where = {"partition": run.partition, "variant": variant, "seed": seed, "split": split}
        for metric in ("miou", "rare_miou", "pixel_accuracy", "seconds_per_step", "peak_memory_mb"):
            value = measured.get(metric)
            if defined(value) is not None or (metric == "miou" and metric in measured):
                rows.append({**where, "metric": metric, "class": None, "value": value})
        rows.extend({**where, "metric": "iou", "class": name, "value": float(value)} for name, value in class_iou.items())

    seen, rare = set(), rare_of_partitions(runs)
    for run in runs:
        folder = run.folder / "data/results/evaluation"
        measured, cost = read_numbers(folder / "metrics.json") or {}, read_numbers(run.done) or {}
        student = "supervised" if run.variant.supervised_only else "distilled"
        class_iou = read_class_tsv(folder / "class_iou.tsv")[student]
        add(run, run.variant.name, run.seed, measured["split"], {**measured[student], **cost}, class_iou)
        for folder in dict.fromkeys((run.shared, run.caching)):
            if folder in seen:
                continue
            seen.add(folder)
            seed = open_project(folder / "params.yaml").params.seed
            for path in sorted((folder / "data/results/teachers").glob("*.json")):
                names, confusion = read_confusion(path.with_name(f"{path.stem}-confusion.csv")) or ([], np.zeros((0, 0)))
                class_iou, of_teacher = iou_by_class(confusion, names), read_numbers(path) or {}
                of_teacher["rare_miou"] = of_rare((names, confusion), rare.get(run.partition, ()), names)
                add(run, _teacher_of(run, folder, path.stem), seed, measured["split"], of_teacher, class_iou)
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def rare_of_partitions(runs: Sequence[Run]) -> dict[str, tuple[str, ...]]:
    """The rare third of the classes by partition, without partitions that an older version measured."""
    measured = [(run.partition, read_numbers(run.folder / "data/results/evaluation/metrics.json") or {}) for run in runs]
    return {partition: names for partition, numbers in measured if (names := rare_classes(numbers))}


def compared(runs: Sequence[Run], reference: str | None) -> dict[str, str]:
    """For each variant the name of the variant that its differences are taken from; that variant itself has no entry.

    It is `reference`, or the first variant where `reference` is None. A student with another network than the first variant's is
    compared with its twin instead: a variant of the same network that learns from labels alone, if the study has one. Of several
    twins, the twin with the same training (learning rate, steps, ...) is taken, else the first twin.
    """
    students = {run.variant.name: open_project(run.folder / "params.yaml").params.student for run in runs}
    first, alone = next(iter(students), ""), dict.fromkeys(run.variant.name for run in runs if run.variant.supervised_only)
    bases = {}
    for name, student in students.items():
        twins = [twin for twin in alone if students[twin].network == student.network]
        alike = [twin for twin in twins if students[twin] == student and name not in alone]
        known = [first] if student.network == students[first].network else [*alike, *twins, first]
        bases[name] = reference or known[0]
    return {name: base for name, base in bases.items() if name != base}


def taught(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The teachers that each variant learns from, as the table calls them; for labels alone, all teachers of the partition."""
    teachers = {}
    for run in runs:
        params = open_project(run.folder / "params.yaml").params
        names = list(params.teachers) if run.variant.supervised_only else params.losses.used_teachers
        teachers[run.variant.name] = [_teacher_of(run, run.caching, name) for name in names]
    return teachers


def _teacher_of(run: Run, folder: Path, name: str) -> str:
    return f"{_TEACHER}{name}" if folder == run.shared else f"{_TEACHER}{name}, {folder.name}"


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """Mean of values - reference, pair by pair, with Student's 95 % confidence interval (n - 1 degrees of freedom)."""
    from scipy.stats import ttest_1samp

    differences = np.subtract(values, reference)
    if len(differences) < 2:
        return Difference(float(differences.mean()), math.nan, math.nan)
    low, high = ttest_1samp(differences, 0.0).confidence_interval(0.95)
    return Difference(float(differences.mean()), float(low), float(high))


def by_variant(table: pa.Table, metric: str) -> dict[tuple[str, str], dict[int, float]]:
    """Defined values of one metric without classes, in the order of the study: {(partition, variant): {seed: value}}."""
    values: dict[tuple[str, str], dict[int, float]] = {}
    for row in table.to_pylist():
        if row["metric"] == metric and row["class"] is None and defined(row["value"]) is not None:
            values.setdefault((row["partition"], row["variant"]), {})[row["seed"]] = row["value"]
    return values


def markdown(
    table: pa.Table,
    against: Mapping[str, str],
    alone: Collection[str],
    taught: Mapping[str, Collection[str]],
    rare: Mapping[str, Sequence[str]],
) -> str:
    """Two tables, in per cent: mIoU of each variant beside a reference and the better teacher, and IoU of each class.

    mIoU has its mean and standard deviation over the seeds, and the mean paired difference from the variant in `against`; the rare
    third likewise, if every run with an mIoU has it, and notes name its classes, which are in `rare` by partition. The
    better teacher has the highest mIoU of the teachers in `taught`. The gap lies between that teacher and a student in `alone`,
    which learns from labels only; there is no gap against another variant. If the teacher is
    not above that student, or the variant is below that student, the share has no meaning, and a note says so.
    """
    mious, rares = by_variant(table, "miou"), by_variant(table, "rare_miou")
    seconds, memory = by_variant(table, "seconds_per_step"), by_variant(table, "peak_memory_mb")
    lines = [
        "| partition | variant | runs | mIoU, % | standard deviation | against | difference [95 % interval] "
        "| rare third, % | its difference [95 % interval] | of the better teacher, % | gap to it closed, % | s a step | peak MB |",
        "|" + "---|" * 13,
    ]
    splits_of: dict[tuple[str, str], list[str]] = {}
    for row in table.to_pylist():
        if row["metric"] == "miou":
            splits_of.setdefault((row["partition"], row["variant"]), []).append(row["split"])
    undefined, no_gap = {}, False
    for key, splits in splits_of.items():
        partition, variant = key
        by_seed, reference = mious.get(key, {}), against.get(variant, "-")
        values, base = 100 * np.array(list(by_seed.values())), mious.get((partition, reference), {})
        if len(values) < len(splits):
            undefined[splits[0]] = None
        teachers = [miou for name in taught.get(variant, ()) for miou in mious.get((partition, name), {}).values()]
        better = max(teachers, default=math.nan)
        shared = [seed for seed in by_seed if seed in base]
        paired, closed = _paired(by_seed, base), "-"
        if paired is not None:
            gap = 100 * (better - np.mean([base[seed] for seed in shared]))
            if reference in alone and not math.isnan(gap):
                closed = per_cent(float(paired.mean / gap), 0) if gap > 0 else "-"
                no_gap |= closed.startswith("-")
        # Means over fewer runs cannot be compared: an older version has not measured the rare third.
        rare_by_seed, rare_base = rares.get(key, {}), rares.get((partition, reference), {})
        rare_by_seed = rare_by_seed if rare_by_seed.keys() == by_seed.keys() else {}
        rare_paired = _paired(rare_by_seed, rare_base if rare_base.keys() == base.keys() else {})
        rare_mean = f"{100 * np.mean(list(rare_by_seed.values())):.1f}" if rare_by_seed else "-"
        count = str(len(values)) if len(values) == len(splits) else f"{len(values)} of {len(splits)}"
        mean = f"{values.mean():.1f}" if len(values) else "-"
        spread = f"{values.std(ddof=1):.1f}" if len(values) > 1 else "-"
        reached = f"{values.mean() / better:.1f}" if better > 0 and len(values) else "-"
        step = f"{np.mean(list(seconds[key].values())):.3f}" if key in seconds else "-"
        peak = f"{np.mean(list(memory[key].values())):.0f}" if key in memory else "-"
        closed = "-" if closed.startswith("-") else closed
        differences = _difference_text(paired), rare_mean, _difference_text(rare_paired)
        cells = [partition, variant, count, mean, spread, reference, *differences, reached, closed, step, peak]
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"Partition {partition}, {what_is_rare(names)}." for partition, names in rare.items()]
    notes += [_NO_GAP] if no_gap else []
    notes += [f"No mIoU, and not counted among the runs: {why_undefined(split)}." for split in undefined]
    return "\n".join([*lines, "", *(line for note in notes for line in (note, "")), *_class_lines(table)]) + "\n"


def _paired(values: Mapping[int, float], base: Mapping[int, float]) -> Difference | None:
    """`paired_difference` in points over the seeds that both have; None without any."""
    shared = [seed for seed in values if seed in base]
    return paired_difference([100 * values[seed] for seed in shared], [100 * base[seed] for seed in shared]) if shared else None


def _difference_text(paired: Difference | None) -> str:
    if paired is None:
        return "-"
    interval = "" if math.isnan(paired.low) else f" [{signed(paired.low)}, {signed(paired.high)}]"
    return f"{signed(paired.mean)}{interval}"


def _class_lines(table: pa.Table) -> list[str]:
    """Mean IoU of each class over the seeds that have a number for it."""
    ious: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in table.to_pylist():
        if row["metric"] == "iou":
            ious.setdefault((row["partition"], row["variant"]), {}).setdefault(row["class"], []).append(100 * row["value"])
    names = list(dict.fromkeys(name for values in ious.values() for name in values))
    shown = " | ".join(name.replace("|", "\\|") for name in names)
    lines = [f"| partition | variant | {shown} |", "|" + "---|" * (2 + len(names))]
    for (partition, variant), values in ious.items():
        cells = [f"{np.mean(values[name]):.1f}" if name in values else "-" for name in names]
        lines.append(f"| {partition} | {variant} | {' | '.join(cells)} |")
    return lines


def plot(table: pa.Table, path: Path) -> None:
    """mIoU of each variant over the partitions: a dot for each seed, a line through the means."""
    load_matplotlib()
    from matplotlib.figure import Figure

    mious = by_variant(table, "miou")
    partitions = sorted({partition for partition, _ in mious}, key=lambda share: -int(share.split("/")[1]))
    variants = list(dict.fromkeys(variant for _, variant in mious))
    with plain_style(variants):
        figure = Figure(figsize=(3.5 + 1.5 * len(partitions), 4.5))
        axes = figure.add_subplot()
        for i, variant in enumerate(variants):
            shift = (i - (len(variants) - 1) / 2) * 0.5 / len(variants)
            at = [j for j, partition in enumerate(partitions) if (partition, variant) in mious]
            values = [100 * np.array(list(mious[partitions[j], variant].values())) for j in at]
            teacher = variant.startswith(_TEACHER)
            means, style = [v.mean() for v in values], "--" if teacher else "-"
            (line,) = axes.plot([j + shift for j in at], means, style, marker="_", markersize=12, label=variant)
            for j, points in zip(at, values, strict=True):
                axes.plot([j + shift] * len(points), points, ".", color=line.get_color(), alpha=0.7)
        axes.set_xticks(range(len(partitions)), partitions)
        axes.set_xlabel("labelled share of the training images")
        axes.set_ylabel("mIoU, %")
        if variants:
            axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes.grid(alpha=0.3)
        replace_file(path, png_of_figure(figure, dpi=130, bbox_inches="tight"))
