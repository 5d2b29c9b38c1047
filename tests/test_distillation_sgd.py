"""SGD with two momenta: exactly SGD where they are equal, by hand where they are not, and as the student's training calls it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import TINY
from mgd_pipeline.errors import ParamsError
from mgd_pipeline.params_file import override_params
from mgd_pipeline.training import DistillationSGD
from mgd_pipeline.training.optimisation import StepLoss, backward, build_optimizer
from mgd_stages.run.project import Project, open_project
from mgd_stages.study.variants import named_variants

SGD = [*TINY, "student.optimizer=sgd", "student.learning_rate=0.01"]


def weights(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(2, 3, generator=generator).requires_grad_() for _ in range(count)]


def in_groups(some: list[Tensor]) -> list[dict[str, Any]]:
    return [{"params": some[:2], "weight_decay": 0.02}, {"params": some[2:], "lr": 0.03}]


def take(optimizer: DistillationSGD, some: list[Tensor], distillation: list[Tensor | None], task: list[Tensor | None]) -> None:
    for w, gradient in zip(some, distillation, strict=True):
        w.grad = None if gradient is None else gradient.clone()
    optimizer.step_distillation()
    assert all(w.grad is None for w in some)
    for w, gradient in zip(some, task, strict=True):
        w.grad = None if gradient is None else gradient.clone()
    optimizer.step()


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    momentum=st.floats(0, 0.99),
    missing=st.lists(
        st.lists(st.sampled_from(["both", "task", "distillation", "none"]), min_size=3, max_size=3), min_size=2, max_size=8
    ),
)
def test_without_a_difference_it_is_sgd_on_the_sum(seed: int, momentum: float, missing: list[list[str]]) -> None:
    """Over several steps with a schedule, two groups, and parameters that have one gradient, both or none."""
    generator, ours, theirs = torch.Generator().manual_seed(seed), weights(), weights()
    dot = DistillationSGD(in_groups(ours), lr=0.1, momentum=momentum, distillation_momentum=0.0)
    sgd = torch.optim.SGD(in_groups(theirs), lr=0.1, momentum=momentum)
    schedules = [torch.optim.lr_scheduler.PolynomialLR(one, total_iters=10, power=0.9) for one in (dot, sgd)]
    for kinds in missing:
        gradients = [torch.randn(2, 2, 3, generator=generator) for _ in kinds]
        distillation = [g[0] if kind in ("both", "distillation") else None for kind, g in zip(kinds, gradients, strict=True)]
        task = [g[1] if kind in ("both", "task") else None for kind, g in zip(kinds, gradients, strict=True)]
        take(dot, ours, distillation, task)
        for w, one, other in zip(theirs, distillation, task, strict=True):
            there = [gradient for gradient in (one, other) if gradient is not None]
            w.grad = torch.stack(there).sum(0) if there else None
        sgd.step()
        for schedule in schedules:
            schedule.step()
        for w, expected in zip(ours, theirs, strict=True):
            assert torch.allclose(w, expected, rtol=1e-6, atol=1e-6)


def test_two_steps_by_hand() -> None:
    """momentum 0.5 - 0.25 and 0.5 + 0.25, weight decay in the part of the task; the second parameter learns from teachers alone."""
    both, alone = torch.tensor([1.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    optimizer = DistillationSGD([both, alone], lr=0.1, momentum=0.5, distillation_momentum=0.25, weight_decay=0.1)
    one, two = torch.tensor([1.0]), torch.tensor([2.0])
    take(optimizer, [both, alone], [two, two], [one, None])
    # v_task = 1 + 0.1, v_distillation = 2: 1 - 0.1 * 3.1
    assert both.item() == pytest.approx(0.69) and alone.item() == pytest.approx(1 - 0.1 * 2.1)
    take(optimizer, [both, alone], [two, two], [one, None])
    # v_task = 0.25 * 1.1 + 1 + 0.069, v_distillation = 0.75 * 2 + 2; alone: 0.5 * 2.1 + 2 + 0.079
    assert both.item() == pytest.approx(0.69 - 0.1 * (1.344 + 3.5))
    assert alone.item() == pytest.approx(0.79 - 0.1 * 3.129)


def test_both_buffers_are_in_the_state() -> None:
    """A step that is taken after a restart is the step without one; without a buffer it is another."""
    ours, gradients = weights(), [[torch.full((2, 3), float(i + part)) for i in range(3)] for part in range(2)]
    optimizer = DistillationSGD(in_groups(ours), lr=0.1)
    take(optimizer, ours, gradients[0], gradients[1])  # type: ignore[arg-type]
    state = copy.deepcopy(optimizer.state_dict())
    before = [w.detach().clone() for w in ours]
    take(optimizer, ours, gradients[0], gradients[1])  # type: ignore[arg-type]
    for forgotten in (None, "task_buffer", "distillation_buffer"):
        again = [w.clone().requires_grad_() for w in before]
        restarted = DistillationSGD(in_groups(again), lr=0.1)
        kept = {i: {name: v for name, v in buffers.items() if name != forgotten} for i, buffers in state["state"].items()}
        restarted.load_state_dict({**state, "state": kept})
        take(restarted, again, gradients[0], gradients[1])  # type: ignore[arg-type]
        assert all(torch.equal(*pair) for pair in zip(again, ours, strict=True)) == (forgotten is None), forgotten


def test_a_step_of_a_network_has_two_backward_passes(project: Project) -> None:
    """The parts of the loss reach their buffers; a loss without parts is a task."""
    params = open_project(project.base / "params.yaml", [*SGD, "student.distillation_momentum=0.05"]).params.student
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = build_optimizer(network, params)
    assert isinstance(optimizer, DistillationSGD) and [group["weight_decay"] for group in optimizer.param_groups] == [
        params.weight_decay,
        0,
    ]
    out = network(torch.ones(5, 3))
    distillation, task = out[:, 0].square().mean(), out[:, 1].square().mean()
    expected = [torch.autograd.grad(part, [*network.parameters()], retain_graph=True) for part in (distillation, task)]
    backward(StepLoss(distillation + task, {}, (distillation, task)), optimizer)
    before = [w.detach().clone() for w in network.parameters()]
    optimizer.step()
    for i, w in enumerate(network.parameters()):
        assert torch.allclose(optimizer.state[w]["distillation_buffer"], expected[0][i])
        assert torch.allclose(optimizer.state[w]["task_buffer"], expected[1][i] + (w.dim() > 1) * params.weight_decay * before[i])
    backward(StepLoss(network(torch.ones(5, 3)).sum(), {}), optimizer)
    assert all(w.grad is not None for w in network.parameters())


def steady(some: list[Tensor], optimizer: torch.optim.Optimizer, k: float) -> float:
    """How far a weight moves in a step in the end, if distillation pulls with k times 1 and the task with 1 the other way."""
    before = some[0].item()
    for _ in range(600):
        before = some[0].item()
        if isinstance(optimizer, DistillationSGD):
            take(optimizer, some, [torch.full((1,), k)], [torch.full((1,), -1.0)])
        else:
            some[0].grad = torch.full((1,), k - 1.0)
            optimizer.step()
    return some[0].item() - before


def test_the_control_moves_as_the_two_momenta_do_in_the_steady_state(project: Project) -> None:
    params = open_project(project.base / "params.yaml", [*SGD, "losses.region=2", "losses.image=0"]).params
    variants = named_variants(params)
    dot, control = (override_params(params, list(variants[name].overrides)) for name in ("dot", "dot-control"))
    assert dot.student.distillation_momentum == pytest.approx(0.075)
    ratio = control.losses.pixel / params.losses.pixel
    assert ratio == pytest.approx(7) == control.losses.region / 2 and control.losses.image == 0
    assert control.student.learning_rate == pytest.approx(0.01 / 1.75) and control.student.distillation_momentum == 0
    two, one = [torch.zeros(1, requires_grad=True)], [torch.zeros(1, requires_grad=True)]
    moved = steady(two, DistillationSGD(two, 0.01, 0.9, dot.student.distillation_momentum), 0.5)
    assert moved == pytest.approx(steady(one, torch.optim.SGD(one, control.student.learning_rate, 0.9), 0.5 * ratio), rel=1e-2)
    plain = [torch.zeros(1, requires_grad=True)]
    assert moved * steady(plain, torch.optim.SGD(plain, 0.01, 0.9), 0.5) < 0, "plain SGD goes the other way"
    adamw = override_params(params, ["student.optimizer=adamw"])
    assert not {"dot", "dot-control"} & set(named_variants(adamw))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["student.optimizer=adamw"],
            r"distillation_momentum = 0\.1: is defined for sgd, but optimizer is adamw; set optimizer to sgd",
        ),
        (
            ["student.momentum=0.9"],
            r"distillation_momentum = 0\.1: must be below 0\.1, so that momentum = 0\.9 less it and plus it",
        ),
        (["student.momentum=0.05"], r"distillation_momentum = 0\.1: must be below 0\.05, so that momentum = 0\.05"),
    ],
)
def test_momenta_that_cannot_be_are_one_line(project: Project, overrides: list[str], said: str) -> None:
    with pytest.raises(ParamsError, match=said):
        open_project(project.base / "params.yaml", [*SGD, "student.distillation_momentum=0.1", *overrides])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"momentum": 0.9, "distillation_momentum": 0.1}, "must stay within 0 and 1"),
        ({"momentum": 0.05, "distillation_momentum": 0.1}, "must stay within 0 and 1"),
        ({"lr": -1.0}, "must not be negative"),
    ],
)
def test_values_that_cannot_be_are_an_error(values: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DistillationSGD([{"params": weights(1), **values}], lr=0.1)
