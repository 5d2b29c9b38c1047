"""Networks that take inputs of one size: through windows or resized, what they say stays at the pixel that they say it of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mgd_pipeline.caches.provenance import applying, expected_provenance
from mgd_pipeline.caches.reader import open_cache
from mgd_pipeline.errors import ParamsError, ProvenanceMismatch, WeightsError
from mgd_pipeline.networks.segmentation import Fault, output_grid
from mgd_pipeline.networks.weights import save_weights
from mgd_pipeline.params import FixedSize, ImportedTeacher, TargetsParams, TimmTeacher, TtaParams
from mgd_pipeline.params_file import parse_params
from mgd_pipeline.teachers.kinds import build_teacher
from mgd_pipeline.teachers.looks import dense_targets, look
from mgd_pipeline.teachers.probing import check_sees, only_size
from mgd_pipeline.teachers.teacher import Teacher, read_for, teacher_provenance
from mgd_stages.run.machine import Machine
from mgd_stages.run.project import Project
from mgd_stages.stages.precompute_teachers import precompute_teachers
from mgd_stages.stages.train_student import train_student
from test_teachers import PLAIN, Net, areas, assert_ramps, echo

CPU = torch.device("cpu")
WAYS: tuple[FixedSize, ...] = ("windows", "resize")


def of_one_size(size: tuple[int, int], corners: bool, way: FixedSize, shift: int = 0) -> Teacher:
    """Repeats the colours in cells, and refuses inputs of another size. `shift`: says of a pixel what lies so many pixels on."""

    def cells(images: torch.Tensor) -> torch.Tensor:
        assert images.shape[-2:] == size
        return (echo if corners else areas(8))(images.roll((-shift, -shift), (-2, -1)))

    return Teacher(Net(cells).eval(), PLAIN, align_corners=corners, size=size, fixed_size=way)


def ramp(size: tuple[int, int]) -> np.ndarray:
    image = np.zeros((*size, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(size[0])[:, None], np.arange(size[1])[None]
    return image


OPTIONS = [
    TargetsParams(),
    TargetsParams(stride=2, region_stride=4, tta=TtaParams()),
    TargetsParams(overlap=0.6, tta=TtaParams(scales=[0.5, 1.0, 1.5])),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("image", "away"), [((128, 192), 36), ((118, 165), 36), ((47, 60), 10)], ids=str)
@pytest.mark.parametrize("size", [(64, 64), (56, 96)], ids=str)
@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_ramp_in_an_image_is_the_same_ramp_in_its_targets(
    way: FixedSize, corners: bool, size: tuple[int, int], image: tuple[int, int], away: int, options: TargetsParams
) -> None:
    """Larger and smaller images, other proportions, scales and flips; and half a cell of a shift would be seen."""
    frame, tolerance = output_grid([image]).frames[0], 0.6  # half a grey value of rounding where images are scaled
    targets = dense_targets(of_one_size(size, corners, way), [ramp(image)], options)[0]
    assert_ramps(targets.logits, image, frame, away, tolerance)
    if options.tta is None:  # mirror images would take the shift out again
        shifted = dense_targets(of_one_size(size, corners, way, shift=4), [ramp(image)], options)[0]
        with pytest.raises(AssertionError):
            assert_ramps(shifted.logits, image, frame, away, tolerance)


@pytest.mark.parametrize("corners", [True, False])
def test_a_window_as_large_as_the_image_is_the_image(corners: bool) -> None:
    """The same targets, bit for bit, as those of a network of every size."""
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    for way in WAYS:
        fixed = of_one_size((64, 96), corners, way)
        for options in OPTIONS[:2]:
            every = dense_targets(replace(fixed, size=None), [image], options)[0]
            for name, values in every._asdict().items():
                assert np.array_equal(values, getattr(dense_targets(fixed, [image], options)[0], name)), name


def shown(teacher: Teacher, image: tuple[int, int], options: TargetsParams) -> int:
    """How often a network is run for one image."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    with teacher.network.register_forward_hook(count):
        look(teacher, [np.zeros((*image, 3), np.uint8)], options)
    return calls


