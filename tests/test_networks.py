"""Networks: the same function as the plain smp model, and weights that fit to the last tensor or are refused by name."""

from __future__ import annotations

import copy
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from segmentation_models_pytorch.encoders import encoders as smp_encoders
from segmentation_models_pytorch.encoders import get_encoder, get_preprocessing_params
from torch import Tensor, nn

from mgd_pipeline.errors import ParamsError, WeightsError
from mgd_pipeline.networks.counting import multiply_accumulates, parameter_count
from mgd_pipeline.networks.encoders import hub_reached, normalisation, resolve_encoder_weights, unrecorded_normalisation
from mgd_pipeline.networks.normalisation import IMAGENET
from mgd_pipeline.networks.segmentation import (
    STRIDE,
    DenseOutputs,
    SegmentationNetwork,
    build_branches,
    build_network,
    check_network,
    load_network,
    output_grid,
    pad_to_multiple,
    run_branches,
    upsample,
)
from mgd_pipeline.networks.weights import convert_weights, sha256_of_state
from mgd_pipeline.params import NetworkParams, TeacherNetworkParams
from mgd_stages.projects.presets import preset
from mgd_stages.run.project import networks_of, seen_sizes


def params(encoder: str, decoder: Any = "deeplabv3plus", channels: int = 16, weights: str = "none") -> NetworkParams:
    return NetworkParams(encoder=encoder, decoder=decoder, decoder_channels=channels, encoder_weights=weights)


