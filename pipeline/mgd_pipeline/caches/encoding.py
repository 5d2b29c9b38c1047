"""What one teacher says of one image, and how it is encoded. NumPy only: reading a cache imports no torch.

Letters: K classes, D decoder channels, h w cells of the logits, r c cells of the regions.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from mgd_pipeline.errors import NonFiniteError

_FLOAT16_EXPONENT = np.uint16(0x7C00)
"""All bits of the exponent; only NaN and infinity have all of them set."""

TARGETS_VERSION = 1
"""Raised whenever the meaning of stored targets changes; caches of another version are refused."""


class Fidelity(NamedTuple):
    """What the encoding of targets has changed, as sums over a sample of their cells: those of several images are added up."""

    cells: float = 0
    """cells of the logits in the sample"""
    kl: float = 0
    """KL divergence from the teacher's probabilities to the stored ones, nats, summed over these cells"""
    same_class: float = 0
    """how many of these cells have the same most likely class"""
    pairs: float = 0
    """pairs of cells of the regions in the sample"""
    cosine: float = 0
    """squared error of the cosine similarity, summed over these pairs"""


class TeacherTargets(NamedTuple):
    """Targets of one image in the image's own frame. K is 0 for a teacher without classes, D is 0 for one without features."""

    logits: np.ndarray
    """(K, h, w) float32; corners aligned with the padded network input. Or uint8, which `logits_affine` decodes."""
    region_embeddings: np.ndarray
    """(D, r, c) float16: decoder features averaged over blocks of pixels, half-pixel centres. Or uint8, which `region_affine`
    decodes. The device that made them has rounded them already: it rounds ten times faster than NumPy, and a GPU has less to send.
    """
    global_descriptor: np.ndarray
    """(K,) float32: logits averaged over the pixels of the image."""
    logits_affine: tuple[float, float] | None = None
    """Offset and scale of encoded logits"""
    region_affine: np.ndarray | None = None
    """(D, 2) float32: offset and scale of each channel of encoded region embeddings"""
    fidelity: Fidelity | None = None
    """What the encoding has changed, where something is encoded"""


class EncodedLogits(NamedTuple):
    values: np.ndarray
    """(K, h, w) uint8 or float16"""
    offset: float
    scale: float
    """logit = offset + scale * value"""


def encode_logits(logits: np.ndarray, encoding: Literal["uint8", "float16"]) -> EncodedLogits:
    """Encodes (K, h, w) float32 logits; the error is at most half a step of 1/255 of their range (uint8).

    float16 rounds them, and needs magnitudes of at most 65504. Raises NonFiniteError.
    """
    require_finite(logits, "logits")
    if encoding == "float16":
        largest = float(np.abs(logits).max(initial=0))
        if largest > float(np.finfo(np.float16).max):
            raise NonFiniteError(f"logits: {largest:g} is beyond float16 (65504)")
        return EncodedLogits(logits.astype(np.float16), 0.0, 1.0)
    low, high = np.float32(logits.min()), np.float32(logits.max())
    # A constant map has no range: any scale except 0 decodes it without a special case.
    scale = np.float32((high - low) / 255) or np.float32(1)
    values = np.rint((logits - low) / scale).clip(0, 255).astype(np.uint8)
    return EncodedLogits(values, float(low), float(scale))


def decoded(values: np.ndarray, affine: np.ndarray | tuple[float, float] | None) -> np.ndarray:
    """(K, h, w) logits by their (2,) offset and scale, or (D, r, c) region embeddings by the (D, 2) of their channels, as float32;
    as stored where there are none."""
    if affine is None or not len(affine):
        return values
    offset, scale = np.asarray(affine, np.float32).T[..., None, None]
    return offset + scale * values


def require_finite_float16(values: np.ndarray, what: str) -> None:
    """Like `require_finite`, only for float16 and in a sixth of the time.

    Raises TypeError for another dtype, which NumPy would round silently, and values beyond float16 to infinity.
    """
    if values.dtype != np.float16:
        raise TypeError(f"{what}: {values.dtype}, must be float16")
    if (values.view(np.uint16) & _FLOAT16_EXPONENT == _FLOAT16_EXPONENT).any():
        count = int((~np.isfinite(values)).sum())
        raise NonFiniteError(f"{what}: {count} of {values.size} values are NaN, infinite or beyond float16 (65504)")


def require_finite(values: np.ndarray, what: str) -> None:
    """Raises NonFiniteError with the number of values that are NaN or infinite."""
    if not np.isfinite(values).all():
        count = int((~np.isfinite(values)).sum())
        raise NonFiniteError(f"{what}: {count} of {values.size} values are NaN or infinite")
