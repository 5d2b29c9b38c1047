"""How do cached targets differ from the targets of a teacher that runs on every view? Markdown tables by cause.

mgd-pipeline demo runs/0 --full --seed 0
python docs/experiments/live_vs_cached.py runs/0 --images 96

Each row draws views of the first unlabelled images that differ from the whole image in one respect. It compares the teacher
cache's targets on these views with the teacher's own output. "Right" is the share of pixels that agree with the truth, for data
sets that have masks of their "unlabelled" images. Nothing is trained on these masks.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mgd_pipeline.caches.reader import TargetCache, open_cache
from mgd_pipeline.data.images import IGNORE
from mgd_pipeline.data.manifest import Manifest, read_manifest
from mgd_pipeline.distillation import content_aware_loss, semantic_sensitive_loss
from mgd_pipeline.networks.encoders import normalisation
from mgd_pipeline.networks.normalisation import Normalisation
from mgd_pipeline.networks.segmentation import MULTIPLE, SegmentationNetwork, load_network, upsample
from mgd_pipeline.params import SmpTeacher, ViewsParams
from mgd_pipeline.training.batches import ReadTargets, Source, ViewTargets, make_source, view_images, view_labels, view_targets
from mgd_pipeline.views import ViewParams, draw_cutmix, draw_view, mix, valid_pixels
from mgd_stages.run.project import open_project

Draw = Callable[[int, int], ViewParams]
"""A view of an image from its height and width, pixels."""
FORMATS = {
    "live right, %": "{:.1f}",
    "cached right, %": "{:.1f}",
    "same class, %": "{:.1f}",
    "KL, nats": "{:.4f}",
    "RMS of region cosines": "{:.3f}",
    "mean logits": "{:.2f}",
}
"""The columns."""


@dataclass(frozen=True)
class Teacher:
    """A teacher, its cache, and the images that both have seen."""

    name: str
    network: SegmentationNetwork
    normalise: Normalisation
    cache: TargetCache
    manifest: Manifest
    images: int
    """how many unlabelled images count"""

    def sources(self, draw: Draw) -> Iterator[Source]:
        """One image each, so that images of any sizes go together."""
        for row in self.manifest.unlabelled[: self.images]:
            image = self.manifest.image(row)
            size = image.shape[0], image.shape[1]
            labels = None
            if row.mask_path is not None:
                labels = torch.from_numpy(self.manifest.mask(row, size))[None]
            targets = ReadTargets(self.cache.read([self.cache.row(self.manifest.key(row))]), self.cache.layout)
            pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]
            yield make_source([row], [draw(*size)], pixels, labels, {self.name: targets}, torch.zeros(1, 6))

    def inputs(self, source: Source) -> Tensor:
        return view_images(source, self.normalise, 0)

    @torch.no_grad()
    def live(self, inputs: Tensor, change: Callable[[Tensor], Tensor] = lambda logits: logits) -> ViewTargets:
        """What the network says, its logits at stride 4 changed."""
        outputs = self.network(inputs)
        return ViewTargets(upsample(change(outputs.logits.float()), (inputs.shape[-2], inputs.shape[-1])), outputs.features.float())


def padded(side: int) -> int:
    return -(-side // MULTIPLE) * MULTIPLE


def whole(height: int, width: int, scale: float = 1.0, flip: bool = False) -> ViewParams:
    """The whole image at a scale, padded below and to the right as stage one pads it."""
    rows, columns = round(height * scale), round(width * scale)
    return ViewParams(height, width, rows, columns, 0, 0, padded(rows), padded(columns), flip)


def framed(height: int, width: int) -> ViewParams:
    """The whole image in the middle of a view with 16 pixels or more of padding on each side."""
    size = padded(height + 2 * 16), padded(width + 2 * 16)
    return ViewParams(height, width, height, width, -((size[0] - height) // 2), -((size[1] - width) // 2), *size)


def cropped(crop: list[int], step: int) -> Draw:
    """Crops at scale 1 whose offsets are multiples of `step`; the largest multiple of 32 that fits where the image is small."""
    rng = np.random.default_rng(0)

    def draw(height: int, width: int) -> ViewParams:
        size = [min(c, side // MULTIPLE * MULTIPLE) for c, side in zip(crop, (height, width), strict=True)]
        top, left = (int(rng.integers((side - s) // step + 1)) * step for side, s in zip((height, width), size, strict=True))
        return ViewParams(height, width, height, width, top, left, size[0], size[1])

    return draw


def drawn(views: ViewsParams) -> Draw:
    """Views as training draws them."""
    rng, crop = np.random.default_rng(0), (views.crop[0], views.crop[1])
    return lambda height, width: draw_view(rng, (height, width), crop, views.scales, views.flip)


def truth_of(source: Source) -> Tensor | None:
    return None if source.labels is None else view_labels(source)


def difference(live: ViewTargets, other: ViewTargets, valid: Tensor, truth: Tensor | None, regions: bool = True) -> list[float]:
    """The columns for one view; nan where not compared. `regions` is the root mean square over pairs of the 49 regions."""
    right = [math.nan, math.nan]
    if truth is not None and (truth != IGNORE).any():
        known = truth != IGNORE
        right = [100 * (targets.logits.max(1).indices == truth)[known].float().mean().item() for targets in (live, other)]
    agree = (live.logits.max(1).indices == other.logits.max(1).indices)[valid].float().mean()
    divergence = F.kl_div(other.logits.log_softmax(1), live.logits.log_softmax(1), reduction="none", log_target=True).sum(1)
    region = content_aware_loss(other.features, live.features, valid=valid).sqrt().item() if regions else math.nan
    image = semantic_sensitive_loss(other.logits, live.logits, valid=valid).item()
    return [*right, 100 * agree.item(), divergence[valid].mean().item(), region, image]


def compare(teacher: Teacher, draw: Draw) -> Iterator[list[float]]:
    for source in teacher.sources(draw):
        live, cached = teacher.live(teacher.inputs(source)), view_targets(source, teacher.name)
        yield difference(live, cached, valid_pixels(source.views), truth_of(source))


def encodings(teacher: Teacher, change: Callable[[Tensor], Tensor]) -> Iterator[list[float]]:
    """Whole images whose logits at stride 4 went through `change`."""
    for source in teacher.sources(whole):
        inputs = teacher.inputs(source)
        live, changed = teacher.live(inputs), teacher.live(inputs, change)
        yield difference(live, changed, valid_pixels(source.views), truth_of(source), regions=False)


def coarser(logits: Tensor) -> Tensor:
    """Every second cell's worth, corners aligned: stride 8."""
    half = (logits.shape[-2] // 2, logits.shape[-1] // 2)
    small = F.interpolate(logits, size=half, mode="bilinear", align_corners=True)
    return F.interpolate(small, size=(logits.shape[-2], logits.shape[-1]), mode="bilinear", align_corners=True)


def seams(teacher: Teacher, draw: Draw) -> Iterator[list[float]]:
    """The live teacher on pairs of mixed views against its own mixed targets: the seam alone."""
    rng, sources = np.random.default_rng(0), teacher.sources(draw)
    for one, other in zip(sources, sources, strict=False):
        mask = torch.from_numpy(draw_cutmix(rng, one.views[0].crop_height, one.views[0].crop_width))[None]
        first, second = (teacher.inputs(source) for source in (one, other))
        mixed = ViewTargets(*(mix(*pair, mask) for pair in zip(teacher.live(first), teacher.live(second), strict=True)))
        valid = mix(valid_pixels(one.views), valid_pixels(other.views), mask)
        truths = truth_of(one), truth_of(other)
        truth = None if truths[0] is None or truths[1] is None else mix(truths[0], truths[1], mask)
        yield difference(teacher.live(mix(first, second, mask)), mixed, valid, truth)


def causes(teacher: Teacher, encoding: str, views: ViewsParams) -> Iterator[tuple[str, Iterator[list[float]]]]:
    """The rows: what differs, and how much on one image after the other."""
    yield f"the cache on whole images ({encoding})", compare(teacher, whole)
    yield "float16 logits", encodings(teacher, lambda logits: logits.half().float())
    yield "stride 8", encodings(teacher, coarser)
    yield "flip", compare(teacher, lambda height, width: whole(height, width, flip=True))
    yield "padding on every side", compare(teacher, framed)
    for scale in sorted({views.scales[0], views.scales[-1]}):
        yield f"scale {scale:g}", compare(teacher, lambda height, width, scale=scale: whole(height, width, scale))
    size = f"{views.crop[0]} x {views.crop[1]}"
    yield f"crop {size}, offsets of 32: context", compare(teacher, cropped(views.crop, MULTIPLE))
    yield "the same, any offset", compare(teacher, cropped(views.crop, 1))
    yield "CutMix seam, on drawn views", seams(teacher, drawn(views))
    yield "drawn views: all together, without CutMix", compare(teacher, drawn(views))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("project", type=Path)
    parser.add_argument("--images", type=int, default=96, help="unlabelled images")
    arguments = parser.parse_args()
    project = open_project(arguments.project / "params.yaml")
    manifest = read_manifest(project.manifest, project.base)
    for name, params in project.params.teachers.items():
        assert isinstance(params, SmpTeacher), "live targets come from this project's own teachers"
        network = load_network(params, len(manifest.classes), project.teacher(name)).eval()
        cache = open_cache(project.targets(name))
        teacher = Teacher(name, network, normalisation(params.encoder), cache, manifest, arguments.images)
        print(f"\n| {name} | {' | '.join(FORMATS)} |")
        print("|---" * (len(FORMATS) + 1) + "|")
        for cause, differences in causes(teacher, project.params.targets.logits, project.params.views):
            means = np.mean(list(differences), 0)
            cells = ["-" if math.isnan(mean) else text.format(mean) for text, mean in zip(FORMATS.values(), means, strict=True)]
            print(f"| {cause} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