def tiny(**changes: Any) -> NetworkParams:
    return params("tu-test_resnet", "fpn", **{"channels": 32, **changes})


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [
        ("resnet18", "deeplabv3plus"),
        ("mobilenet_v2", "fpn"),
        ("mit_b0", "fpn"),
        ("tu-resnet10t", "upernet"),
        ("tu-convnext_atto", "upernet"),
        ("tu-tf_efficientnet_lite0", "deeplabv3plus"),
    ],
)
def test_a_network_is_the_plain_smp_model_cut_before_its_upsampling(encoder: str, decoder: str) -> None:
    """Without dropout: a teacher's targets must not depend on chance. Checking that it fits draws no random numbers."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    check_network("student.network", params(encoder, decoder, 32), [(64, 64), (64, 96)])
    assert torch.equal(torch.get_rng_state(), state)
    network = build_network(params(encoder, decoder, channels=32), 5).eval()
    assert not any(m.p for m in network.modules() if isinstance(m, (nn.Dropout, nn.Dropout2d)))
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        outputs = network(images)
        assert isinstance(outputs, DenseOutputs)
        assert outputs.logits.shape == (2, 5, 64 // STRIDE, 96 // STRIDE)
        assert outputs.features.shape == (2, 32, 64 // STRIDE, 96 // STRIDE)
        torch.testing.assert_close(upsample(outputs.logits, (64, 96)), network.model(images), rtol=0, atol=1e-5)
        head = network.model.segmentation_head[0]
        assert head.kernel_size == (1, 1)
        by_hand = torch.einsum("kd,bdhw->bkhw", head.weight[:, :, 0, 0], outputs.features) + head.bias[:, None, None]
        torch.testing.assert_close(outputs.logits, by_hand, rtol=0, atol=1e-5)
    assert {key.removeprefix("model.") for key in network.state_dict()} == set(network.model.state_dict())
    assert all(key.split(".")[0] in ("encoder", "decoder", "segmentation_head") for key in network.model.state_dict())


@pytest.mark.parametrize(
    ("name", "multiple"),
    [
        ("test_vit", 32),
        ("vit_small_patch16_dinov3", 32),
        ("eva02_tiny_patch14_224", 28),
        ("vit_small_patch14_reg4_dinov2", 28),
    ],
)
def test_dpt_takes_vits_of_any_patch_and_images_of_any_size(name: str, multiple: int, tmp_path: Path) -> None:
    """With class and register tokens and rotary positions. smp itself builds patches of 16 pixels, but not of 14."""
    torch.manual_seed(0)
    published = timm.create_model(name, pretrained=False).state_dict()
    save_file(published, tmp_path / "w.safetensors")
    given = TeacherNetworkParams(decoder="dpt", encoder=f"tu-{name}", decoder_channels=32, encoder_weights="w.safetensors")
    check_network("teachers.x", given, [(64, 96), (32, 32)])
    network = build_network(given, 5, base=tmp_path).eval()
    assert network.multiple == multiple
    loaded = network.model.encoder.model.state_dict()
    assert loaded.keys() <= published.keys() and all(torch.equal(value, published[key]) for key, value in loaded.items())
    assert not any(m.p for m in network.modules() if isinstance(m, (nn.Dropout, nn.Dropout2d)))
    for rows, columns in ((1, 3), (4, 2)):
        images = torch.randn(2, 3, rows * multiple, columns * multiple)
        with torch.no_grad():
            outputs = network(images)
            assert outputs.logits.shape == (2, 5, 16 * rows, 16 * columns) and outputs.features.shape == (
                2,
                32,
                16 * rows,
                16 * columns,
            )
            if multiple == 32:
                whole = network.model(images)
                torch.testing.assert_close(upsample(outputs.logits, (32 * rows, 32 * columns)), whole, rtol=0, atol=1e-5)
            classifier = network.model.segmentation_head.head[-1]
            torch.testing.assert_close(outputs.logits, classifier(outputs.features))
    assert classifier.kernel_size == (1, 1)
    assert {key.removeprefix("model.") for key in network.state_dict()} == set(network.model.state_dict())


def test_a_frozen_encoder_stays_as_it_is_and_runs_once_for_all_branches() -> None:
    """Batch statistics, too, whatever the rest of the network does; the logits are those of networks with encoders of their own."""
    torch.manual_seed(0)
    first, second = build_branches(tiny(), 3, 2, frozen_encoder=True)
    encoder, images = first.model.encoder, torch.randn(2, 3, 64, 96)
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in encoder.modules())
    alone = copy.deepcopy(second)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    calls: list[bool] = []
    encoder.register_forward_hook(lambda module, *_: calls.append(module.training or torch.is_grad_enabled()))
    for network in (first, second, alone):
        assert network.train().training and network.model.decoder.training and not network.model.encoder.training
    logits = run_branches([first, second], images)
    assert calls == [False], "once, in eval mode and without gradients"
    assert torch.equal(logits[1], run_branches([first, alone], images)[1]) and not torch.equal(logits[0], logits[1])
    sum(value.sum() for value in logits).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(value.grad is None for value in encoder.parameters())
    assert all(value.grad is not None for value in second.model.decoder.parameters())
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def test_students_of_mgd_have_its_dilations_and_cost() -> None:
    """DeepLabV3+ on ResNet-18: 16.6 M parameters were measured for MGD's own; smp's separable decoder is lighter."""
    network = build_network(params("resnet18", channels=256), 21)
    dilations = {m.dilation[0] for m in network.model.decoder.aspp.modules() if isinstance(m, nn.Conv2d)}
    assert dilations == {1, 6, 12, 18}
    assert parameter_count(network) == sum(value.numel() for value in network.model.parameters()) == pytest.approx(12.3e6, rel=0.02)


MINUS_ONE_TO_ONE = ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5))
OF_IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
PUBLISHED = {
    **dict.fromkeys(["resnet", "resnext", "vgg", "senet", "se_res", "densenet", "efficientnet-b", "mobilenet_v2"], OF_IMAGENET),
    **dict.fromkeys(["timm-efficientnet-", "timm-skres", "mit_b", "mobileone_s"], OF_IMAGENET),
    **dict.fromkeys(["inceptionresnetv2", "inceptionv4", "xception", "timm-tf_efficientnet_lite"], MINUS_ONE_TO_ONE),
    "dpn": ((124.0, 117.0, 104.0), (59.880240,) * 3),
}
"""Input of the ImageNet weights of all families of smp's encoders, from the table in its code up to version 0.5, times 255: all are
RGB, with a range of 0 to 1."""


def test_every_encoder_is_shown_the_input_of_its_published_weights() -> None:
    for encoder in smp_encoders:
        (family,) = [start for start in PUBLISHED if encoder.startswith(start)]  # a new family: look at its config.json on the hub
        ours, before = normalisation(encoder), unrecorded_normalisation(encoder)
        assert ours.channels == "RGB" and np.allclose(ours[:2], PUBLISHED[family], atol=1e-4), encoder
        assert before == IMAGENET and (ours == before) == (PUBLISHED[family] == OF_IMAGENET), "0.1.0 knew ImageNet's alone"
    names = timm.list_models(pretrained=True)
    assert len(names) > 1000
    for name in names:
        wanted = get_preprocessing_params(f"tu-{name}")
        assert (wanted["input_space"], wanted["input_range"]) == ("RGB", [0, 1])
        ours = normalisation(f"tu-{name}")
        assert np.allclose(ours[:2], 255 * np.array([wanted["mean"], wanted["std"]])), name
        assert ours == unrecorded_normalisation(f"tu-{name}")


# --- what does not fit together


@pytest.mark.parametrize(
    ("decoder", "encoder", "size", "said"),
    [
        ("deeplabv3plus", "densenet121", 64, "(DenseNet encoders do not support dilated mode due to pooling operation for downs"),
        ("deeplabv3plus", "vgg11_bn", 64, "; take decoder: fpn or upernet, or another encoder, such as resnet50"),
        ("deeplabv3plus", "tu-efficientvit_b0", 64, "unexpected keyword argument 'output_stride'"),
        ("fpn", "tu-vit_tiny_patch16_224", 64, "(Unsupported model downsampling pattern.); take another encoder, such as resnet50"),
        ("upernet", "tu-swin_tiny_patch4_window7_224", 64, "decoder upernet cannot see 64 x 64 pixels with encoder tu-swin"),
        ("upernet", "tu-inception_v4", 96, "pixels with encoder tu-inception_v4 (its logits are 22 x 22 cells, not 24 x"),
        ("fpn", "resnet19", 64, "student.network.encoder: encoder 'resnet19' is unknown to segmentation-models-pytorch"),
        ("fpn", "ResNet18", 64, "is unknown to segmentation-models-pytorch; nearest is resnet18; timm's are written tu-<name>"),
        ("fpn", "test_resnet", 64, "is unknown to segmentation-models-pytorch; timm's are written tu-test_resnet"),
        ("fpn", "tu-test_resnt", 64, "encoder 'tu-test_resnt' is unknown to timm; nearest is tu-test_resnet"),
    ],
)
def test_pairs_that_do_not_fit_are_named_with_the_remedy(decoder: str, encoder: str, size: int, said: str) -> None:
    """By the check, and alike by building the network unless only its size is wrong."""
    with pytest.raises(ParamsError) as caught:
        check_network("student.network", params(encoder, decoder, 32), [(size, size)])
    assert said in str(caught.value) and str(caught.value).startswith("student.network") and "\n" not in str(caught.value)
    if "pixels with" not in said:
        with pytest.raises((ParamsError, WeightsError)) as caught:
            build_network(params(encoder, decoder, 32), 3)
        assert said.removeprefix("student.network.encoder: ") in str(caught.value)


@pytest.mark.parametrize(
    ("decoder", "encoder", "said"),
    [
        (
            "dpt",
            "tu-resnet18",
            "(dpt takes plain ViTs, and the maps of this encoder have strides 2, 4, 8, 32); take decoder: deeplab",
        ),
        (
            "dpt",
            "resnet18",
            "must start with 'tu-', got resnet18); take decoder: deeplabv3plus or fpn or upernet, or another encoder",
        ),
        ("dpt", "tu-beit_base_patch16_224", "cannot see 64 x 64 pixels with encoder tu-beit_base_patch16_224 (Input height (64) d"),
        ("dpt", "tu-xcit_nano_12_p16_224", "'return_prefix_tokens'); take another encoder, such as tu-vit_base_patch14_dinov2"),
        ("fpn", "tu-vit_tiny_patch16_224", "(Unsupported model downsampling pattern.); take decoder: dpt, or another encoder"),
    ],
)
def test_what_dpt_does_not_take_is_named_and_what_others_do_not_take_may_fit_dpt(decoder: Any, encoder: str, said: str) -> None:
    with pytest.raises(ParamsError, match=r"^teachers\.x: decoder [^\n]*$") as caught:
        check_network("teachers.x", TeacherNetworkParams(decoder=decoder, encoder=encoder, decoder_channels=32), [(64, 64)])
    assert said in str(caught.value)


@pytest.mark.parametrize("dataset", ["shapes", "voc", "cityscapes", "folder"])
def test_networks_of_the_presets_can_be_built(dataset: Any) -> None:
    changes: dict[str, Any] = {"classes": ["a", "b"]} if dataset == "folder" else {}
    chosen = preset(dataset, "data/raw/x", "1/8", changes)
    networks = networks_of(chosen)
    assert len(networks) >= 2
    for key, network in networks.items():
        check_network(key, network, seen_sizes(chosen, key, None))


@pytest.mark.parametrize("decoder", ["deeplabv3plus", "fpn", "upernet"])
def test_an_image_is_seen_alone_as_in_a_batch(decoder: str) -> None:
    """Groups of a single value, too, which fpn has with 32 channels at 32 x 32 pixels."""
    torch.manual_seed(0)
    network = build_network(params("tu-test_resnet", decoder, 32), 3).eval().double()
    for layer in network.modules():
        if isinstance(layer, nn.GroupNorm):
            nn.init.normal_(layer.bias)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)  # float32 leaves noise of single values in a batch
    with torch.no_grad():
        both, alone = network(images).logits, network(images[:1]).logits
    assert torch.allclose(alone, both[:1], atol=1e-6)


def test_padding_and_grid() -> None:
    padded = pad_to_multiple(torch.ones(1, 3, 33, 64))
    assert padded.shape == (1, 3, 64, 64) and padded[..., :33, :].eq(1).all() and padded[..., 33:, :].eq(0).all()
    assert pad_to_multiple(torch.ones(1, 3, 32, 64)).shape == (1, 3, 32, 64)
    grid = output_grid([(33, 64), (100, 1)])
    assert grid.frames.tolist() == [[64, 64], [128, 32]] and grid.cells.tolist() == [[16, 16], [32, 8]] and grid.align_corners


# --- initial weights of an encoder


def encoder_with(path: Path) -> nn.Module:
    return build_network(tiny(weights=path.name), 3, base=path.parent).model.encoder


def test_encoder_weights_from_a_file(tmp_path: Path) -> None:
    """As torchvision or timm publish it: the encoder's tensors and the classifier's."""
    torch.manual_seed(1)
    published = timm.create_model("test_resnet", pretrained=False).state_dict()
    save_file(published, tmp_path / "w.safetensors")
    torch.save({"state_dict": published}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        loaded = encoder_with(tmp_path / name).get_submodule("model").state_dict()
        assert loaded and all(torch.equal(value, published[key]) for key, value in loaded.items())
        assert published.keys() - loaded.keys() == {"fc.weight", "fc.bias"}, "only the classifier may stay unused"
    save_file({**published, "extra.weight": torch.zeros(1)}, path := tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=re.escape(f"{path}: does not fit tu-test_resnet: holds foreign 1 tensor: extra.weight")):
        encoder_with(path)
    said = r"encoder_weights: .*gone\.pth: no such file; put the state dict of tu-test_resnet there"
    with pytest.raises(WeightsError, match=said):
        encoder_with(tmp_path / "gone.pth")
    # The file that MGD's readers have: torchvision's ResNet-18 with its classifier, and without BatchNorm counters.
    state = {k: v for k, v in get_encoder("resnet18", weights=None).state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save({**state, "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}, tmp_path / "r18.pth")
    encoder = build_network(params("resnet18", weights="r18.pth"), 3, base=tmp_path).model.encoder
    assert torch.equal(encoder.conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize(("encoder", "repository"), [("resnet18", "smp-hub/resnet18"), ("tu-resnet10t", "timm/resnet10t")])
def test_imagenet_weights_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: str, repository: str) -> None:
    """Said within two seconds; the hub's own client would retry for most of a minute."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(WeightsError) as caught:
        build_network(params(encoder, weights="imagenet"), 3)
    said = str(caught.value)
    assert f"ImageNet weights of {encoder} are not on this machine and the hub cannot be reached" in said and "\n" not in said
    assert f"`hf download {repository}" in said and "model.safetensors" in said
    assert "encoder_weights" in said and str(tmp_path) in said
    with pytest.raises(WeightsError, match="no ImageNet weights are published for it"):
        resolve_encoder_weights("tu-coatnet_0_224", "imagenet")


