"""Teachers of every kind behind one contract: real architectures with random weights, built without a hub."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from ruamel.yaml import YAML
from torchvision.models import get_model

from caches import file_bytes
from mgd_pipeline.caches.reader import open_cache
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.errors import ParamsError, WeightsError
from mgd_pipeline.networks.encoders import normalisation
from mgd_pipeline.networks.inference import to_input
from mgd_pipeline.networks.normalisation import IMAGENET
from mgd_pipeline.networks.segmentation import build_network
from mgd_pipeline.networks.weights import read_metadata, read_state_dict, save_weights
from mgd_pipeline.params import (
    TEACHERS,
    ImportedTeacher,
    NetworkParams,
    SmpTeacher,
    TargetsParams,
    TeacherParams,
    TimmTeacher,
    TorchvisionTeacher,
    TransformersTeacher,
)
from mgd_pipeline.params_file import parse_params
from mgd_pipeline.teachers.class_map import class_groups
from mgd_pipeline.teachers.fetching import check_published, fetch_teacher
from mgd_pipeline.teachers.kinds import build_teacher
from mgd_pipeline.teachers.looks import dense_targets
from mgd_pipeline.teachers.probing import output_channels
from mgd_pipeline.teachers.teacher import Teacher, data_classes, teacher_provenance
from mgd_stages.reports.origins import origins
from mgd_stages.run.machine import Machine
from mgd_stages.run.project import Project
from mgd_stages.stages.precompute_teachers import precompute_teachers
from mgd_stages.stages.train_student import train_student
from mgd_stages.stages.train_teacher import train_teacher

transformers: Any = import_module("transformers") if find_spec("transformers") else None  # an extra
CPU = torch.device("cpu")
CLASSES = tuple("abcdefg")
IMAGES = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """Fresh normalisations are blind to what they are given; a few steps in training mode tell their statistics apart."""
    model.train()
    with torch.no_grad():
        for seed in range(2):
            model(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(seed)))
    return model.eval()


def outputs_of(params: TeacherParams, base: Path) -> tuple[Teacher, Any, Any]:
    """A teacher, and its logits and features of IMAGES."""
    teacher = build_teacher("x", params, CLASSES, base)
    assert not teacher.network.training and not any(p.requires_grad for p in teacher.network.parameters())
    with torch.inference_mode():
        return teacher, *teacher.network(IMAGES)


@pytest.mark.parametrize("name", ["deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large"])
def test_torchvision_networks_say_what_they_say_by_themselves(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    lraspp = name.startswith("lraspp")
    model = moved(get_model(name, weights=None, weights_backbone=None, num_classes=7, **({} if lraspp else {"aux_loss": True})))
    torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, tmp_path / "own.pth")
    teacher, logits, features = outputs_of(TorchvisionTeacher(torchvision=name, weights="own.pth"), tmp_path)
    assert teacher.labels is None and teacher.normalisation == IMAGENET and not teacher.align_corners
    assert features.shape[1] >= 128
    with torch.inference_mode():
        whole = model(IMAGES)["out"]
        assert torch.allclose(F.interpolate(logits, (96, 128), mode="bilinear"), whole, atol=1e-5)
        if not lraspp:
            assert logits.shape[-1] < 64, "native, not upsampled"
            again = model.get_submodule("classifier.4")(features)
            assert torch.allclose(again, logits, atol=1e-6), "features are the input of the last convolution"


def test_published_weights_of_torchvision_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    name, file = "deeplabv3_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large-fc3c493d.pth"
    params = TorchvisionTeacher(torchvision=name, pretrained="COCO_WITH_VOC_LABELS_V1", weights="data/coco.safetensors")
    monkeypatch.setattr("mgd_pipeline.teachers.kinds.torchvision.reachable", lambda url: False)
    with pytest.raises(WeightsError, match=rf"download https://\S+/{file}, and put the file here as {tmp_path}/home/\S+/{file}"):
        fetch_teacher("coco", params, tmp_path)
    assert not (tmp_path / "data").exists()
    model = moved(get_model(name, weights=None, weights_backbone=None, num_classes=21, aux_loss=True))
    place = tmp_path / "home/hub/checkpoints" / file
    place.parent.mkdir(parents=True)
    torch.save(model.state_dict(), place)
    fetch_teacher("coco", params, tmp_path)
    shutil.rmtree(tmp_path / "home")
    labels = build_teacher("coco", params.model_copy(update={"class_map": {"x": ["cat"], "y": ["dog", 0]}}), ("x", "y"), tmp_path)
    assert labels.labels is not None and labels.labels[:3] == ("__background__", "aeroplane", "bicycle")
    assert labels.groups == ((8,), (12, 0)) and np.allclose(labels.normalisation[:2], IMAGENET[:2])
    for wrong, said in (("COCO", "there are COCO_WITH_VOC_LABELS_V1"), (None, "None are no published weights")):
        with pytest.raises(ParamsError, match=said):
            fetch_teacher("coco", params.model_copy(update={"pretrained": wrong}), tmp_path)
    with pytest.raises(ParamsError, match="nearest is 'deeplabv3_resnet101'"):
        fetch_teacher("coco", params.model_copy(update={"torchvision": "deeplabv3_resnet11"}), tmp_path)


SEEN: dict[str, Any] = {"num_labels": 7}
STAGES: dict[str, Any] = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}


def segformer() -> Any:
    small: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
    return transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**small, **SEEN, decoder_hidden_size=32))


def upernet() -> Any:
    backbone = transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], **STAGES)
    auxiliary: dict[str, Any] = {"auxiliary_in_channels": 24, "auxiliary_channels": 16}
    return transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(backbone_config=backbone, hidden_size=32, **auxiliary, **SEEN)
    )


def mask2former() -> Any:
    swin = transformers.SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, **STAGES)
    widths: dict[str, Any] = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim"), 32)
    layers: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 9}
    config = transformers.Mask2FormerConfig(backbone_config=swin, **widths, **layers, **SEEN, dim_feedforward=32)
    return transformers.Mask2FormerForUniversalSegmentation(config)


def publish(model: Any, folder: Path, processor: Any = None) -> TransformersTeacher:
    """As on the hub: configuration, weights, and how images are prepared."""
    model.config.id2label = dict(enumerate(CLASSES))
    model.save_pretrained(folder / "published")
    processor = processor or transformers.SegformerImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.2, 0.1])
    processor.save_pretrained(folder / "published")
    params = TransformersTeacher(transformers="published", weights="teacher.safetensors")
    fetch_teacher("x", params, folder)
    shutil.rmtree(folder / "unplugged", ignore_errors=True)
    (folder / "published").rename(folder / "unplugged")
    return params


@pytest.mark.parametrize("architecture", [segformer, upernet, mask2former])
def test_transformers_segmenters_say_what_they_say_by_themselves(architecture: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = architecture().eval()
    params = publish(model, tmp_path)
    teacher, logits, features = outputs_of(params, tmp_path)
    assert teacher.labels == CLASSES and teacher.groups is None and not teacher.align_corners
    assert np.allclose(teacher.normalisation[:2], [[127.5, 102, 76.5], [51, 51, 25.5]], rtol=1e-6)
    assert teacher.normalisation.channels == "RGB"
    assert logits.shape == (2, 7, 24, 32) and features.shape == (2, 32, 24, 32)
    with torch.inference_mode():
        whole = model(pixel_values=IMAGES)
    if architecture is mask2former:
        classes, masks = whole.class_queries_logits.softmax(-1)[..., :7], whole.masks_queries_logits.sigmoid()
        assert torch.allclose(logits.exp(), torch.einsum("bqk,bqhw->bkhw", classes, masks), atol=1e-5)
    else:
        size = whole.logits.shape[-2:]
        assert torch.allclose(F.interpolate(logits, size, mode="bilinear", align_corners=False), whole.logits, atol=1e-5)


def test_a_fetched_teacher_leaves_what_dvc_expects_and_no_curve_of_another(project: Project) -> None:
    """DVC wants the folder of curves of every teacher; the report would draw those of the teacher that had this name before."""
    raw = project.params.model_dump()
    params = publish(segformer(), project.base)
    raw["teachers"]["deep"] = {**params.model_dump(), "transformers": "unplugged"}
    folder = project.results / "train-teacher-deep"
    assert (folder / "plots/loss.tsv").is_file() and (folder / "speed.json").is_file()
    fetching = Project(project.base, parse_params(raw))
    train_teacher(fetching, "deep", Machine(CPU))
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("*.*")] == ["plots/fetched.tsv"]
    manifest = read_manifest(project.manifest, project.base)
    teachers = dict(origins(fetching, manifest, dict.fromkeys(raw["teachers"], "none"), {}))["Teachers"]
    said = {name: lines[1] for name, lines in teachers}
    assert said == {"teacher wide": "trained here for 3 steps", "teacher deep": "fetched as it was published"}


def mobilevit() -> Any:
    sizes: dict[str, Any] = {"hidden_sizes": [16, 20, 24], "neck_hidden_sizes": [8, 8, 12, 16, 20, 24, 32], "aspp_out_channels": 16}
    config = transformers.MobileViTConfig(**sizes, **SEEN, num_attention_heads=2, initializer_range=0.3)
    return transformers.MobileViTForSemanticSegmentation(config)


def processors() -> dict[str, Any]:
    """How published segmenters prepare their images, by what is unusual in it."""
    fields: dict[str, Any] = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}
    return {
        "blue first": transformers.MobileViTImageProcessor(),
        "fields that it does not use": transformers.MobileViTImageProcessor(do_normalize=True, **fields),
        "blue first, 0 to 255": transformers.MobileViTImageProcessor(do_rescale=False),
        "red first after all": transformers.MobileViTImageProcessor(do_flip_channel_order=False),
        "0 to 255": transformers.SegformerImageProcessor(do_rescale=False, do_normalize=False),
        "0 to 255, normalised": transformers.SegformerImageProcessor(do_rescale=False, **fields),
        "0 to 1": transformers.SegformerImageProcessor(do_normalize=False),
        "another range": transformers.SegformerImageProcessor(rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3),
        "one number": transformers.SegformerImageProcessor(image_mean=0.5, image_std=0.25),
        "cropped": transformers.BeitImageProcessor(do_center_crop=True, **fields),
    }


@pytest.mark.parametrize("kind", processors() if find_spec("transformers") else [])
def test_a_teacher_is_given_what_its_processor_gives(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    blue_first = "blue first" in kind or "does not use" in kind
    model, processor = (mobilevit if blue_first else segformer)().eval(), processors()[kind]
    teacher = build_teacher("x", publish(model, tmp_path, processor), CLASSES, tmp_path)
    assert teacher.normalisation.channels == ("BGR" if blue_first else "RGB")
    image = np.random.default_rng(1).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    image[..., 0] //= 4  # colours that tell red from blue
    wanted = processor(images=[image], return_tensors="pt", do_resize=False, do_center_crop=False)["pixel_values"].float()
    given = to_input(image, teacher.normalisation, CPU)
    assert torch.allclose(given, wanted, atol=1e-4 * float(wanted.std()))
    with torch.inference_mode():
        if blue_first:
            ours, theirs = teacher.network(given).logits, model(pixel_values=wanted).logits
            assert torch.allclose(ours, theirs, atol=1e-6)
            assert not torch.allclose(theirs, model(pixel_values=wanted.flip(1)).logits, atol=1e-4)
    made = teacher_provenance({"teacher": {}, "preprocessing": {}}, teacher, "", None)["preprocessing"]
    assert made.get("channels") == ("BGR" if blue_first else None), "the provenance of RGB caches is what it was"


def test_what_else_a_processor_does_to_the_colours_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = transformers.SegformerImageProcessor._preprocess

    def squared(self: Any, images: Any, **options: Any) -> Any:
        return [values**2 for values in real(self, images, **options)]

    monkeypatch.setattr(transformers.SegformerImageProcessor, "_preprocess", squared)
    with pytest.raises(WeightsError, match=r"its SegformerImageProcessor does more to the colours .*; wrap the network"):
        publish(segformer(), tmp_path)
    assert not (tmp_path / "teacher.safetensors").exists()


def test_a_file_of_version_0_1_0_does_not_hide_that_its_network_takes_blue_first(tmp_path: Path) -> None:
    def unnoted(model: Any, channels: str, processor: Any = None) -> Teacher:
        params = publish(model, tmp_path, processor)
        notes = read_metadata(path := tmp_path / params.weights)
        assert notes.pop("channels") == channels
        save_weights(path, read_state_dict(path), notes)
        return build_teacher("x", params, CLASSES, tmp_path)

    with pytest.raises(WeightsError, match=r"takes blue first; version 0\.1\.0 made the file: fetch it again"):
        unnoted(mobilevit(), "BGR", processors()["blue first"])
    assert unnoted(segformer(), "RGB").normalisation.channels == "RGB"


def dpt() -> Any:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 32, "image_size": 64}
    necks: dict[str, Any] = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
    return transformers.DPTForSemanticSegmentation(transformers.DPTConfig(**sizes, **necks, **SEEN, num_attention_heads=2))


def test_networks_of_one_input_size_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    params = publish(dpt(), tmp_path)  # takes squares alone
    (tmp_path / "unplugged").rename(tmp_path / "published")
    (tmp_path / params.weights).unlink()
    check_published("x", params, tmp_path, lambda multiple: [(96, 96)])
    for look_at in (check_published, fetch_teacher):
        with pytest.raises(WeightsError, match=r"teachers\.x: cannot see images of 64 x 96 pixels .*; set teachers\.x\.fixed_size"):
            look_at("x", params, tmp_path, lambda multiple: [(64, 96)])
    assert not (tmp_path / params.weights).exists()


def test_a_teacher_that_cannot_see_these_images_is_named_before_anything_is_computed(project: Project) -> None:
    """Height and width of the shapes differ, and this network takes squares alone."""
    params = publish(dpt(), project.base)
    raw = project.params.model_dump()
    classes = read_manifest(project.manifest, project.base).classes
    raw["teachers"]["wide"] = {**params.model_dump(), "class_map": {name: [i] if i < 7 else [] for i, name in enumerate(classes)}}
    raw["train_teachers"] = ["deep"]
    before = file_bytes(project.targets("wide"))
    for window in (None, [32, 32]):  # it is measured without a window, too
        raw["targets"]["window"] = window
        with pytest.raises(WeightsError, match=r"teachers\.wide: cannot see images of 64 x 96 pixels"):
            precompute_teachers(Project(project.base, parse_params(raw)), "wide", device=CPU)
        assert file_bytes(project.targets("wide")) == before


@pytest.mark.parametrize(
    ("notes", "seen"),
    [
        ({}, (124.0, 117.0, 104.0)),  # the group's own: as smp trains it
        ({"kind": "teacher", "classes": list(CLASSES)}, IMAGENET.mean),  # version 0.1.0 showed it that
        ({"kind": "teacher", "classes": list(CLASSES), "normalisation": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]}, (1.0, 2.0, 3.0)),
    ],
)
def test_a_teacher_is_shown_what_it_was_trained_with(notes: dict[str, Any], seen: tuple[float, ...], tmp_path: Path) -> None:
    network = NetworkParams(encoder="dpn68", decoder="fpn", decoder_channels=32)
    save_weights(tmp_path / "x.safetensors", build_network(network, 7).model.state_dict(), notes)
    teacher = build_teacher("x", SmpTeacher(**network.model_dump(), weights="x.safetensors"), CLASSES, tmp_path)
    assert teacher.normalisation.mean == seen


def test_trained_teachers_say_what_they_were_shown(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where version 0.1.0 showed them the same nothing is noted, so that the file has the bytes which that version wrote."""
    assert "normalisation" not in read_metadata(project.teacher("wide"))
    monkeypatch.setattr("mgd_stages.run.unfinished.unrecorded_normalisation", lambda encoder: IMAGENET)
    short = project.params.teacher_training.model_copy(update={"steps": 1})
    once = dataclasses.replace(project, params=project.params.model_copy(update={"teacher_training": short}))
    train_teacher(once, "wide", Machine(CPU, resume=False))
    notes = read_metadata(project.teacher("wide"))
    assert notes["normalisation"] == [list(values) for values in normalisation("tu-test_resnet")[:2]]


