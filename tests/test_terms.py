"""What a student hears: each key of `losses` changes its own terms, to what the pure functions say, and no other term."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import TINY, training_set
from mgd_pipeline.caches.image_targets import ImageTargets
from mgd_pipeline.caches.reader import TargetCache
from mgd_pipeline.data.images import IGNORE
from mgd_pipeline.data.manifest import ImageKey, Manifest, read_manifest
from mgd_pipeline.distillation import (
    agreement_weight,
    best_by_class,
    binary_loss,
    cauchy_schwarz_loss,
    channel_loss,
    class_weight,
    confidence_weight,
    content_aware_loss,
    correct_weight,
    dist_loss,
    edge_weight,
    kl_loss,
    known_classes_kl,
    margin_weight,
    mean_log_probability_loss,
    mean_of_probabilities,
    mean_one,
    pixel_consistency_loss,
    presence_loss,
    region_kl_loss,
    semantic_sensitive_loss,
    supervised_loss,
    ttm_loss,
)
from mgd_pipeline.errors import ParamsError
from mgd_pipeline.networks.encoders import normalisation
from mgd_pipeline.networks.segmentation import DenseOutputs, build_network, upsample
from mgd_pipeline.params import LossesParams
from mgd_pipeline.training.batches import (
    StepTargets,
    cached_targets,
    mixed_valid,
    mixed_views,
    valid_views,
    view_images,
    view_labels,
)
from mgd_pipeline.training.knowledge import Knowledge, knowledge_of, labelled_iou
from mgd_pipeline.training.terms import Seen, image_term, pixel_terms, step_terms, total_loss
from mgd_stages.run.project import open_project

CPU = torch.device("cpu")
IOU = {"wide": torch.linspace(0, 1, 9), "deep": torch.linspace(1, 0, 9)}
PROTOTYPES = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
OFF = torch.linspace(-2, 2, 9)[:, None, None]
PIXELS = torch.arange(1.0, 10) ** 2


@dataclass
class Step:
    """One step of the tiny project: what student and teachers say, and the terms."""

    terms: dict[str, Tensor]
    total: float
    labelled: Tensor
    """the student's logits"""
    unlabelled: Tensor
    features: Tensor
    targets: Mapping[str, StepTargets]
    labels: Tensor
    valid_labelled: Tensor
    valid: Tensor

    @property
    def on_labelled(self) -> list[Tensor]:
        return [self.targets[name].labelled_logits for name in ("wide", "deep")]

    @property
    def on_unlabelled(self) -> list[Tensor]:
        return [self.targets[name].unmixed_logits for name in ("wide", "deep")]


def step_of(folder: Path, *overrides: str, knowledge: Knowledge | None = None) -> Step:
    project = open_project(folder / "params.yaml", [*TINY, *overrides])
    params, dataset = project.params, training_set(project)
    torch.manual_seed(0)
    network, said = build_network(params.student.network, 9), []

    def forward(images: Tensor) -> DenseOutputs:
        said.append(network(images))
        return said[-1]

    batch = dataset[0]
    if knowledge is None:
        knowledge = knowledge_of(params, dataset.manifest, dataset.open_caches(), CPU)
    terms = step_terms(forward, batch, cached_targets, params, knowledge)
    logits = upsample(said[0].logits.float(), (32, 32))
    valid = valid_views(batch.labelled), mixed_valid(batch)
    total = total_loss(terms, params.losses).item()
    return Step(
        terms, total, logits[:2], logits[2:], said[0].features[2:], cached_targets(batch), view_labels(batch.labelled), *valid
    )


@pytest.fixture(scope="module")
def plain(finished_project: Path) -> Step:
    return step_of(finished_project)


LABELLED = {"pixel_labelled_wide", "pixel_labelled_deep"}
UNLABELLED = {"pixel_unlabelled_wide", "pixel_unlabelled_deep"}
CHANNELS = {name.replace("pixel", "channel") for name in LABELLED | UNLABELLED}


def weighed(s: Step, weight: Tensor, which: int = 1) -> Tensor:
    return pixel_consistency_loss(s.unlabelled, s.on_unlabelled[which], valid=s.valid, weight=weight)


