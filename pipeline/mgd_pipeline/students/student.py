"""A trained student: one file, and a network that is ready to use.

Letters: K classes, H W pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from mgd_pipeline.access import is_there
from mgd_pipeline.data.images import PhotoRules, photo_of, read_photo, resize_image, scaled_size
from mgd_pipeline.errors import WeightsError, shell_command
from mgd_pipeline.networks.inference import OVERLAP, predict_logits, resize_logits, run_whole
from mgd_pipeline.networks.normalisation import Normalisation
from mgd_pipeline.networks.segmentation import SegmentationNetwork, load_network
from mgd_pipeline.networks.weights import read_metadata, require_access, sha256_of_state
from mgd_pipeline.params import NetworkParams
from mgd_pipeline.words import listed


class Student(nn.Module):
    """A trained student with everything that prediction needs; made by `load_student`."""

    def __init__(self, network: SegmentationNetwork, metadata: dict[str, Any]) -> None:
        super().__init__()
        self.network = network.eval()
        self.classes: list[str] = metadata["classes"]
        self.palette: list[list[int]] = metadata["palette"]
        mean, std = (tuple(values) for values in metadata["normalisation"][:2])
        self.normalisation = Normalisation(mean, std)
        self.long_side: int | None = metadata["long_side"]
        self.photo_rules = PhotoRules(**metadata.get("photo_rules", {}))
        """How photos are decoded; students of projects with the default rules do not note it."""
        self.metadata = metadata

    @property
    def weights_sha256(self) -> str:
        """`sha256_of_state` of the student file's tensors, by which exported files name their student."""
        return sha256_of_state(self.network.model.state_dict())

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

        The EXIF orientation of files and PIL images is applied first, as viewers do, so the mask fits the photo as it is shown.

        An image larger than `long_side` is scaled down first. `window` is (height, width) in pixels of a sliding window over the
        scaled image, and `overlap` the share that neighbouring windows have in common; without a window the whole image is seen
        at once. Raises DataError for files and PIL images that training refuses as well: transparent or 16-bit ones.
        """
        if isinstance(image, (str, Path)):
            pixels = read_photo(image, self.photo_rules)[0]
        elif isinstance(image, Image.Image):
            pixels = photo_of(image, getattr(image, "filename", "") or "the image", self.photo_rules)[0]
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
    """Reads a `student.safetensors`, whose metadata says how to build the network. Raises WeightsError for any other file."""
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
    above, project = path.parent, Path("data/students")
    places = (above, *above.glob("*/"), *above.parent.glob("*/"), project, *project.glob("*/"))
    near = {place / name for place in places for name in ("best.safetensors", "student.safetensors")}
    near = {file for file in near if file.is_file()}
    if not near:
        return "make one by `mgd-pipeline train-student`"
    return f"there {'is' if len(near) == 1 else 'are'} {listed([shell_command(other) for other in sorted(near)])}"
