"""Settings for a data set of one's own, by the size of the machine, and what becomes of them without ImageNet weights.

Nothing heavy is imported before weights are looked for.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from mgd_pipeline.params import Params
from mgd_pipeline.params_file import parse_params
from mgd_pipeline.words import listed
from mgd_stages.run.project import networks_of


@dataclass(frozen=True)
class Scale:
    """Networks and sizes of images that suit a machine."""

    name: str
    about: tuple[str, ...]
    """Machine, needs, time and score, a line each; the first lines of params.yaml and of the preset in `--preset list`."""
    wide: dict[str, Any]
    """Decoder, encoder and decoder_channels of a teacher, and what else it has; `deep` and `network`, the student's, likewise."""
    deep: dict[str, Any]
    network: dict[str, Any]
    crop: int
    """Height and width of a training view, pixels."""
    long_side: int
    batch: int
    """Labelled images of a step, and as many unlabelled ones."""
    method: str
    """How the teachers are trained"""
    teacher_steps: int
    student_steps: int
    names: tuple[str, str] = ("wide", "deep")
    """Of the teachers `wide` and `deep` in params.yaml"""


_LITE: dict[str, Any] = {
    "wide": {"decoder": "fpn", "encoder": "tu-tf_efficientnet_lite2", "decoder_channels": 128},
    "deep": {"decoder": "fpn", "encoder": "tu-tf_efficientnet_lite0", "decoder_channels": 64},
    "network": {"decoder": "fpn", "encoder": "tu-tf_efficientnet_lite0", "decoder_channels": 64},
    # CPS takes up to three times as long, and forgets thin classes on photos (docs/log.md).
    "method": "supervised",
}
_OWN = "Score: unknown, for every data set has its own; `mgd-pipeline evaluate` measures yours."
_TIME = "Time: about {}, an estimate from the networks' multiplications ({} hours at {} TFLOPS), not measured on such a GPU."