def weighed_by_all(s: Step) -> Tensor:
    """agreement, margin and edges, of which a confident teacher speaks."""
    edges = edge_weight(mean_of_probabilities(s.on_unlabelled).argmax(1), strength=5.0, valid=s.valid)
    margin = margin_weight(s.targets["wide"].mixed_features, PROTOTYPES, (32, 32), valid=s.valid)
    valid = s.valid & confidence_weight(s.on_unlabelled[1], 0.35)
    product = torch.stack([edges, agreement_weight(*s.on_unlabelled, valid=s.valid), margin]).prod(0)
    weight = mean_one(mean_one(product, s.valid), valid)
    return pixel_consistency_loss(s.unlabelled, s.on_unlabelled[1], valid=valid, weight=weight)


@pytest.mark.parametrize(
    ("overrides", "changed", "term", "by_hand"),
    [
        (
            ["pixel_distance=kl", "temperature=2.0"],
            LABELLED | UNLABELLED,
            "pixel_unlabelled_wide",
            lambda s: kl_loss(s.unlabelled, s.on_unlabelled[0], valid=s.valid, temperature=2.0),
        ),
        *(
            (
                [f"pixel_distance={name}"],
                LABELLED | UNLABELLED,
                "pixel_labelled_deep",
                lambda s, distance=distance: distance(s.labelled, s.on_labelled[1], valid=s.valid_labelled),
            )
            for name, distance in {
                "dist": dist_loss,
                "cauchy-schwarz": cauchy_schwarz_loss,
                "ttm": ttm_loss,
                "binary": binary_loss,
            }.items()
        ),
        (
            ["channel=3.0", "temperature=2.0"],
            CHANNELS,
            "channel_unlabelled_deep",
            lambda s: channel_loss(s.unlabelled, s.on_unlabelled[1], valid=s.valid, temperature=2.0),
        ),
        (
            ["pixel=0", "channel=3.0", "images=[labelled]"],
            {name for name in CHANNELS if "unlabelled" not in name},
            "channel_labelled_wide",
            lambda s: channel_loss(s.labelled, s.on_labelled[0], valid=s.valid_labelled),
        ),
        (
            ["region_distance=kl"],
            {"region"},
            "region",
            lambda s: region_kl_loss(s.features, s.targets["wide"].mixed_features, valid=s.valid),
        ),
        (
            ["region_teacher=[deep, wide]"],
            {"region_deep", "region_wide"},
            "region_deep",
            lambda s: content_aware_loss(s.features, s.targets["deep"].mixed_features, valid=s.valid),
        ),
        (
            ["image_distance=log-probability"],
            {"image"},
            "image",
            lambda s: mean_log_probability_loss(s.unlabelled, s.targets["deep"].mixed_logits, 9.2, valid=s.valid),
        ),
        (
            ["image_distance=presence"],
            {"image"},
            "image",
            lambda s: presence_loss(s.unlabelled, s.targets["deep"].mixed_logits, valid=s.valid),
        ),
        (
            ["pixel_choice=by-class"],
            {"pixel_labelled_by-class", "pixel_unlabelled_by-class"},
            "pixel_unlabelled_by-class",
            lambda s: pixel_consistency_loss(s.unlabelled, best_by_class(s.on_unlabelled, list(IOU.values())), valid=s.valid),
        ),
        (
            ["pixel_weights=[agreement]"],
            UNLABELLED,
            "pixel_unlabelled_deep",
            lambda s: weighed(s, agreement_weight(*s.on_unlabelled, valid=s.valid)),
        ),
        (
            ["pixel_weights=[margin]"],
            UNLABELLED,
            "pixel_unlabelled_deep",
            lambda s: weighed(s, margin_weight(s.targets["wide"].mixed_features, PROTOTYPES, (32, 32), valid=s.valid)),
        ),
        (
            ["pixel_weights=[correct]"],
            LABELLED,
            "pixel_labelled_deep",
            lambda s: pixel_consistency_loss(
                s.labelled, s.on_labelled[1], valid=s.valid_labelled & correct_weight(s.on_labelled[1], s.labels)
            ),
        ),
        (
            ["pixel_weights=[edges]"],
            LABELLED | UNLABELLED,
            "pixel_labelled_wide",
            lambda s: pixel_consistency_loss(
                s.labelled,
                s.on_labelled[0],
                valid=s.valid_labelled,
                weight=edge_weight(s.labels, strength=2.0, valid=s.valid_labelled),
            ),
        ),
        (
            ["pixel_weights=[balance]", "balance=0.75"],
            LABELLED | UNLABELLED,
            "pixel_unlabelled_deep",
            lambda s: weighed(
                s, class_weight(mean_of_probabilities(s.on_unlabelled).argmax(1), PIXELS, strength=0.75, valid=s.valid)
            ),
        ),
        (
            ["pixel_weights=[edges, agreement, margin]", "edges=5.0", "confidence=0.35"],
            LABELLED | UNLABELLED,
            "pixel_unlabelled_deep",
            weighed_by_all,
        ),
        (
            ["prior_adjustment=2.0", "confidence=0.35"],  # which is read before the prior comes off
            UNLABELLED | LABELLED,
            "pixel_unlabelled_deep",
            lambda s: pixel_consistency_loss(
                s.unlabelled, s.on_unlabelled[1] - OFF, valid=s.valid & confidence_weight(s.on_unlabelled[1], 0.35)
            ),
        ),
        (
            ["prior_adjustment=2.0", "pixel_choice=ensemble"],
            {"pixel_labelled_ensemble", "pixel_unlabelled_ensemble"},
            "pixel_unlabelled_ensemble",
            lambda s: pixel_consistency_loss(s.unlabelled, mean_of_probabilities(s.on_unlabelled) - OFF, valid=s.valid),
        ),
        (
            ["prior_adjustment=2.0", "pixel_weights=[balance]", "balance=0.75"],
            LABELLED | UNLABELLED,
            "pixel_unlabelled_deep",
            lambda s: pixel_consistency_loss(
                s.unlabelled,
                s.on_unlabelled[1] - OFF,
                valid=s.valid,
                weight=class_weight((mean_of_probabilities(s.on_unlabelled) - OFF).argmax(1), PIXELS, strength=0.75, valid=s.valid),
            ),
        ),
        (
            ["prior_adjustment=2.0"],
            UNLABELLED,
            "pixel_unlabelled_deep",
            lambda s: pixel_consistency_loss(s.unlabelled, s.on_unlabelled[1] - OFF, valid=s.valid),
        ),
    ],
)
def test_each_key_changes_its_own_terms_to_what_the_functions_say(
    finished_project: Path,
    plain: Step,
    overrides: list[str],
    changed: set[str],
    term: str,
    by_hand: Callable[[Step], Tensor],
) -> None:
    knowledge = Knowledge(iou=IOU, prototypes=PROTOTYPES if "margin" in overrides[0] else None)
    knowledge = replace(knowledge, pixels=PIXELS if "balance" in " ".join(overrides) else None)
    knowledge = replace(knowledge, offsets=OFF if "prior" in overrides[0] else None)
    step = step_of(finished_project, *(f"losses.{override}" for override in overrides), knowledge=knowledge)
    assert {name for name, value in step.terms.items() if not value.equal(plain.terms.get(name, torch.zeros(0)))} == changed
    assert step.terms[term].equal(by_hand(step)) and step.terms[term] > 0
    assert step.total != plain.total, "the terms have a weight"


