"""What several kinds of teachers share. Letters: B batch, D channels, H W pixels, h w cells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mgd_pipeline.errors import WeightsError
from mgd_pipeline.networks.normalisation import Normalisation
from mgd_pipeline.teachers.class_map import some
from mgd_pipeline.teachers.teacher import TeacherOutputs


class BeforeClassifier(nn.Module):
    """A segmenter that also returns the input of its classifier, a 1x1 convolution, as features.

    If the classifier is the last step but for upsampling, its native output is the logits.
    """

    def __init__(self, model: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], classifier: nn.Module) -> None:
        super().__init__()
        self.model, self._run = model, run
        self._seen: tuple[Tensor, Tensor] | None = None
        self._is_last = isinstance(classifier, nn.Conv2d) and classifier.kernel_size == (1, 1)
        classifier.register_forward_hook(self._remember)

    def _remember(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._seen = inputs[0], output

    def forward(self, images_B3HW: Tensor) -> TeacherOutputs:
        logits = self._run(self.model, images_B3HW)
        assert self._seen is not None
        (features, native), self._seen = self._seen, None
        return TeacherOutputs(native if self._is_last else logits, features)


def noted_normalisation(notes: dict[str, Any], default: Normalisation) -> Normalisation:
    """The input normalisation in a weights file's metadata, or the default."""
    if "normalisation" not in notes:
        return default
    mean, std = (tuple(values) for values in notes["normalisation"])
    return Normalisation(mean, std, notes.get("channels", "RGB"))


def channels_of(state: dict[str, Tensor], key: str, path: Path) -> int:
    """The length of a tensor, which may have a prefix before its name. Raises WeightsError if there is no such tensor."""
    names = [name for name in state if name == key or name.endswith(f".{key}")]
    if not names:
        raise WeightsError(f"{path}: holds no tensor {key}; it has {some(list(state))}")
    return len(state[names[0]])
