"""Targets of whole images, by networks that repeat what they see: cell and pixel stay together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import region_means, teacher_of
from mgd_pipeline.data.images import read_image
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.networks.normalisation import Normalisation
from mgd_pipeline.networks.segmentation import DenseOutputs, SegmentationNetwork, build_network, output_grid, upsample
from mgd_pipeline.params import TargetsParams, TeacherNetworkParams, TtaParams
from mgd_pipeline.teachers.looks import class_scores, dense_targets, largest_logits, look, pixel_means
from mgd_pipeline.teachers.teacher import Teacher, TeacherOutputs, read_for
from mgd_pipeline.training import semi_supervised
from mgd_stages.run.project import Project

PLAIN = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class Net(torch.nn.Module):
    """A network without weights: a function from its input to logits and features, which are the same."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.anything, self.function = torch.nn.Parameter(torch.zeros(1)), function

    def forward(self, images: torch.Tensor) -> TeacherOutputs:
        cells = self.function(images)
        return TeacherOutputs(cells, cells)


def echo(images: torch.Tensor) -> torch.Tensor:
    """The colours at cells of 4 pixels, corners aligned."""
    size = images.shape[-2] // 4, images.shape[-1] // 4
    return torch.nn.functional.interpolate(images, size, mode="bilinear", align_corners=True)


