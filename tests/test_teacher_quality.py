"""A teacher that is not what it seems to be is noticed before it has cost anything; its quality is measured as it is stored."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.classification import multiclass_calibration_error
from typer.testing import CliRunner

from caches import file_bytes
from mgd_pipeline.caches.reader import open_cache
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.errors import DataError, WeightsError
from mgd_pipeline.metrics import calibration_bins, expected_calibration_error, iou_by_class
from mgd_pipeline.networks.encoders import normalisation
from mgd_pipeline.networks.inference import to_input
from mgd_pipeline.networks.normalisation import Normalisation
from mgd_pipeline.networks.segmentation import build_network, upsample
from mgd_pipeline.networks.weights import save_weights
from mgd_pipeline.params import NetworkParams
from mgd_pipeline.params_file import override_params
from mgd_pipeline.pictures.overlays import save_overlay
from mgd_pipeline.teachers.teacher import Teacher
from mgd_stages.cli import app
from mgd_stages.projects.presets import preset, render_params
from mgd_stages.run.class_tables import read_class_tsv, read_confusion
from mgd_stages.run.loaded_teacher import LoadedTeacher, load_teacher
from mgd_stages.run.pictures import read_masks
from mgd_stages.run.project import Project, open_project
from mgd_stages.run.teacher_check import best_order, check_teacher_sees
from mgd_stages.stages.precompute_teachers import precompute_teachers
from mgd_stages.stages.prepare_data import prepare_data

CPU = torch.device("cpu")
Change = Callable[[torch.Tensor], torch.Tensor]
NETWORK = NetworkParams(encoder="tu-test_resnet", decoder_channels=16)
COLOURS = np.array([(200, 100, 0), (0, 200, 100), (100, 0, 200)])
CLASSES = ["orange", "mint", "violet"]


def scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(64, 64, 3) uint8 image of four patches, and its (64, 64) uint8 mask: each class has its colour, and nothing else tells."""
    rng = np.random.default_rng(seed)
    mask = np.kron(rng.integers(0, 3, (2, 2)), np.ones((32, 32), np.int64))
    return (COLOURS[mask] + rng.uniform(0, 40, (64, 64, 3))).astype(np.uint8), mask.astype(np.uint8)


@pytest.fixture(scope="module")
def trained() -> dict[str, torch.Tensor]:
    """Weights of a network that has learnt the colours."""
    torch.manual_seed(0)
    network, normalise = build_network(NETWORK, 3), normalisation(NETWORK.encoder)
    images, masks = zip(*(scene(seed) for seed in range(24)), strict=True)
    inputs = torch.cat([to_input(image, normalise, CPU) for image in images])
    labels = torch.from_numpy(np.stack(masks)).long()
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(upsample(network(inputs).logits, (64, 64)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.model.state_dict()


@pytest.fixture
def colours(tmp_path: Path, trained: dict[str, torch.Tensor]) -> Project:
    """A project of coloured patches, with a trained teacher `wide` and one, `deep`, that has seen nothing."""
    seed = 100
    for split, count in (("train", 12), ("val", 4)):
        for kind in ("images", "masks"):
            (tmp_path / f"data/raw/own/{kind}/{split}").mkdir(parents=True)
        for i in range(count):
            image, mask = scene(seed := seed + 1)
            Image.fromarray(image).save(tmp_path / f"data/raw/own/images/{split}/{split}{i}.png")
            Image.fromarray(mask).save(tmp_path / f"data/raw/own/masks/{split}/{split}{i}.png")
    params = preset("folder", "data/raw/own", "1/2", {"classes": CLASSES})
    own = ["encoder=tu-test_resnet", "decoder_channels=16", "encoder_weights=none", "decoder=deeplabv3plus"]
    overrides = [f"teachers.{name}.{setting}" for name in ("wide", "deep") for setting in own]
    params = override_params(params, [*overrides, "train_teachers=[]", "views.crop=[32, 32]", "evaluation.split=val"])
    (tmp_path / "params.yaml").write_text(render_params(params))
    project = open_project(tmp_path / "params.yaml")
    prepare_data(project)
    save_weights(project.teacher("wide"), trained, {"classes": CLASSES})
    torch.manual_seed(1)
    save_weights(project.teacher("deep"), build_network(NETWORK, 3).model.state_dict(), {"classes": CLASSES})
    return project


def load(project: Project, name: str = "wide") -> LoadedTeacher:
    return load_teacher(project, name, read_manifest(project.manifest, project.base), CPU)


class Other(torch.nn.Module):
    """A teacher's network with its input or its logits changed."""

    def __init__(self, network: torch.nn.Module, shown: Change = torch.Tensor.clone, said: Change = torch.Tensor.clone) -> None:
        super().__init__()
        self.network, self.shown, self.said = network, shown, said

    def forward(self, images: torch.Tensor) -> object:
        outputs = self.network(self.shown(images))
        return outputs._replace(logits=self.said(outputs.logits))


def test_a_right_teacher_passes_and_wrong_ones_say_what_is_wrong(colours: Project) -> None:
    loaded = load(colours)
    teacher = loaded.teacher

    def tried(one: Teacher) -> None:
        check_teacher_sees(replace(loaded, teacher=one), 0.5)

    tried(teacher)
    with pytest.raises(WeightsError, match="with red and blue exchanged: it does not get the input that it was trained with"):
        tried(replace(teacher, network=Other(teacher.network, shown=lambda images: images.flip(1)).eval()))
    with pytest.raises(WeightsError, match="with input from -1 to 1: it does not get the input"):
        tried(replace(teacher, normalisation=Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))))
    with pytest.raises(WeightsError, match="in another order: it calls orange 'mint', mint 'violet', violet 'orange'; write t"):
        tried(replace(teacher, groups=((2,), (0,), (1,))))
    untrained = load(colours, "deep").teacher
    with pytest.raises(WeightsError, match=r"less than --min-miou 0\.5; train it longer, or use another one"):
        tried(untrained)


