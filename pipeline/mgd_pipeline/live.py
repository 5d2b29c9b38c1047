"""Targets of teachers that run beside the student, as in MGD's own training: for studies of what caching changes.

Letters: B labelled images, U unlabelled ones, K classes, D channels, H W pixels of a view, h w cells of a network's output.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mgd_pipeline.batches import Batch, StepTargets, view_images
from mgd_pipeline.networks import STRIDE, Normalisation, SegmentationNetwork, upsample
from mgd_pipeline.views import mix


@torch.no_grad()
def live_targets(
    teachers: Mapping[str, tuple[SegmentationNetwork, Normalisation]],
    batch: Batch,
) -> dict[str, StepTargets]:
    """Targets of a step from the teachers themselves, on the very views that the student sees (a TargetProvider, once bound).

    Each teacher runs four times, as in MGD (method.md 1.3): on the labelled views, on both sources of the mixed views, whose
    logits are mixed for the pixel term, and on the mixed views, for the region and the image term. It does not see the
    student's colour jitter. Unlike MGD's code, whose teachers stay in training mode, it must be in eval mode: with batch
    statistics its targets would depend on the other images of the step. Raises ValueError otherwise, and where the
    features of a teacher do not lie at the student's cells.
    """
    assert batch.unlabelled is not None and batch.partner is not None and batch.cutmix is not None
    cutmix = batch.cutmix
    count, unlabelled = len(batch.labelled.rows), len(batch.unlabelled.rows)
    found = {}
    for name, (network, normalise) in teachers.items():
        if network.training:
            raise ValueError(f"live_targets needs teacher {name} in eval mode")
        labelled, first, second = (
            view_images(source, normalise, 0) for source in (batch.labelled, batch.unlabelled, batch.partner)
        )
        shape = (labelled.shape[-2] // STRIDE, labelled.shape[-1] // STRIDE)
        inputs = torch.cat([labelled, first, second, mix(first, second, cutmix)])
        outputs = network(inputs.contiguous(memory_format=torch.channels_last))
        features = outputs.features[-unlabelled:].float()
        if tuple(features.shape[-2:]) != shape:
            raise ValueError(f"teacher {name}: features of {tuple(features.shape[-2:])} cells, the student has {shape}")
        logits = upsample(outputs.logits.float(), (inputs.shape[-2], inputs.shape[-1]))
        on_labelled, on_first, on_second, on_mixed = logits.split([count, unlabelled, unlabelled, unlabelled])
        found[name] = StepTargets(on_labelled, mix(on_first, on_second, cutmix), on_mixed, features)
    return found
