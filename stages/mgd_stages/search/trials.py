"""The trials of a search on the disk, and which recipe is tried next.

    <output>/
      space.yaml  search.json   what may change; what this search is
      manifest/  targets/       of all trials: val without what is held back; links to the project's teacher caches
      trials/0007/trial.json    what trial 7 changes
      trials/0007/300/          a project: trial 7 trained for 300 steps
      final/trial-0007/4/       a project: trial 7 at full length with seed 4; test/ below it is measured on test
      best.yaml  results.parquet  search.html
      teachers/trial-0007.safetensors   with --self-teach: a student that taught the winner

Each project is an ordinary one: its params.yaml says what it was, and each stage can be called in it by hand. The folders are the
only record. Optuna hears of them anew for each proposal, so that a search that is killed loses nothing and counts nothing twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mgd_pipeline.durable import replace_file
from mgd_pipeline.errors import DataError, MGDError, ParamsError
from mgd_pipeline.params import Params
from mgd_pipeline.params_file import change_params
from mgd_pipeline.words import defined
from mgd_stages.projects.presets import render_params
from mgd_stages.run.class_tables import read_numbers
from mgd_stages.run.progress import write_json
from mgd_stages.run.verdicts import why_undefined
from mgd_stages.search.halving import Job, Trial
from mgd_stages.search.space import Axis, Space, choice_text
from mgd_stages.study.matrix import Run, link_folder
from mgd_stages.study.variants import Variant

Objective = Literal["miou", "miou+rare"]
STUDENTS = "students"
"""What a trial notes under this name: earlier students that teach it."""
_STARTUP = 10
"""Trials that are drawn at random before Optuna models them."""
_DRAWS = 100
"""So often a recipe is drawn anew whose settings contradict each other."""


@dataclass(frozen=True)
class Search:
    """What is searched, and where."""

    folder: Path
    """Absolute."""
    base: Params
    """Of trial 0: the project's own, with absolute paths, measured on val."""
    space: Space
    rungs: tuple[int, ...]
    """Optimiser steps of each length, the shortest first."""
    objective: Objective

    def of_trial(self, number: int) -> Path:
        return self.folder / f"trials/{number:04d}"

    def of_job(self, job: Job) -> Path:
        return self.of_trial(job.trial) / str(self.rungs[job.rung])

    def of_final(self, number: int, seed: int) -> Path:
        return self.folder / f"final/trial-{number:04d}/{seed}"

    def changes(self, values: dict[str, Any]) -> dict[str, Any]:
        """What a trial sets, by the keys of params.yaml."""
        axes = {axis.name: axis for axis in self.space}
        return {key: value for name, one in values.items() if name in axes for key, value in axes[name].settings(one).items()}

    def parameters(self, values: dict[str, Any], steps: int, seed: int) -> Params:
        """Raises ParamsError for values that contradict each other."""
        settings = {**self.changes(values), "student.steps": steps, "seed": seed}
        params, source = self.base, "trial"
        if students := values.get(STUDENTS):
            listened = settings.get("losses.pixel_teachers", self.base.losses.pixel_teachers)
            settings["losses.pixel_teachers"] = [*listened, *students]
            params = change_params(params, {f"teachers.{name}": student_teacher(self, name) for name in students}, source)
        return change_params(params, settings, source)


def student_teacher(search: Search, name: str) -> dict[str, Any]:
    """The section of params.yaml that makes a teacher of a trial's student of full length; `name` is such as trial-0007."""
    folder = search.of_job(Job(int(name.removeprefix("trial-")), len(search.rungs) - 1))
    network = search.base.student.network.model_dump()
    return {**network, "encoder_weights": "none", "weights": str(folder / "data/students/distilled/student.safetensors")}


def make_project(search: Search, folder: Path, params: Params) -> None:
    """Writes the project of one training: params.yaml last, so that a training has begun where it is."""
    for name in ("manifest", "targets"):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        link_folder(search.folder / name, folder / "data" / name)
    path = folder / "params.yaml"
    if not path.exists():
        replace_file(path, render_params(params).encode())


def as_run(folder: Path, name: str, search: Search, seed: int) -> Run:
    """A training as the results of studies know it."""
    return Run(str(search.base.data.partition), Variant(name), seed, folder, folder, folder)