def test_a_hub_is_reached_directly_or_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://{here}")
        assert not hub_reached(), "HF_HUB_OFFLINE"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        assert hub_reached()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        assert not hub_reached()
        monkeypatch.setenv("http_proxy", f"http://{here}")
        assert hub_reached()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert not hub_reached()


# --- whole checkpoints


def assert_loads(path: Path, state: dict[str, Tensor]) -> None:
    loaded = load_network(tiny(), 3, path).model.state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)


def test_checkpoints_load_to_the_last_tensor_or_not_at_all(tmp_path: Path) -> None:
    network, path = build_network(tiny(), 3), tmp_path / "n.safetensors"
    state = network.model.state_dict()
    save_file(state, path)
    assert_loads(path, state)
    first = next(iter(state))
    for damaged, problem in (
        ({key: value for key, value in state.items() if key != first}, f"lacks 1 tensor: {first}"),
        ({**state, "extra": torch.zeros(1)}, "holds foreign 1 tensor: extra"),
        ({**state, first: torch.zeros(7)}, f"has another shape for 1 tensor: {first}"),
    ):
        save_file(damaged, path)
        with pytest.raises(WeightsError, match=re.escape(f"{path}: does not fit fpn with tu-test_resnet and 3 classes: {problem}")):
            load_network(tiny(), 3, path)
    save_file(state, path)
    with pytest.raises(WeightsError, match=r"4 classes: has another shape for 2 tensors: segmentation_head\.0\.weight"):
        load_network(tiny(), 4, path)
    with pytest.raises(WeightsError, match="no such file"):
        load_network(tiny(), 3, tmp_path / "gone.safetensors")


