"""Distil a teacher cache into your own network, in your own loop, with your own augmentation: plain PyTorch and torchvision.

python examples/own_loop.py PROJECT [STEPS]          PROJECT is a folder in which `mgd-pipeline precompute-teachers` has finished.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.models.segmentation import lraspp_mobilenet_v3_large
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from mgd_pipeline import open_cache
from mgd_pipeline.data.manifest import read_manifest

CROP = (64, 96)
TEACHER = "wide"


def random_view(image: Tensor) -> tuple[Tensor, Tensor]:
    """A view (3, h, w), and the matrix (2, 3) from its pixels to the image's: a factor for each step, in the order of the steps."""
    (height, width), (h, w) = image.shape[-2:], CROP
    angle = v2.RandomRotation([-10, 10]).make_params([image])["angle"]
    view = F.rotate(image, angle, InterpolationMode.BILINEAR)
    cos, sin, x, y = math.cos(math.radians(angle)), math.sin(math.radians(angle)), (width - 1) / 2, (height - 1) / 2
    matrix = affine([cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y])
    box = v2.RandomResizedCrop(CROP, scale=(0.3, 1.0)).make_params([view])
    view = F.resized_crop(view, **box, size=list(CROP), antialias=False)
    x_step, y_step = box["width"] / w, box["height"] / h
    matrix @= affine([x_step, 0, box["left"] + x_step / 2 - 0.5], [0, y_step, box["top"] + y_step / 2 - 0.5])
    if torch.rand(()) < 0.5:
        view = F.horizontal_flip(view)
        matrix @= affine([-1, 0, w - 1], [0, 1, 0])
    return view, matrix[:2]


def affine(*rows: list[float]) -> Tensor:
    return torch.tensor([*rows, [0, 0, 1]], dtype=torch.float64)


class Views(Dataset[tuple[Tensor, Tensor, Tensor]]):
    def __init__(self, project: Path) -> None:
        self.manifest = read_manifest(project / "data/manifest", project)
        self.rows = self.manifest.training
        self.cache = open_cache(project / f"data/targets/{TEACHER}.zarr")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        row = self.rows[index]
        image = torch.from_numpy(self.manifest.image(row)).permute(2, 0, 1)
        view, matrix = random_view(image.float() / 255)
        logits, inside = self.cache[row.image_id].sample(matrix, CROP)
        return F.normalize(view, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), logits, inside


def train(project: Path, steps: int, workers: int = 2) -> Iterator[float]:
    data = Views(project)
    student: Any = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=len(data.manifest.classes))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for views, logits, inside in DataLoader(data, 4, sampler=torch.randint(len(data), (4 * steps,)).tolist(), num_workers=workers):
        loss = -(logits.softmax(1) * student(views)["out"].log_softmax(1)).sum(1)[inside].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


if __name__ == "__main__":
    for step, loss in enumerate(train(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 200)):
        print(f"step {step}: cross entropy with {TEACHER} {loss:.3f}")
