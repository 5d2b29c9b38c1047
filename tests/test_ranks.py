"""Several processes: they share the batch of one, and average its gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import mgd_stages.run.ranks as ranks_module
from conftest import TINY, training_set
from mgd_pipeline.errors import ParamsError
from mgd_pipeline.networks.segmentation import build_network
from mgd_pipeline.params import NetworkParams
from mgd_pipeline.training.batches import cached_targets
from mgd_pipeline.training.dataset import TrainingSet
from mgd_pipeline.training.features import with_projections
from mgd_pipeline.training.knowledge import knowledge_of
from mgd_pipeline.training.optimisation import build_optimizer, build_schedule
from mgd_pipeline.training.terms import step_terms, total_loss
from mgd_stages.run.loop import _seed
from mgd_stages.run.project import Project, open_project
from mgd_stages.run.ranks import on_ranks
from student_runs import CPU, FEATURE, distil

BATCH_OF_FOUR = [*TINY, "student.labelled_batch=4", "student.unlabelled_batch=4"]


def of_ranks(project: Project, ranks: int) -> list[TrainingSet]:
    four = open_project(project.base / "params.yaml", BATCH_OF_FOUR)
    return [replace(training_set(four), rank=rank, ranks=ranks) for rank in range(ranks)]


def test_ranks_share_the_batch_of_one(project: Project) -> None:
    (whole,) = of_ranks(project, 1)
    for ranks in (2, 4):
        for rank, part in enumerate(of_ranks(project, ranks)):
            for step in range(3):
                batch, share = whole[step], part[step]
                for all_of_it, mine in zip(batch.sources, share.sources, strict=True):
                    assert mine.rows == all_of_it.rows[rank::ranks] and mine.views == all_of_it.views[rank::ranks]
                    assert torch.equal(mine.jitter, all_of_it.jitter[rank::ranks])
                assert batch.cutmix is not None and share.cutmix is not None and len(batch.sources) == 3
                assert torch.equal(share.cutmix, batch.cutmix[rank::ranks])


@pytest.mark.parametrize(("heard", "steps"), [([], 1), (FEATURE, 2)], ids=["", "feature"])
def test_torchrun_trains_on_two_processes(project: Project, heard: list[str], steps: int) -> None:
    """gloo on the CPU: one writer, metrics averaged over the ranks, the same student again; gradients are averaged over the ranks,
    also of the projections of the feature term."""
    settings = [*BATCH_OF_FOUR, *heard, f"student.steps={steps}", "student.optimizer=sgd", "student.learning_rate=0.05"]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mgd_stages.cli"),
        *("train-student", "--device", "cpu", "--no-resume", "--config", str(project.base / "params.yaml")),
        *(part for override in settings for part in ("--set", override)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("student distilled ->") == 1
    logged = (project.results / "train-student-distilled/plots/loss.tsv").read_text().splitlines()[1]

    params, parts = open_project(project.base / "params.yaml", settings).params, of_ranks(project, 2)
    knowledge = knowledge_of(params, parts[0].manifest, parts[0].open_caches(), CPU)
    torch.manual_seed(params.seed)
    trained = with_projections(build_network(params.student.network, 9), knowledge.features, params.targets.region_stride)
    optimizer, losses = build_optimizer(trained, params.student), []
    schedule = build_schedule(optimizer, params.student)
    for step in range(steps):
        losses = []
        for rank, part in enumerate(parts):
            torch.manual_seed(_seed(params.seed, step, rank))
            targets = partial(cached_targets, losses=params.losses)
            loss = total_loss(step_terms(trained, part[step], targets, params, knowledge), params.losses)
            (loss / 2).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert losses[0] != losses[1]
    assert float(logged.split("\t")[1]) == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_batchnorm_of_several_gpus_keeps_its_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's BatchNorm has an activation inside, which torch's own conversion drops without a word."""
    monkeypatch.setattr(ranks_module, "DistributedDataParallel", lambda network: network)
    network = build_network(NetworkParams(encoder="tu-test_efficientnet", decoder_channels=16), 4, initialise=False).eval()
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = network(pixels).logits
        synchronised: Any = on_ranks(network, torch.device("cuda"), 2, compiled=False)
        assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in synchronised.modules())
        assert torch.equal(synchronised(pixels).logits, expected)


def test_two_backward_passes_are_refused_where_they_would_be_wrong(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    dot = ["student.optimizer=sgd", "student.distillation_momentum=0.075", "student.labelled_batch=4", "student.unlabelled_batch=4"]
    two_momenta = open_project(project.base / "params.yaml", [*TINY, *dot])
    with pytest.raises(ParamsError, match=r"student\.distillation_momentum: .*leave --compile out"):
        distil(two_momenta, compiled=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ParamsError, match=r"student\.distillation_momentum: .*call the command without torchrun"):
        distil(two_momenta)


def test_batches_that_cannot_be_shared_out_are_refused(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ParamsError, match=r"student\.labelled_batch is 2: must be a multiple of the 2 processes, two images each"):
        distil(project)
