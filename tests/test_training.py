"""Optimiser, schedule and moving average against their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mgd_pipeline.networks.segmentation import build_branches
from mgd_pipeline.params import NetworkParams, OptimisationParams, TeacherTrainingParams
from mgd_pipeline.training.optimisation import build_average, build_optimizer, build_schedule, consistency_weight, update_average
from mgd_pipeline.views import draw_jitter, jitter_colours

NETWORK = NetworkParams(encoder="tu-test_resnet", decoder_channels=16)
BASE: dict[str, Any] = {"steps": 50, "labelled_batch": 2, "unlabelled_batch": 2, "learning_rate": 0.1}


def params(**changes: Any) -> OptimisationParams:
    return OptimisationParams(**{**BASE, **changes})


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_poly_schedule_and_decay_groups(optimizer: str) -> None:
    built = build_optimizer(small(), params(optimizer=optimizer, weight_decay=0.3))
    assert [group["weight_decay"] for group in built.param_groups] == [0.3, 0.0]
    assert [len(group["params"]) for group in built.param_groups] == [1, 3], "bias and normalisation do not decay"
    schedule = build_schedule(built, params())
    for step in range(50):
        assert built.param_groups[0]["lr"] == pytest.approx(0.1 * (1 - step / 50) ** 0.9)
        built.step()
        schedule.step()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_encoders_have_a_learning_rate_of_their_own(optimizer: str) -> None:
    """Of both branches, with the same schedule; every weight is in one group, and a frozen one in none."""
    settings = TeacherTrainingParams(**BASE, optimizer=optimizer, encoder_learning_rate=0.01)  # type: ignore[arg-type]
    networks = nn.ModuleList(build_branches(NETWORK, 3, 2))
    built = build_optimizer(networks, settings)
    of_encoders = {id(value) for key, value in networks.named_parameters() if ".encoder." in key}
    groups = [[id(value) for value in group["params"]] for group in built.param_groups]
    assert set(groups[2] + groups[3]) == of_encoders
    assert sorted(value for group in groups for value in group) == sorted(map(id, networks.parameters()))
    assert [group["weight_decay"] for group in built.param_groups] == [1e-4, 0, 1e-4, 0]
    schedule = build_schedule(built, settings)
    for step in range(3):
        factor = (1 - step / 50) ** 0.9
        assert [group["lr"] for group in built.param_groups] == pytest.approx([0.1 * factor] * 2 + [0.01 * factor] * 2)
        built.step()
        schedule.step()
    frozen = nn.ModuleList(build_branches(NETWORK, 3, 2, frozen_encoder=True))
    groups = [
        {id(value) for value in group["params"]} for group in build_optimizer(frozen, params(optimizer=optimizer)).param_groups
    ]
    assert set.union(*groups) == {id(value) for key, value in frozen.named_parameters() if ".encoder." not in key}


def test_the_average_of_a_frozen_encoder_is_itself() -> None:
    network, _ = build_branches(NETWORK, 3, 2, frozen_encoder=True)
    average = build_average(network, params(ema=0.9))
    assert average is not None
    before = {key: value.clone() for key, value in network.state_dict().items()}
    for step in range(3):
        network.model.segmentation_head[0].bias.data.add_(1)
        update_average(average, network, 0.9, step)
    for key, value in average.state_dict().items():
        assert torch.equal(value, before[key]) == (key != "model.segmentation_head.0.bias"), key
    assert average.state_dict().keys() == before.keys()


def test_average_follows_its_formula_and_forgets_the_start() -> None:
    network, by_hand = small(), torch.zeros(4, 3, 3, 3)
    average = build_average(network, params(ema=0.99))
    assert average is not None and build_average(network, params(ema=0.0)) is None
    for step in range(60):
        weight = network.get_parameter("0.weight").data.add_(step + 1)
        network(torch.randn(2, 3, 8, 8))
        update_average(average, network, 0.99, step)
        decay = min(0.99, (1 + step) / (10 + step)) if step else 0.0
        by_hand = decay * by_hand + (1 - decay) * weight
        assert torch.allclose(average.get_parameter("0.weight"), by_hand, rtol=1e-4)
    assert average.get_buffer("1.num_batches_tracked") == 60
    assert not torch.equal(average.get_buffer("1.running_mean"), torch.zeros(4)), "statistics of BatchNorm are averaged too"


def test_jitter_is_a_function_of_its_seed_and_zero_is_identity() -> None:
    images = torch.randn(2, 3, 8, 8)
    one, other = draw_jitter(1, 2), draw_jitter(2, 2)
    assert torch.equal(one, draw_jitter(1, 2)) and one.abs().max() <= 1 and not torch.equal(one[0], one[1])
    torch.testing.assert_close(jitter_colours(images, 0.0, one), images)
    assert not torch.allclose(jitter_colours(images, 0.4, one), jitter_colours(images, 0.4, other), atol=0.01)
    alone = jitter_colours(images[1:], 0.4, one[1:])
    torch.testing.assert_close(jitter_colours(images, 0.4, one)[1:], alone)  # an image's colours do not depend on its batch


def test_cps_weight_rises_in_a_line_and_stays() -> None:
    settings = TeacherTrainingParams(**{**BASE, "steps": 10, "consistency": 2.0, "consistency_rampup": 0.5})
    assert [consistency_weight(settings, step, 10) for step in range(10)] == pytest.approx([0.4, 0.8, 1.2, 1.6, *[2.0] * 6])
    constant = settings.model_copy(update={"consistency_rampup": 0.0})
    assert {consistency_weight(constant, step, 10) for step in range(10)} == {2.0}, "MGD's own weight is constant"
