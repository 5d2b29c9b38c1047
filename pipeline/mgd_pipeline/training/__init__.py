"""What training needs beside a network: batches, loading, optimisation, checkpoints, a data set for other loops."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgd_pipeline.training.distillation_dataset import DistillationDataset
    from mgd_pipeline.training.distillation_sgd import DistillationSGD

__all__ = ["DistillationDataset", "DistillationSGD"]


def __getattr__(name: str) -> Any:
    # Lazily: a checkpoint or a schedule needs neither caches nor images.
    if name == "DistillationDataset":
        from mgd_pipeline.training.distillation_dataset import DistillationDataset

        return DistillationDataset
    if name == "DistillationSGD":
        from mgd_pipeline.training.distillation_sgd import DistillationSGD

        return DistillationSGD
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
