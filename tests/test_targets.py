"""Live teachers against cached ones: what stage two reads is what the teacher says, on the same pixels."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load

from caches import LAYOUT, SMALL
from conftest import TINY, teacher_of, training_set
from mgd_pipeline.caches.encoding import decoded
from mgd_pipeline.caches.reader import CachedTargets, open_cache
from mgd_pipeline.data.images import read_image
from mgd_pipeline.data.manifest import ImageKey, ImageRow, read_manifest
from mgd_pipeline.errors import DataError, ProvenanceMismatch
from mgd_pipeline.networks.encoders import normalisation
from mgd_pipeline.networks.inference import predict_logits, to_input
from mgd_pipeline.networks.segmentation import build_network
from mgd_pipeline.params import TargetsParams
from mgd_pipeline.teachers.looks import dense_targets
from mgd_pipeline.teachers.teacher import teacher_provenance
from mgd_pipeline.training.batches import (
    ReadTargets,
    Source,
    cached_targets,
    make_source,
    mixed_valid,
    placed_targets,
    view_images,
    view_labels,
    view_regions,
    view_targets,
)
from mgd_pipeline.training.live import live_targets
from mgd_pipeline.training.loading import load_batches
from mgd_pipeline.training.terms import step_terms
from mgd_pipeline.views import draw_view, identity_view, mix
from mgd_stages.run.machine import Machine
from mgd_stages.run.project import Project, open_project
from mgd_stages.stages.precompute_teachers import precompute_teachers
from mgd_stages.stages.train_student import train_student
from mgd_stages.stages.train_teacher import train_teacher
from mgd_stages.tools.caches import recheck

CPU = torch.device("cpu")


@pytest.fixture
def finished(finished_project: Path) -> Project:
    """The finished project of all tests, to read."""
    return open_project(finished_project / "params.yaml", TINY)


def pixels_of(project: Project, row: ImageRow) -> np.ndarray:
    return read_image(project.base / project.params.data.root / row.image_path)


def one_source(row: Any, image: np.ndarray, targets: dict[str, ReadTargets]) -> Source:
    """One whole image, un-augmented."""
    pixels = torch.from_numpy(image.transpose(2, 0, 1)[None].copy())
    return make_source([row], [identity_view(*image.shape[:2])], pixels, None, targets, torch.zeros(1, 6))


def test_identity_view_of_the_cache_equals_the_live_teacher(finished: Project) -> None:
    """Sampled logits are the teacher's own upsampled ones, within the encoding's tolerance; the descriptor is their mean."""
    for name in finished.params.teachers:
        teacher, cache = teacher_of(finished, name), open_cache(finished.targets(name))
        for row in read_manifest(finished.manifest, finished.base).training[:4]:
            image, number = pixels_of(finished, row), cache.row(ImageKey(row.image_id, row.image_sha256))
            live = predict_logits(teacher.network, image, teacher.normalisation)
            cached = cache.read([number])
            source = one_source(row, image, {name: ReadTargets(cached, cache.layout)})
            sampled = view_targets(source, name).logits[0]
            step = float(cached.affine[0, 1])
            assert (sampled - live).abs().max() <= step / 2 + 1e-3 * live.abs().max()
            assert (sampled.argmax(0) == live.argmax(0)).float().mean() > 0.97
            assert (sampled - live.flip(-1)).abs().max() > 5 * step, "a forgotten flip would be noticed"
            assert np.allclose(cache.record("global_descriptors", number), live.mean((1, 2)).numpy(), atol=1e-4)


def test_teachers_side_by_side_are_seen_as_each_alone() -> None:
    """Teachers of one grid share their points; other strides, padding and canvases, and mirrored caches do not."""
    rng, sizes = np.random.default_rng(0), [(60, 90), (64, 80)]
    views = [draw_view(rng, size, (32, 64), [0.5, 1.0, 1.5], flip) for size, flip in zip(sizes, (0.0, 1.0), strict=True)]
    assert [view.flip for view in views] == [False, True]
    rows: list[Any] = [SimpleNamespace(image_path=f"{i}.png") for i in range(2)]

    def stored(mirrored: bool = False, canvas: int = 96, frame: int = 96, **layout: int) -> ReadTargets:
        one = dataclasses.replace(LAYOUT, height=canvas, width=canvas, **layout)
        shapes = {name: (2, *shape) for name, (shape, _) in one.records.items()}
        extents = np.array([(*size, 64, frame) for size in sizes], np.int32)
        logits = rng.integers(256, size=shapes["logits"], dtype=np.uint8)
        regions = rng.normal(size=shapes["region_embeddings"]).astype(np.float16)
        return ReadTargets(CachedTargets(logits, np.ones((2, 2), np.float32), regions, extents), one, mirrored)

    targets = {
        "first": stored(),
        "alike": stored(),
        "mirrored": stored(mirrored=True),
        "finer": stored(stride=2),
        "finer regions": stored(region_stride=8),
        "other padding": stored(frame=92),
        "other canvas": stored(canvas=128),
    }
    pixels = torch.zeros(2, 3, 64, 90, dtype=torch.uint8)
    together = make_source(rows, views, pixels, None, targets, torch.zeros(2, 6))
    for name, one in targets.items():
        alone = make_source(rows, views, pixels, None, {name: one}, torch.zeros(2, 6))
        for seen, expected in zip(view_targets(together, name), view_targets(alone, name), strict=True):
            assert torch.equal(seen, expected), name


def test_encoded_embeddings_are_sampled_as_what_they_stand_for() -> None:
    """Each channel of each image has its own offset; what lies beyond the image on the canvas does not count."""
    rng, sizes = np.random.default_rng(0), [(60, 90), (41, 33)]
    views = [draw_view(rng, size, (32, 64), [0.5, 1.5], 0.5) for size in sizes]
    rows: list[Any] = [SimpleNamespace(image_path=f"{i}.png") for i in range(2)]
    extents = np.array([(60, 90, 64, 96), (41, 33, 64, 64)], np.int32)
    logits, affine = np.zeros((2, 5, 16, 24), np.uint8), np.ones((2, 2), np.float32)
    stored = rng.integers(128, size=(2, 6, 4, 6), dtype=np.uint8)
    affines = rng.normal(size=(2, 6, 2)).astype(np.float32)
    plain = np.stack([decoded(*both) for both in zip(stored, affines, strict=True)])
    plain[1, :, 3:], plain[1, :, :, 3:] = 0, 0
    made = {
        "encoded": ReadTargets(CachedTargets(logits, affine, stored, extents, affines), SMALL),
        "plain": ReadTargets(CachedTargets(logits, affine, plain, extents), LAYOUT),
    }
    source = make_source(rows, views, torch.zeros(2, 3, 60, 90, dtype=torch.uint8), None, made, torch.zeros(2, 6))
    for seen in (lambda name: view_targets(source, name).features, lambda name: view_regions(source, name)):
        assert torch.allclose(seen("encoded"), seen("plain"), rtol=0, atol=1e-4)


def test_targets_of_another_size_are_an_error_that_names_the_image() -> None:
    extents = np.array([(60, 90, 64, 96), (60, 91, 64, 96)], np.int32)
    empty = [LAYOUT.nothing(name, 2) for name in ("logits", "logits_affine", "region_embeddings")]
    cached = CachedTargets(empty[0], empty[1], empty[2], extents)
    rows: list[Any] = [SimpleNamespace(image_path=f"{i}.png") for i in range(2)]
    with pytest.raises(DataError, match=r"^1\.png: is 60x90, its targets are of 60x91$"):
        placed_targets(rows, [identity_view(60, 90)] * 2, {"wide": ReadTargets(cached, LAYOUT)})


def test_a_rows_targets_do_not_depend_on_its_batch(finished: Project) -> None:
    """In training mode a teacher would mix the images of a batch; in eval mode [a, b] equals [a] alone."""
    teacher = teacher_of(finished, "wide")
    images = [pixels_of(finished, row) for row in read_manifest(finished.manifest, finished.base).training[:3]]
    together, alone = (dense_targets(teacher, some, TargetsParams())[0] for some in (images, images[:1]))
    for name in ("logits", "region_embeddings", "global_descriptor"):
        assert np.allclose(getattr(together, name), getattr(alone, name), atol=1e-4), name
    teacher.network.train()
    with pytest.raises(ValueError, match="eval mode"):
        dense_targets(teacher, images, TargetsParams())


def test_normalisation_and_channel_order_are_pinned() -> None:
    """One golden pixel through the input path of each stage; BGR or a missing normalisation differs."""
    image = np.zeros((1, 1, 3), np.uint8)
    image[0, 0] = (255, 0, 127)
    golden = torch.tensor([(255 - 123.675) / 58.395, (0 - 116.28) / 57.12, (127 - 103.53) / 57.375])
    assert torch.allclose(to_input(image, normalisation("resnet18"), CPU).flatten(), golden)
    lite = to_input(image, normalisation("tu-tf_efficientnet_lite0"), CPU).flatten()
    assert torch.allclose(lite, torch.tensor([1.0, -1.0, -0.5 / 127.5]))
    source = one_source(None, image, {})
    assert torch.allclose(view_images(source, normalisation("resnet18"), 0).flatten(), golden, atol=1e-5)
    blue_first = normalisation("resnet18")._replace(channels="BGR")
    assert torch.allclose(to_input(image, blue_first, CPU).flatten(), golden.flip(0))
    assert torch.allclose(view_images(source, blue_first, 0).flatten(), golden.flip(0), atol=1e-5)


def test_caches_of_other_targets_are_told_apart_and_read(project: Project) -> None:
    options = [f"targets.{option}" for option in ("stride=8", "region_stride=8", "top_k=2", "tta={scales: [1.0, 1.25]}")]
    for option in options:
        with pytest.raises(ProvenanceMismatch, match=option.split("=")[0].split(".")[1]):
            train_student(open_project(project.base / "params.yaml", [*TINY, option]), Machine(CPU, resume=False))
    other, before = open_project(project.base / "params.yaml", [*TINY, *options]), project.student("distilled").read_bytes()
    for name in other.params.teachers:
        precompute_teachers(other, name, device=CPU, batch_size=4)
    train_student(other, Machine(CPU, resume=False))
    assert other.student("distilled").read_bytes() != before


def test_windowed_caches_of_version_0_1_are_read_but_not_continued(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold the nearest window's values where windows overlap, and say nothing of it."""
    wide_alone = ("losses.pixel_teachers=[wide]", "losses.region=0", "losses.image=0")
    windowed = open_project(project.base / "params.yaml", [*TINY, *wide_alone, "targets.window=[32,32]"])

    def silent(*arguments: Any) -> dict[str, Any]:
        made = teacher_provenance(*arguments)
        assert made["preprocessing"].pop("windows") == "averaged where they overlap"
        return made

    with monkeypatch.context() as before:
        before.setattr("mgd_stages.run.loaded_teacher.teacher_provenance", silent)
        precompute_teachers(windowed, "wide", device=CPU, batch_size=8)
    old = open_cache(windowed.targets("wide"))
    train_student(windowed, Machine(CPU, resume=False))
    with pytest.raises(ProvenanceMismatch, match=r"preprocessing\.windows: .*None"):
        recheck(windowed, "wide", 1.0, "cpu", as_json=False)
    precompute_teachers(windowed, "wide", device=CPU, batch_size=8)
    assert open_cache(windowed.targets("wide")).fingerprint != old.fingerprint


