"""Simulated 8-bit arithmetic: rounding by hand, gradients, BatchNorm in the weights, and what a fine-tuning under it mends."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mgd_pipeline.training.simulated_int8 as simulated_int8
from mgd_pipeline.errors import ParamsError
from mgd_pipeline.networks.segmentation import DenseOutputs, SegmentationNetwork, build_network
from mgd_pipeline.params import NetworkParams
from mgd_pipeline.training.simulated_int8 import ActivationRange, Int8Layer, in_simulated_int8, rounded_weights

SIZE = (64, 96)


def ranged(low: float, high: float) -> ActivationRange:
    kept = ActivationRange().eval()
    kept.low.fill_(low)
    kept.high.fill_(high)
    return kept


def test_activations_are_rounded_as_computed_by_hand() -> None:
    """Levels are 4 / 255 apart, and 0 is level round(63.75) = 64: those at the ends are -64 and 191 of them."""
    step = 4 / 255
    values = torch.tensor([-1.0, 0.0, 0.5, 3.0, -7.0, 7.0])
    expected = torch.tensor([-64.0, 0.0, 32.0, 191.0, -64.0, 191.0]) * step
    torch.testing.assert_close(ranged(-1, 3)(values), expected)
    # --- of one sign: 0 stays a level, so the range reaches to it
    torch.testing.assert_close(ActivationRange()(torch.tensor([5.1, 2.55])), torch.tensor([255.0, 128.0]) * 5.1 / 255)
    # --- nothing to tell apart, and nothing that is not finite
    assert ActivationRange()(torch.zeros(3)).tolist() == [0, 0, 0]


def test_ranges_are_moving_averages_of_training_batches() -> None:
    kept = ActivationRange()
    kept(torch.tensor([-1.0, 2.0]))
    assert (float(kept.low), float(kept.high)) == (-1, 2), "the first batch is the range"
    kept(torch.tensor([-3.0, 1.0]))
    assert float(kept.low) == pytest.approx(-1.02) and float(kept.high) == pytest.approx(1.99)
    kept.eval()(torch.tensor([-9.0, 9.0]))
    assert float(kept.high) == pytest.approx(1.99)


def test_gradients_pass_the_rounding_and_stop_outside_the_range() -> None:
    values = torch.tensor([-2.0, -1.0, 0.3, 3.0, 4.0], requires_grad=True)
    (ranged(-1, 3)(values) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [0, 2, 3, 4, 0]
    weights = torch.tensor([[1.0, -0.3], [0.01, 0.004]], requires_grad=True)
    rounded_weights(weights).sum().backward()
    assert weights.grad is not None and weights.grad.tolist() == [[1, 1], [1, 1]]


def test_weights_have_a_scale_for_each_output_channel() -> None:
    weights = torch.tensor([[1.0, 0.505, -0.3], [0.01, 0.004, 0.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[127.0, 64.0, -38.0], [127.0, 51.0, 0.0], [0.0, 0.0, 0.0]]) / 127
    torch.testing.assert_close(rounded_weights(weights), expected * torch.tensor([[1.0], [0.01], [0.0]]))


# --- networks


def trained(encoder: str, decoder: str) -> SegmentationNetwork:
    """A network whose BatchNorm has statistics and factors as after a training."""
    torch.manual_seed(0)
    network = build_network(NetworkParams(encoder=encoder, decoder=decoder, decoder_channels=32), 5, initialise=False)  # pyright: ignore
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None and layer.running_var is not None
            nn.init.normal_(layer.running_mean, std=0.2)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.2)
    return network.eval()


def layers_of(network: nn.Module) -> list[Int8Layer]:
    return [layer for layer in network.modules() if isinstance(layer, Int8Layer)]


@pytest.mark.parametrize("decoder", ["fpn", "deeplabv3plus", "upernet"])
@pytest.mark.parametrize(
    "encoder", ["tu-test_efficientnet", "tu-test_resnet", "mobilenet_v2", "tu-tf_efficientnet_lite0", "resnet18"]
)
def test_without_rounding_the_network_is_the_float_one(encoder: str, decoder: str) -> None:
    """In training mode, too: BatchNorm keeps its statistics. Each layer is simulated, and each BatchNorm is in the weights."""
    network = trained(encoder, decoder)
    simulated = in_simulated_int8(network, SIZE)
    layers, pixels = layers_of(simulated), torch.randn(2, 3, *SIZE)
    ours = [module for module in simulated.modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))]
    assert len(ours) == sum(isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) for module in network.modules())
    assert {id(module) for module in ours} == {id(module) for layer in layers for module in (layer.layer, layer.norm) if module}
    assert [id(one) for one in network.parameters()] and {id(one) for one in network.parameters()} == {
        id(one) for one in simulated.parameters()
    }
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with torch.no_grad():
        expected = network(pixels)
        rounded = simulated.train()(pixels).logits
        for layer in layers:
            layer.rounds = False
        logits = simulated(pixels).logits
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-4 * float(expected.logits.abs().max()))
    assert not torch.allclose(rounded, expected.logits, rtol=0, atol=1e-3 * float(expected.logits.abs().max()))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


class Forked(nn.Module):
    """Its convolution is read twice, once without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
        nn.init.constant_(self.norm.weight, 3.0)

    def forward(self, pixels: Tensor) -> DenseOutputs:
        values = self.first(pixels)
        features = self.norm(values) + values
        return DenseOutputs(self.last(features), features)


