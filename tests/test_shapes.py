"""The built-in scenes: functions of their arguments, with every class where it should be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mgd_pipeline.data.images import read_image, read_raw_mask
from mgd_pipeline.data.shapes import CLASSES, PALETTE, RARE, RARE_SHARE, _paint, render_scene, write_shapes
from mgd_pipeline.metrics import confusion_matrix, mean_iou
from mgd_pipeline.params import ShapesData

SIZE = (96, 128)


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, np.ndarray]]:
    return [render_scene(0, "train", index, *SIZE) for index in range(250)]


def test_a_scene_is_a_function_of_its_arguments_of_any_size_and_no_other_split() -> None:
    np.random.seed(0)  # noqa: NPY002  (global state must not matter)
    first = render_scene(3, "val", 5, 40, 60)
    np.random.seed(1)  # noqa: NPY002
    again = render_scene(3, "val", 5, 40, 60)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    for others in ((4, "val", 5), (3, "test", 5), (3, "val", 6), (-3, "val", 5)):
        assert (render_scene(*others, 40, 60)[0] != first[0]).mean() > 0.5
    for size in ((96, 128), (40, 60), (65, 33), (200, 300)):
        image, mask = render_scene(0, "train", 0, *size)
        assert image.shape == (*size, 3) and mask.shape == size and image.dtype == mask.dtype == np.uint8
    with pytest.raises(ValueError, match="split 'dev': must be one of train, val, test"):
        render_scene(0, "dev", 0, *SIZE)


def test_scenes_are_mostly_background_with_every_class(scenes: list[tuple[np.ndarray, np.ndarray]]) -> None:
    masks = np.stack([mask for _, mask in scenes])
    assert masks.max() == len(CLASSES) - 1 == len(PALETTE) - 1
    share = np.bincount(masks.ravel(), minlength=len(CLASSES)) / masks.size
    assert 0.5 < share[0] < 0.85
    assert share[1:].min() > 0.001
    present = np.array([[(mask == k).any() for k in range(len(CLASSES))] for mask in masks])
    objects = present[:, 1:].sum(1)
    assert objects.min() >= 1 and objects.mean() > 3
    for name, frequency in zip(CLASSES[1:], present[:, 1:].mean(0), strict=True):
        low, high = (RARE_SHARE - 0.06, RARE_SHARE + 0.06) if name in RARE else (0.5, 0.85)
        assert low < frequency < high, name


def test_colour_alone_does_not_solve_it(scenes: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """The best table from a pixel's colour (512 bins) to a class, learnt on half of the scenes, fails on the other half."""
    colour = np.stack([(image >> 5).astype(np.int64) @ np.array([64, 8, 1]) for image, _ in scenes])
    truth = np.stack([mask for _, mask in scenes]).astype(np.int64)
    half, kinds = len(scenes) // 2, len(CLASSES)
    pairs = (colour[:half] * kinds + truth[:half]).ravel()
    table = np.bincount(pairs, minlength=512 * kinds).reshape(512, kinds)
    balanced = table / table.sum(0)  # else it would answer "background" always, and any scene would pass
    for scores in (table, balanced):
        score = mean_iou(confusion_matrix(truth[half:], scores.argmax(1)[colour[half:]], kinds))
        assert score < 0.3  # hues without any spread reach 0.48


@pytest.mark.parametrize("seed", range(20))
def test_the_discs_differ_in_texture_alone(seed: int) -> None:
    painted = []
    for name in ("striped_disc", "checkered_disc"):
        image, mask = np.zeros((*SIZE, 3), np.float32), np.zeros(SIZE, np.uint8)
        _paint(np.random.default_rng(seed), image, mask, name)
        assert set(np.unique(mask)) == {0, CLASSES.index(name)}
        painted.append((image.mean(-1), mask > 0))  # grey: the hue of a class must not count as its texture
    (striped, outline), (checkered, same_outline) = painted
    np.testing.assert_array_equal(outline, same_outline)
    assert np.abs(striped - checkered)[outline].mean() > 0.03


def test_written_files_are_the_scenes_and_repeat_byte_for_byte(tmp_path: Path) -> None:
    params = ShapesData(dataset="shapes", root="unused", partition="1/8", height=40, width=60, train=3, val=2, test=1)
    calls: list[tuple[int, int]] = []
    write_shapes(params, tmp_path / "one", lambda done, total: calls.append((done, total)))
    assert calls == [(done, 6) for done in range(1, 7)]
    write_shapes(params, tmp_path / "two")
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.png"))
    assert len(files) == 12 and Path("masks/train/train_00002.png") in files
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()
    image, mask = render_scene(0, "val", 1, 40, 60)
    np.testing.assert_array_equal(read_image(tmp_path / "one/images/val/val_00001.png"), image)
    np.testing.assert_array_equal(read_raw_mask(tmp_path / "one/masks/val/val_00001.png"), mask)
    with Image.open(tmp_path / "one/masks/val/val_00001.png") as picture:
        assert picture.mode == "P"
        assert (picture.getpalette() or [])[: 3 * len(PALETTE)] == [value for colour in PALETTE for value in colour]