def test_a_ramp_comes_back_through_encoding_loader_and_random_views(finished: Project) -> None:
    """The whole reading path: uint8 logits and float16 regions that hold their own position, through drawn views."""
    dataset = training_set(finished)
    cache = dataset.open_caches()["wide"]
    for step in range(4):
        for source in dataset[step].sources:
            cached = cache.read([cache.row(ImageKey(row.image_id, row.image_sha256)) for row in source.rows])
            view = source.views[0]
            _, k, h, w = cached.logits.shape
            frame = cached.extents[0, 2:]
            cells = frame // 4
            ramp = np.zeros((len(source.rows), k, h, w), np.uint8)
            affine = np.zeros((len(source.rows), 2), np.float32)
            # uint8 resolves 1/255 of the ramp's length: scale = length / (cells - 1) makes every cell exact.
            ramp[:, 0, : cells[0], : cells[1]] = np.arange(cells[0])[:, None]
            ramp[:, 1, : cells[0], : cells[1]] = np.arange(cells[1])[None]
            affine[:, 1] = (frame[0] - 1) / (cells[0] - 1)
            regions = np.zeros_like(cached.region_embeddings)
            regions[:, 0] = (np.arange(regions.shape[2]) * 16 + 7.5)[:, None]
            fake = CachedTargets(ramp, affine, regions, cached.extents)
            targets = {"wide": ReadTargets(fake, cache.layout)}
            traced = make_source(source.rows, source.views, source.images, None, targets, source.jitter)
            sampled = view_targets(traced, "wide")
            y = (np.arange(view.crop_height) + view.top + 0.5) * view.height / view.resized_height - 0.5
            inside = (y >= 0) & (y <= view.height - 1)
            assert np.abs(sampled.logits[0, 0, :, 3].numpy() - y)[inside].max() < 0.05
            y16 = np.linspace(0, view.crop_height - 1, view.crop_height // 4) + view.top
            y16 = (y16 + 0.5) * view.height / view.resized_height - 0.5
            blocks = -(-view.height // 16)
            inner = (y16 >= 7.5) & (y16 <= (blocks - 1) * 16 + 7.5)
            assert np.abs(sampled.features[0, 0, :, 3].numpy() - y16)[inner].max(initial=0) < 0.05


def test_image_labels_and_targets_of_a_batch_belong_together(finished: Project) -> None:
    """Each position of a batch holds one image's pixels and targets; the partner's are the partner's."""
    dataset = training_set(finished)
    teacher = teacher_of(finished, "deep")
    for step in range(3):
        for source in dataset[step].sources:
            for i, row in enumerate(source.rows):
                image = pixels_of(finished, row)
                assert np.array_equal(source.images[i].numpy().transpose(1, 2, 0)[: image.shape[0], : image.shape[1]], image)
                truth = dense_targets(teacher, [image], TargetsParams())[0]
                values = source.targets["deep"].logits[i].float().numpy()
                offset, scale = source.targets["deep"].affine[i].tolist()
                assert np.abs(offset + scale * values - truth.logits).max() < scale


def test_partner_is_another_image_or_the_same_as_the_parameters_say(finished: Project) -> None:
    other = training_set(finished)
    same = training_set(finished)
    same.cutmix = finished.params.cutmix.model_copy(update={"partner": "same"})
    differs = 0
    for step in range(3):
        a, b = other[step], same[step]
        assert a.unlabelled and a.partner and b.unlabelled and b.partner
        assert b.partner.rows is b.unlabelled.rows and b.partner.views != b.unlabelled.views
        assert b.partner.targets["wide"].logits is b.unlabelled.targets["wide"].logits, "read once"
        differs += sum(p.image_id != q.image_id for p, q in zip(a.partner.rows, a.unlabelled.rows, strict=True))
    assert differs >= 4


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # four workers on two cores, on purpose
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_batches_are_a_function_of_seed_and_step(finished: Project, workers: int) -> None:
    """The same views, order and masks on 0, 1 and 4 workers, and when starting in the middle."""
    reference = [training_set(finished)[step] for step in (1, 2, 3)]
    for batch, expected in zip(load_batches(training_set(finished), 1, workers, 0, CPU), reference, strict=True):
        assert batch.step == expected.step and len(batch.sources) == 3
        for a, b in zip(batch.sources, expected.sources, strict=True):
            assert [row.image_id for row in a.rows] == [row.image_id for row in b.rows] and a.views == b.views
            assert torch.equal(a.images, b.images) and torch.equal(a.jitter, b.jitter)
            assert torch.equal(a.targets["wide"].logits, b.targets["wide"].logits)
        assert batch.cutmix is not None and expected.cutmix is not None and torch.equal(batch.cutmix, expected.cutmix)
    other = training_set(finished, seed=1)[1].cutmix
    assert other is not None and reference[0].cutmix is not None and not torch.equal(other, reference[0].cutmix)


def test_every_unlabelled_image_comes_once_an_epoch(finished: Project) -> None:
    dataset = training_set(finished)
    dataset.optimisation = dataset.optimisation.model_copy(update={"steps": 18})
    count = len(dataset.manifest.unlabelled)
    seen = [row.image_id for step in range(18) for row in dataset[step].unlabelled.rows]  # type: ignore[union-attr]
    assert len(set(seen[:count])) == count and len(set(seen[count : 2 * count])) == count
    assert seen[:count] != seen[count : 2 * count]
    labelled = {row.image_id for step in range(18) for row in dataset[step].labelled.rows}
    assert labelled == {row.image_id for row in dataset.manifest.labelled}


def test_cutmixed_image_and_valid_mask_follow_one_mask(finished: Project) -> None:
    dataset = training_set(finished)
    batch = dataset[0]
    assert batch.unlabelled is not None and batch.partner is not None and batch.cutmix is not None
    normalise = normalisation("resnet18")
    first, second = (view_images(s, normalise, 0) for s in (batch.unlabelled, batch.partner))
    mixed = mix(first, second, batch.cutmix)
    mask = batch.cutmix[:, None].expand_as(mixed)
    assert torch.equal(mixed[mask], second[mask]) and torch.equal(mixed[~mask], first[~mask])
    valid = mixed_valid(batch)
    assert (mixed.abs().sum(1)[~valid] == 0).all(), "padding of the mixed image is the mean colour"


def test_without_boxes_nothing_is_mixed_and_no_partner_read(finished: Project) -> None:
    """The views and targets of a step are those that an empty mask gives, from live teachers, too."""
    mixed, plain = training_set(finished)[1], training_set(finished)
    plain.cutmix = plain.cutmix.model_copy(update={"boxes": 0})
    batch = plain[1]
    assert batch.partner is None and batch.cutmix is None and mixed.cutmix is not None and mixed.cutmix.any()
    empty = dataclasses.replace(mixed, cutmix=torch.zeros_like(mixed.cutmix))
    assert torch.equal(mixed_valid(batch), mixed_valid(empty))
    network = build_network(finished.params.student.network, 9)
    for name, exact, provider in (
        ("cached", True, cached_targets),
        ("live", False, partial(live_targets, {name: teacher_of(finished, name) for name in finished.params.teachers})),
    ):
        terms, same, other = (step_terms(network, step, provider, finished.params) for step in (batch, empty, mixed))
        assert list(terms) == list(same)
        for term, value in terms.items():
            # A live teacher's batch has another size, so its sums are rounded otherwise.
            assert torch.equal(value, same[term]) if exact else torch.isclose(value, same[term], rtol=1e-3), (name, term)
        assert not torch.isclose(terms["region"], other["region"], rtol=1e-3), name


def test_a_teacher_is_trained_without_cutmix(project: Project) -> None:
    """Not the teacher that CutMix made. The weights are compared, because the file also notes its parameters."""
    weights = project.teacher("wide")
    before = load(weights.read_bytes())
    plain = open_project(project.base / "params.yaml", [*TINY, "cutmix.boxes=0"])
    train_teacher(plain, "wide", Machine(CPU, resume=False))
    after = load(weights.read_bytes())
    assert any(not torch.equal(after[name], values) for name, values in before.items())


def test_colour_jitter_changes_the_input_but_neither_geometry_nor_padding(finished: Project) -> None:
    dataset = training_set(finished)
    batch = dataset[0]
    normalise = normalisation("resnet18")
    plain = view_images(batch.labelled, normalise, 0)
    first, again = (view_images(batch.labelled, normalise, 0.3) for _ in range(2))
    assert torch.equal(first, again) and not torch.allclose(first, plain, atol=0.05)
    assert torch.equal(first == 0, (plain == 0) | (first == 0))
    # The strongest edges stay where they are: correlation of the horizontal gradients' magnitude.
    a, b = ((image.mean(1)[..., 1:] - image.mean(1)[..., :-1]).abs().flatten() for image in (plain, first))
    assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.9
    labels = view_labels(batch.labelled)
    assert labels.shape == plain.shape[:1] + plain.shape[2:] and labels.dtype == torch.int64