def test_a_network_whose_batchnorm_cannot_be_folded_is_refused() -> None:
    network: Any = Forked()
    with pytest.raises(ParamsError, match=r"student\.network: with BatchNorm folded, its logits differ by .*leave --quantised out"):
        in_simulated_int8(network, SIZE)


# --- what the fine-tuning mends


class Depthwise(nn.Module):
    """A depthwise convolution between two others. Channels before and behind it have scales from 1/8 to 8, which the next layer
    takes back."""

    def __init__(self, channels: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        between = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.between = nn.Sequential(between, nn.BatchNorm2d(channels), nn.ReLU())
        self.last = nn.Conv2d(channels, 5, 1)
        scales = 2 ** torch.linspace(-3, 3, channels)
        before, behind = scales[torch.randperm(channels)], scales[torch.randperm(channels)]
        with torch.no_grad():
            for block, factors in ((self.first, before), (self.between, behind)):
                norm: Any = block[1]
                norm.weight.mul_(factors)
                norm.bias.normal_(std=0.2).mul_(factors)
            between.weight.div_(before.view(-1, 1, 1, 1))
            self.last.weight.mul_(4).div_(behind.view(1, -1, 1, 1))
        self.eval()

    def forward(self, pixels: Tensor) -> DenseOutputs:
        features = self.between(self.first(pixels))
        return DenseOutputs(self.last(features), features)


def with_one_scale(weights: Tensor) -> Tensor:
    """Rounded without looking at channels."""
    return torch.fake_quantize_per_tensor_affine(
        weights, weights.detach().abs().max() / 127, torch.zeros((), dtype=torch.int32), -127, 127
    )


def test_channels_of_very_different_scales_lose_little_after_a_fine_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    network: Any = Depthwise()
    teacher, generator = copy.deepcopy(network), torch.Generator().manual_seed(1)
    held_out, steps = torch.randn(4, 3, 32, 48, generator=generator), 200
    simulated = in_simulated_int8(network, (32, 48))

    def same() -> float:
        with torch.no_grad():
            return float((simulated.eval()(held_out).logits.argmax(1) == teacher(held_out).logits.argmax(1)).double().mean())

    with torch.no_grad():
        simulated.train()(torch.randn(4, 3, 32, 48, generator=generator))
    before = same()
    with monkeypatch.context() as patched:
        patched.setattr(simulated_int8, "rounded_weights", with_one_scale)
        naive = same()
    optimizer = torch.optim.Adam(simulated.parameters(), lr=0.005)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    simulated.train()
    for _ in range(steps):
        pixels = torch.randn(4, 3, 32, 48, generator=generator)
        with torch.no_grad():
            target = teacher(pixels).logits.softmax(1)
        loss = nn.functional.cross_entropy(simulated(pixels).logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert naive < 0.8 < before < 0.93 < same()


RANKS = """
import torch
import torch.distributed as dist
from mgd_pipeline.training.simulated_int8 import ActivationRange

dist.init_process_group("gloo")
layer = ActivationRange()
for step in range(3):
    layer(torch.linspace(-1, 2, 8).mul(step + 1)[dist.get_rank() :: 2])
if dist.get_rank() == 0:
    print(layer.low.item(), layer.high.item())
dist.destroy_process_group()
"""


def test_ranges_are_those_of_the_whole_batch_where_processes_share_it(tmp_path: Path) -> None:
    """As docs/training.md says of every training: several processes compute what one computes."""
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", tmp_path / "ranks.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    alone = ActivationRange()
    for step in range(3):
        alone(torch.linspace(-1, 2, 8).mul(step + 1))
    assert [float(end) for end in done.stdout.split()] == pytest.approx([alone.low.item(), alone.high.item()]), done.stderr
