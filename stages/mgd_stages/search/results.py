"""The results of a search: a tidy Parquet file, the final comparison, and a page."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import Environment, PackageLoader, StrictUndefined

from mgd_pipeline.durable import replace_file
from mgd_pipeline.pictures.drawing import load_matplotlib, plain_style, png_of_figure
from mgd_pipeline.tables import parquet_bytes
from mgd_pipeline.words import counted, listed, per_cent, signed
from mgd_stages.projects.presets import yaml_value
from mgd_stages.run.progress import console
from mgd_stages.search.halving import Job, Trial, begun_of, bias_sentence
from mgd_stages.search.run import Outcome, name_of
from mgd_stages.search.space import choice_text
from mgd_stages.search.trials import STUDENTS, as_run, importances, score_of, told_values
from mgd_stages.study.matrix import Run
from mgd_stages.study.results import Difference, by_variant, collect, markdown, paired_difference, rare_of_partitions

OWN = name_of(0)


def write_search_results(outcome: Outcome) -> None:
    """Writes results.parquet and search.html, and prints the final comparison."""
    folder, table = outcome.search.folder, table_of(outcome)
    replace_file(folder / "results.parquet", parquet_bytes(table))
    content = page_content(outcome, table)
    replace_file(folder / "search.html", render(content).encode())
    for line in content["sentences"]:
        console.print(line)
    for split, text in comparison_tables(outcome, table).items():
        console.print(f"final comparison on {split}:\n{text}")
    console.print("  ".join(str(folder / name) for name in ("best.yaml", "results.parquet", "search.html")))
    if students := outcome.best.values.get(STUDENTS):
        console.print(
            f"best.yaml has {counted(len(students), 'teacher')} made of a student of this search, {listed(students)}; once it is "
            "params.yaml, run `mgd-pipeline precompute-teachers` before train-student"
        )


def final_runs(outcome: Outcome) -> list[Run]:
    """The measured trainings of the final comparison, on val and on test."""
    runs = []
    for number in outcome.finals:
        for seed in outcome.seeds:
            folder = outcome.search.of_final(number, seed)
            if (folder / "measured.json").exists():
                runs += [as_run(place, name_of(number), outcome.search, seed) for place in (folder, folder / "test")]
    return runs


def table_of(outcome: Outcome) -> pa.Table:
    """The numbers of all trainings in the columns of a study's results, and `steps`, `final` and `settings`, which is JSON."""
    search, parts = outcome.search, []
    values = {name_of(trial.number): search.changes(trial.values) | _taught(trial) for trial in outcome.trials}
    for rung, steps in enumerate(search.rungs):
        runs = [
            as_run(search.of_job(Job(trial.number, rung)), name_of(trial.number), search, search.base.seed)
            for trial in outcome.trials
            if len(trial.scores) > rung
        ]
        parts.append(_with_columns(collect(runs), steps, False, values))
    parts.append(_with_columns(collect(final_runs(outcome)), search.rungs[-1], True, values))
    return pa.concat_tables(parts)


def _taught(trial: Trial) -> dict[str, Any]:
    return {STUDENTS: trial.values[STUDENTS]} if STUDENTS in trial.values else {}


def _with_columns(table: pa.Table, steps: int, final: bool, values: dict[str, dict[str, Any]]) -> pa.Table:
    settings = [json.dumps(values[name], sort_keys=True, allow_nan=False) for name in table["variant"].to_pylist()]
    for name, column in (
        ("steps", pa.array([steps] * len(table), pa.int64())),
        ("final", pa.array([final] * len(table), pa.bool_())),
        ("settings", pa.array(settings, pa.string())),
    ):
        table = table.append_column(name, column)
    return table


def _finals(table: pa.Table, split: str) -> pa.Table:
    """The rows of the final comparison on one split, in the columns of a study's results."""
    rows = [row for row in table.to_pylist() if row["final"] and row["split"] == split]
    known = [name for name in table.column_names if name not in ("steps", "final", "settings")]
    return pa.Table.from_pylist(rows, schema=table.select(known).schema)


def comparison_tables(outcome: Outcome, table: pa.Table) -> dict[str, str]:
    """Markdown of the final comparison by split, with paired differences from the project's own parameters."""
    against, rare = {name_of(number): OWN for number in outcome.finals if number}, rare_of_partitions(final_runs(outcome))
    return {split: markdown(_finals(table, split), against, (), {}, rare) for split in ("val", "test")}