def test_a_weak_teacher_is_compared_rightly(colours: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """A teacher that says one class everywhere has as much as one class everywhere, one that is always wrong has less; and where no
    pixel has a class nothing is known, which no threshold can pass."""
    loaded = load(colours)
    manifest = loaded.manifest

    truth = np.concatenate([manifest.mask(row).ravel() for row in manifest.labelled])
    counts = np.bincount(truth, minlength=3)[:3]
    for which, words in ((int(counts.argmax()), "as much as"), (int(counts.argmin()), "less than")):
        one_hot = torch.eye(3)[which].view(1, 3, 1, 1)
        constant = Other(loaded.teacher.network, said=lambda logits, one_hot=one_hot: one_hot.expand_as(logits))
        check_teacher_sees(replace(loaded, teacher=replace(loaded.teacher, network=constant.eval())), 0.0)
        assert f", {words} one class everywhere would have" in capsys.readouterr().out
    void = replace(manifest, lookup=tuple([255] * len(manifest.lookup)))
    for least in (0.0, 0.5):
        with pytest.raises(DataError, match="holds no class, nor does any other of the 4 masks of the val images"):
            check_teacher_sees(replace(loaded, manifest=void), least)


def test_a_wrong_teacher_costs_nothing_and_a_right_one_is_tried_once(colours: Project, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(colours.base / "params.yaml")
    command = ["precompute-teachers", "--teacher", "wide", "--config", config, "--device", "cpu"]
    mapped = "teachers.wide.class_map={orange: mint, mint: violet, violet: orange}"
    done = CliRunner().invoke(app, [*command, "--set", mapped])
    assert done.exit_code == 1, done.output
    assert "its classes in another order" in done.output and not colours.targets("wide").exists()
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0 and "labelled images, each read in" in first.output, first.output
    second = CliRunner().invoke(app, command)
    assert second.exit_code == 0 and "labelled images, each" not in second.output, "nothing is computed, nothing is tried"
    done = CliRunner().invoke(app, [*command[:2], "deep", *command[3:], "--min-miou", "0.5"])
    assert done.exit_code != 0 and "less than --min-miou" in done.output and not colours.targets("deep").exists()


def test_a_weak_teacher_whose_cache_is_there_is_refused_as_well(colours: Project) -> None:
    command = ["precompute-teachers", "--teacher", "deep", "--config", str(colours.base / "params.yaml"), "--device", "cpu"]
    assert CliRunner().invoke(app, command).exit_code == 0
    before = file_bytes(colours.targets("deep"))
    for options in ([], ["--shards", "0::2"], *([["--workers", "1"]] if find_spec("distributed") else [])):  # an extra
        done = CliRunner().invoke(app, [*command, *options, "--min-miou", "0.5"])
        assert done.exit_code == 1 and "less than --min-miou 0.5" in done.output, done.output
        assert file_bytes(colours.targets("deep")) == before
    assert CliRunner().invoke(app, [*command, "--min-miou", "0.01"]).exit_code == 0


def test_best_order_by_hand() -> None:
    confusion = np.array([[1, 8, 1], [0, 2, 9], [7, 1, 0]])
    order = best_order(confusion)
    assert order.tolist() == [1, 2, 0] and np.diag(confusion[:, order]).tolist() == [8, 9, 7]


def test_calibration_is_that_of_torchmetrics() -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(3, 5, 40, 30)) * 2)
    truth = rng.integers(0, 5, (3, 40, 30)).astype(np.uint8)
    truth[:, :4] = 255
    bins = sum(calibration_bins(t, p) for t, p in zip(truth, logits.softmax(1).numpy(), strict=True))
    theirs = multiclass_calibration_error(
        logits.softmax(1), torch.from_numpy(truth).long(), num_classes=5, n_bins=15, norm="l1", ignore_index=255
    )
    assert expected_calibration_error(np.asarray(bins)) == pytest.approx(float(theirs), abs=1e-6)
    half = calibration_bins(np.array([[0]], np.uint8), np.array([[[0.5]], [[0.5]]]))
    assert half[0].argmax() == 7 and half[:, 7].tolist() == [1, 0.5, 1], "the eighth of fifteen"
    certain = calibration_bins(np.array([[1, 1]], np.uint8), np.array([[[0.0, 1.0]], [[1.0, 0.0]]]))
    assert expected_calibration_error(certain) == 0.5 and certain[:, -1].tolist() == [2, 2, 1]


