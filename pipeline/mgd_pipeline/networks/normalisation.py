"""The input that a network expects: mean, standard deviation and order of its channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Normalisation(NamedTuple):
    """Per channel R, G, B, in units of 0 to 255: input = (pixel - mean) / std."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    channels: Literal["RGB", "BGR"] = "RGB"
    """Order in which the network takes the channels. `mean` and `std` are in the order R, G, B in either case."""


IMAGENET = Normalisation((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
"""ImageNet's, from torchvision's documentation."""


def in_order(images_B3HW: Tensor, normalisation: Normalisation) -> Tensor:
    """Channels R, G, B in the order in which the network takes them."""
    return images_B3HW.flip(1) if normalisation.channels == "BGR" else images_B3HW
