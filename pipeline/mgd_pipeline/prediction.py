"""From an image to class scores: whole, or by a sliding window; and the student as a user holds it.

Letters: K classes, H W pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from mgd_pipeline.access import is_there
from mgd_pipeline.errors import WeightsError, shell_command
from mgd_pipeline.images import read_image, resize_image, rgb_of, scaled_size
from mgd_pipeline.networks import Normalisation, SegmentationNetwork, in_order, load_network, pad_to_multiple, upsample
from mgd_pipeline.params import NetworkParams
from mgd_pipeline.scaling import scale_down
from mgd_pipeline.weights import read_metadata, require_access
from mgd_pipeline.words import listed

OVERLAP = 1 / 3
"""Share of a window by which its neighbours overlap it, where nobody says another."""


def to_input(image: np.ndarray, normalisation: Normalisation, device: torch.device) -> Tensor:
    """(H, W, 3) uint8 RGB to a normalised (1, 3, H, W) float32 on the device, channels in the network's order."""
    pixels = torch.from_numpy(np.require(image, requirements=["C", "W"])).to(device).permute(2, 0, 1)[None].float()
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (normalisation.mean, normalisation.std))
    return in_order((pixels - mean) / std, normalisation)


@torch.inference_mode()
def predict_logits(
    network: nn.Module,
    image: np.ndarray,
    normalisation: Normalisation,
    *,
    window: tuple[int, int] | None = None,
    overlap: float = OVERLAP,
) -> Tensor:
    """(H, W, 3) uint8 to (K, H, W) float32 logits on the network's device; the network must be in eval mode.

    With a `window` (height, width) in pixels, windows that overlap by the share `overlap` are predicted one by one and
    their logits averaged where they overlap (MGD sums them: the argmax is the same).
    """
    if network.training:
        raise ValueError("predict_logits needs a network in eval mode: in training mode its output depends on its batch")
    device = next(network.parameters()).device
    pixels = to_input(image, normalisation, device)
    height, width = image.shape[:2]
    if window is None or (height <= window[0] and width <= window[1]):
        return run_padded(network, pixels)[0]
    size = min(window[0], height), min(window[1], width)
    total, count = None, torch.zeros(height, width, device=device)
    for top in window_starts(height, size[0], overlap):
        for left in window_starts(width, size[1], overlap):
            inside = (..., slice(top, top + size[0]), slice(left, left + size[1]))
            logits = run_padded(network, pixels[inside])[0]
            if total is None:
                total = torch.zeros(logits.shape[0], height, width, device=device)
            total[inside] += logits
            count[inside] += 1
    assert total is not None
    return total / count


def run_padded(network: nn.Module, pixels_B3HW: Tensor) -> Tensor:
    """(B, 3, H, W) normalised, any size, to (B, K, H, W) logits: padded, through the network, upsampled, cut back."""
    height, width = pixels_B3HW.shape[-2:]
    padded = pad_to_multiple(pixels_B3HW)
    logits = network(padded).logits.float()
    return upsample(logits, (padded.shape[-2], padded.shape[-1]))[..., :height, :width]


def run_whole(network: nn.Module, images_B3HW: Tensor, mean: Tensor, std: Tensor, long_side: int | None) -> Tensor:
    """(B, 3, H, W) RGB in 0 to 255, any size, to (B, K, H, W) logits: what `Student.predict` does with a whole image.

    Larger images than `long_side` are scaled down to it, and their logits brought back. No step branches on the size.
    """
    if long_side is None:
        return run_padded(network, (images_B3HW - mean) / std)
    logits = run_padded(network, (scale_down(images_B3HW, long_side) - mean) / std)
    return as_large_as(logits, images_B3HW)


def as_large_as(logits_BKhw: Tensor, images_B3HW: Tensor) -> Tensor:
    """(B, K, h, w) to (B, K, H, W), half-pixel centres: from the scaled images back to the images."""
    return F.interpolate(logits_BKhw, size=images_B3HW.shape[-2:], mode="bilinear", align_corners=False)


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Offsets of windows that cover a length; the last one ends at the border."""
    step = max(1, int(window * (1 - overlap)))
    return [*range(0, length - window, step), length - window]


def resize_logits(logits_KHW: Tensor, size: tuple[int, int]) -> Tensor:
    """(K, H, W) to (K, *size), half-pixel centres: from the working size back to the image's own."""
    if tuple(logits_KHW.shape[-2:]) == tuple(size):
        return logits_KHW
    return F.interpolate(logits_KHW[None], size=size, mode="bilinear", align_corners=False)[0]


