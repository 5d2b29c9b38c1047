"""For the fork server of a study: where a training of the student saves its state, the process that KILLED names is killed.

The server imports this module beside the stages, and its forks inherit the change.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import Any

from mgd_pipeline.training.checkpoint import TrainingCheckpoint

_save = TrainingCheckpoint.save


def _save_and_kill(self: TrainingCheckpoint, *state: Any) -> None:
    _save(self, *state)
    if self.folder.name != "train-student-distilled":
        return
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    os.kill(parent.pid if os.environ["KILLED"] == "study" else os.getpid(), signal.SIGKILL)
    signal.pause()  # it ends with its parent


TrainingCheckpoint.save = _save_and_kill  # pyright: ignore[reportAttributeAccessIssue]