def areas(stride: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The colours of areas of `stride` pixels: the cells of torchvision, transformers and timm."""

    def cells(images: torch.Tensor) -> torch.Tensor:
        assert images.shape[-2] % stride == images.shape[-1] % stride == 0
        return torch.nn.functional.avg_pool2d(images, stride)

    return cells


def contrast(images: torch.Tensor) -> torch.Tensor:
    """The difference between neighbouring columns, as one channel of areas of 4 pixels."""
    steps = torch.nn.functional.pad(images.diff(dim=-1).abs(), (0, 1)).mean(1, keepdim=True)
    return torch.nn.functional.avg_pool2d(steps, 4)


@pytest.mark.parametrize("size", [(64, 96), (61, 90), (33, 47)])
def test_region_means_are_block_means_of_the_upsampled_features(size: tuple[int, int]) -> None:
    features = torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    padded = (-(-size[0] // 32) * 32, -(-size[1] // 32) * 32)
    features = features[..., : padded[0] // 4, : padded[1] // 4]
    teacher = Teacher(Net(lambda images: features).eval(), PLAIN, align_corners=True)
    for stride in (4, 8, 16):
        means = look(teacher, [np.zeros((*size, 3), np.uint8)], TargetsParams(region_stride=stride)).features  # type: ignore[arg-type]
        assert torch.allclose(means, region_means(features, size, stride), atol=1e-5)
    means = pixel_means(features, size)
    assert torch.allclose(means, upsample(features, padded)[..., : size[0], : size[1]].mean((2, 3)), atol=1e-5)


OPTIONS = [
    TargetsParams(),
    TargetsParams(stride=16, region_stride=4),
    TargetsParams(stride=2, tta=TtaParams()),
    TargetsParams(stride=2, tta=TtaParams(scales=[0.75, 1.0, 1.5])),
    TargetsParams(stride=8, region_stride=8, tta=TtaParams(scales=[1.25])),
    TargetsParams(window=[84, 112]),
    TargetsParams(window=[64, 100], overlap=0.5, region_stride=8, tta=TtaParams(scales=[0.75, 1.25])),
]


def eighths(patch: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The colours at eight cells for each patch, corners aligned, as DPT has them."""

    def cells(images: torch.Tensor) -> torch.Tensor:
        size = images.shape[-2] // patch * 8, images.shape[-1] // patch * 8
        return torch.nn.functional.interpolate(images, size, mode="bilinear", align_corners=True)

    return cells


TEACHERS = {
    "corners aligned": Teacher(Net(echo).eval(), PLAIN, align_corners=True),
    "areas of 8": Teacher(Net(areas(8)).eval(), PLAIN, align_corners=False),
    "areas of 14, padded to 14": Teacher(Net(areas(14)).eval(), PLAIN, align_corners=False, multiple=14),
    "areas of 4, seen at 150": Teacher(Net(areas(4)).eval(), PLAIN, align_corners=False, short_side=150),
    "eight cells for 14 pixels, padded to 28": Teacher(Net(eighths(14)).eval(), PLAIN, align_corners=True, multiple=28),
    "corners aligned, seen at 100": Teacher(Net(echo).eval(), PLAIN, align_corners=True, short_side=100),
}


AWAY = {kind: 30 if "14" in kind else 20 for kind in TEACHERS}
"""Pixels from a border: cells that see padding, and the cells interpolated from them."""


def assert_ramps(logits: np.ndarray, ends: tuple[int, int], frame: np.ndarray, away: int, tolerance: float) -> None:
    """The first two logits are the row and the column of the pixel at which each cell lies, away from borders."""
    for axis in (0, 1):
        along = np.moveaxis(logits[axis], axis, 0)
        pixels, across = (np.linspace(0, frame[i] - 1, along.shape[i != axis]) for i in (axis, 1 - axis))
        inside = (pixels > away) & (pixels < ends[axis] - away)
        within = (across > away) & (across < ends[1 - axis] - away)
        assert inside.sum() >= 3
        assert np.abs(along[inside][:, within] - pixels[inside, None]).max() < tolerance


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [(128, 192), (118, 165)])
@pytest.mark.parametrize("kind", TEACHERS)
def test_a_ramp_in_an_image_is_the_same_ramp_in_its_targets(kind: str, options: TargetsParams, size: tuple[int, int]) -> None:
    """Whatever grid, scales, flips, windows and strides a target went through, cell and pixel stay together (away from borders)."""
    teacher = TEACHERS[kind]
    image = np.zeros((*size, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(size[0])[:, None], np.arange(size[1])[None]
    targets = dense_targets(teacher, [image], options)[0]
    embeddings = look(teacher, [image], options).features[0]
    assert np.array_equal(targets.region_embeddings, embeddings.numpy().astype(np.float16)), "which knows no tenths of pixels"
    frame, stride = output_grid([size]).frames[0], options.region_stride
    assert targets.logits.shape == (3, frame[0] // options.stride, frame[1] // options.stride)
    assert targets.region_embeddings.shape == (3, -(-size[0] // stride), -(-size[1] // stride))
    # Antialiased resizing averages uint8 pixels: half a grey value of rounding where there is a scale.
    exact = teacher.short_side is None and (options.tta is None or options.tta.scales == [1.0])
    tolerance = 0.05 if exact else 0.55
    assert_ramps(targets.logits, size, frame, AWAY[kind], tolerance)
    for axis in (0, 1):
        blocks = np.moveaxis(embeddings[axis].numpy(), axis, 0)
        centres = np.arange(len(blocks)) * stride + (stride - 1) / 2
        inner = slice(2 * 16 // stride, -2 * 16 // stride - 1)
        assert np.abs(blocks[inner, inner] - centres[inner, None]).max() < tolerance


class Patches(torch.nn.Module):
    """An encoder whose maps are the mean colours of patches."""

    def __init__(self, patch: int, channels: int) -> None:
        super().__init__()
        self.patch, self.channels = patch, channels

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        means = areas(self.patch)(images)
        padded = torch.nn.functional.pad(means, (0, 0, 0, 0, 0, self.channels - 3))
        return [padded] * 4, [torch.zeros(len(images), 1, self.channels)] * 4


def repeating_dpt(encoder: str) -> SegmentationNetwork:
    """smp's DPT with weights that repeat the colours of patches, by its finest map alone."""
    network = build_network(TeacherNetworkParams(decoder="dpt", encoder=encoder, decoder_channels=16), 3)
    model = network.model
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.zeros_(layer.weight) if "residual" in name else torch.nn.init.dirac_(layer.weight)
        elif isinstance(layer, torch.nn.ConvTranspose2d):
            torch.nn.init.zeros_(layer.weight)
            layer.weight.data[range(16), range(16)] = 1
        elif isinstance(layer, torch.nn.Linear):
            torch.nn.init.eye_(layer.weight)
        if isinstance(bias := getattr(layer, "bias", None), torch.Tensor):
            torch.nn.init.zeros_(bias)
    for block in model.decoder.reassemble_blocks[1:]:
        torch.nn.init.zeros_(block.project_to_feature_dim.weight)
    model.encoder = Patches(model.encoder.output_stride, model.encoder.out_channels[0])
    return network.eval()


@pytest.mark.parametrize("exact", [True, False], ids=["aligned ramp", "whole DPT"])
@pytest.mark.parametrize(("encoder", "patch"), [("tu-test_vit", 16), ("tu-eva02_tiny_patch14_224", 14)])
def test_dpt_sees_a_pixel_where_it_is_in_training_and_in_stage_one(
    encoder: str, patch: int, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the logits that the loss gets and in those that are stored. Views are multiples of 32; for patches of 14 pixels they are
    padded to multiples of 28.

    Cells that repeat a ramp, corners aligned, repeat it exactly. smp's DPT doubles areas of patch / 4 pixels as if their corners
    were aligned, so that a border cell comes from (patch / 4 - 1) / 2 pixels further inside; elsewhere the shift is smaller.
    """
    network, height, width = repeating_dpt(encoder), 160, 192
    assert network.multiple == 2 * patch
    if exact:
        monkeypatch.setattr(network, "encode", eighths(patch))
        monkeypatch.setattr(network, "decode", lambda cells: DenseOutputs(cells, cells))
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(height)[:, None], np.arange(width)[None]
    view = torch.from_numpy(image).permute(2, 0, 1)[None].float()

    seen: list[torch.Tensor] = []
    monkeypatch.setattr(semi_supervised, "view_labels", lambda _: None)
    monkeypatch.setattr(semi_supervised, "view_images", lambda *_: view)
    monkeypatch.setattr(semi_supervised, "supervised_loss", lambda logits, *_, **__: seen.append(logits) or logits.sum())
    batch: Any = SimpleNamespace(unlabelled=None, labelled=SimpleNamespace(images=view))
    semi_supervised.cross_pseudo_supervision([network], batch, semi_supervised.Settings(PLAIN, 0, False, None, 0))
    teacher = Teacher(network, PLAIN, align_corners=True, multiple=network.multiple)
    stored = class_scores(look(teacher, [image], TargetsParams(stride=2)).logits, (height, width))
    for logits in (seen[0][0].detach(), stored[0]):
        for axis, side in ((0, height), (1, width)):
            whole = side // patch * patch  # pixels of whole patches; the patches beyond see padding
            places = np.moveaxis(logits[axis].numpy(), axis, 0)[:whole, 3 * patch].reshape(-1, patch).mean(1)
            shifts = places - (np.arange(len(places)) * patch + (patch - 1) / 2)
            assert np.abs(shifts[1:-1]).max() < (0.01 if exact else (patch / 4 - 1) / 2 + 0.1)


@pytest.mark.parametrize("kind", [name for name, teacher in TEACHERS.items() if teacher.short_side is None])
@pytest.mark.parametrize("short_side", [118, 150, 236])
@pytest.mark.parametrize("stride", [2, 4])
def test_a_teacher_with_a_short_side_sees_the_whole_file_and_speaks_of_the_working_size(
    kind: str, short_side: int, stride: Literal[2, 4], tmp_path: Path
) -> None:
    """A ramp in a file of twice the working size is the same ramp in the targets, in pixels of the working size."""
    teacher = replace(TEACHERS[kind], short_side=short_side)
    image = np.zeros((236, 330, 3), np.uint8)
    image[..., 0] = np.arange(236)[:, None]
    image[..., 1] = np.minimum(np.arange(330), 255)[None]
    Image.fromarray(image).save(tmp_path / "ramp.png")
    shown = read_for(teacher, tmp_path / "ramp.png", 165)
    assert shown.shape == (236, 330, 3) and read_for(TEACHERS[kind], tmp_path / "ramp.png", 165).shape == (118, 165, 3)
    targets = dense_targets(teacher, [shown], TargetsParams(stride=stride), 165)[0]
    frame = output_grid([(118, 165)]).frames[0]
    assert targets.logits.shape == (3, frame[0] // stride, frame[1] // stride) and targets.region_embeddings.shape == (3, 8, 11)
    assert_ramps(targets.logits / 2 - 0.25, (118, 127), frame, AWAY[kind], 0.3)


def test_what_is_lost_at_the_working_size_is_seen_by_a_teacher_with_a_short_side(tmp_path: Path) -> None:
    image = np.zeros((128, 128, 3), np.uint8)
    image[:, ::2] = 200
    Image.fromarray(image).save(tmp_path / "stripes.png")
    for short_side, low, high in ((None, 0, 1), (128, 190, 200)):
        teacher = Teacher(Net(contrast).eval(), PLAIN, align_corners=False, short_side=short_side)
        seen = dense_targets(teacher, [read_for(teacher, tmp_path / "stripes.png", 64)], TargetsParams(), 64)[0]
        assert seen.logits.shape == (1, 16, 16) and seen.region_embeddings.shape == (1, 4, 4)
        assert low <= seen.logits[0, 4:12, 4:12].mean() <= high and low <= seen.global_descriptor[0] <= high


def test_cells_of_two_pixels_keep_what_is_thin(tmp_path: Path) -> None:
    """A line of one pixel of the working size: how strong it is at least, wherever it runs, in cells of 2 and of 4 pixels."""
    teacher = Teacher(Net(areas(4)).eval(), PLAIN, align_corners=False, short_side=128)
    weakest = {}
    for stride in (2, 4):
        shown = []
        for column in range(40, 56):
            image = np.zeros((128, 128, 3), np.uint8)
            image[:, column : column + 2] = 200
            targets = dense_targets(teacher, [image], TargetsParams(stride=stride), 64)[0]
            shown.append(targets.logits[0, 8].max())
        weakest[stride] = min(shown)
    assert weakest[2] > 45 and weakest[4] < 30, weakest


def test_tta_is_the_mean_of_its_passes_and_blind_to_mirrors(project: Project) -> None:
    teacher = teacher_of(project, "wide")
    manifest = read_manifest(project.manifest, project.base)
    image = read_image(project.base / manifest.root / manifest.training[0].image_path)[:32, :64]
    mirror = np.ascontiguousarray(image[:, ::-1])
    plain, mirrored = (dense_targets(teacher, [seen], TargetsParams())[0] for seen in (image, mirror))
    both, again = (dense_targets(teacher, [seen], TargetsParams(tta=TtaParams()))[0] for seen in (image, mirror))
    assert np.abs(plain.logits - mirrored.logits[..., ::-1]).max() > 1e-2, "the teacher itself is not symmetric"
    assert np.allclose(both.logits, (plain.logits + mirrored.logits[..., ::-1]) / 2, atol=1e-4)
    assert np.allclose(both.logits, again.logits[..., ::-1], atol=1e-4)
    features, mirrored_features = (look(teacher, [seen], TargetsParams(tta=TtaParams())).features for seen in (image, mirror))
    assert torch.allclose(features, mirrored_features.flip(-1), atol=1e-4)
    assert np.allclose(both.global_descriptor, again.global_descriptor, atol=1e-4)


def test_largest_logits_by_hand() -> None:
    logits = torch.tensor([5.0, 1.0, 3.0, -1.0]).view(1, 4, 1, 1)
    assert largest_logits(logits, 2).flatten().tolist() == [5.0, 0.0, 3.0, 0.0]
    assert largest_logits(logits, 4) is logits
    many = torch.randn(2, 7, 5, 6, generator=torch.Generator().manual_seed(0))
    few = largest_logits(many, 3)
    assert torch.equal(few.argmax(1), many.argmax(1)) and torch.allclose(few.mean(1), many.mean(1), atol=1e-6)
