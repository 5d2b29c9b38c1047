"""Distil a project's teachers with Lightning (pip install lightning): python examples/lightning_student.py PROJECT [EPOCHS]"""

import sys
from pathlib import Path
from typing import Any

import lightning  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from mgd_pipeline.training import DistillationDataset


class Student(lightning.LightningModule):
    """Labels where there are labels, every teacher's logits everywhere: the pixel terms of train-student, without CutMix."""

    def __init__(self, data: DistillationDataset) -> None:
        super().__init__()
        self.data = data
        self.network: Any = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=len(data.manifest.classes))

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        self.data.set_epoch(self.current_epoch)  # before the loader begins, so in here
        return DataLoader(self.data, batch_size=4, shuffle=True, drop_last=True, num_workers=2)

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        logits = self.network(batch["image"])["out"]
        terms = [-(seen["logits"].softmax(1) * logits.log_softmax(1)).sum(1)[batch["inside"]].mean() for seen in _all(batch)]
        known = batch["label"] != 255
        if known.any():
            terms.append(cross_entropy(logits, batch["label"], ignore_index=255))
        loss = torch.stack(terms).sum()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def _all(batch: dict[str, Any]) -> list[dict[str, Tensor]]:
    """What each teacher that names classes says."""
    return [seen for seen in batch["targets"].values() if seen["logits"].shape[1]]


def main(project: Path, epochs: int, **trainer: Any) -> Student:
    student = Student(DistillationDataset(project))
    # A new loader in each epoch, so that each epoch has its own views.
    lightning.Trainer(max_epochs=epochs, reload_dataloaders_every_n_epochs=1, **trainer).fit(student)
    return student


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 10)