def of_classes(project: Project, path: str, names: list[str]) -> float:
    """Mean IoU of some classes by the confusion matrix of a stage."""
    classes, confusion = read_confusion(project.results / f"{path}-confusion.csv") or ([], np.zeros(0))
    return float(np.mean([iou_by_class(confusion, classes)[name] for name in names]))


def test_quality_of_what_is_stored(colours: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """On val as the targets let the teacher see it; on labelled images from the caches; disagreement with pictures."""
    # Colours are the same from either side: a teacher that knows them says nearly the same, once it is turned back.
    precompute_teachers(open_project(colours.base / "params.yaml", ["targets.mirrored=true"]), "wide", device=CPU, batch_size=4)
    made = json.loads((colours.results / "teachers/wide.json").read_text())
    assert made["miou"] > 0.8 and made["miou_mirrored"] > 0.8 and 0.9 < made["agreement_mirrored"] < 1

    looks = open_project(colours.base / "params.yaml", ["targets.tta={scales: [1.0, 0.5], flip: true}"])
    for name in ("wide", "deep"):
        precompute_teachers(looks, name, device=CPU, batch_size=4)
    right, wrong = (json.loads((looks.results / f"teachers/{name}.json").read_text()) for name in ("wide", "deep"))
    assert right["miou"] > 0.8 > 0.4 > wrong["miou"] and 0 <= right["ece"] < 0.5
    assert right["rare_miou"] == pytest.approx(of_classes(looks, "teachers/wide", right["rare_classes"]), abs=1e-6)
    assert right["rare_classes"] == wrong["rare_classes"] and len(right["rare_classes"]) == 1, "one of the three"
    assert right["miou_one_look"] != right["miou"] and 0.5 < right["agreement_one_look"] < 1
    rows = list(csv.DictReader((looks.results / "teachers/wide-confusion.csv").read_text().splitlines()))
    on_diagonal, elsewhere = (
        sum(int(row["pixels"]) for row in rows if (row["actual"] == row["predicted"]) == right) for right in (True, False)
    )
    assert on_diagonal + elsewhere == 4 * 64 * 64 and on_diagonal > 0.9 * 4 * 64 * 64

    config = ["--config", str(looks.base / "params.yaml"), "--set", "targets.tta={scales: [1.0, 0.5], flip: true}"]
    shown: list[list[np.ndarray]] = []

    def seen(path: Path, image: np.ndarray, masks: dict[str, np.ndarray], *others: Any, **named: Any) -> None:
        shown.append(list(masks.values()))
        save_overlay(path, image, masks, *others, **named)

    monkeypatch.setattr("mgd_stages.stages.compare_teachers.save_overlay", seen)
    done = CliRunner().invoke(app, ["compare-teachers", *config])
    assert done.exit_code == 0, done.output
    folder = looks.results / "compare-teachers"
    measured = json.loads((folder / "metrics.json").read_text())
    assert measured["wide"]["miou_labelled"] > 0.8 > 0.4 > measured["deep"]["miou_labelled"]
    assert measured["wide"]["rare_classes"] == right["rare_classes"], "all labelled images are in the caches"
    of_rare = of_classes(looks, "compare-teachers/wide", right["rare_classes"])
    assert measured["wide"]["rare_miou_labelled"] == pytest.approx(of_rare, abs=1e-6)
    cache = open_cache(looks.targets("wide"))
    confident = []
    for row in cache.index.rows.tolist():
        values = cache.record("logits", row).astype(np.float32) * cache.record("logits_affine", row)[1]
        confident.append(float((torch.from_numpy(values).softmax(0).amax(0) >= 0.95).float().mean()))
    assert measured["wide"]["confident_share"] == pytest.approx(np.mean(confident), abs=1e-5)
    pair = measured["wide and deep"]
    agreement = read_class_tsv(folder / "disagreement/class_agreement.tsv")["wide and deep"]
    assert 0 < pair["same_class_share"] < 0.9 and agreement and set(agreement) <= set(CLASSES)
    pictures = sorted(path.name for path in (folder / "disagreement").glob("*.png"))
    assert pictures == [f"{i:02d}.png" for i in range(1, 11)], "the ten images on which they differ most"
    assert "the same class on" in done.output
    for one, other in shown:
        assert ((one == 255) == (other == 255)).all() and (one != 255).any()
        assert (one != other)[one != 255].all(), "colours only where they differ"
    kept = read_masks(folder / "disagreement/masks.parquet")
    assert [mask.network for mask in kept] == ["wide", "deep"] * 10
    assert all((one.mask == mask).all() for one, mask in zip(kept, [mask for pair in shown for mask in pair], strict=True))
    scores = [one.score for one in kept[::2]]
    assert scores == sorted(scores, reverse=True) and scores[0] > 0
    held_out = read_masks(looks.results / "teachers/wide-masks.parquet")
    assert len(held_out) == 4 and np.mean([one.score for one in held_out]) > 0.7
