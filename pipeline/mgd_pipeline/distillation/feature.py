"""The loss of features: the teacher's own channels, cell by cell."""

from __future__ import annotations

import torch
from torch import Tensor

from mgd_pipeline.views import coverage


def feature_loss(projected: Tensor, teacher_features: Tensor, mean: Tensor, std: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Mean squared error of (B, D, h, w) projected student features to teacher features that are standardised by channel.

    `teacher_features` are (B, D, h, w) at the same cells; `mean` and `std` are (D,), the teacher's statistics over its cache. Cells
    weigh by the share of their area that is `valid`, (B, H, W). As FitNets (Romero et al., ICLR 2015), with the standardisation of
    Theia (Shang et al., CoRL 2024). A channel that is constant (std below 1e-6) has the target 0 in all cells.
    """
    if projected.shape != teacher_features.shape:
        raise ValueError(f"projected {tuple(projected.shape)} and teacher features {tuple(teacher_features.shape)} differ in shape")
    scale = torch.where(std < 1e-6, torch.inf, std.float())[:, None, None]
    target = (teacher_features.detach().float() - mean.float()[:, None, None]) / scale
    errors = (projected.float() - target).square().mean(1)
    if valid is None:
        return errors.mean()
    share = coverage(valid, (errors.shape[-2], errors.shape[-1]))
    return torch.where(share > 0, errors * share, 0).sum() / share.sum().clamp(min=1e-6)