def differences(outcome: Outcome, table: pa.Table, metric: str = "miou") -> dict[str, Difference | None]:
    """The winner's metric less that of the project's own parameters, shares from 0 to 1, by split; None without pairs."""
    partition, name, of_split = str(outcome.search.base.data.partition), name_of(outcome.best.number), {}
    for split in ("val", "test"):
        values = by_variant(_finals(table, split), metric)
        best, own = (values.get((partition, key), {}) for key in (name, OWN))
        shared = [seed for seed in best if seed in own]
        pairs = [best[seed] for seed in shared], [own[seed] for seed in shared]
        of_split[split] = paired_difference(*pairs) if shared and outcome.best.number else None
    return of_split


def sentences(outcome: Outcome, table: pa.Table) -> list[str]:
    """What came out, in plain words; the most important one first."""
    lines, unseen = [], _unseen(outcome)
    gain = differences(outcome, table)["test"]
    if outcome.best.number == 0:
        lines.append("No trial was better on val than the project's own parameters; best.yaml holds these.")
    elif gain is None:
        lines.append("The final comparison has no pair of measured students, so nothing says whether the winner is better.")
    else:
        verdict = "better" if gain.low > 0 else "worse" if gain.high < 0 else "not told apart from them by so few runs"
        lines.append(
            f"On {unseen}, trial {outcome.best.number} has {_gain_text(gain)} points of mIoU against the project's own parameters "
            f"(95 % interval over {len(outcome.seeds)} new seeds): it is {verdict}."
        )
        if (rare := differences(outcome, table, "rare_miou")["test"]) is not None:
            lines.append(f"There the rare third of the classes has {_gain_text(rare)} points.")
    measured = [outcome.search.of_final(outcome.best.number, seed) for seed in outcome.seeds]
    again = [score_of(folder, outcome.search.objective) for folder in measured if (folder / "measured.json").exists()]
    if known := [score for score in again if score is not None]:
        tried = sum(bool(trial.scores) for trial in outcome.trials)
        lines.append(bias_sentence(outcome.best.scores[-1], known, tried))
    if failed := [trial for trial in outcome.trials if trial.failure]:
        lines.append(f"{counted(len(failed), 'trial')} failed; the table of trials says why.")
    return lines


def _unseen(outcome: Outcome) -> str:
    return f"{counted(len(outcome.held_back), 'image')} of val that no trial saw" if outcome.held_back else "the test split"


def page_content(outcome: Outcome, table: pa.Table) -> dict[str, Any]:
    """All that the page shows, by the names that its template has for it."""
    search, share = outcome.search, importances(outcome.search, outcome.trials)
    best = {**search.changes(outcome.best.values), **_taught(outcome.best)}
    return {
        "name": search.base.data.dataset,
        "best": outcome.best.number,
        "sentences": sentences(outcome, table),
        "objective": search.objective,
        "rungs": search.rungs,
        "shortest": counted(search.rungs[0], "step"),
        "lengths": list(zip(begun_of(outcome.trials, len(search.rungs)), search.rungs, strict=True)),
        "unseen": _unseen(outcome),
        "settings": [(key, yaml_value(value)) for key, value in best.items()],
        "finals": _final_rows(outcome, table),
        "seeds": outcome.seeds,
        "history": _picture(_draw_history, outcome.trials, search.rungs),
        "parallel": _picture(_draw_parallel, outcome) if len(outcome.trials) > 1 else None,
        "importances": [(name, f"{100 * value:.0f}") for name, value in sorted(share.items(), key=lambda pair: -pair[1])],
        "trials": [_trial_row(trial, outcome) for trial in sorted(outcome.trials, key=_rank)],
        "failures": outcome.failures,
    }


def _rank(trial: Trial) -> tuple[float, ...]:
    return (-len(trial.scores), -trial.scores[-1] if trial.scores else 0.0, trial.number)


def _trial_row(trial: Trial, outcome: Outcome) -> dict[str, Any]:
    scores = [per_cent(score) for score in trial.scores]
    changed = {**outcome.search.changes(trial.values), **_taught(trial)}
    return {
        "number": trial.number,
        "scores": scores + ["–"] * (len(outcome.search.rungs) - len(scores)),
        "settings": ", ".join(f"{key}: {yaml_value(value)}" for key, value in changed.items()) or OWN,
        "failure": trial.failure,
    }


