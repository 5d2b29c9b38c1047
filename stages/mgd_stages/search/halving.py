"""Successive halving over the length of training: many short trials, and the best third of each length goes on to the next.

Each length is a training of its own from initial weights, with its own schedule: a short training that breaks off in the middle of
a long schedule would say little about the long one. Everything here is a pure function of the trials so far.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

ETA = 3
"""One of so many trials goes on to the next length, which is so many times as long."""
FINAL_SEEDS = 3
FEW_FAILURES = 3
"""If this many trials fail before one works, the search stops."""


@dataclass(frozen=True)
class Trial:
    """One recipe, and how far it came."""

    number: int
    values: dict[str, Any]
    """Of the axes of the space by name; empty for the project's own parameters, which are trial 0."""
    scores: tuple[float, ...] = ()
    """The objective after each length that is finished, the shortest first."""
    begun: int = 1
    """How many lengths were begun."""
    failure: str | None = None
    """Why the last length that was begun has no score."""

    @property
    def unfinished(self) -> bool:
        return self.failure is None and self.begun > len(self.scores)


class Job(NamedTuple):
    trial: int
    rung: int
    """Number of the length, 0 is the shortest."""


def rungs_of(steps: int) -> tuple[int, ...]:
    """Optimiser steps of each length, the shortest first; equal lengths count once.

    >>> rungs_of(900)
    (100, 300, 900)
    """
    return tuple(sorted({max(1, round(steps / ETA**power)) for power in range(3)}))


def next_job(trials: Sequence[Trial], planned: int, rungs: int, running: Collection[int]) -> Job | None:
    """What is trained next; None where nothing can begin before something ends, or nothing is left.

    First what was begun and not finished, then a trial that goes on to a longer training, then a new trial, whose number is
    `len(trials)`. `running` are the numbers of the trials that are trained now.
    """
    for trial in trials:
        if trial.unfinished and trial.number not in running:
            return Job(trial.number, len(trial.scores))
    for rung in reversed(range(rungs - 1)):
        if (number := _promoted(trials, planned, rung)) is not None:
            return Job(number, rung + 1)
    return Job(len(trials), 0) if len(trials) < planned else None


def _promoted(trials: Sequence[Trial], planned: int, rung: int) -> int | None:
    """The best trial that goes on from a length, if one does: it is in the best third. If no further trial reaches this length, one
    goes on at least, and another one for each that failed there."""
    reached = sorted((trial for trial in trials if len(trial.scores) > rung), key=lambda trial: (-trial.scores[rung], trial.number))
    count = len(reached) // ETA
    if _closed(trials, planned, rung):
        count = max(count, 1 + sum(trial.failure is not None and trial.begun > rung + 1 for trial in reached))
    return next((trial.number for trial in reached[:count] if trial.begun == rung + 1 and trial.failure is None), None)


def _closed(trials: Sequence[Trial], planned: int, rung: int) -> bool:
    """Whether no further trial can be finished at a length."""
    if rung == 0:
        return len(trials) >= planned and not any(trial.begun == 1 and trial.unfinished for trial in trials)
    below = _closed(trials, planned, rung - 1) and _promoted(trials, planned, rung - 1) is None
    return below and not any(trial.begun == rung + 1 and trial.unfinished for trial in trials)


def winner(trials: Sequence[Trial], rungs: int) -> Trial | None:
    """The best trial of full length; of equal trials the first. None if none was finished."""
    finished = [trial for trial in trials if len(trial.scores) == rungs]
    return max(finished, key=lambda trial: (trial.scores[-1], -trial.number), default=None)


def all_failed(trials: Sequence[Trial], planned: int) -> str | None:
    """Why the last trial failed, if the first few all have."""
    failures = [trial.failure for trial in trials if trial.failure is not None]
    return failures[-1] if len(failures) >= min(FEW_FAILURES, planned) and not any(trial.scores for trial in trials) else None


def trainings(trials: int, rungs: int, begun: Sequence[int] = ()) -> list[int]:
    """How many trainings of each length so many trials need, and at least those that were `begun`. A trial that was among the best
    third for a while went on, so there may be a few more.

    >>> trainings(30, 3)
    [30, 10, 3]
    """
    counts = [trials]
    while len(counts) < rungs:
        counts.append(max(1, counts[-1] // ETA))
    return [max(pair) for pair in zip(counts, begun or counts, strict=True)]


def cost(trials: int, seconds: Sequence[float], jobs: int, begun: Sequence[int] = ()) -> float:
    """Seconds that so many trials and the final comparison take on `jobs` processes; `seconds` are of a training of each length."""
    counts = trainings(trials, len(seconds), begun)
    searching = sum(count * each for count, each in zip(counts, seconds, strict=True))
    return searching / jobs + math.ceil(2 * FINAL_SEEDS / jobs) * seconds[-1]


def affordable(budget: float, seconds: Sequence[float], jobs: int, begun: Sequence[int] = ()) -> int:
    """The largest number of trials that `cost` fits into `budget` seconds; 0 if not even one does."""
    trials = 0
    while cost(trials + 1, seconds, jobs, begun) <= budget:
        trials += 1
    return trials


def begun_of(trials: Sequence[Trial], rungs: int) -> list[int]:
    """How many trainings of each length were begun."""
    return [sum(trial.begun > rung for trial in trials) for rung in range(rungs)]


def bias_sentence(score: float, again: Sequence[float], tried: int) -> str:
    """How much too good the winner's score is, in plain words: `score` and the same recipe trained again, shares from 0 to 1."""
    mean = sum(again) / len(again)
    excess = round(100 * (score - mean), 1)
    how = f"{excess:.1f} points less" if excess > 0 else "no less"
    return (
        f"The best of {tried} trials on val is a biased number, because the best is also the luckiest: the winner had "
        f"{100 * score:.1f} % in the search, and with {len(again)} new seeds it has {100 * mean:.1f} % on average, {how}. "
        "Trust the numbers on images that the search never saw."
    )
