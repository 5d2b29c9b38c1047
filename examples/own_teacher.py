"""A network of your own as a teacher. Copy this file beside params.yaml and name it there:

    teachers:
      own: {import: "own_teacher:build_teacher", weights: ours.pth, options: {width: 32}}

`docs/teachers.md` says what each field of `Teacher` means.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from mgd_pipeline.networks.normalisation import IMAGENET
from mgd_pipeline.teachers import Teacher, TeacherOutputs


class Segmenter(nn.Module):
    """Your network: any, as long as `forward` returns TeacherOutputs."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 8, stride=8), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images_B3HW: Tensor) -> TeacherOutputs:
        features = self.body(images_B3HW)
        return TeacherOutputs(logits=self.head(features), features=features)


def build_teacher(weights: Path, classes: tuple[str, ...], width: int = 32) -> Teacher:
    """What `import:` calls: `classes` are those of the data set, further arguments come from `options` in params.yaml."""
    network = Segmenter(len(classes), width)
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    # A convolution of stride 8 has cells that are areas of 8 x 8 pixels, so corners are not aligned.
    return Teacher(network.eval(), IMAGENET, align_corners=False, multiple=8, labels=classes)