def _final_rows(outcome: Outcome, table: pa.Table) -> list[dict[str, Any]]:
    rows, gains = [], {metric: differences(outcome, table, metric) for metric in ("miou", "rare_miou")}
    for split in ("val", "test"):
        for number in outcome.finals:
            key = str(outcome.search.base.data.partition), name_of(number)
            values = {metric: list(by_variant(_finals(table, split), metric).get(key, {}).values()) for metric in gains}
            row = {"split": "held back" if split == "test" and outcome.held_back else split, "name": name_of(number)}
            row["values"] = ", ".join(per_cent(value) for value in values["miou"]) or "–"
            for metric, of_split in gains.items():
                row[metric] = per_cent(float(np.mean(values[metric]))) if values[metric] else "–"
                row[f"{metric}_gain"] = _gain_text(of_split[split] if number else None)
            rows.append(row)
    return rows


def _gain_text(gain: Difference | None) -> str:
    if gain is None:
        return "–"
    interval = "" if np.isnan(gain.low) else f" [{signed(100 * gain.low)}, {signed(100 * gain.high)}]"
    return f"{signed(100 * gain.mean)}{interval}"


def _picture(draw: Any, *arguments: Any) -> str:
    """A figure as the address of its bytes, so that the page needs no other file."""
    return "data:image/png;base64," + base64.b64encode(draw(*arguments)).decode()


def _draw_history(trials: Sequence[Trial], rungs: Sequence[int]) -> bytes:
    """The objective of each trial at each length, and the best of the longest so far."""
    load_matplotlib()
    from matplotlib.figure import Figure

    with plain_style(()):
        figure = Figure(figsize=(8, 3.6))
        axes = figure.add_subplot()
        for rung, steps in enumerate(rungs):
            reached = [trial for trial in trials if len(trial.scores) > rung]
            x, y = [trial.number for trial in reached], [100 * trial.scores[rung] for trial in reached]
            axes.plot(x, y, "ov^"[rung % 3], color=f"C{rung}", alpha=0.8, label=counted(steps, "step"))
            if x and rung == len(rungs) - 1:
                axes.step(x, np.maximum.accumulate(y), where="post", color=f"C{rung}", alpha=0.5)
        axes.set_xlabel("trial")
        axes.set_ylabel("objective on val, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        return png_of_figure(figure, dpi=110, bbox_inches="tight")


def _draw_parallel(outcome: Outcome) -> bytes:
    """A line for each trial through its settings, coloured by its objective after the shortest training."""
    load_matplotlib()
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    space = outcome.search.space
    scored = sorted((trial for trial in outcome.trials if trial.scores), key=lambda trial: trial.scores[0])
    names = [axis.name.replace(", ", ",\n") for axis in space]
    with plain_style(names):
        figure = Figure(figsize=(max(8, 0.95 * len(space)), 4.2))
        axes = figure.add_subplot()
        scores = [100 * trial.scores[0] for trial in scored]
        scale = Normalize(min(scores, default=0), max(scores, default=1))
        for trial, score in zip(scored, scores, strict=True):
            told = told_values(outcome.search, trial)
            points = [(at, _height(axis, told[axis.name])) for at, axis in enumerate(space) if axis.name in told]
            won = trial.number == outcome.best.number
            colour = colormaps["viridis"](scale(score))
            axes.plot(*zip(*points, strict=True), "-", color="C3" if won else colour, linewidth=2.5 if won else 1.0, alpha=0.9)
        for at, axis in enumerate(space):
            axes.axvline(at, color="0.8", linewidth=0.8, zorder=0)
            marks = [(place / max(1, len(axis.choices) - 1), yaml_value(one)) for place, one in enumerate(axis.choices)]
            for height, text in marks or [(0.0, f"{axis.low:g}"), (1.0, f"{axis.high:g}")]:
                axes.text(at + 0.04, height, text, fontsize=6, va="center")
        axes.set_xticks(range(len(space)), names, rotation=35, ha="right", fontsize=8)
        axes.set_yticks([])
        axes.set_xlim(-0.2, len(space) - 0.3)
        figure.colorbar(ScalarMappable(scale, "viridis"), ax=axes, label="objective after the shortest training, %")
        return png_of_figure(figure, dpi=110, bbox_inches="tight")


def _height(axis: Any, value: Any) -> float:
    """Where a value stands on its axis, 0 to 1."""
    if axis.choices:
        return [choice_text(one) for one in axis.choices].index(value) / (len(axis.choices) - 1)
    low, high, at = (np.log(one) if axis.log else one for one in (axis.low, axis.high, value))
    return float((at - low) / (high - low))


def render(content: dict[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("mgd_stages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("search.html").render(**content)