# For `init --hours` alone. With the same networks and 12 labels of CamVid, distilled students had 33 % at 160 pixels, 37 at 240 and
# 42 at 480, more than further steps gained (docs/results.md).
CPU_192, CPU_384, CPU_512 = (
    Scale(f"cpu-{side}", (), **_LITE, crop=side // 2, long_side=side, batch=4, teacher_steps=1000, student_steps=2000)
    for side in (192, 384, 512)
)
CPU = Scale(
    "cpu",
    (
        "Your own images on a machine without a GPU.",
        "Command: mgd-pipeline init --preset cpu --root photos",
        "Needs: 2 cores and 4 GB; ImageNet weights of EfficientNet-Lite0 and Lite2, or `init` begins from random weights.",
        "Time: about 1 hour on one CPU core; from a few measured steps, beside other work.",
        _OWN,
    ),
    **_LITE,
    crop=128,
    long_side=256,
    batch=4,
    teacher_steps=2000,
    student_steps=4000,
)
SMALL_GPU = Scale(
    "small-gpu",
    (
        "Your own images on a GPU with 8 GB.",
        "Command: mgd-pipeline init --preset small-gpu --root photos",
        "Needs: a CUDA GPU; ImageNet weights of ResNet-50, ResNet-34 and MobileNetV2, or `init` begins from random weights.",
        _TIME.format("1 hour", 0.4, 5),
        _OWN,
    ),
    wide={"decoder": "fpn", "encoder": "resnet50", "decoder_channels": 128},
    deep={"decoder": "fpn", "encoder": "resnet34", "decoder_channels": 128},
    network={"decoder": "deeplabv3plus", "encoder": "mobilenet_v2", "decoder_channels": 128},
    crop=256,
    long_side=512,
    batch=4,
    method="cps",
    teacher_steps=4000,
    student_steps=8000,
)
LARGE_GPU = Scale(
    "large-gpu",
    (
        "Your own images on a GPU with 24 GB or more: MGD's teachers, and the settings of `init` without a preset.",
        "Command: mgd-pipeline init --preset large-gpu --root photos",
        "Needs: a CUDA GPU; ImageNet weights of Wide ResNet-50-2, ResNet-101 and MobileNetV2, or `init` begins from random",
        "  weights.",
        _TIME.format("3 hours", 2.2, 10),
        _OWN,
    ),
    wide={"decoder": "deeplabv3plus", "encoder": "tu-wide_resnet50_2", "decoder_channels": 256},
    deep={"decoder": "deeplabv3plus", "encoder": "resnet101", "decoder_channels": 256},
    network={"decoder": "deeplabv3plus", "encoder": "mobilenet_v2", "decoder_channels": 128},
    crop=256,
    long_side=512,
    batch=8,
    method="cps",
    teacher_steps=8000,
    student_steps=8000,
)
MODERN = Scale(
    "modern",
    (
        "Your own images on a GPU with 24 GB or more: a frozen ViT of DINOv2 and a convolutional network as teachers.",
        "Command: mgd-pipeline init --preset modern --root photos",
        "Needs: a CUDA GPU; published weights of DINOv2-B (Apache licence), ResNet-101 and MobileNetV2, or `init` begins from",
        "  random weights. The encoder tu-vit_base_patch16_dinov3.lvd1689m is the alternative; DINOv3 has a licence of its own.",
        _TIME.format("4 hours", 2.8, 10),
        _OWN,
    ),
    # At the teacher itself: teacher_training.frozen_encoder would freeze the ResNet, too.
    wide={
        "decoder": "dpt",
        "encoder": "tu-vit_base_patch14_dinov2.lvd142m",
        "decoder_channels": 256,
        "frozen_encoder": True,
    },
    deep={"decoder": "deeplabv3plus", "encoder": "resnet101", "decoder_channels": 256},
    network={"decoder": "deeplabv3plus", "encoder": "mobilenet_v2", "decoder_channels": 128},
    names=("dino", "resnet"),
    crop=224,  # a multiple of 28, to which inputs are padded for patches of 14 pixels, and of 32
    long_side=512,
    batch=8,
    method="cps",
    teacher_steps=8000,
    student_steps=8000,
)
MACHINES = {scale.name: scale for scale in (CPU, SMALL_GPU, LARGE_GPU, MODERN)}
# Students do not feel it: docs/experiments/2026-11-30-small-caches.md.
SMALL_CACHES = {"logits": "log-probability", "region_embeddings": "uint8", "compression": "zstd"}
"""A third of the bytes of plain ones. The image term then compares mean log-probabilities."""


def settings_of_scale(scale: Scale) -> dict[str, Any]:
    """All sections of params.yaml; of the section data only long_side."""
    training = {
        "labelled_batch": scale.batch,
        "unlabelled_batch": scale.batch,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "ema": 0.99,
    }
    teachers = {
        name: {**network, "encoder_weights": "imagenet", "weights": f"data/teachers/{name}.safetensors"}
        for name, network in zip(scale.names, (scale.wide, scale.deep), strict=True)
    }
    listened = dict(zip(("region_teacher", "image_teacher"), scale.names, strict=True))
    return {
        "data": {"long_side": scale.long_side},
        "views": {"crop": [scale.crop, scale.crop], "scales": [0.5, 0.75, 1.0, 1.25, 1.5], "colour_jitter": 0.3},
        "cutmix": {"partner": "other"},
        "teachers": teachers,
        "train_teachers": list(teachers),
        "teacher_training": {**training, "steps": scale.teacher_steps, "method": scale.method},
        "targets": {**SMALL_CACHES, "region_stride": 16 if scale.crop > 128 else 8},
        "student": {**training, "steps": scale.student_steps, "network": {**scale.network, "encoder_weights": "imagenet"}},
        # prior_adjustment: docs/results.md, "Which options help?"; no value was better with 12, 23 and 46 labels of CamVid.
        "losses": {
            "region": 10.0,
            "image": 0.002,
            "image_distance": "log-probability",
            "prior_adjustment": 0.5,
            "pixel_teachers": list(scale.names),
            **listened,
        },
    }


def on_scale(params: Params, scale: Scale) -> Params:
    """The same data set and the same split for comparisons with a scale's settings."""
    made = settings_of_scale(scale)
    made["data"] = {**params.data.model_dump(), **made["data"]}
    return parse_params({**made, "seed": params.seed, "evaluation": {"split": params.evaluation.split}})


# --- ImageNet weights -------------------------------------------------------------------------------------------------

_SMALLER = {"tu-wide_resnet50_2": "resnet50", "resnet101": "resnet34"}
"""What the largest encoders know more than these comes from ImageNet."""
# Learning rate of AdamW from random weights. EfficientNet-Lite0 on CamVid (46 labels, images of 192 pixels, 1,000 steps, one seed)
# has 29.8 % mIoU at 0.006 and 24.7 at 0.001; MobileNetV2 and ResNet-18 learnt about as well from 0.003 to 0.012, and the built-in
# data set's networks at 0.01 (docs/experiments/2026-11-28-camvid-longer-training.md, docs/log.md).
_RATE = 0.006


def unavailable_weights(params: Params) -> dict[str, str]:
    """Encoders whose ImageNet weights a training will need and cannot have here, by the key of the network.

    The hub is asked, for at most 1.5 s, only if weights are not in its cache on this machine.
    """
    keys = {"student.network", *(f"teachers.{name}" for name in params.train_teachers)}
    wanted = {
        key: network.encoder
        for key, network in networks_of(params).items()
        if key in keys and network.encoder_weights == "imagenet"
    }
    if not wanted:
        return {}
    from mgd_pipeline.networks.encoders import hub_reached, resolve_encoder_weights

    absent = {key: encoder for key, encoder in wanted.items() if resolve_encoder_weights(encoder, "imagenet", fetch=False) is None}
    return absent if absent and not hub_reached() else {}


def from_random_weights(params: Params, keys: Collection[str]) -> Params:
    """Settings that suit random weights, for the networks of these keys and their trainings.

    Teachers become ResNet-50 and ResNet-34 at most, a ViT becomes ResNet-50, and they learn from labels alone: with CPS that sets
    in slowly, as on the built-in data set, Lite0 had 26.9 % instead of 29.8 on CamVid, less than a student (46 labels, 1,000 steps,
    one seed).
    """
    raw = params.model_dump()
    for name, teacher in raw["teachers"].items():
        if f"teachers.{name}" in keys:
            teacher |= {"encoder_weights": "none", "encoder": _SMALLER.get(teacher["encoder"], teacher["encoder"])}
            if teacher["decoder"] == "dpt":
                teacher |= {"decoder": "deeplabv3plus", "encoder": "resnet50", "frozen_encoder": None}
            raw["teacher_training"] |= {"learning_rate": _RATE, "method": "supervised"}
    if "student.network" in keys:
        raw["student"]["network"]["encoder_weights"] = "none"
        raw["student"]["learning_rate"] = _RATE
    return parse_params(raw)


def say_unavailable(absent: dict[str, str], *, kept: bool) -> list[str]:
    """What a user reads of weights that cannot be had: what happens without them, and how to get them. `kept`: the settings ask for
    them all the same."""
    if not absent:
        return []
    from huggingface_hub import constants

    from mgd_pipeline.networks.encoders import fetch_command

    networks = listed([f"{key} ({encoder})" for key, encoder in absent.items()])
    if kept:
        then = "these settings need them, and training stops without them: fetch them, or take --preset cpu, small-gpu or large-gpu"
    else:
        then = (
            "these settings begin from random weights instead; networks then need more labels, and teachers may know no more than "
            "the student"
        )
    return [
        f"ImageNet weights of {networks} are not on this machine and the hub cannot be reached: {then}",
        "to have the weights, run on a machine that reaches the hub:",
        *(f"  {command}" for command in dict.fromkeys(map(fetch_command, absent.values()))),
        f"then copy its cache of the hub to {constants.HF_HUB_CACHE} and init again, or write each encoder and the path of its "
        "file into params.yaml: encoder, encoder_weights",
    ]


def gpu_is_here() -> bool:
    import torch

    return torch.cuda.is_available()
