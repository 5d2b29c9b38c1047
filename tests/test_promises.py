"""Figures on README.md and docs/ that follow from the code are what the code says: counts, sizes, limits, defaults."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from typing import Any

import pytest
import typer

from mgd_pipeline.caches.format import SHARD_BYTES, SHARD_ROWS, Layout, plan_layout
from mgd_pipeline.data.cityscapes import CITYSCAPES
from mgd_pipeline.data.partition import draw_partition
from mgd_pipeline.data.voc import VOC_CLASSES
from mgd_pipeline.exports import formats
from mgd_pipeline.networks.segmentation import output_grid
from mgd_pipeline.params import FolderData, Params, ShapesData, SmpTeacher
from mgd_pipeline.training import checkpoint, loading
from mgd_stages import cluster
from mgd_stages.cli import app
from mgd_stages.doctor import data as doctor_data
from mgd_stages.projects.presets import preset, quick
from mgd_stages.run import loop as training_loop
from mgd_stages.run import pace, teacher_check
from mgd_stages.stages import compare_teachers
from test_guide import PAGES
from test_init import REPOSITORY

SHAPES, VOC = (preset(name, f"data/raw/{name}", "1/8") for name in ("shapes", "voc"))
OWN = preset("folder", "data/raw/folder", "1/8", {"classes": ["a", "b"]})
assert isinstance(SHAPES.data, ShapesData)
SCENES = SHAPES.data.train
VOC_TRAIN, CAMVID_TRAIN, CITYSCAPES_TRAIN = 10582, 366, 2975
"""Training images: VOC 2012 with SBD, CamVid by sequence, Cityscapes, as they are published."""
HELD_OUT = tuple(FolderData.model_fields[f"{split}_fraction"].default for split in ("val", "test"))


def labelled(images: int, denominator: int) -> int:
    return len(draw_partition([str(i) for i in range(images)], denominator, 0)[0])


def wide_and_deep(params: Params) -> tuple[SmpTeacher, SmpTeacher]:
    wide, deep = params.teachers["wide"], params.teachers["deep"]
    assert isinstance(wide, SmpTeacher) and isinstance(deep, SmpTeacher)
    return wide, deep


def options(command: str) -> dict[str, Any]:
    """Defaults of a command's options, by name."""
    named: Any = typer.main.get_command(app)
    for part in command.split():
        named = named.commands[part]
    return {parameter.name: parameter.default for parameter in named.params}


def voc_cache(side: int = 500, **changes: Any) -> Layout:
    """Of the teacher `wide`, for images up to that size: photos lie and stand, the longer side has 500 pixels."""
    targets, channels = VOC.targets.model_copy(update=changes), wide_and_deep(VOC)[0].decoder_channels
    ((height, width),) = output_grid([(side, side)]).frames
    classes = len(VOC_CLASSES)
    return plan_layout(classes, channels, int(height), int(width), targets.stride, targets.region_stride, targets.logits)


PYTHON = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"].removeprefix(">=")
PROMISES: list[tuple[str, Callable[[], str]]] = [
    # --- README
    *((page, lambda: f"Python {PYTHON} or newer") for page in ("README.md", "docs/guide.md")),
    *(("README.md", lambda n=n: f"`shapes`{' (built in)' * (n == 16)} | 1/{n} ({labelled(SCENES, n)}) |") for n in (16, 8, 4, 2)),
    *(("README.md", lambda n=n: f"EfficientNet-Lite0 | 1/{n} ({labelled(CAMVID_TRAIN, n)}) |") for n in (30, 16, 8)),
    # --- networks and settings of `init`
    ("docs/guide.md", lambda: {"tu-wide_resnet50_2": "Wide ResNet-50-2"}[wide_and_deep(OWN)[0].encoder]),
    ("docs/guide.md", lambda: {"resnet101": "ResNet-101"}[wide_and_deep(OWN)[1].encoder]),
    ("docs/guide.md", lambda: f"MobileNetV2; images of {OWN.data.long_side} pixels"),
    ("docs/guide.md", lambda: f"images of {quick(OWN).data.long_side} pixels, few steps"),
    ("docs/guide.md", lambda: {(0.1, 0.1): "a tenth each of them is kept for validation and test"}[HELD_OUT]),
    ("docs/guide.md", lambda: f"all of up to {doctor_data._SAMPLE}"),
    ("docs/guide.md", lambda: f"{len(CITYSCAPES)} classes of the benchmark"),
    # --- sizes of teacher caches
    (
        "docs/guide.md",
        lambda: f"about {VOC_TRAIN * voc_cache().record_bytes / 1e9:.1f} GB ({voc_cache().record_bytes / 1e3:.0f} kB an image)",
    ),
    ("docs/guide.md", lambda: f"instead of {VOC_TRAIN:,}"),
    ("docs/guide.md", lambda: f"{CITYSCAPES_TRAIN:,} and 500"),
    (
        "docs/teachers.md",
        lambda: {4: "four times the bytes of the logits"}[
            voc_cache(512, stride=2).bytes_of("logits") // voc_cache().bytes_of("logits")
        ],
    ),
    (
        "docs/troubleshooting.md",
        lambda: {4: "`targets.stride: 8` takes a quarter of the logits' space"}[
            voc_cache().bytes_of("logits") // voc_cache(512, stride=8).bytes_of("logits")
        ],
    ),
    ("docs/cache.md", lambda: {4: "logits on every fourth pixel"}[VOC.targets.stride]),
    ("docs/cache.md", lambda: {16: "region embeddings on every sixteenth"}[VOC.targets.region_stride]),
    ("docs/cluster.md", lambda: f"up to {SHARD_ROWS} images, or {SHARD_BYTES // 2**20} MiB of the largest array"),
    # --- limits and defaults
    ("docs/cluster.md", lambda: {60.0: "no worker for a minute"}[cluster._WORKER_SECONDS]),
    ("docs/training.md", lambda: {1 / 30: "at most a thirtieth of the time"}[training_loop._CHECKPOINT_SHARE]),
    ("docs/training.md", lambda: f"Above {100 * pace._WAITING_SHARE:.0f} % a training says so"),
    ("docs/training.md", lambda: {10: "every tenth step"}[training_loop._STEPS_PER_LOOK]),
    ("docs/training.md", lambda: {2: "The last two are kept"}[checkpoint._KEPT]),
    ("docs/training.md", lambda: f"dies or hangs** ({loading._WORKER_SECONDS:.0f} s)"),
    ("docs/teachers.md", lambda: {8: "tries a teacher on eight labelled images"}[teacher_check._LOOKED_AT]),
    ("docs/teachers.md", lambda: {10: "pictures of the ten images"}[compare_teachers._PICTURES]),
    ("docs/sharing.md", lambda: {14.0: "after two weeks deleted"}[options("cache gc")["days"]]),
    ("docs/students.md", lambda: {1e-4: "off by more than a ten-thousandth of the largest one"}[formats.TOLERANCE]),
]


@pytest.mark.parametrize(("page", "promise"), PROMISES, ids=[str(i) for i in range(len(PROMISES))])
def test_figures_follow_from_the_code(page: str, promise: Callable[[], str]) -> None:
    expected = promise()
    assert expected and expected in re.sub(r"\s+", " ", PAGES[page]), f"{page} does not say {expected!r}"
