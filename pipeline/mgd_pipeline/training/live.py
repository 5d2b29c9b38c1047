"""Targets of teachers that run beside the student, as in MGD's own training, for studies of what caching changes.

Letters: B labelled images, U unlabelled ones, K classes, D channels, H W pixels of a view, h w cells of a network's output.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mgd_pipeline.networks.segmentation import STRIDE, upsample
from mgd_pipeline.params import SmpTeacher, TeacherParams
from mgd_pipeline.teachers.teacher import Teacher
from mgd_pipeline.training.batches import Batch, StepTargets, mixed_views, view_images


def runs_live(teacher: TeacherParams) -> bool:
    """Whether `live_targets` takes a teacher, which has the student's cells, the data set's classes, and no size of its own."""
    own = isinstance(teacher, SmpTeacher) and teacher.decoder != "dpt"
    return own and teacher.class_map is None and teacher.short_side is None


@torch.no_grad()
def live_targets(teachers: Mapping[str, Teacher], batch: Batch) -> dict[str, StepTargets]:
    """Targets of a step from the teachers themselves, on the student's own views (a TargetProvider, once bound).

    Each teacher sees four sets of views, as in MGD's code: the labelled views; both sources of the mixed views, whose logits are
    mixed for the pixel term; and the mixed views, for the region and the image term. Without CutMix these are the labelled and
    the unlabelled views. A teacher does not see the student's colour jitter.

    Raises ValueError for a teacher in training mode (MGD's teachers are; with batch statistics, targets would depend on the other
    images of the step), and for one with other cells, other classes or an input size of its own.
    """
    targets = {}
    for name, teacher in teachers.items():
        network = teacher.network
        if network.training:
            raise ValueError(f"live_targets needs teacher {name} in eval mode")
        own_size = teacher.short_side is not None or teacher.size is not None
        if teacher.groups is not None or own_size or not teacher.align_corners:
            raise ValueError(f"teacher {name}: only teachers of segmentation-models-pytorch on the data set's classes run live")
        seen = [view_images(source, teacher.normalisation, 0) for source in batch.sources]
        if batch.cutmix is not None:
            seen.append(mixed_views(batch, seen[1:]))
        height, width = seen[0].shape[-2:]
        shape = (height // STRIDE, width // STRIDE)
        outputs = network(torch.cat(seen).contiguous(memory_format=torch.channels_last))
        features = outputs.features[-len(seen[-1]) :].float()
        if tuple(features.shape[-2:]) != shape:
            raise ValueError(f"teacher {name}: features of {tuple(features.shape[-2:])} cells, the student has {shape}")
        logits = upsample(outputs.logits.float(), (height, width))
        on_labelled, *on_seen = logits.split([len(images) for images in seen])
        targets[name] = StepTargets(on_labelled, mixed_views(batch, on_seen), on_seen[-1], features)
    return targets
