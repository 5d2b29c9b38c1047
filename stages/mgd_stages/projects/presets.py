"""Complete parameters for each data set, and how they are written with their comments.

VOC and Cityscapes carry MGD's own settings. Their learning rates are the ones that MGD's gradients effectively see, with the weight
decay scaled to match, so that one process needs no world-size rule.
"""

from __future__ import annotations

import io
import textwrap
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from ruamel.yaml import YAML

from mgd_pipeline.errors import ParamsError
from mgd_pipeline.params import Params, Section
from mgd_pipeline.params_file import parse_params

_PRESETS = files("mgd_stages") / "presets"
_HEADER = """\
Every setting that affects results. Settings of the machine (device, workers, threads) are options of the commands:
`mgd-pipeline <stage> --help` lists them. Written by `mgd-pipeline init`; change any value.
"""


def preset(dataset: str, root: str, partition: str, data: dict[str, Any] | None = None) -> Params:
    """Checked parameters; `data` adds to the section of that name. Raises ParamsError for an impossible partition."""
    made = {"shapes": _shapes, "voc": _voc, "cityscapes": _cityscapes, "folder": _folder}[dataset]()
    made["data"] = {"dataset": dataset, "root": root, "partition": partition, **made.get("data", {}), **(data or {})}
    return parse_params(made, source=f"--partition {partition}")


def _mgd_teachers(weights: str) -> dict[str, Any]:
    return {
        "wide": {"encoder": "tu-wide_resnet50_2", "encoder_weights": weights, "weights": "data/teachers/wide.safetensors"},
        "deep": {"encoder": "resnet101", "encoder_weights": weights, "weights": "data/teachers/deep.safetensors"},
    }


def _voc() -> dict[str, Any]:
    sgd = {"labelled_batch": 8, "unlabelled_batch": 8, "learning_rate": 0.0025, "weight_decay": 4e-4}
    return {
        "views": {"crop": [512, 512]},
        "teachers": _mgd_teachers("imagenet"),
        "train_teachers": ["wide", "deep"],
        "teacher_training": {"steps": 39338, **sgd},
        "student": {"network": {"encoder": "resnet18", "encoder_weights": "imagenet"}, "steps": 39338, **sgd},
        "losses": {"region": 100.0, "image": 0.004},
        "evaluation": {"split": "val"},
    }


def voc_mobilenetv2(params: Params) -> Params:
    """MGD's settings for the MobileNetV2 student on VOC, from those for ResNet-18."""
    raw = params.model_dump()
    raw["student"] |= {"learning_rate": 0.0035, "network": {**raw["student"]["network"], "encoder": "mobilenet_v2"}}
    raw["losses"] |= {"region": 50.0, "image": 0.001}
    return parse_params(raw)


def quick(params: Params) -> Params:
    """The same data set with the built-in one's networks, which need no download, small images and few steps: the whole way within
    minutes on two cores."""
    raw, small = params.model_dump(), _shapes()
    raw["data"]["long_side"] = 256
    raw |= {"views": {**small["views"], "crop": [128, 128]}, "teachers": small["teachers"], "losses": small["losses"]}
    batch = {"labelled_batch": 4, "unlabelled_batch": 4}
    raw |= {name: {**small[name], **batch, "steps": steps} for name, steps in (("teacher_training", 100), ("student", 200))}
    raw["evaluation"]["window"] = None
    return parse_params(raw)


def _cityscapes() -> dict[str, Any]:
    def batch(images: int) -> dict[str, Any]:
        """MGD keeps at least 50,000 pixels an image: 100,000 on each of its GPUs, which see two images each."""
        return {"labelled_batch": images, "unlabelled_batch": images, "ohem": {"threshold": 0.7, "min_kept": 50_000 * images}}

    sgd = {"learning_rate": 0.0025, "weight_decay": 8e-4}
    return {
        "views": {"crop": [800, 800]},
        "teachers": _mgd_teachers("imagenet"),
        "train_teachers": ["wide", "deep"],
        "teacher_training": {"steps": 44525, "cps": 5.0, **batch(8), **sgd},
        "student": {
            "network": {"encoder": "resnet18", "encoder_weights": "imagenet"},
            "steps": 22194,
            **batch(16),
            **sgd,
        },
        "losses": {"region": 100.0, "image": 0.002},
        "evaluation": {"split": "val", "window": [800, 800]},
    }