class Student(nn.Module):
    """A trained student with all that its use needs; made by `load_student`."""

    def __init__(self, network: SegmentationNetwork, metadata: dict[str, Any]) -> None:
        super().__init__()
        self.network = network.eval()
        self.classes: list[str] = metadata["classes"]
        self.palette: list[list[int]] = metadata["palette"]
        mean, std = (tuple(values) for values in metadata["normalisation"][:2])
        self.normalisation = Normalisation(mean, std)
        self.long_side: int | None = metadata["long_side"]
        self.metadata = metadata

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """(B, 3, H, W) float32 RGB in 0 to 255 to (B, K, H, W) logits; differentiable, any size.

        Images larger than `long_side` are scaled down inside, as `predict` does, and their logits brought back to (H, W).
        """
        mean, std = (torch.tensor(v, device=images_B3HW.device).view(1, 3, 1, 1) for v in self.normalisation[:2])
        larger = self.long_side is not None and max(images_B3HW.shape[-2:]) > self.long_side
        return run_whole(self.network, images_B3HW, mean, std, self.long_side if larger else None)

    def predict(
        self,
        image: np.ndarray | Image.Image | str | Path,
        *,
        window: tuple[int, int] | None = None,
        overlap: float = OVERLAP,
    ) -> np.ndarray:
        """An RGB image (array (H, W, 3) uint8, PIL image, or path) to its class ids, (H, W) uint8.

        An image larger than `long_side` is scaled down first. `window`: (height, width) in pixels of a sliding window over the
        scaled image, `overlap` its share that neighbours have in common, as `predict_logits` has them; the whole image where None.
        Raises DataError for files and PIL images that training would refuse, too: transparent ones, and those of 16 bits.
        """
        if isinstance(image, (str, Path)):
            pixels = read_image(image)
        elif isinstance(image, Image.Image):
            pixels = rgb_of(image, getattr(image, "filename", "") or "the image")
        else:
            pixels = image
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            raise ValueError(f"predict takes (H, W, 3) uint8 RGB, not {pixels.shape} {pixels.dtype}")
        size = pixels.shape[0], pixels.shape[1]
        pixels = resize_image(pixels, *scaled_size(*size, self.long_side))
        self.network.eval()
        logits = predict_logits(self.network, pixels, self.normalisation, window=window, overlap=overlap)
        return resize_logits(logits, size).max(0).indices.to(torch.uint8).cpu().numpy()


def load_student(path: str | Path, device: str | torch.device = "cpu") -> Student:
    """Reads `student.safetensors`; its metadata says how to build the network. Raises WeightsError for any other file."""
    path = Path(path)
    require_access(path)
    if not is_there(path):
        raise WeightsError(f"{path}: no such file; {_others(path)}")
    metadata = read_metadata(path)
    if metadata.get("kind") != "student":
        raise WeightsError(f"{path}: not a student made by `mgd-pipeline train-student`")
    lacking = [key for key in ("network", "classes", "palette", "normalisation", "long_side") if key not in metadata]
    try:
        params = NetworkParams(**metadata.get("network", {}))
    except ValidationError as error:
        lacking.append(".".join(map(str, ("network", *error.errors()[0]["loc"]))))
    if lacking:
        raise WeightsError(f"{path}: written by another version of mgd-pipeline (differs in {', '.join(lacking)}); use that one")
    network = load_network(params, len(metadata["classes"]), path)
    return Student(network, metadata).to(device).eval()


def _others(path: Path) -> str:
    """What to do where there is no such student: the students that lie near it, or below this folder."""
    places = (path.parent, *path.parent.parent.glob("*/"), *Path("data/students").glob("*/"))
    near = {place / "student.safetensors" for place in places if (place / "student.safetensors").is_file()}
    if not near:
        return "make one by `mgd-pipeline train-student`"
    return f"there {'is' if len(near) == 1 else 'are'} {listed([shell_command(other) for other in sorted(near)])}"
