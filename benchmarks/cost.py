"""What teachers and students cost: parameters, multiply-accumulates, time on a CPU; backbones beside the paper's ratios.

python benchmarks/cost.py

MACs are of one 512 x 512 image. Times are medians of the whole network on one image, float32, channels last, of rounds in which
every network has its turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from mgd_pipeline.networks.counting import multiply_accumulates, parameter_count
from mgd_pipeline.networks.segmentation import SegmentationNetwork, build_network
from mgd_pipeline.params import NetworkParams
from mgd_stages.tools.bench import in_turns
from reader import Table

TEACHERS = {"wide: Wide ResNet-50-2": "tu-wide_resnet50_2", "deep: ResNet-101": "resnet101"}
STUDENTS = {"ResNet-18": "resnet18", "MobileNetV2": "mobilenet_v2", "EfficientNet-Lite0": "tu-tf_efficientnet_lite0"}
CLASSES = 21


def build(encoder: str) -> SegmentationNetwork:
    """DeepLabV3+ with MGD's 256 channels, as for VOC."""
    params = NetworkParams(decoder="deeplabv3plus", encoder=encoder, decoder_channels=256, encoder_weights="none")
    return build_network(params, CLASSES).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def latencies(networks: dict[str, SegmentationNetwork], side: int, rounds: int) -> dict[str, float]:
    """Seconds an image."""
    image = torch.zeros(1, 3, side, side).contiguous(memory_format=torch.channels_last)

    def forward(network: SegmentationNetwork) -> Callable[[], None]:
        def once() -> None:
            with torch.inference_mode():
                network(image)

        return once

    return in_turns({name: forward(network) for name, network in networks.items()}, rounds)


def cost_tables(side: int = 512, rounds: int = 3) -> list[Table]:
    networks = {name: build(encoder) for name, encoder in {**TEACHERS, **STUDENTS}.items()}
    seconds = latencies(networks, side, rounds)
    macs = {name: multiply_accumulates(network, side, side) for name, network in networks.items()}
    backbones = {name: network.model.encoder for name, network in networks.items()}
    backbone_macs = {name: multiply_accumulates(encoder, side, side) for name, encoder in backbones.items()}
    rows = [
        (
            name,
            f"{parameter_count(backbones[name]) / 1e6:.1f}",
            f"{backbone_macs[name] / 1e9:.1f}",
            f"{parameter_count(network) / 1e6:.1f}",
            f"{macs[name] / 1e9:.1f}",
            f"{seconds[name] * 1e3:,.0f}",
        )
        for name, network in networks.items()
    ]
    header = ("network", "backbone, M parameters", "backbone, GMACs", "whole, M parameters", "whole, GMACs", "CPU, ms an image")
    paper = {"ResNet-18": "3.4 to 5.3", "MobileNetV2": "38.7 to 59.6"}
    ratios = [
        (
            name,
            *(
                " to ".join(f"{value:.1f}" for value in sorted(values[teacher] / values[name] for teacher in TEACHERS))
                for values in (backbone_macs, macs, seconds)
            ),
            paper.get(name, ""),
        )
        for name in STUDENTS
    ]
    compared = ("student", "backbone, MACs", "whole network, MACs", "whole network, CPU time", "paper: backbone, MACs")
    title = f"DeepLabV3+ on {side} x {side}, {torch.get_num_threads()} threads"
    return [Table(title, header, rows, []), Table("How many times less than the teachers", compared, ratios, [])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512, help="height and width of the image in pixels")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    for table in cost_tables(arguments.side, arguments.rounds):
        print(table.markdown())


if __name__ == "__main__":
    main()
