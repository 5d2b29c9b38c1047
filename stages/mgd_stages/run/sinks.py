"""Where a training's metrics go besides DVC's files, on request: TensorBoard, Weights & Biases, MLflow.

Each is one function log(step, values). Its library is imported only on request.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Literal

from mgd_pipeline.errors import ParamsError
from mgd_stages.run.progress import Log
from mgd_stages.run.project import Project

SinkName = Literal["tensorboard", "wandb", "mlflow"]


@contextmanager
def open_sink(name: SinkName | None, project: Project, run: str) -> Iterator[Log | None]:
    """The log function of a sink for one run, such as train-student-distilled, with the project's parameters.

    Raises ParamsError if the sink is not installed. A resumed run logs the steps since its checkpoint again, with the same values.
    """
    if name is None:
        yield None
        return
    opened = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}[name](project, run)
    with ExitStack() as closing:
        try:
            log = closing.enter_context(opened)
        except ModuleNotFoundError as error:
            raise ParamsError(f"--log-to {name}: {error}; pip install 'mgd-pipeline[{name}]'") from None
        yield log


@contextmanager
def _tensorboard(project: Project, run: str) -> Iterator[Log]:
    """Event files below .mgd/tensorboard: `tensorboard --logdir .mgd/tensorboard`."""
    writer = import_module("torch.utils.tensorboard").SummaryWriter(str(project.base / ".mgd/tensorboard" / run))

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    try:
        yield log
    finally:
        writer.close()


@contextmanager
def _wandb(project: Project, run: str) -> Iterator[Log]:
    """A run of the W&B project that the environment names (WANDB_PROJECT), or mgd-pipeline; its files lie below .mgd/wandb."""
    wandb = import_module("wandb")
    folder = project.base / ".mgd"
    folder.mkdir(exist_ok=True)
    where = os.environ.get("WANDB_PROJECT", "mgd-pipeline")
    with wandb.init(project=where, name=run, dir=str(folder), config=project.params.model_dump(mode="json")) as started:
        yield lambda step, values: started.log(dict(values), step=step)


@contextmanager
def _mlflow(project: Project, run: str) -> Iterator[Log]:
    """A run on the tracking server that the environment names (MLFLOW_TRACKING_URI)."""
    mlflow = import_module("mlflow")
    with mlflow.start_run(run_name=run):
        mlflow.log_dict(project.params.model_dump(mode="json"), "params.yaml")
        yield lambda step, values: mlflow.log_metrics(dict(values), step=step)