def write_failure(folder: Path, reason: str) -> None:
    write_json(folder / "failed.json", {"reason": " ".join(reason.split())})


def failure_of(folder: Path) -> str | None:
    return (read_numbers(folder / "failed.json") or {}).get("reason")


def read_trials(search: Search) -> list[Trial]:
    """All trials so far by number. Raises DataError for a file that is not what a search wrote."""
    trials = []
    while (note := search.of_trial(len(trials)) / "trial.json").exists():
        trials.append(_read_trial(search, len(trials), (read_numbers(note) or {})))
    return trials


def _read_trial(search: Search, number: int, values: dict[str, Any]) -> Trial:
    scores, begun, failure = [], 1, None
    for rung in range(len(search.rungs)):
        folder = search.of_job(Job(number, rung))
        if rung and not (folder / "params.yaml").exists() and not (folder / "failed.json").exists():
            break
        begun = rung + 1
        if failure := failure_of(folder):
            break
        if not as_run(folder, "trial", search, search.base.seed).finished:
            break
        score = score_of(folder, search.objective)
        if score is None:
            failure = f"{folder}: no score, because {why_undefined('val')}"
            break
        scores.append(score)
    return Trial(number, values, tuple(scores), begun, failure)


def score_of(folder: Path, objective: Objective) -> float | None:
    """The objective of a finished training, 0 to 1; None if it is undefined.

    Raises DataError where the evaluation lacks the rare third of the classes and the objective needs it.
    """
    path = folder / "data/results/evaluation/metrics.json"
    numbers = (read_numbers(path) or {}).get("distilled", {})
    parts = [numbers.get("miou")]
    if objective == "miou+rare":
        if "rare_miou" not in numbers:
            raise DataError(f"{path}: has no rare_miou, which --objective miou+rare needs; choose --objective miou")
        parts.append(numbers["rare_miou"])
    known = [value for value in map(defined, parts) if value is not None]
    return sum(known) / len(known) if len(known) == len(parts) else None


def seconds_of(search: Search, trials: Sequence[Trial]) -> list[float] | None:
    """Mean seconds of a training of each length; where none is finished, in proportion to the steps. None before the first."""
    taken: dict[int, list[float]] = {}
    for trial in trials:
        for rung in range(len(trial.scores)):
            numbers = read_numbers(search.of_job(Job(trial.number, rung)) / "data/results/run.json") or {}
            taken.setdefault(rung, []).append(float(numbers.get("seconds", 0.0)))
    means = {rung: sum(values) / len(values) for rung, values in taken.items()}
    if not any(means.values()):
        return None
    steps, longest = search.rungs, max(means)
    return [means.get(rung, means[longest] * steps[rung] / steps[longest]) for rung in range(len(steps))]


def load_optuna() -> Any:
    """The module, which prints nothing below a warning. Raises MGDError with the command that installs it."""
    try:
        import optuna
    except ImportError:
        raise MGDError("search needs Optuna, which is not installed; run `pip install 'mgd-pipeline[search]'`") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def propose(search: Search, trials: Sequence[Trial], students: Sequence[str]) -> dict[str, Any]:
    """What the next trial changes. It depends on the seed, the trials so far and nothing else.

    Trial 0 changes nothing: the project's own parameters are one of the trials. `students` may teach the new trial. A recipe whose
    settings contradict each other, such as three pixel_teachers and the weight agreement, is drawn again. Raises ParamsError if no
    recipe can be.
    """
    if not trials:
        return {}
    optuna = load_optuna()
    axes = {axis.name: axis for axis in search.space}
    distributions = {name: _distribution(optuna, axis) for name, axis in axes.items()}
    # Trials that run now count as poor, so that processes beside each other try different things.
    seed = int(np.random.SeedSequence([search.base.seed, len(trials)]).generate_state(1)[0])
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP, constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.add_trials([_told(optuna, search, trial, distributions, bool(students)) for trial in trials])
    asked = {**distributions, **({STUDENTS: _slots(optuna)} if students else {})}
    contradiction = ""
    for _ in range(_DRAWS):
        trial = study.ask(asked)
        values = _values(axes, trial.params, students)
        try:
            search.parameters(values, search.rungs[0], search.base.seed)
        except ParamsError as error:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            contradiction = " ".join(str(error).removeprefix("trial: ").split())
        else:
            return values
    raise ParamsError(
        f"{search.folder}: {_DRAWS} recipes were drawn from the space, and each contradicts itself; change the space, and choose "
        f"another --output; the last recipe: {contradiction}"
    )


