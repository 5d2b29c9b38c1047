"""Targets of teachers that run beside the student, as in MGD's own training: for studies of what caching changes.

Letters: B labelled images, U unlabelled ones, K classes, D channels, H W pixels of a view, h w cells of a network's output.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mgd_pipeline.batches import Batch, StepTargets, mixed_views, view_images
from mgd_pipeline.networks import STRIDE, upsample
from mgd_pipeline.teachers import Teacher


@torch.no_grad()
def live_targets(
    teachers: Mapping[str, Teacher],
    batch: Batch,
) -> dict[str, StepTargets]:
    """Targets of a step from the teachers themselves, on the very views that the student sees (a TargetProvider, once bound).

    Each teacher runs four times, as in MGD (method.md 1.3): on the labelled views, on both sources of the mixed views, whose
    logits are mixed for the pixel term, and on the mixed views, for the region and the image term. It does not see the
    student's colour jitter. Unlike MGD's code, whose teachers stay in training mode, it must be in eval mode: with batch
    statistics its targets would depend on the other images of the step. Raises ValueError otherwise, and for teachers that
    are not like the student: with outputs at other cells, other classes, or an input rule of their own.
    """
    sizes = [len(source.rows) for source in batch.sources]
    found = {}
    for name, teacher in teachers.items():
        network = teacher.network
        if network.training:
            raise ValueError(f"live_targets needs teacher {name} in eval mode")
        if teacher.groups is not None or teacher.short_side is not None or not teacher.align_corners:
            raise ValueError(f"teacher {name}: only teachers of segmentation-models-pytorch on the data set's classes run live")
        labelled, *seen = (view_images(source, teacher.normalisation, 0) for source in batch.sources)
        shape = (labelled.shape[-2] // STRIDE, labelled.shape[-1] // STRIDE)
        inputs = torch.cat([labelled, *seen, mixed_views(batch, seen)])
        outputs = network(inputs.contiguous(memory_format=torch.channels_last))
        features = outputs.features[-sizes[-1] :].float()
        if tuple(features.shape[-2:]) != shape:
            raise ValueError(f"teacher {name}: features of {tuple(features.shape[-2:])} cells, the student has {shape}")
        logits = upsample(outputs.logits.float(), (inputs.shape[-2], inputs.shape[-1]))
        on_labelled, *on_seen, on_mixed = logits.split([*sizes, sizes[-1]])
        found[name] = StepTargets(on_labelled, mixed_views(batch, on_seen), on_mixed, features)
    return found