def test_prefixes_of_wrappers_are_removed_where_that_makes_a_checkpoint_fit(tmp_path: Path) -> None:
    state, path = build_network(tiny(), 3).model.state_dict(), tmp_path / "n.pth"
    for prefix in ("model.", "module._orig_mod.model.", "a.b.c."):
        torch.save({"state_dict": {f"{prefix}{key}": value for key, value in state.items()}, "epoch": 3}, path)
        assert_loads(path, state)
        encoder = {f"{prefix}{key[14:]}": value for key, value in state.items() if key.startswith("encoder.model.")}
        torch.save({**encoder, f"{prefix}fc.weight": torch.zeros(10, 512), f"{prefix}fc.bias": torch.zeros(10)}, path)
        alone = encoder_with(path).get_submodule("model").state_dict()
        assert all(torch.equal(alone[key], state[f"encoder.model.{key}"]) for key in alone)
    parts = {f"module.{key.replace('encoder.', 'encoder._orig_mod.')}": value for key, value in state.items()}  # by compiling
    torch.save({**parts, "n_averaged": torch.tensor(3)}, path)
    assert_loads(path, state)


def test_a_checkpoint_of_several_networks_is_never_guessed_at(tmp_path: Path) -> None:
    state, path = build_network(tiny(), 3).model.state_dict(), tmp_path / "n.pth"
    student = {f"student.{key}": value for key, value in state.items()}
    torch.save({**student, **{f"teacher.{key}": value + 1 for key, value in state.items()}}, path)
    several = rf"n\.pth: holds the network several times, as student\.\* and teacher\.\*; choose one, such as by `.* {path} "
    with pytest.raises(WeightsError, match=several):
        load_network(tiny(), 3, path)
    convert_weights(path, tmp_path / "t.safetensors", key="teacher")
    assert_loads(tmp_path / "t.safetensors", {key: value + 1 for key, value in state.items()})
    torch.save({**student, "loss.weight": torch.ones(3)}, path)
    besides = r"holds 1 tensor besides student\.\*: loss\.weight; keep the network alone by .*--key student`"
    with pytest.raises(WeightsError, match=besides):
        load_network(tiny(), 3, path)
    del student[f"student.{next(iter(state))}"]
    torch.save(student, path)
    with pytest.raises(WeightsError, match=f"lacks 1 tensor: {re.escape(next(iter(state)))}$"):
        load_network(tiny(), 3, path)


