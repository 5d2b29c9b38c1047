"""How many bytes do the small encodings take for many classes? A simulated teacher, beside what a real one of 11 classes shows.

python benchmarks/simulated.py [CACHE ...]

Each simulated image shows a dozen of the classes (seven of eleven, as street scenes of CamVid do), frequent classes more often. The
logits of a shown class are smooth random fields, whose largest parts decide where the class lies, and fine noise. Classes that the
image does not show lie lower, each by an offset of its own, and have weaker fields: some come close, most are far.
The sizes of the parts are fitted to a real teacher: at 11 classes and 48 x 64 cells they give its calibration (mean largest
probability, entropy), its number of changes of class between neighbours, and the size of its compressed uint8 logits. Name teacher
caches with uint8 logits, and their rows stand in the table below the simulated ones.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numcodecs.zstd import compress
from torch import Tensor

from mgd_pipeline.caches.decoding import stored_logits
from mgd_pipeline.caches.encoding import encode_logits
from mgd_pipeline.caches.format import ZSTD_LEVEL
from mgd_pipeline.caches.levels import log_probability_levels
from mgd_pipeline.caches.reader import open_cache
from mgd_pipeline.params import TargetsParams

_FIELD, _ABSENT, _OFFSET, _OWN, _NOISE = 11.0, 2.0, 3.0, 3.0, 0.1
"""Sizes of the parts, nats: fields of shown classes; how far absent classes lie below; their offsets, their fields; fine noise."""
SIZES = (
    (2, 128, 128, 2),
    (5, 128, 128, 4),
    (11, 48, 64, 7),
    (21, 128, 128, 4),
    (19, 256, 512, 12),
    (150, 128, 172, 12),
    (171, 128, 160, 12),
)
"""Classes, cells, and classes in an image: of CamVid at a quarter of its size, of VOC, Cityscapes, ADE20K and COCO-Stuff."""
IMAGES = 8
"""of each size"""


def smooth(classes: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """(classes, height, width) random fields of about variance one: noise of 3 to 24 cells a column, coarse noise strongest."""
    total, size = torch.zeros(classes, height, width), 3
    for weight in (0.9, 0.25, 0.05, 0.01):
        cells = (size, max(2, round(size * width / height)))
        noise = torch.randn(1, classes, *cells, generator=generator)
        total += weight * F.interpolate(noise, (height, width), mode="bicubic", align_corners=True)[0]
        size *= 2
    return total


def simulated(classes: int, height: int, width: int, shown: int, generator: torch.Generator) -> Tensor:
    """(classes, height, width) float32 logits of one image that shows so many classes."""
    frequency = 1 / torch.arange(1, classes + 1).float()
    there = torch.multinomial(frequency, shown, generator=generator)
    offsets = _OFFSET * torch.randn(classes, 1, 1, generator=generator) - _ABSENT
    logits = offsets + _OWN * smooth(classes, height, width, generator)
    logits[there] = _FIELD * smooth(shown, height, width, generator)
    return logits + _NOISE * torch.randn(classes, height, width, generator=generator)


def facts(images: Iterable[Tensor]) -> dict[str, str]:
    """What the logits (K, h, w) of images show, and the bytes that their encodings take, as shares of the bytes of plain uint8."""
    options, rows = TargetsParams(), []
    for logits in images:
        said = logits.log_softmax(0)
        stored = log_probability_levels(logits[None], options.floor_of(len(logits)), options.levels)[0].numpy()
        plain, first = encode_logits(logits.numpy(), "uint8").values, logits.argmax(0)
        changes = torch.cat([(first[1:] != first[:-1]).flatten(), (first[:, 1:] != first[:, :-1]).flatten()])
        small, lossless = (len(compress(np.ascontiguousarray(values), ZSTD_LEVEL)) / plain.size for values in (stored, plain))
        values = said.exp().amax(0).mean(), -(said.exp() * said).sum(0).mean(), changes.float().mean()
        rows.append([*map(float, values), (stored > 0).sum(0).mean(), lossless, small])
    names = (
        "largest probability",
        "entropy, nats",
        "changes of class",
        "classes above the floor",
        "uint8 with zstd",
        "log-probability with zstd",
    )
    return {name: f"{value:.3f}" for name, value in zip(names, np.mean(rows, 0), strict=True)}


def cached(path: Path) -> Iterable[Tensor]:
    """The logits of some images of a teacher cache."""
    cache = open_cache(path)
    rows = cache.index.rows[cache.index.has_targets]
    return (torch.from_numpy(stored_logits(cache, int(row))[0]) for row in rows[:: -(-len(rows) // 24)])


def main(paths: list[Path]) -> None:
    generator = torch.Generator().manual_seed(0)
    table = {
        f"simulated, {classes} classes, {height} x {width} cells": facts(
            simulated(classes, height, width, shown, generator) for _ in range(IMAGES)
        )
        for classes, height, width, shown in SIZES
    } | {str(path): facts(cached(path)) for path in paths}
    print("\n".join(["| logits | " + " | ".join(next(iter(table.values()))) + " |", "|" + " --- |" * 7]))
    for name, values in table.items():
        print(f"| {name} | {' | '.join(values.values())} |")


if __name__ == "__main__":
    main([Path(path) for path in sys.argv[1:]])