def test_scales_that_show_the_same_count_once_and_targets_window_is_for_others() -> None:
    windows, resize = (of_one_size((64, 64), False, way) for way in WAYS)
    scales = TargetsParams(tta=TtaParams(scales=[0.5, 1.0, 2.0], flip=True))
    assert shown(resize, (128, 192), scales) == 2, "flipped and not"
    assert shown(windows, (32, 48), scales) == 2 * 2, "64 x 96 at each scale, two windows"
    assert shown(windows, (64, 64), TargetsParams(window=[32, 32])) == 1
    assert shown(windows, (128, 64), TargetsParams(overlap=0)) == 2
    assert shown(replace(windows, short_side=64), (128, 256), TargetsParams(overlap=0)) == 2, "EoMT's way"


def test_it_sees_the_file_and_not_the_working_size(tmp_path: Path) -> None:
    Image.fromarray(ramp((128, 192))).save(tmp_path / "x.png")
    for way in WAYS:
        fixed = of_one_size((64, 64), False, way)
        seen = read_for(fixed, tmp_path / "x.png", 96)
        assert seen.shape[:2] == (128, 192)
        targets = dense_targets(fixed, [seen], TargetsParams(), 96)[0]
        assert targets.logits.shape[1:] == (16, 24)
        assert_ramps(targets.logits / 2 - 0.25, (64, 96), np.array((64, 96)), 20, 0.4)


def test_only_its_caches_record_how_images_met_it() -> None:
    """Caches of networks that take every size keep the identity that they had before fixed_size existed."""
    windows, resize = (TimmTeacher(timm="x", weights="w", fixed_size=way) for way in WAYS)
    asked = {
        way: expected_provenance(params, TargetsParams(), ("a",), None) for way, params in zip(WAYS, (windows, resize), strict=True)
    }
    fixed = of_one_size((64, 80), False, "windows")
    made = teacher_provenance(asked["windows"], fixed, "", None)["preprocessing"]
    assert made["size"] == [64, 80] and made["fixed_size"] == {"images": "windows", "overlap": 1 / 3}
    assert asked["resize"]["preprocessing"]["fixed_size"] == {"images": "resize", "overlap": None}
    by_default = expected_provenance(TimmTeacher(timm="x", weights="w"), TargetsParams(), ("a",), None)
    assert by_default == asked["windows"]
    every = teacher_provenance(by_default, replace(fixed, size=None), "", None)
    assert not {"size", "fixed_size"} & set(every["preprocessing"])
    assert applying(every, by_default) == applying(every, asked["resize"]) != by_default


CODE = """
import torch
from mgd_pipeline.networks import IMAGENET
from mgd_pipeline.teachers import Teacher, TeacherOutputs


class Patches(torch.nn.Module):
    def __init__(self, classes, drawn):
        super().__init__()
        self.head, self.drawn = torch.nn.Conv2d(3, classes, 8, stride=8), drawn

    def forward(self, images):
        if images.shape[-2:] != (48, 48):
            raise ValueError("takes 48 x 48")
        scores = self.head(images)
        return TeacherOutputs(torch.nn.functional.dropout(scores, 0.5, self.drawn), images.mean(1, keepdim=True))


def build(weights, classes, size=(48, 48), drawn=False, **options):
    torch.manual_seed(0)
    return Teacher(Patches(len(classes), drawn), IMAGENET, align_corners=False, size=size, **options)


def every(weights, classes):
    return build(weights, classes, size=None)


def resized(weights, classes):
    return build(weights, classes, fixed_size="resize")


def listed(weights, classes):
    return build(weights, classes, size=[48, 48])
"""


@pytest.fixture
def lab(tmp_path: Path) -> Any:
    (tmp_path / "fixed_lab.py").write_text(CODE)

    def made(function: str = "build", fixed_size: str | None = None, **options: Any) -> Teacher:
        raw = {"import": f"fixed_lab:{function}", "options": options, "weights": "w", "fixed_size": fixed_size}
        return build_teacher("x", ImportedTeacher.model_validate(raw), ("a", "b"), tmp_path)

    return made