def test_the_hash_of_a_state_depends_on_all_of_it() -> None:
    state = {"a": torch.arange(6.0), "b": torch.zeros(2, 3), "scalar": torch.tensor(1)}
    same = sha256_of_state(dict(reversed([(key, value.clone()) for key, value in state.items()])))
    hashes = [
        sha256_of_state(state),
        sha256_of_state({**state, "b": torch.zeros(3, 2)}),
        sha256_of_state({**state, "a": torch.arange(6.0).double()}),
        sha256_of_state({**state, "a": torch.arange(6.0).flip(0)}),
        sha256_of_state({"c" if key == "b" else key: value for key, value in state.items()}),
    ]
    assert same == hashes[0] and len(set(hashes)) == 5


# --- cost


class Countable(nn.Module):
    """One 3x3 convolution of stride 4, 3 -> 8 channels, and a 1x1 classifier of 5."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.Identity()
        self.segmentation_head = nn.Sequential(nn.Conv2d(8, 5, 1))


def test_cost_of_a_network_that_can_be_counted_by_hand() -> None:
    network = SegmentationNetwork(Countable())
    assert parameter_count(network) == (3 * 3 * 3 * 8 + 8) + (8 * 5 + 5)
    cells = (64 // 4) * (96 // 4)
    assert multiply_accumulates(network, 64, 96) == cells * (3 * 3 * 3 * 8 + 8 * 5)
    assert multiply_accumulates(network, 33, 95) == multiply_accumulates(network, 64, 96), "padded to multiples of 32"
    assert network.training, "counting leaves the mode as it was"