def _values(axes: Mapping[str, Axis], chosen: Mapping[str, Any], students: Sequence[str]) -> dict[str, Any]:
    """What a trial changes, of what Optuna chose."""
    values = {
        name: json.loads(value) if axes[name].choices else _short(axes[name], value)
        for name, value in chosen.items()
        if name in axes
    }
    if teaching := [students[int(slot)] for slot in chosen.get(STUDENTS, "") if int(slot) < len(students)]:
        values[STUDENTS] = teaching
    return values


def _short(axis: Axis, value: float) -> float:
    """A number of a range as a person would write it, in four digits."""
    return value if axis.whole else min(axis.high, max(axis.low, float(f"{value:.4g}")))


def _slots(optuna: Any) -> Any:
    """Which of at most two students teach: Optuna's choices must be the same for all trials."""
    return optuna.distributions.CategoricalDistribution(("", "0", "1", "01"))


def _distribution(optuna: Any, axis: Axis) -> Any:
    known = optuna.distributions
    if axis.choices:
        return known.CategoricalDistribution(tuple(choice_text(choice) for choice in axis.choices))
    if axis.whole:
        return known.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return known.FloatDistribution(float(axis.low), float(axis.high), log=axis.log)


def told_values(search: Search, trial: Trial) -> dict[str, Any]:
    """The values of a trial as Optuna knows them, without those outside of the space; trial 0 has the project's own."""
    values = {axis.name: trial.values.get(axis.name, axis.value_of(search.base)) for axis in search.space}
    return {
        axis.name: choice_text(values[axis.name]) if axis.choices else values[axis.name]
        for axis in search.space
        if axis.has(values[axis.name])
    }


def _told(optuna: Any, search: Search, trial: Trial, distributions: dict[str, Any], with_students: bool) -> Any:
    """A trial as Optuna has it: complete at full length, else pruned after the longest training that was finished. A failed trial
    is pruned after nothing, which ranks it last."""
    states, values = optuna.trial.TrialState, told_values(search, trial)
    known = {name: distributions[name] for name in values}
    if with_students:
        names = {name: str(slot) for slot, name in enumerate(slot_names(search.folder))}
        values[STUDENTS] = "".join(sorted(names[name] for name in trial.values.get(STUDENTS, ()) if name in names))
        known[STUDENTS] = _slots(optuna)
    if trial.failure is not None:
        return optuna.trial.create_trial(state=states.PRUNED, params=values, distributions=known)
    reached = {search.rungs[rung]: score for rung, score in enumerate(trial.scores)}
    if len(reached) == len(search.rungs):
        state, value = states.COMPLETE, trial.scores[-1]
    else:
        state, value = (states.RUNNING if trial.unfinished else states.PRUNED), None
    return optuna.trial.create_trial(state=state, value=value, params=values, distributions=known, intermediate_values=reached)


def slot_names(folder: Path) -> list[str]:
    """The students that may teach, in the order in which they became teachers."""
    return list((read_numbers(folder / "students.json") or {}).get("students", ()))


def importances(search: Search, trials: Sequence[Trial]) -> dict[str, float]:
    """Share of each axis in the differences between the shortest trainings, which all trials have; empty for too few trials.

    By PED-ANOVA, which compares the better trials with all trials.
    """
    optuna = load_optuna()
    distributions = {axis.name: _distribution(optuna, axis) for axis in search.space}
    told = [
        (values, trial.scores[0])
        for trial in trials
        if trial.scores and len(values := told_values(search, trial)) == len(search.space)
    ]
    if len(told) < _STARTUP or len({score for _, score in told}) < 2:
        return {}
    study = optuna.create_study(direction="maximize")
    study.add_trials([optuna.trial.create_trial(value=score, params=values, distributions=distributions) for values, score in told])
    return dict(optuna.importance.get_param_importances(study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()))