def test_a_function_says_which_size_its_network_takes(lab: Any) -> None:
    assert (lab().size, lab().fixed_size, lab(fixed_size="resize").fixed_size) == ((48, 48), "windows", "resize")
    with pytest.raises(ParamsError, match=r"fixed_size: windows is for networks of one input size, and fixed_lab:every names"):
        lab("every", fixed_size="windows")
    with pytest.raises(ParamsError, match="sets short_side, groups or fixed_size"):
        lab("resized")
    assert lab("listed", fixed_size="resize").size == (48, 48)
    for size in (48, "48x48", 0):
        with pytest.raises(ParamsError, match=rf"fixed_lab:build returned a Teacher with the size {size!r}; return height and"):
            lab(size=size)
    with pytest.raises(WeightsError, match=r"teachers\.x: cannot see images of 64 x 64 pixels .*takes 48 x 48"):
        lab("every")
    with pytest.raises(WeightsError, match=r"teachers\.x: gives other outputs for the same image, so it draws random numbers"):
        lab(drawn=True)


def test_a_project_makes_its_targets_and_notices_another_way(project: Project) -> None:
    (project.base / "fixed_lab.py").write_text(CODE)
    save_weights(project.base / "own.safetensors", {"any": torch.zeros(1)}, {})
    raw = project.params.model_dump()
    raw["teachers"]["wide"] = {"import": "fixed_lab:build", "weights": "own.safetensors"}
    raw["train_teachers"] = ["deep"]

    def asking(way: str | None) -> Project:
        raw["teachers"]["wide"]["fixed_size"] = way
        return Project(project.base, parse_params(raw))

    precompute_teachers(asking("resize"), "wide", device=CPU)
    resized = open_cache(project.targets("wide"))
    assert resized.provenance["preprocessing"]["size"] == [48, 48]
    with pytest.raises(
        ProvenanceMismatch, match=r"preprocessing\.fixed_size\.images: the cache has 'resize', the parameters say 'windows'"
    ):
        train_student(asking(None), Machine(CPU, resume=False))
    precompute_teachers(asking(None), "wide", device=CPU)
    windowed = open_cache(project.targets("wide"))
    assert windowed.layout == resized.layout
    assert windowed.fingerprint != resized.fingerprint
    train_student(asking("windows"), Machine(CPU, resume=False))
    with pytest.raises(ParamsError, match="short_side: has no effect with fixed_size: resize"):
        raw["teachers"]["wide"]["short_side"] = 64
        asking("resize")


@pytest.mark.parametrize(
    ("taken", "asked", "size"),
    [
        (lambda h, w: True, None, None),
        (lambda h, w: h == w, None, None),  # square images need nothing more
        (lambda h, w: h == w, "resize", (96, 96)),
        (lambda h, w: (h, w) == (96, 96), None, (96, 96)),
        (lambda h, w: True, "windows", "fixed_size: windows is for networks of one input size, and this one takes every size"),
        (lambda h, w: False, None, "cannot see images of 96 x 96 pixels"),
    ],
)
def test_the_size_of_a_published_network_is_found_by_trying(taken: Any, asked: Any, size: Any) -> None:
    def takes(tried: tuple[int, int]) -> Fault | None:
        return None if taken(*tried) else Fault(tried, "no")

    if isinstance(size, str):
        with pytest.raises((ParamsError, WeightsError), match=rf"teachers\.x.*{size}"):
            only_size("x", takes, 32, (96, 96), asked)
    else:
        assert only_size("x", takes, 32, (96, 96), asked) == size


def test_rows_that_a_network_mixes_up_are_noticed() -> None:
    """16 x 4 patches are as many as 8 x 8, for which some networks take them."""

    def squares(images: torch.Tensor) -> torch.Tensor:
        cells = areas(16)(images).flatten(2)
        side = int(cells.shape[-1] ** 0.5)
        return cells.unflatten(2, (side, side))

    check_sees("x", lambda: Net(squares), 32, [(96, 96)])
    with pytest.raises(WeightsError, match=r"cannot see images of 256 x 64 pixels \(its outputs are 8 x 8 cells\); a teacher must"):
        check_sees("x", lambda: Net(squares), 32, [(256, 64)])
    with pytest.raises(WeightsError, match=r"cannot see images of 256 x 64 .*; set teachers\.x\.fixed_size"):
        check_sees("x", lambda: Net(squares), 32, [(256, 64)], fixed_size=True)