def test_what_is_not_on_this_machine_or_does_not_segment_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgd_pipeline.teachers.kinds.transformers.reachable", lambda url: False)
    params = TransformersTeacher(transformers="nvidia/segformer-none", weights="x.safetensors")
    with pytest.raises(WeightsError, match="hf download nvidia/segformer-none --local-dir FOLDER"):
        fetch_teacher("x", params, tmp_path)
    save_weights(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {})
    with pytest.raises(WeightsError, match="holds no network's configuration; `mgd-pipeline train-teacher` makes"):
        build_teacher("x", params, CLASSES, tmp_path)
    config = transformers.SegformerConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
    with pytest.raises(WeightsError, match="is a SegformerForImageClassification, not a network for semantic segmentation"):
        publish(transformers.SegformerForImageClassification(config), tmp_path)


@pytest.mark.parametrize(("name", "multiple", "stride"), [("vit_tiny_patch16_224", 16, 16), ("resnet10t", 32, 32)])
def test_backbones_give_embeddings_only(name: str, multiple: int, stride: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = timm.create_model(name, pretrained=False).state_dict()  # with its classifier
    torch.save({f"module._orig_mod.model.{key}": value for key, value in state.items()}, tmp_path / "own.pth")
    teacher, logits, features = outputs_of(TimmTeacher(timm=name, weights="own.pth"), tmp_path)
    assert logits is None and teacher.multiple == multiple and teacher.labels is None
    assert features.shape[-2:] == (96 // stride, 128 // stride)
    image = np.random.default_rng(0).integers(0, 256, (97, 130, 3), dtype=np.uint8)
    targets = dense_targets(teacher, [image], TargetsParams())[0]
    assert targets.logits.shape[0] == 0 and targets.global_descriptor.shape == (0,)
    assert targets.region_embeddings.shape == (features.shape[1], 7, 9) and np.isfinite(targets.region_embeddings).all()
    state.pop(next(iter(state)))
    torch.save(state, tmp_path / "own.pth")
    with pytest.raises(WeightsError, match="lacks 1 tensor"):
        build_teacher("x", TimmTeacher(timm=name, weights="own.pth"), CLASSES, tmp_path)


GUIDE = (Path(__file__).parents[1] / "docs/teachers.md").read_text(encoding="utf-8")
WRONG = """
from dataclasses import replace

def number(weights, classes):
    return 3

def scaled(weights, classes, side):
    return replace(build_teacher(weights, classes), short_side=side)

def lame(weights, classes):
    teacher = build_teacher(weights, classes)
    teacher.network.forward = lambda images: TeacherOutputs(None, None)
    return teacher
"""


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", GUIDE, re.DOTALL)


def test_a_function_of_the_groups_own_is_a_teacher(tmp_path: Path) -> None:
    """The guide's, and what is said of others."""
    (code,) = blocks("python")
    (tmp_path / "guide_lab").mkdir()
    (tmp_path / "guide_lab/models.py").write_text(code + WRONG)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    torch.save(namespace["Segmenter"](7).state_dict(), tmp_path / "ours.pth")

    def params(function: str, **options: int) -> ImportedTeacher:
        return ImportedTeacher.model_validate({"import": function, "options": options, "weights": "ours.pth"})

    teacher, logits, _ = outputs_of(params("guide_lab.models:build_teacher"), tmp_path)
    assert teacher.groups is None and logits.shape == (2, 7, 12, 16) and teacher.multiple == 8
    assert output_channels("x", teacher) == (7, 32)
    for function, said in (
        (params("guide_labs:build_teacher"), "no module 'guide_labs'; install it, or put it beside params.yaml"),
        (params("guide_lab.models:build"), "guide_lab.models has no 'build'"),
        (params("guide_lab.models:number"), "returned int, not mgd_pipeline.teachers.Teacher"),
        (params("guide_lab.models:scaled", side=520), "scaled sets short_side, groups or fixed_size; write short_side, class_map"),
    ):
        with pytest.raises(ParamsError, match=said):
            build_teacher("x", function, CLASSES, tmp_path)
    with pytest.raises(WeightsError, match="gives neither logits nor features"):
        build_teacher("x", params("guide_lab.models:lame"), CLASSES, tmp_path)
    with pytest.raises(ParamsError, match=r"only it can make ours\.pth"):
        fetch_teacher("x", params("guide_lab.models:build_teacher"), tmp_path)


def test_the_guide_lists_the_fields_of_a_teacher() -> None:
    documented = re.findall(r"^\| `(\w+)` \|", GUIDE[GUIDE.index("| Field | Meaning |") :].split("\n\n")[0], re.MULTILINE)
    ours = {"short_side", "fixed_size", "groups"}  # set from params.yaml
    assert documented == [field.name for field in dataclasses.fields(Teacher) if field.name not in ours]


def test_the_guides_parameters_are_valid(project: Project) -> None:
    """Every kind in one file; one input size; a ViT that is trained here; a student as a teacher; heads; other classes."""
    sections, fixed, vit, student, heads, mapped = (YAML(typ="safe").load(block) for block in blocks("yaml"))
    raw = project.params.model_dump()
    teachers = {**sections["teachers"], **heads["teachers"]}
    params = parse_params({**raw, **sections, "teachers": teachers, "losses": {**raw["losses"], **sections["losses"]}})
    assert {type(teacher) for teacher in params.teachers.values()} == set(TEACHERS.values()), "one of each kind"
    trained = parse_params({**raw, **vit})
    assert trained.training_of("dino").frozen_encoder and not trained.training_of("resnet").frozen_encoder
    assert parse_params({**raw, **student, "teachers": {**raw["teachers"], **student["teachers"]}}).train_teachers == []
    assert parse_params({**raw, "teachers": {**raw["teachers"], **mapped, **fixed}}).teachers["city"].class_map


def test_several_classes_to_one_and_none_to_one_by_hand() -> None:
    logits = torch.tensor([1.0, 2.0, 0.5, -3.0]).view(1, 4, 1, 1)
    ours = data_classes(logits, [(1,), (0, 2), ()]).flatten()
    together = float(torch.logsumexp(torch.tensor([1.0, 0.5]), 0))
    assert torch.allclose(ours, torch.tensor([2.0, together, min(2.0, together) - 1]))
    probabilities = logits.softmax(1).flatten()
    both = data_classes(logits, [(1, 3), (0, 2)]).softmax(1).flatten()
    assert torch.allclose(both, torch.stack([probabilities[1] + probabilities[3], probabilities[0] + probabilities[2]]))
    many = torch.randn(2, 4, 5, 6)
    assert not (data_classes(many, [(1,), (), (0, 2)]).argmax(1) == 1).any(), "a class that it does not know is never said"


TWICE = ("cat", "dog", "cat", "road")


@pytest.mark.parametrize(
    ("class_map", "said"),
    [
        (None, "t.class_map: missing; this teacher has 3 classes (cat, dog, road), the data set 2 (animal, street)"),
        (None, "write for each of these what the teacher calls it, 'cat' by its numbers 0, 2"),
        ({"animal": ["cat"]}, "says nothing of street; write [] where the teacher has no such class"),
        ({"animal": ["cat"], "street": ["roat"]}, "street: the teacher has no class 'roat'; nearest is 'road'"),
        ({"animal": ["cat"], "street": [3]}, "street: the teacher has no class 3; it has 0 to 2"),
        ({"animal": ["cat"], "streets": ["road"]}, "'streets' is no class of the data set; nearest is 'street'"),
        ({"animal": ["cat", "dog"], "street": [1]}, "names the teacher's class 'dog' twice"),
        ({"animal": [], "street": []}, "names no class of the teacher's; it has cat, dog, road"),
        (
            {"animal": ["cat"], "street": ["road"]},
            "animal: the teacher calls several classes 'cat', which are its numbers 0, 2; write the numbers that you mean",
        ),
    ],
)
def test_class_maps_that_do_not_fit_are_refused(class_map: Any, said: str) -> None:
    labels = TWICE if "numbers 0, 2" in said else ("cat", "dog", "road")
    with pytest.raises(ParamsError) as caught:
        class_groups("t", class_map, ("animal", "street"), labels, len(labels))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("class_map", "classes", "labels", "groups"),
    [
        ({"animal": ["cat", 1], "street": ["road"]}, ("animal", "street"), ("cat", "dog", "road"), ((0, 1), (2,))),
        ({"a": [], "b": [0]}, ("a", "b"), None, ((), (0,))),
        (None, ("a", "b"), ("a", "b"), None),
        (None, ("a", "b"), None, None),
        ({"animal": [0, 2], "street": ["road"]}, ("animal", "street"), TWICE, ((0, 2), (3,))),
        ({"animal": ["dog"], "street": [2]}, ("animal", "street"), TWICE, ((1,), (2,))),  # "cat" is not asked for
    ],
)
def test_class_maps_that_fit(class_map: Any, classes: tuple[str, ...], labels: tuple[str, ...] | None, groups: Any) -> None:
    assert class_groups("t", class_map, classes, labels, len(labels or classes)) == groups


def test_foreign_teachers_teach_a_student(project: Project) -> None:
    """A segmenter of other classes and a backbone without any: each cache has its teacher's outputs, and the losses use them."""
    torch.manual_seed(0)
    base, raw = project.base, project.params.model_dump()
    classes = read_manifest(project.manifest, base).classes
    save_weights(base / "own/vit.safetensors", timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), {})
    model_name = "lraspp_mobilenet_v3_large"
    model = moved(get_model(model_name, weights=None, weights_backbone=None, num_classes=12))
    torch.save(model.state_dict(), base / "own/lraspp.pth")
    class_map = {name: [] if i == 3 else [i] for i, name in enumerate(classes)}
    class_map[classes[0]] = [0, 9, 10]
    raw["teachers"] = {
        "lraspp": {"torchvision": model_name, "weights": "own/lraspp.pth", "class_map": class_map, "short_side": 64},
        "dino": {"timm": "vit_tiny_patch16_224", "weights": "own/vit.safetensors"},
        "wide": raw["teachers"]["wide"],
    }
    raw["train_teachers"] = ["wide"]
    raw["losses"] |= {"pixel_teachers": ["lraspp", "wide"], "region_teacher": "dino", "image_teacher": "lraspp"}
    raw["losses"] |= {"feature": 1.0, "feature_teachers": ["dino"], "prior_adjustment": 0.5}
    mixed = Project(base, parse_params(raw))
    assert isinstance(mixed.params.teachers["wide"], SmpTeacher)
    for name in mixed.params.teachers:
        precompute_teachers(mixed, name, device=CPU, batch_size=4)
    arrays = {name: sorted(path.name for path in mixed.targets(name).iterdir() if path.is_dir()) for name in mixed.params.teachers}
    assert arrays["dino"] == ["extents", "region_embeddings"] and len(arrays["lraspp"]) == 5
    cache = open_cache(mixed.targets("lraspp"))
    rows = cache.read(cache.index.rows)
    assert rows.logits.shape[1] == 9 and not (rows.logits.argmax(1) == 3).any()
    assert cache.provenance["class_map"] == class_map and cache.provenance["teacher"]["torchvision"] == model_name

    before = project.student("distilled").read_bytes()
    train_student(mixed, Machine(CPU, resume=False))
    assert project.student("distilled").read_bytes() != before
    written = {path.stem for path in (mixed.results / "train-student-distilled/plots").iterdir()}
    assert {"region", "image", "pixel_unlabelled_lraspp", "pixel_unlabelled_wide", "feature_labelled_dino"} <= written

    raw["losses"]["pixel_teachers"] = ["dino"]
    with pytest.raises(ParamsError, match=r"losses\.pixel_teachers: teacher dino names no classes"):
        train_student(Project(base, parse_params(raw)), Machine(CPU, resume=False))