def test_the_step_of_version_0_1_0_is_the_same_to_the_bit(finished_project: Path) -> None:
    """Gradients, too: they are sums, whose order is the order of the terms and of the slices of the student's logits."""
    project = open_project(finished_project / "params.yaml", TINY)
    params, batch = project.params, training_set(project)[0]
    gradients = []
    for former in (False, True):
        torch.manual_seed(0)
        network = build_network(params.student.network, 9)
        if former:
            normalise, jitter = normalisation(params.student.network.encoder), params.views.colour_jitter
            mixed = mixed_views(batch, [view_images(source, normalise, jitter) for source in batch.mixed])
            inputs = torch.cat([view_images(batch.labelled, normalise, jitter), mixed])
            outputs = network(inputs.contiguous(memory_format=torch.channels_last))
            logits, targets, valid = upsample(outputs.logits, (32, 32)), cached_targets(batch), mixed_valid(batch)
            losses = [supervised_loss(logits[:2], view_labels(batch.labelled))]
            for name in ("wide", "deep"):
                said, exists = targets[name], valid_views(batch.labelled)
                losses += [pixel_consistency_loss(logits[:2], said.labelled_logits, valid=exists)]
                losses += [pixel_consistency_loss(logits[2:], said.unmixed_logits, valid=valid)]
            losses += [10.0 * content_aware_loss(outputs.features[2:], targets["wide"].mixed_features, valid=valid)]
            losses += [0.004 * semantic_sensitive_loss(logits[2:], targets["deep"].mixed_logits, valid=valid)]
            torch.stack(losses).sum().backward()
        else:
            total_loss(step_terms(network, batch, cached_targets, params), params.losses).backward()
        gradients.append([value.grad for value in network.parameters() if value.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    assert all(now.equal(then) for now, then in zip(*gradients, strict=True))


def test_weights_of_terms_are_those_of_their_keys(finished_project: Path, plain: Step) -> None:
    more = step_of(finished_project, "losses.pixel=0", "losses.channel=3.0", "losses.region_teacher=[wide, deep]", "losses.image=0")
    terms = {name: value.item() for name, value in more.terms.items()}
    channels = sum(value for name, value in terms.items() if name.startswith("channel"))
    expected = terms["supervised"] + 3 * channels + 10 * (terms["region_wide"] + terms["region_deep"])
    assert more.total == pytest.approx(expected, rel=1e-6) and set(terms) == {"supervised", "region_wide", "region_deep"} | CHANNELS


def test_a_confidence_of_version_0_1_0_is_what_it_was(finished_project: Path) -> None:
    step = step_of(finished_project, "losses.confidence=0.35")
    assert 0 < confidence_weight(step.on_labelled[1], 0.35).float().mean() < 1
    for images, student, logits, valid in (
        ("labelled", step.labelled, step.on_labelled, step.valid_labelled),
        ("unlabelled", step.unlabelled, step.on_unlabelled, step.valid),
    ):
        for name, said in zip(("wide", "deep"), logits, strict=True):
            former = pixel_consistency_loss(student, said, valid=valid, confidence=0.35)
            assert step.terms[f"pixel_{images}_{name}"].equal(former)


def test_a_teacher_is_not_heard_on_classes_that_it_does_not_know(finished_project: Path) -> None:
    """Several teachers together know what any of them knows; the rarest class is not lifted where nobody knows it."""
    manifest = read_manifest(open_project(finished_project / "params.yaml", TINY).manifest, finished_project)

    def of_maps(*overrides: str) -> Knowledge:
        return knowledge_of(open_project(finished_project / "params.yaml", [*TINY, *overrides]).params, manifest, {}, CPU)

    def lacking(*numbers: int) -> str:
        return json.dumps({name: [] if number in numbers else [number] for number, name in enumerate(manifest.classes)})

    maps = [f"teachers.wide.class_map={lacking(2, 5)}", f"teachers.deep.class_map={lacking(5)}", "losses.pixel_distance=kl"]
    of = {}
    for choice in ("each", "ensemble"):
        of[choice] = of_maps(*maps, f"losses.pixel_choice={choice}")
    known = {choice: {name: ids.tolist() for name, ids in knowledge.known.items()} for choice, knowledge in of.items()}
    assert known["each"] == {"wide": [0, 1, 3, 4, 6, 7, 8], "deep": [0, 1, 2, 3, 4, 6, 7, 8]}
    assert known["ensemble"] == {"ensemble": known["each"]["deep"]}
    of_image = of["each"].known_of_image
    assert of_image is not None and of_image.tolist() == known["each"]["deep"] and of_maps(maps[0]).known_of_image is None
    offsets = of_maps(*maps, "losses.prior_adjustment=1.0").offsets
    assert offsets is not None and offsets[5] == offsets.max() > offsets[2]
    for key, term in (("pixel_teachers", "wide"), ("image_teacher", "deep")):
        with pytest.raises(ParamsError, match=rf"losses\.{key}: {term} knows one class of the data set only"):
            of_maps(
                f"teachers.{term}.class_map={lacking(*range(8))}", "losses.pixel_teachers=[wide]", "losses.image_distance=presence"
            )
    step = step_of(finished_project, "losses.pixel_distance=kl", knowledge=Knowledge({"wide": of["each"].known["wide"]}))
    alone = known_classes_kl(step.unlabelled, step.on_unlabelled[0], known["each"]["wide"], valid=step.valid)
    assert step.terms["pixel_unlabelled_wide"].equal(alone)
    assert step.terms["pixel_unlabelled_deep"].equal(kl_loss(step.unlabelled, step.on_unlabelled[1], valid=step.valid))


def pixels(*probabilities: tuple[float, ...]) -> Tensor:
    """(1, K, 1, W) logits."""
    return torch.tensor(probabilities).log().T[None, :, None]


UNSURE, TOLD = pixels((0.4, 0.4, 0.2), (0.1, 0.1, 0.8)), pixels((0.72, 0.24, 0.04), (0.6, 0.2, 0.2))
"""The teacher does not know the third class. Of the first two the student says 1/2 and 1/2, the teacher 3/4 and 1/4, at both
pixels; 0.8 and 0.2 of the student's probability lie on them, and at the second pixel it names the third class."""
KL = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
FLAT = 3**0.2 / (1 + 3**0.2)


@pytest.mark.parametrize(
    ("keys", "student", "expected"),
    [
        ({"pixel_distance": "cross-entropy"}, UNSURE, 0.5 * math.log(2)),
        ({"pixel_distance": "cross-entropy", "pixel_labels": "soft"}, UNSURE, 0.5 * math.log(2)),
        ({"pixel_distance": "kl"}, UNSURE, 0.5 * KL),
        ({"pixel_distance": "cauchy-schwarz"}, UNSURE, -0.5 * math.log(0.5**2 / (0.5 * 0.625))),
        ({"pixel_distance": "ttm"}, UNSURE, 0.5 * (FLAT * math.log(2 * FLAT) + (1 - FLAT) * math.log(2 - 2 * FLAT))),
        ({"pixel_distance": "binary"}, UNSURE, 0.5 * 2 * 0.25 * math.log(2)),
        # Over two classes a correlation is 1 or -1, and one pixel has none with itself.
        ({"pixel_distance": "dist"}, pixels((0.2, 0.6, 0.2), (0.1, 0.1, 0.8)), 2),
        # Both classes lie to 4/5 on the student's first pixel, and to 6/11 on the teacher's.
        ({"channel": 1.0, "pixel": 0.0}, UNSURE, 6 / 11 * math.log(30 / 44) + 5 / 11 * math.log(25 / 11)),
        ({"image_distance": "l1"}, UNSURE, abs(math.log(0.04 / 0.432)) / 2 + abs(math.log(0.04 / 0.048)) / 2),
        ({"image_distance": "log-probability"}, UNSURE, math.log(1.5) + math.log(2)),
        ({"image_distance": "presence"}, UNSURE, 2 * KL),
    ],
)
def test_what_a_teacher_says_of_the_classes_that_it_knows_by_hand(keys: dict[str, Any], student: Tensor, expected: float) -> None:
    valid, known = torch.ones(1, 1, 2, dtype=torch.bool), torch.tensor([0, 1])
    said = TOLD.clone()
    said[:, 2] -= 3  # which nobody reads, but in what the teacher's own softmax would say
    student = student.clone().requires_grad_()
    if "image_distance" in keys:
        term = image_term(student, said, valid, known, keys["image_distance"], floor=9.0)
    else:
        losses = LossesParams(region=0, image=0, pixel_teachers=["wide"], **keys)
        (term,) = pixel_terms(
            [Seen("unlabelled", student, slice(None), {"wide": said}, valid)], losses, Knowledge(known={"wide": known})
        ).values()
    assert term.item() == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(term, student)
    assert not gradient[:, 2].any(), "nothing is said of the third class"
    assert gradient[:, :2].any() or "dist" in keys.values(), "of the two others something, but where a correlation is 1 or -1"


def best_of(first: list[float], second: list[float]) -> list[float]:
    """The log-probabilities of a pixel, of which one teacher is best at class 0 and one at class 1."""
    logits = [torch.tensor(values).view(1, 2, 1, 1) for values in (first, second)]
    return best_by_class(logits, [torch.tensor([0.9, 0.1]), torch.tensor([0.2, 0.9])]).flatten().exp().tolist()


def test_the_teacher_that_is_better_at_what_it_names_is_heard() -> None:
    sure, unsure = torch.tensor([3.0, 0.0]).softmax(0).tolist(), torch.tensor([0.0, 1.0]).softmax(0).tolist()
    assert best_of([3.0, 0.0], [1.0, 0.0]) == pytest.approx(sure), "0.9 against 0.2"
    assert best_of([0.0, 3.0], [0.0, 1.0]) == pytest.approx(unsure), "0.1 against 0.9"
    assert best_of([3.0, 0.0], [0.0, 1.0]) == pytest.approx(sure), "both are best at what they name: the first"


def cells_of(manifest: Manifest, cache: TargetCache, swapped: Mapping[int, int]) -> dict[ImageKey, ImageTargets]:
    """Targets of the labelled images that name the true class of the pixel in the middle of each cell, but for some classes."""
    planted = {}
    for row in manifest.labelled:
        key = manifest.key(row)
        real, mask = cache[key], torch.from_numpy(manifest.mask(row))
        height, width = real.frame
        frame = torch.full((height, width), IGNORE)
        frame[: mask.shape[0], : mask.shape[1]] = mask
        rows, columns = (torch.linspace(-1, 1, cells) for cells in real.logits.shape[1:])
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)[None]
        named = F.grid_sample(frame[None, None].float(), grid, "nearest", align_corners=True).long().squeeze()
        for true, said in swapped.items():
            named = torch.where(named == true, said, named)
        logits = F.one_hot(named.where(named != IGNORE, 0), len(manifest.classes)).permute(2, 0, 1).numpy()
        records = {name: cache.record(name, cache.row(key)) for name in ("region_embeddings", "global_descriptors", "extents")}
        canvas = np.zeros(cache.layout.records["logits"][0], np.float32)
        canvas[:, : logits.shape[1], : logits.shape[2]] = logits
        planted[key] = ImageTargets.decode({**records, "logits": canvas, "logits_affine": np.array([0.0, 1.0])}, cache.layout)
    return planted


def test_teachers_are_measured_where_their_cells_lie(finished_project: Path) -> None:
    project = open_project(finished_project / "params.yaml", TINY)
    manifest = read_manifest(project.manifest, project.base)
    cache = training_set(project).open_caches()["wide"]
    right = labelled_iou(cells_of(manifest, cache, {}), manifest)  # type: ignore[arg-type]  # a cache that is a dictionary
    shown = right > 0
    assert shown.sum() > 3 and (right[shown] == 1).all(), "each cell that shows a class names it"
    first, second, *others = shown.nonzero().flatten().tolist()
    wrong = labelled_iou(cells_of(manifest, cache, {first: second}), manifest)  # type: ignore[arg-type]
    assert wrong[first] == 0 < wrong[second] < 1 and (wrong[others] == 1).all()


def test_prototypes_are_of_cells_that_show_one_class(finished_project: Path) -> None:
    """Knowledge is measured only where a term asks for it."""
    project = open_project(finished_project / "params.yaml", TINY)
    dataset, manifest = training_set(project), read_manifest(project.manifest, project.base)
    caches = dataset.open_caches()
    assert knowledge_of(project.params, manifest, {}, CPU) == Knowledge()
    balanced = open_project(finished_project / "params.yaml", [*TINY, "losses.pixel_weights=[balance]"])
    pixels = knowledge_of(balanced.params, manifest, {}, CPU).pixels
    labelled = np.concatenate([manifest.mask(row).ravel() for row in manifest.labelled])
    assert pixels is not None and pixels.tolist() == [(labelled == k).sum() for k in range(9)]
    asked = open_project(finished_project / "params.yaml", [*TINY, "losses.pixel_weights=[margin]", "losses.pixel_choice=by-class"])
    knowledge = knowledge_of(asked.params, manifest, caches, CPU)
    assert knowledge.iou["deep"].equal(labelled_iou(caches["deep"], manifest)) and set(knowledge.iou) == {"wide", "deep"}

    sums, side = np.zeros((9, caches["wide"].layout.features)), caches["wide"].layout.region_stride
    for row in manifest.labelled:
        mask, features = manifest.mask(row), caches["wide"][manifest.key(row)].features.numpy()
        for i, j in np.ndindex(features.shape[1:]):
            counts = np.bincount(mask[i * side : (i + 1) * side, j * side : (j + 1) * side].ravel(), minlength=256)[:9]
            if counts.max() >= 0.9 * side**2:
                sums[counts.argmax()] += features[:, i, j] / np.linalg.norm(features[:, i, j])
    prototypes = knowledge.prototypes
    assert prototypes is not None and (sums.any(1)).sum() > 1
    directions = F.normalize(prototypes, dim=1).numpy()
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    np.testing.assert_allclose(directions, sums / np.where(norms > 0, norms, 1), atol=1e-5)
