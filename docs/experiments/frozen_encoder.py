"""What a step of a teacher's training costs with a frozen encoder, beside the same step with an encoder that learns.

python docs/experiments/frozen_encoder.py tu-vit_small_patch14_dinov2 --side 112
python docs/experiments/frozen_encoder.py resnet50 --decoder deeplabv3plus --side 96

Both arms take turns in one process, on random weights and random images: CPU seconds of a step of cross pseudo supervision, the
median of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from mgd_pipeline.distillation import pixel_consistency_loss, supervised_loss
from mgd_pipeline.networks.segmentation import build_branches, run_branches
from mgd_pipeline.params import TeacherNetworkParams, TeacherTrainingParams
from mgd_pipeline.training.optimisation import build_average, build_optimizer, update_average

CLASSES = 9
HOW = TeacherTrainingParams(steps=10, labelled_batch=2, unlabelled_batch=2, learning_rate=1e-3, optimizer="adamw", ema=0.99)


class Arm:
    def __init__(self, network: TeacherNetworkParams, frozen: bool) -> None:
        branches = build_branches(network, CLASSES, 2, frozen_encoder=frozen)
        self.branches = nn.ModuleList(branches).train()
        self.optimizer, self.average = build_optimizer(self.branches, HOW), build_average(branches[0], HOW)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """CPU seconds."""
        began, count = time.process_time(), len(labels)
        with torch.no_grad():
            guides = run_branches([*self.branches], images)[::-1]
        outputs = run_branches([*self.branches], images)
        pairs = zip(outputs, guides, strict=True)
        losses = [supervised_loss(seen[:count], labels) + pixel_consistency_loss(seen, guide) for seen, guide in pairs]
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        self.optimizer.step()
        assert self.average is not None
        update_average(self.average, self.branches[0], HOW.ema, step=1)
        return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder")
    parser.add_argument("--decoder", default="dpt")
    parser.add_argument("--side", type=int, default=112, help="pixels of a square view")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = TeacherNetworkParams(decoder=given.decoder, encoder=given.encoder, decoder_channels=64)
    arms = {"frozen": Arm(network, True), "learning": Arm(network, False)}
    images, labels = torch.randn(4, 3, given.side, given.side), torch.randint(CLASSES, (2, given.side, given.side))
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(given.rounds + 1):
        for name, arm in arms.items():
            took = arm.step(images, labels)
            if number:  # the first one warms up
                seconds[name].append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(", ".join(f"{name} {value:.3f} s" for name, value in medians.items()))
    print(f"frozen / learning: {medians['frozen'] / medians['learning']:.2f}")


if __name__ == "__main__":
    main()
