"""The contract between a network and stage one: any network that fits `Teacher` can be a teacher.

Letters: B batch, L the teacher's classes, K the data set's, D channels, H W pixels, h w cells of an output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mgd_pipeline.caches.provenance import applying
from mgd_pipeline.data.images import AS_STORED, Decoding, read_image
from mgd_pipeline.networks.normalisation import Normalisation
from mgd_pipeline.params import FixedSize


class TeacherOutputs(NamedTuple):
    """The outputs of a teacher for a batch, each on a grid that covers its padded input."""

    logits: Tensor | None
    """(B, L, h, w); None if it names no classes"""
    features: Tensor | None
    """(B, D, h', w'), best the ones of which the logits are a 1x1 convolution; None if it has none to give"""


@dataclass(frozen=True)
class Teacher:
    """A network and how it is used; `import: package.module:function` returns one."""

    network: nn.Module
    """(B, 3, H, W) float32, normalised, to an object with `logits` and `features` as in TeacherOutputs. It must be in
    eval mode when it is used, and treat the images of a batch independently."""
    normalisation: Normalisation
    """mean and std for R, G, B in units of 0 to 255: input = (pixel - mean) / std; and the order of the network's channels"""
    align_corners: bool
    """True: the first and the last cell of an output lie on the first and the last pixel of the padded input. False: cells are
    areas of equal size, with their values at the centres."""
    multiple: int = 32
    """Sides of the input are padded to multiples of this many pixels, at the bottom and right, with the mean colour."""
    labels: tuple[str, ...] | None = None
    """Names of its L classes in order; None if unknown, or if it has no classes."""
    size: tuple[int, int] | None = None
    """Height and width, pixels, of the only input that the network takes, which is never padded; None if it takes every size."""
    fixed_size: FixedSize = "windows"
    """How images meet a network that has a `size`: through windows of that size, or resized to it as a whole."""
    short_side: int | None = None
    """Shorter side at which it sees an image, pixels; None is the image's working size."""
    groups: tuple[tuple[int, ...], ...] | None = None
    """For each of the K classes of the data set the numbers of the teacher's classes, see `data_classes`; None if the teacher's
    classes are the data set's."""

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device


def data_classes(logits_BLhw: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """The teacher's logits as logits of the data set's classes: (B, K, h, w).

    A class with several of the teacher's classes gets the sum of their probabilities. A class with none is never the most
    likely: it gets the smallest logit of the other classes, less 1. A teacher's class that no group names is left out.
    """
    known = {k: torch.logsumexp(logits_BLhw[:, list(group)], 1) for k, group in enumerate(groups) if group}
    missing = torch.stack(list(known.values())).amin(0) - 1
    return torch.stack([known.get(k, missing) for k in range(len(groups))], 1)


def read_for(teacher: Teacher, path: Path, long_side: int | None, decoding: Decoding = AS_STORED) -> np.ndarray:
    """(H, W, 3) uint8: the pixels from which this teacher's input is made.

    The image at its working size; for a teacher with a `short_side` or a `size` of its own the whole file, because it may see more
    than students do.
    """
    return read_image(path, long_side if teacher.short_side is None and teacher.size is None else None, decoding)


def teacher_provenance(expected: dict[str, Any], teacher: Teacher, weights_sha256: str, trained_on: str | None) -> dict[str, Any]:
    """The whole provenance of a teacher cache: `provenance.expected_provenance`, the input that the teacher expects, the hash of
    its weights, and the fingerprint of the labelled ids that it was trained on (None if its weights file does not say)."""
    mean, std, channels = teacher.normalisation
    asked = {"mean": list(mean), "std": list(std), "pad_multiple": teacher.multiple, "align_corners": teacher.align_corners}
    if channels != "RGB":  # the provenance of RGB caches stays what it was before BGR existed
        asked["channels"] = channels
    if expected["preprocessing"].get("window") is not None:  # until version 0.2 each place came from the nearest window alone
        asked["windows"] = "averaged where they overlap"
    if teacher.size is None:
        expected = applying({}, expected)
    else:
        asked["size"] = list(teacher.size)
    return {
        **expected,
        "teacher": {**expected["teacher"], "weights_sha256": weights_sha256, "trained_on": trained_on},
        "preprocessing": {**expected["preprocessing"], **asked},
    }
