"""How do cached targets differ from the targets of a teacher that runs on every view? Markdown tables by cause, and a picture.

mgd-pipeline demo runs/0 --full --seed 0
python docs/experiments/live_vs_cached.py runs/0 --images 96 --picture docs/experiments/live-and-cached-targets.png

Each row draws views of the first unlabelled images that differ from the whole image in one respect. It compares the teacher
cache's targets on these views with the teacher's own output. "Right" is the share of pixels that agree with the truth, for data
sets that have masks of their "unlabelled" images. Nothing is trained on these masks.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mgd_pipeline.caches.reader import TargetCache, open_cache
from mgd_pipeline.data.images import IGNORE, read_image, read_mask
from mgd_pipeline.data.manifest import ImageKey, Manifest, read_manifest
from mgd_pipeline.distillation.losses import content_aware_loss, semantic_sensitive_loss
from mgd_pipeline.networks.encoders import normalisation
from mgd_pipeline.networks.normalisation import Normalisation
from mgd_pipeline.networks.segmentation import MULTIPLE, SegmentationNetwork, load_network, upsample
from mgd_pipeline.params import SmpTeacher
from mgd_pipeline.training.batches import ReadTargets, Source, ViewTargets, make_source, view_images, view_labels, view_targets
from mgd_pipeline.views import ViewParams, draw_cutmix, draw_view, mix, valid_pixels
from mgd_stages.run.project import Project, open_project

CPU = torch.device("cpu")


class Teacher(NamedTuple):
    name: str
    network: SegmentationNetwork
    normalise: Normalisation
    cache: TargetCache


class Difference(NamedTuple):
    """Means over views; `region` is the root mean square over pairs of the 49 regions; nan where not compared."""

    live_right: float
    cached_right: float
    agreement: float
    kl: float
    region: float
    image: float


def padded(side: int) -> int:
    return -(-side // MULTIPLE) * MULTIPLE


def whole(height: int, width: int, scale: float = 1.0, flip: bool = False) -> ViewParams:
    """The whole image at a scale, padded below and to the right as stage one pads it."""
    rows, columns = round(height * scale), round(width * scale)
    return ViewParams(height, width, rows, columns, 0, 0, padded(rows), padded(columns), flip)


def framed(height: int, width: int) -> ViewParams:
    """The whole image in the middle of a view with 16 pixels or more of padding on each side."""
    size = padded(height + 2 * 16), padded(width + 2 * 16)
    return ViewParams(height, width, height, width, -((size[0] - height) // 2), -((size[1] - width) // 2), size[0], size[1])


def cropped(rng: np.random.Generator, height: int, width: int, crop: tuple[int, int], step: int) -> ViewParams:
    """A crop at scale 1 whose offsets are multiples of `step`; the largest multiple of 32 that fits where the image is small."""
    size = [min(c, side // MULTIPLE * MULTIPLE) for c, side in zip(crop, (height, width), strict=True)]
    top, left = (int(rng.integers((side - s) // step + 1)) * step for side, s in zip((height, width), size, strict=True))
    return ViewParams(height, width, height, width, top, left, size[0], size[1])


def sources(
    project: Project, manifest: Manifest, teacher: Teacher, images: int, draw: Callable[..., ViewParams]
) -> Iterator[Source]:
    """One image each, so that images of any sizes go together."""
    for row in manifest.unlabelled[:images]:
        image = read_image(project.base / manifest.root / row.image_path, manifest.long_side)
        targets = teacher.cache.read([teacher.cache.row(ImageKey(row.image_id, row.image_sha256))])
        pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]
        labels = None
        if row.mask_path is not None:
            size = (image.shape[0], image.shape[1])
            mask = read_mask(project.base / manifest.root / row.mask_path, np.asarray(manifest.lookup), size)
            labels = torch.from_numpy(mask)[None]
        view = draw(image.shape[0], image.shape[1])
        yield make_source(
            [row], [view], pixels, labels, {teacher.name: ReadTargets(targets, teacher.cache.layout)}, torch.zeros(1, 6)
        )


@torch.no_grad()
def run(teacher: Teacher, inputs: Tensor) -> ViewTargets:
    outputs = teacher.network(inputs)
    return ViewTargets(upsample(outputs.logits.float(), (inputs.shape[-2], inputs.shape[-1])), outputs.features.float())


def truth_of(source: Source) -> Tensor | None:
    return None if source.labels is None else view_labels(source)


def cached(teacher: Teacher, source: Source) -> ViewTargets:
    return view_targets(source, teacher.name)


def difference(live: ViewTargets, other: ViewTargets, valid: Tensor, truth: Tensor | None, regions: bool = True) -> Difference:
    right = [math.nan, math.nan]
    if truth is not None and (truth != IGNORE).any():
        known = truth != IGNORE
        right = [(targets.logits.max(1).indices == truth)[known].float().mean().item() for targets in (live, other)]
    agree = (live.logits.max(1).indices == other.logits.max(1).indices)[valid].float().mean()
    divergence = F.kl_div(other.logits.log_softmax(1), live.logits.log_softmax(1), reduction="none", log_target=True).sum(1)
    region = content_aware_loss(other.features, live.features, valid=valid).sqrt().item() if regions else math.nan
    image = semantic_sensitive_loss(other.logits, live.logits, valid=valid).item()
    return Difference(right[0], right[1], agree.item(), divergence[valid].mean().item(), region, image)


def compare(teacher: Teacher, views: Iterator[Source]) -> Iterator[Difference]:
    for source in views:
        live = run(teacher, view_images(source, teacher.normalise, 0))
        yield difference(live, cached(teacher, source), valid_pixels(source.views), truth_of(source))


def encodings(teacher: Teacher, views: Iterator[Source], other: Callable[[Tensor], Tensor]) -> Iterator[Difference]:
    """Whole images whose logits at stride 4 went through `other`."""
    for source in views:
        inputs = view_images(source, teacher.normalise, 0)
        with torch.no_grad():
            outputs = teacher.network(inputs)
        size = (inputs.shape[-2], inputs.shape[-1])
        live, changed = (upsample(logits, size) for logits in (outputs.logits, other(outputs.logits)))
        features = outputs.features
        yield difference(
            ViewTargets(live, features), ViewTargets(changed, features), valid_pixels(source.views), truth_of(source), regions=False
        )


def coarser(logits: Tensor) -> Tensor:
    """Every second cell's worth, corners aligned: stride 8."""
    half = (logits.shape[-2] // 2, logits.shape[-1] // 2)
    small = F.interpolate(logits, size=half, mode="bilinear", align_corners=True)
    return F.interpolate(small, size=(logits.shape[-2], logits.shape[-1]), mode="bilinear", align_corners=True)


def seams(teacher: Teacher, views: Iterator[Source], rng: np.random.Generator) -> Iterator[Difference]:
    """The live teacher on mixed views against its own mixed targets: the seam alone."""
    pair: list[Source] = []
    for source in views:
        pair.append(source)
        if len(pair) == 2:
            view = source.views[0]
            mask = torch.from_numpy(draw_cutmix(rng, view.crop_height, view.crop_width))[None]
            first, second = (view_images(one, teacher.normalise, 0) for one in pair)
            apart = [run(teacher, inputs) for inputs in (first, second)]
            mixed = ViewTargets(mix(apart[0].logits, apart[1].logits, mask), mix(apart[0].features, apart[1].features, mask))
            valid = mix(valid_pixels(pair[0].views), valid_pixels(pair[1].views), mask)
            truths = [truth_of(one) for one in pair]
            truth = None if truths[0] is None or truths[1] is None else mix(truths[0], truths[1], mask)
            yield difference(run(teacher, mix(first, second, mask)), mixed, valid, truth)
            pair = []


def rows(project: Project, manifest: Manifest, teacher: Teacher, images: int) -> Iterator[tuple[str, list[Difference]]]:
    params, seed = project.params, 0
    crop = (params.views.crop[0], params.views.crop[1])

    def of(draw: Callable[..., ViewParams]) -> Iterator[Source]:
        return sources(project, manifest, teacher, images, draw)

    def rng() -> np.random.Generator:
        return np.random.default_rng(seed)

    def drawn() -> Callable[..., ViewParams]:
        generator = rng()
        return lambda height, width: draw_view(generator, (height, width), crop, params.views.scales, params.views.flip)

    def crops(step: int) -> Callable[..., ViewParams]:
        generator = rng()
        return lambda height, width: cropped(generator, height, width, crop, step)

    yield f"the cache on whole images ({params.targets.logits})", list(compare(teacher, of(whole)))
    yield "float16 logits", list(encodings(teacher, of(whole), lambda logits: logits.half().float()))
    yield "stride 8", list(encodings(teacher, of(whole), coarser))
    yield "flip", list(compare(teacher, of(lambda height, width: whole(height, width, flip=True))))
    yield "padding on every side", list(compare(teacher, of(framed)))
    for scale in sorted({params.views.scales[0], params.views.scales[-1]}):
        yield f"scale {scale:g}", list(compare(teacher, of(lambda height, width, scale=scale: whole(height, width, scale))))
    yield f"crop {crop[0]} x {crop[1]}, offsets of 32: context", list(compare(teacher, of(crops(MULTIPLE))))
    yield "the same, any offset", list(compare(teacher, of(crops(1))))
    yield "CutMix seam, on drawn views", list(seams(teacher, of(drawn()), rng()))
    yield "drawn views: all together, without CutMix", list(compare(teacher, of(drawn())))


def picture(project: Project, manifest: Manifest, teacher: Teacher, path: Path, count: int = 4) -> None:
    """Drawn views: the image, the live and the cached labels, and where they disagree."""
    generator, params = np.random.default_rng(1), project.params
    crop = (params.views.crop[0], params.views.crop[1])
    drawn = sources(
        project, manifest, teacher, count, lambda h, w: draw_view(generator, (h, w), crop, params.views.scales, params.views.flip)
    )
    figure, axes = plt.subplots(count, 4, figsize=(8, 2.05 * count * crop[0] / crop[1]), squeeze=False)
    palette = np.array(manifest.palette, np.uint8)
    plain = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    for line, source in zip(axes, drawn, strict=True):
        inputs = view_images(source, teacher.normalise, 0)
        live, stored = (targets.logits[0].max(0).indices.numpy() for targets in (run(teacher, inputs), cached(teacher, source)))
        valid = valid_pixels(source.views)[0].numpy()
        shown = view_images(source, plain, 0)[0].clamp(0, 255).byte().permute(1, 2, 0).numpy()
        for axis, panel in zip(line, (shown, palette[live], palette[stored], (live != stored) & valid), strict=True):
            axis.imshow(panel, cmap="gray", interpolation="nearest")
            axis.axis("off")
    for axis, title in zip(axes[0], ("view", "live", "cached", "differs"), strict=True):
        axis.set_title(title, fontsize=9)
    figure.tight_layout(pad=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("project", type=Path)
    parser.add_argument("--images", type=int, default=96, help="unlabelled images")
    parser.add_argument("--picture", type=Path, help="PNG of the first teacher")
    arguments = parser.parse_args()
    project = open_project(arguments.project / "params.yaml")
    manifest = read_manifest(project.manifest, project.base)
    for number, (name, params) in enumerate(project.params.teachers.items()):
        assert isinstance(params, SmpTeacher), "live targets come from this project's own teachers"
        network = load_network(params, len(manifest.classes), project.teacher(name)).eval()
        teacher = Teacher(name, network, normalisation(params.encoder), open_cache(project.targets(name)))
        print(f"\n| {name} | live right, % | cached right, % | same class, % | KL, nats | RMS of region cosines | mean logits |")
        print("|---|---|---|---|---|---|---|")
        for cause, differences in rows(project, manifest, teacher, arguments.images):
            means = np.array(differences).mean(0) * (100, 100, 100, 1, 1, 1)
            formats = ("{:.1f}", "{:.1f}", "{:.1f}", "{:.4f}", "{:.3f}", "{:.2f}")
            cells = ["-" if math.isnan(mean) else text.format(mean) for text, mean in zip(formats, means, strict=True)]
            print(f"| {cause} | {' | '.join(cells)} |", flush=True)
        if number == 0 and arguments.picture:
            picture(project, manifest, teacher, arguments.picture)


if __name__ == "__main__":
    main()
