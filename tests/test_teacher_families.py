"""Each family of networks that docs/teachers.md names, on a small random configuration of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.errors import ParamsError, WeightsError
from mgd_pipeline.networks.segmentation import find_fault
from mgd_pipeline.networks.weights import read_metadata, read_state_dict, save_weights
from mgd_pipeline.params import TimmTeacher, TransformersTeacher
from mgd_pipeline.params_file import parse_params
from mgd_pipeline.teachers.fetching import check_published, fetch_teacher
from mgd_pipeline.teachers.kinds import build_teacher
from mgd_pipeline.teachers.teacher import Teacher
from mgd_stages.doctor.targets import weights
from mgd_stages.run.project import Project
from mgd_stages.stages.precompute_teachers import precompute_teachers
from test_teacher_networks import CLASSES, GUIDE, SEEN, STAGES, dpt, mask2former, mobilevit, segformer, upernet

transformers: Any = import_module("transformers") if find_spec("transformers") else None  # an extra
VIT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}


def beit(family: str) -> Any:
    sizes: dict[str, Any] = {"intermediate_size": 32, "image_size": 96, "out_indices": [0, 1, 2, 3], "pool_scales": [1, 2]}
    config = getattr(transformers, f"{family}Config")(**VIT, **sizes, **SEEN, use_relative_position_bias=True)
    return getattr(transformers, f"{family}ForSemanticSegmentation")(config)


def upernet_of_dinov2() -> Any:
    backbone = transformers.Dinov2Config(**VIT, image_size=56, patch_size=14, **STAGES)
    sizes: dict[str, Any] = {"hidden_size": 32, "auxiliary_in_channels": 32, "auxiliary_channels": 16, "pool_scales": [1, 2]}
    return transformers.UperNetForSemanticSegmentation(transformers.UperNetConfig(backbone_config=backbone, **sizes, **SEEN))


def swin() -> Any:
    return transformers.SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, **STAGES)


LAYERS: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 2}


def maskformer() -> Any:
    feed: dict[str, Any] = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    detr = transformers.DetrConfig(d_model=32, **LAYERS, **feed, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=9)
    widths: dict[str, Any] = {"fpn_feature_size": 32, "mask_feature_size": 32}
    config = transformers.MaskFormerConfig(**widths, backbone_config=swin(), decoder_config=detr, **SEEN)
    return transformers.MaskFormerForInstanceSegmentation(config)


def oneformer() -> Any:
    keys = ("conv_dim", "mask_dim", "hidden_dim", "encoder_feedforward_dim", "dim_feedforward")
    text: dict[str, Any] = {"text_encoder_num_layers": 1, "text_encoder_width": 64, "text_encoder_n_ctx": 4, "is_training": True}
    some: dict[str, Any] = {"text_encoder_vocab_size": 99, "num_queries": 9, "num_attention_heads": 2, "query_dec_layers": 1}
    config = transformers.OneFormerConfig(backbone_config=swin(), **dict.fromkeys(keys, 32), **text, **some, **LAYERS, **SEEN)
    return transformers.OneFormerForUniversalSegmentation(config)


def eomt(family: str) -> Any:
    config = getattr(transformers, f"{family}Config")(**VIT, image_size=96, num_blocks=2, num_queries=9, **SEEN)
    model = getattr(transformers, f"{family}ForUniversalSegmentation")(config)
    model.attn_mask_probs.zero_()
    return model


def sapiens2() -> Any:
    head = {"upsample_out_channels": [16, 16], "conv_out_channels": [16]}
    config = transformers.Sapiens2Config(**VIT, intermediate_size=32, image_size=64, head_config=head, **SEEN)
    return transformers.Sapiens2ForSemanticSegmentation(config)


@dataclass(frozen=True)
class Family:
    make: Callable[[], Any]
    multiple: int = 32
    size: tuple[int, int] | None = None
    """Of the only input that it takes"""


FAMILIES = {
    "SegFormer": Family(segformer),
    "UPerNet": Family(upernet),
    "UPerNet on DINOv2": Family(upernet_of_dinov2, multiple=14),
    "BEiT": Family(lambda: beit("Beit")),
    "Data2Vec": Family(lambda: beit("Data2VecVision"), size=(96, 96)),
    "DPT": Family(dpt),
    "MobileNetV2": Family(
        lambda: transformers.MobileNetV2ForSemanticSegmentation(transformers.MobileNetV2Config(depth_multiplier=0.35, **SEEN))
    ),
    "MobileViT": Family(mobilevit),
    "MobileViTV2": Family(
        lambda: transformers.MobileViTV2ForSemanticSegmentation(transformers.MobileViTV2Config(width_multiplier=0.5, **SEEN))
    ),
    "Sapiens2": Family(sapiens2),
    "MaskFormer": Family(maskformer),
    "Mask2Former": Family(mask2former),
    "OneFormer": Family(oneformer),
    "EoMT": Family(lambda: eomt("Eomt"), size=(96, 96)),
    "EoMT-DINOv3": Family(lambda: eomt("EomtDinov3"), size=(96, 96)),
}


def tokenizer(folder: Path) -> Any:
    """CLIP's, with the letters of "the task is semantic" as its words."""
    letters = [f"{letter}{end}" for letter in sorted(set("thetaskissemantic")) for end in ("", "</w>")]
    vocabulary = {token: number for number, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer.from_pretrained(folder)


def published(model: Any, folder: Path, size: Any = None) -> TransformersTeacher:
    """The files of a network as the hub has them."""
    shutil.rmtree(folder / "published", ignore_errors=True)
    model.config.id2label = dict(enumerate(CLASSES))
    model.save_pretrained(folder / "published")
    size = size or {"height": 96, "width": 96}
    if model.config.model_type == "oneformer":
        images = transformers.OneFormerImageProcessor(size={"shortest_edge": 96, "longest_edge": 960})
        transformers.OneFormerProcessor(images, tokenizer(folder / "tokenizer")).save_pretrained(folder / "published")
        # The published ones name a table on another place of the hub, which is not asked for.
        noted = json.loads((folder / "published/processor_config.json").read_text())
        noted["image_processor"] |= {"class_info_file": "ade20k_panoptic.json", "repo_path": "shi-labs/nowhere"}
        (folder / "published/processor_config.json").write_text(json.dumps(noted))
    else:
        transformers.SegformerImageProcessor(size=size).save_pretrained(folder / "published")
    return TransformersTeacher(transformers="published", weights="teacher.safetensors")


def oblong(multiple: int) -> list[tuple[int, int]]:
    return [(2 * multiple, 3 * multiple)]


@pytest.mark.parametrize("name", FAMILIES if transformers else [])
def test_a_family_of_transformers_says_what_it_says_by_itself(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    family = FAMILIES[name]
    model = family.make().eval()
    params = published(model, tmp_path)
    sizes = oblong if name != "DPT" else lambda multiple: [(96, 96)]  # which takes squares alone
    check_published("x", params, tmp_path, sizes)
    fetch_teacher("x", params, tmp_path, sizes)
    shutil.rmtree(tmp_path / "published")
    teacher = build_teacher("x", params, CLASSES, tmp_path)
    assert (teacher.multiple, teacher.size) == (family.multiple, family.size)
    assert read_metadata(tmp_path / params.weights)["size"] in (96, [96, 96])
    height, width = family.size or sizes(family.multiple)[0]
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits, features = teacher.network(images)
        if name == "OneFormer":
            task = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")(["the task is semantic"])["input_ids"]
            tokens = F.pad(torch.tensor(task), (0, model.config.task_seq_len - len(task[0])))
            for module in model.modules():
                if hasattr(module, "is_training"):
                    module.is_training = False
            model.config.is_training = False
            whole = model(pixel_values=images, task_inputs=tokens.expand(2, -1))
        else:
            whole = model(pixel_values=images)
        if hasattr(whole, "class_queries_logits"):
            classes, masks = whole.class_queries_logits.softmax(-1)[..., :7], whole.masks_queries_logits.sigmoid()
            assert torch.allclose(logits.exp(), torch.einsum("bqk,bqhw->bkhw", classes, masks), atol=1e-5)
        else:
            again = F.interpolate(logits, whole.logits.shape[-2:], mode="bilinear", align_corners=False)
            assert torch.allclose(again, whole.logits, atol=1e-5)
    assert (features is None) == name.startswith("EoMT")


def test_trying_a_network_without_values_leaves_nothing_to_networks_with_values() -> None:
    """BEiT keeps the indices of its positions by size alone, and would read memory that nobody wrote."""
    torch.manual_seed(0)
    model, images = beit("Beit").eval(), torch.randn(1, 3, 128, 160)
    assert find_fault(lambda: beit("Beit"), [(128, 160)]) is None
    with torch.inference_mode():
        first = model(pixel_values=images).logits
        junk = [torch.full((1000 * count,), float("nan")) for count in range(1, 200)]
        del junk
        assert torch.equal(first, model(pixel_values=images).logits)


def refused(params: TransformersTeacher, folder: Path, said: str, sizes: Callable[[int], Any] = oblong) -> None:
    """By doctor and by train-teacher, before anything is written."""
    for look_at in (check_published, fetch_teacher):
        with pytest.raises((ParamsError, WeightsError), match=said) as caught:
            look_at("x", params, folder, sizes)
        assert "\n" not in str(caught.value) and not (folder / params.weights).exists()


def test_what_does_not_work_is_refused_before_weights_are_fetched(tmp_path: Path) -> None:
    small: dict[str, Any] = {"image_size": 64, "num_blocks": 2, "num_queries": 9}
    video = transformers.VideomtForUniversalSegmentation(transformers.VideomtConfig(**VIT, **small, **SEEN))
    refused(published(video, tmp_path), tmp_path, r"cannot see images of \d+ x \d+ pixels .*pixel_values_videos")
    vision: dict[str, Any] = {"intermediate_size": 32, "image_size": 56, "patch_size": 14, "out_indices": [1, 2, 3, 4]}
    backbone = transformers.AutoConfig.for_model("tipsv2_vision_model", **VIT, **vision, reshape_hidden_states=False)
    necks: dict[str, Any] = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
    tips = transformers.Tipsv2DptForSemanticSegmentation(transformers.Tipsv2DptConfig(backbone_config=backbone, **necks, **SEEN))
    refused(published(tips, tmp_path), tmp_path, "has no 1x1 convolution to 7 classes; wrap it by a function")
    params = published(segformer(), tmp_path)
    config = json.loads((tmp_path / "published/config.json").read_text())
    for changed, said in (
        ({"architectures": ["DetrForSegmentation"]}, "is a DetrForSegmentation, not a network for semantic segmentation"),
        ({"id2label": {str(i + 1): name for i, name in enumerate(CLASSES)}}, "id2label in its configuration does not number"),
    ):
        (tmp_path / "published/config.json").write_text(json.dumps({**config, **changed}))
        refused(params, tmp_path, said)


def test_networks_that_take_squares_are_shown_squares_of_the_published_size(tmp_path: Path) -> None:
    params = published(dpt(), tmp_path)
    refused(
        params,
        tmp_path,
        r"teachers\.x: cannot see images of 64 x 96 pixels .*; set teachers\.x\.fixed_size, which shows it squares",
    )
    squares = params.model_copy(update={"fixed_size": "windows"})
    fetch_teacher("x", squares, tmp_path, oblong)
    assert build_teacher("x", squares, CLASSES, tmp_path).size == (96, 96)
    assert build_teacher("x", params, CLASSES, tmp_path).size is None, "square images need nothing more"
    (tmp_path / params.weights).unlink()
    every = published(segformer(), tmp_path).model_copy(update={"fixed_size": "resize"})
    refused(every, tmp_path, r"teachers\.x\.fixed_size: resize is for networks of one input size, and this one takes every size")


def test_processor_and_network_must_agree_on_the_only_size(tmp_path: Path) -> None:
    said = "takes images of 96 x 96 pixels, but its processor makes them 80 x 80; mend size in preprocessor_config.json"
    refused(published(eomt("Eomt"), tmp_path, {"shortest_edge": 80}), tmp_path, said)


@pytest.mark.parametrize("family", ["Eomt", "EomtDinov3"])
def test_masks_that_are_drawn_at_random_are_refused_by_name(family: str, tmp_path: Path) -> None:
    model = eomt(family)
    params = published(model, tmp_path)
    fetch_teacher("x", params, tmp_path)
    state, notes = read_state_dict(path := tmp_path / params.weights), read_metadata(path)
    for values, fine in (([1.0, 1.0], True), ([0.25, 0.0], False)):
        save_weights(path, {**state, "attn_mask_probs": torch.tensor(values)}, notes)
        if fine:  # always masked, as at the start of the training
            build_teacher("x", params, CLASSES, tmp_path)
            continue
        with pytest.raises(
            WeightsError, match=r"teacher\.safetensors: its attn_mask_probs are 0\.25, 0; between 0 and 1 the network"
        ):
            build_teacher("x", params, CLASSES, tmp_path)
    model.attn_mask_probs += 0.25
    params = published(model, tmp_path)
    with pytest.raises(WeightsError, match=r"transformers: published: its attn_mask_probs are 0\.25, 0\.25; between 0 and 1"):
        fetch_teacher("x", params, tmp_path)


def test_weights_that_lack_what_the_network_uses_are_refused(tmp_path: Path) -> None:
    """Not what nothing uses: the published DPT lacks parameters of its first fusion layer."""
    for lacking, fine in (("neck.fusion_stage.layers.0.residual_layer1", True), ("head.head.4", False)):
        model = dpt()
        state = {key: value for key, value in model.state_dict().items() if not key.startswith(lacking)}
        assert len(state) < len(model.state_dict())
        params = published(model, tmp_path)
        model.save_pretrained(tmp_path / "published", state_dict=state)
        if fine:
            fetch_teacher("x", params, tmp_path)
            continue
        with pytest.raises(WeightsError, match=r"its weights lack 2 tensors that the network uses \(head\.head\.4\.\w+, head"):
            fetch_teacher("x", params, tmp_path)


def test_the_published_size_is_named_where_images_are_seen_at_another(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """By doctor and by precompute-teachers; images of about that size, and those of a short_side, need no word."""
    manifest = read_manifest(project.manifest, project.base)
    params = published(segformer(), project.base, {"shortest_edge": 512})
    fetch_teacher("wide", params, project.base)
    class_map = {name: [i] if i < 7 else [] for i, name in enumerate(manifest.classes)}

    def seen_at(short_side: int | None) -> Project:
        raw = project.params.model_dump()
        raw["teachers"]["wide"] = {**params.model_dump(), "class_map": class_map, "short_side": short_side}
        return Project(project.base, parse_params(raw))

    said = "teachers.wide is published for images whose shorter side is 512 pixels, and sees these at 48"
    for short_side, warned in ((None, [said]), (256, [])):
        checks = weights(seen_at(short_side), manifest, partition=True)
        assert [check.found for check in checks if check.mark == "warning" and "teachers.wide" in check.found] == warned
    precompute_teachers(seen_at(None), "wide", device=torch.device("cpu"))
    line = "write `short_side: 512` in teachers.wide to show it the published size"
    assert line in " ".join(capsys.readouterr().out.split())


BACKBONES: dict[str, tuple[int, tuple[int, int] | None]] = {
    "vit_tiny_patch16_224": (16, None),
    "vit_small_patch14_dinov2.lvd142m": (14, None),
    "vit_small_patch16_dinov3.lvd1689m": (16, None),
    "samvit_base_patch16": (16, None),
    "sam2_hiera_tiny": (32, None),
    "convnext_atto": (32, None),
    "swin_tiny_patch4_window7_224": (32, None),
    "pvt_v2_b0": (32, None),
    "maxvit_rmlp_pico_rw_256": (32, (256, 256)),
    "efficientformer_l1": (32, (224, 224)),
    "hiera_tiny_224": (32, (224, 224)),
    "beit_base_patch16_224": (16, (224, 224)),
}
"""Of each the multiple of pixels, and the size of the only input that it takes"""
BUILT = ("vit_tiny_patch16_224", "convnext_atto", "maxvit_rmlp_pico_rw_256", "efficientformer_l1", "hiera_tiny_224")
"""With random weights, too: the others are larger, and are tried without values."""


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_of_timm_has_the_multiple_and_the_size_of_its_own(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    multiple, size = BACKBONES[name]
    asked: list[int] = []

    def sizes(multiple: int) -> list[tuple[int, int]]:
        asked.append(multiple)
        return oblong(multiple)

    params = TimmTeacher(timm=name, weights="x.safetensors")
    check_published("x", params, tmp_path, sizes)
    assert asked == ([multiple] if size is None else []), "a network of one size is not tried at others"
    if size is None:
        with pytest.raises(ParamsError, match=r"teachers\.x\.fixed_size: resize is for networks of one input size"):
            check_published("x", params.model_copy(update={"fixed_size": "resize"}), tmp_path, sizes)
    if name not in BUILT:
        return
    save_weights(tmp_path / "x.safetensors", timm.create_model(name, num_classes=0).state_dict(), {})
    teacher: Teacher = build_teacher("x", params, (), tmp_path)
    assert (teacher.multiple, teacher.size) == (multiple, size)
    height, width = size or oblong(multiple)[0]
    with torch.inference_mode():
        features = teacher.network(torch.zeros(1, 3, height, width)).features
    assert features.shape[-2:] == (height // multiple, width // multiple) and np.isfinite(features.numpy()).all()


def test_a_backbone_that_resizes_its_input_keeps_its_multiple_and_is_not_shown_oblong_images(tmp_path: Path) -> None:
    """CrossViT's cells are those of another size, 17 pixels by its own account."""
    params = TimmTeacher(timm="crossvit_9_240", weights="x.safetensors")
    with pytest.raises(WeightsError, match=r"cannot see images of 64 x 96 pixels .*; set teachers\.x\.fixed_size"):
        check_published("x", params, tmp_path, oblong)
    check_published("x", params.model_copy(update={"fixed_size": "resize"}), tmp_path, oblong)


def test_the_guide_names_the_families_that_are_tested() -> None:
    listed = GUIDE[GUIDE.index("Tested with random weights:") :].partition("\n\n")[0]
    for name in FAMILIES:
        assert name.partition(" ")[0] in listed, name
    for name in BACKBONES:
        assert name.partition(".")[0] in listed, name
