"""What training needs beside a network: batches, loading, optimisation, checkpoints, a data set for other loops."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgd_pipeline.training.distillation_dataset import DistillationDataset

__all__ = ["DistillationDataset"]


def __getattr__(name: str) -> Any:
    # Lazily: a checkpoint or a schedule needs neither caches nor images.
    if name == "DistillationDataset":
        from mgd_pipeline.training.distillation_dataset import DistillationDataset

        return DistillationDataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
