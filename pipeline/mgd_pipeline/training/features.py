"""The student of the feature term: a network, and a trained projection of its features into each feature teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from mgd_pipeline.networks.segmentation import DenseOutputs, SegmentationNetwork
from mgd_pipeline.training.batches import own_cells


class ProjectedOutputs(NamedTuple):
    """`DenseOutputs` of a batch, and what the projections make of the features."""

    logits: Tensor
    """(B, K, h, w)"""
    features: Tensor
    """(B, D, h, w)"""
    projected: dict[str, Tensor]
    """(B, D of the teacher, r, c) for each feature teacher, at cells of the teachers' own stride"""


class ProjectedStudent(nn.Module):
    """A network, and a bias-free 1x1 convolution of its features for each feature teacher (FitNets, Romero et al., ICLR 2015).

    The projections are trained, so they belong to the checkpoint, the optimiser and the gradients that ranks share. The student's
    file, its moving average and its exports are those of `network` alone.
    """

    def __init__(self, network: SegmentationNetwork, teachers: Mapping[str, int], region_stride: int) -> None:
        """`teachers` gives the channels of each feature teacher, whose embeddings have cells of `region_stride` pixels."""
        super().__init__()
        self.network, self.region_stride, self.teachers = network, region_stride, list(teachers)
        channels = network.model.segmentation_head[0].in_channels
        self.projections = nn.ModuleList(nn.Conv2d(channels, theirs, 1, bias=False) for theirs in teachers.values())

    def forward(self, images_B3HW: Tensor) -> ProjectedOutputs:
        outputs: DenseOutputs = self.network(images_B3HW)
        averaged = mean_features(outputs.features, self.region_stride)
        projected = [projection(averaged) for projection in self.projections]
        return ProjectedOutputs(outputs.logits, outputs.features, dict(zip(self.teachers, projected, strict=True)))


def with_projections(
    network: SegmentationNetwork, statistics: Mapping[str, tuple[Tensor, Tensor]], region_stride: int
) -> SegmentationNetwork | ProjectedStudent:
    """What is trained: the network, with a projection for each teacher of `statistics` (`Knowledge.features`), if there are any."""
    if not statistics:
        return network
    device = next(network.parameters()).device
    return ProjectedStudent(network, {name: len(mean) for name, (mean, _) in statistics.items()}, region_stride).to(device)


def mean_features(features_BDhw: Tensor, region_stride: int) -> Tensor:
    """(B, D, r, c) float32 means of a network's features over the cells of `batches.view_regions`.

    Sides of views are multiples of 32 pixels, so each mean is over whole cells of the features, equally many.
    """
    h, w = features_BDhw.shape[-2:]
    r, c = own_cells((h, w), region_stride)
    return F.avg_pool2d(features_BDhw.float(), (h // r, w // c))