def _folder() -> dict[str, Any]:
    adamw = {"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.01, "labelled_batch": 8, "unlabelled_batch": 8}
    return {
        "data": {"long_side": 512},
        "views": {"crop": [256, 256], "scales": [0.5, 0.75, 1.0, 1.25, 1.5], "colour_jitter": 0.3},
        "cutmix": {"partner": "other"},
        "teachers": _mgd_teachers("imagenet"),
        "train_teachers": ["wide", "deep"],
        "teacher_training": {"steps": 8000, **adamw, "ema": 0.99},
        "student": {
            "network": {"encoder": "mobilenet_v2", "encoder_weights": "imagenet", "decoder_channels": 128},
            "steps": 8000,
            **adamw,
            "ema": 0.99,
        },
        "losses": {"region": 10.0, "image": 0.002},
    }


def _shapes() -> dict[str, Any]:
    adamw = {"optimizer": "adamw", "weight_decay": 0.01, "labelled_batch": 8, "unlabelled_batch": 8, "ema": 0.99}
    return {
        "views": {"crop": [64, 64], "scales": [0.75, 1.0, 1.25], "colour_jitter": 0.5},
        "cutmix": {"partner": "other"},
        "teachers": {
            "wide": {
                "encoder": "tu-test_resnet",
                "decoder_channels": 128,
                "weights": "data/teachers/wide.safetensors",
            },
            "deep": {
                "decoder": "fpn",
                "encoder": "tu-test_resnet",
                "decoder_channels": 64,
                "weights": "data/teachers/deep.safetensors",
            },
        },
        "train_teachers": ["wide", "deep"],
        "teacher_training": {"steps": 1000, "learning_rate": 0.01, "cps": 1.0, "cps_rampup": 0.5, **adamw},
        "student": {
            "network": {"encoder": "tu-test_efficientnet", "decoder_channels": 64},
            "steps": 2500,
            "learning_rate": 0.01,
            **adamw,
        },
        "losses": {"region": 10.0, "image": 0.004},
        "evaluation": {"split": "test"},
    }


def camvid() -> Params:
    """CamVid with EfficientNet-Lite networks, from the settings for any folder."""
    names = ["sky", "building", "pole", "road", "pavement", "tree", "sign_symbol", "fence", "car", "pedestrian", "bicyclist"]
    folder = preset("folder", "data/raw/camvid", "1/30", {"classes": names, "long_side": None})
    lite0, lite2 = (
        {"encoder": f"tu-tf_efficientnet_{name}", "encoder_weights": f"data/raw/weights/tf_efficientnet_{name}.safetensors"}
        for name in ("lite0", "lite2")
    )
    raw = folder.model_dump()
    raw["views"] |= {"crop": [160, 224], "scales": [0.75, 1.0, 1.25, 1.5]}
    # FPN for both: it pools no whole image, which the crops that two cores can pay for do not show.
    raw["teachers"]["wide"] |= {**lite2, "decoder": "fpn", "decoder_channels": 128}
    raw["teachers"]["deep"] |= {**lite0, "decoder": "fpn", "decoder_channels": 64}
    raw["teacher_training"] |= {"steps": 1500, "cps": 0.0, "labelled_batch": 8, "unlabelled_batch": 4, "learning_rate": 1.5e-3}
    raw["targets"] |= {"tta": {"scales": [1.0], "flip": True}}
    raw["student"] |= {"steps": 3000, "network": {**raw["student"]["network"], **lite0}}
    raw["student"] |= {"labelled_batch": 4, "unlabelled_batch": 4, "learning_rate": 1.5e-3}
    raw["losses"] |= {"image": 0.004}
    raw["evaluation"] |= {"window": [160, 224]}
    return parse_params(raw)


@dataclass(frozen=True)
class Experiment:
    """A preset of `mgd-pipeline init --preset`: complete parameters, and what the top of its file says of them."""

    title: str
    needs: str
    time: str
    score: str
    params: Params

    def text(self, name: str) -> str:
        begin = f"mgd-pipeline init --preset {name} --root /path/to/{self.params.data.root.rpartition('/')[2]} --output {name}"
        about = {"Command": begin, "Needs": self.needs, "Time": self.time, "Score": self.score}
        paragraphs = [f"{self.title}, {self.params.data.partition} labelled.", *(f"{key}: {value}" for key, value in about.items())]
        head = [line for text in paragraphs for line in textwrap.wrap(text, 116, break_on_hyphens=False, subsequent_indent="  ")]
        return "\n".join([*(f"# {line}" for line in head), "#", render_params(self.params)])


def render_presets() -> dict[str, str]:
    """The files of mgd_stages/presets: MGD's own experiments at the 1/8 partition, and CamVid at 1/30."""
    voc, cityscapes = (preset(name, f"data/raw/{name}", "1/8") for name in ("voc", "cityscapes"))
    no_gpu = ("not measured; meant for a GPU.", "not trained here; the settings are those of MGD's paper and code.")
    of_voc = "PASCAL VOC 2012, better with SBD's masks; ImageNet weights from the hub."
    experiments = {
        "voc-resnet18": Experiment("MGD on PASCAL VOC", of_voc, *no_gpu, voc),
        "voc-mobilenetv2": Experiment("MGD on PASCAL VOC with the lighter student", of_voc, *no_gpu, voc_mobilenetv2(voc)),
        "cityscapes-resnet18": Experiment(
            "MGD on Cityscapes", "Cityscapes with fine annotations; ImageNet weights from the hub.", *no_gpu, cityscapes
        ),
        "camvid-lite0": Experiment(
            "CamVid by sequence, for a machine without a GPU",
            "CamVid's 11 classes as images/<split> and masks/<split>; data/raw/weights/tf_efficientnet_lite0.safetensors and "
            "tf_efficientnet_lite2.safetensors with ImageNet weights, or `encoder_weights: imagenet` to fetch them.",
            "about 3 hours on one CPU core: teachers 40 and 25 minutes, targets 9 minutes each, students 45 to 60 minutes each.",
            "mIoU on val 41.9 % distilled, 40.5 % from the labelled images alone, best teacher 41.3 %; one seed, no clear lead.",
            camvid(),
        ),
    }
    return {f"{name}.yaml": experiment.text(name) for name, experiment in experiments.items()}


def preset_names() -> list[str]:
    return sorted(path.name.removesuffix(".yaml") for path in _PRESETS.iterdir() if path.name.endswith(".yaml"))


def read_preset(name: str) -> tuple[list[str], Params]:
    """The lines that say what a preset is, each behind `# `, and its parameters. Raises ParamsError for an unknown name."""
    if name not in (names := preset_names()):
        raise ParamsError(f"--preset {name}: must be one of {', '.join(names)}; `mgd-pipeline init --preset list` describes them")
    text = (_PRESETS / f"{name}.yaml").read_text(encoding="utf-8")
    head = text.partition("\n#\n")[0].splitlines()
    return head, parse_params(YAML(typ="safe", pure=True).load(text), source=f"--preset {name}")


def render_params(params: Params) -> str:
    """params.yaml: every key with its value, its comment from the typed models, and its choices."""
    lines = [f"# {line}" for line in _HEADER.splitlines()]
    lines += _render(params, 0)
    return "\n".join(lines) + "\n"


def _render(section: BaseModel, depth: int) -> list[str]:
    lines: list[str] = []
    indent = "  " * depth
    fields = type(section).model_fields
    for key in sorted(fields, key=lambda name: (name != "dataset", name in ("class_map", "short_side"))):
        field, value = fields[key], getattr(section, key)
        if depth == 0:
            lines.append("")
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        # No-break spaces keep the choices in one line.
        shown = ["[" + "\u00a0|\u00a0".join(map(str, choices)) + "]"] if len(choices) > 1 else []
        comment = " ".join([field.description or "", *shown])
        lines += [f"{indent}# {line}" for line in textwrap.wrap(comment, 116 - 2 * depth)]
        if isinstance(value, Section):
            lines += [f"{indent}{key}:", *_render(value, depth + 1)]
        elif isinstance(value, dict) and depth == 0:
            lines.append(f"{indent}{key}:")
            for name, member in value.items():
                lines += [f"{indent}  {name}:", *_render(member, depth + 2)]
        else:
            lines.append(f"{indent}{field.alias or key}: {yaml_value(value)}")
    return [line.replace("\u00a0", " ") for line in lines]


def yaml_value(value: object) -> str:
    """A value as params.yaml has it, in one line."""
    if value is None:
        return "null"
    buffer = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width = True, 10_000
    yaml.dump(value, buffer)
    return buffer.getvalue().removesuffix("...\n").strip()
