"""Complete parameters for each data set, and how they are written with their comments.

The files of mgd_stages/presets are experiments, MGD's own among them. MGD's learning rates are the ones that its gradients
effectively see, with the weight decay scaled to match, so that one process needs no world-size rule.
"""

from __future__ import annotations

import io
import textwrap
from importlib.resources import files
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from ruamel.yaml import YAML

from mgd_pipeline.data.datasets import names_of
from mgd_pipeline.errors import ParamsError
from mgd_pipeline.params import Params, Section
from mgd_pipeline.params_file import parse_params
from mgd_stages.projects.labels import BACKGROUND
from mgd_stages.projects.machines import LARGE_GPU, MACHINES, SMALL_CACHES, settings_of_scale

_PRESETS = files("mgd_stages") / "presets"
_HEADER = """\
Every setting that affects results. Settings of the machine (device, workers, threads) are options of the commands:
`mgd-pipeline <stage> --help` lists them. Written by `mgd-pipeline init`; change any value.
"""
PROMPTED = "words"
"""The teacher that draws the first masks."""
_ADAMW = {"optimizer": "adamw", "weight_decay": 0.01, "labelled_batch": 8, "unlabelled_batch": 8, "ema": 0.99}


def preset(dataset: str, root: str, partition: str, data: dict[str, Any] | None = None) -> Params:
    """Checked parameters; `data` adds to the section of that name. Raises ParamsError for an impossible partition."""
    match dataset:
        case "shapes":
            made = _shapes()
        case "folder":
            made = settings_of_scale(LARGE_GPU)
        case _:
            made = {**read_preset(f"{dataset}-resnet18")[1].model_dump(), "data": {}}
    made["data"] = {"dataset": dataset, "root": root, "partition": partition, **made.get("data", {}), **(data or {})}
    return parse_params(made, source=f"--partition {partition}")


def quick(params: Params) -> Params:
    """The same data set with the built-in one's networks, which need no download, small images and few steps: the whole way within
    minutes on two cores.

    Images are small so that there is time for steps: with images of 256 pixels, 100 steps of the teachers with CPS and 200 of the
    student, the distilled student had 20 % mIoU and its twin 31 (docs/experiments/2026-11-29-quick-runs.md).
    """
    raw, small = params.model_dump(), _shapes()
    raw["data"]["long_side"] = 160
    raw |= {"views": {**small["views"], "crop": [96, 96]}, "teachers": small["teachers"]}
    raw["targets"] |= small["targets"]
    training = {"labelled_batch": 4, "unlabelled_batch": 4, "steps": 800}
    raw |= {
        "teacher_training": {**small["teacher_training"], **training, "method": "supervised"},
        "student": {**small["student"], **training},
    }
    raw["losses"] = {**small["losses"], "pixel_choice": "ensemble", "prior_adjustment": 0.5}
    raw["evaluation"]["window"] = None
    return parse_params(raw)


def with_prompts(params: Params) -> Params:
    """The same with a text-prompted teacher for photos without labels. Its phrases are the names of the classes."""
    raw, classes = params.model_dump(), names_of(params.data).classes
    rest = next((name for name in classes if name.lower() in BACKGROUND), None)
    raw["teachers"][PROMPTED] = {
        "prompts": {name: [] if name == rest else [name.replace("_", " ")] for name in classes},
        "transformers": "CIDAS/clipseg-rd64-refined",
        "weights": f"data/teachers/{PROMPTED}.safetensors",
    }
    raw["train_teachers"].append(PROMPTED)
    return parse_params(raw)


def _shapes() -> dict[str, Any]:
    wide = {"encoder": "tu-test_resnet", "decoder_channels": 128, "weights": "data/teachers/wide.safetensors"}
    deep = {"encoder": "tu-test_resnet", "decoder_channels": 64, "weights": "data/teachers/deep.safetensors", "decoder": "fpn"}
    network = {"encoder": "tu-test_efficientnet", "decoder_channels": 64}
    return {
        "views": {"crop": [64, 64], "scales": [0.75, 1.0, 1.25], "colour_jitter": 0.5},
        "cutmix": {"partner": "other"},
        "teachers": {"wide": wide, "deep": deep},
        "train_teachers": ["wide", "deep"],
        "teacher_training": {"steps": 1000, "learning_rate": 0.01, "consistency_rampup": 0.5, **_ADAMW},
        "targets": SMALL_CACHES,
        "student": {"network": network, "steps": 2500, "learning_rate": 0.01, **_ADAMW},
        "losses": {"region": 10.0, "image": 0.004, "image_distance": "log-probability"},
        "evaluation": {"split": "test"},
    }


def preset_heads() -> dict[str, list[str]]:
    """The lines that say what a preset is, by its name: first those for machines, then the experiments."""
    return {name: list(scale.about) for name, scale in MACHINES.items()} | {
        name: [line.removeprefix("# ") for line in read_preset(name)[0]] for name in preset_names()
    }


def preset_names() -> list[str]:
    """Those of experiments."""
    return sorted(path.name.removesuffix(".yaml") for path in _PRESETS.iterdir() if path.name.endswith(".yaml"))


def read_preset(name: str) -> tuple[list[str], Params]:
    """The lines that say what an experiment is, each behind `# `, and its parameters. Raises ParamsError for an unknown name."""
    if name not in (names := preset_names()):
        raise ParamsError(
            f"--preset {name}: must be one of {', '.join([*MACHINES, *names])}; `mgd-pipeline init --preset list` describes them"
        )
    text = (_PRESETS / f"{name}.yaml").read_text(encoding="utf-8")
    head = text.partition("\n#\n")[0].splitlines()
    return head, parse_params(YAML(typ="safe", pure=True).load(text), source=f"--preset {name}")


def render_params(params: Params) -> str:
    """params.yaml: every key with its value, its comment from the typed models, and its choices."""
    return "\n".join([*(f"# {line}" for line in _HEADER.splitlines()), *_render(params, 0)]) + "\n"


def _render(section: BaseModel, depth: int) -> list[str]:
    lines: list[str] = []
    indent = "  " * depth
    fields, dumped = type(section).model_fields, section.model_dump()
    for key in sorted(fields, key=lambda name: (name != "dataset", name in ("class_map", "short_side", "fixed_size"))):
        field, value = fields[key], getattr(section, key)
        if depth == 0:
            lines.append("")
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        # No-break spaces keep the choices in one line.
        shown = ["[" + "\u00a0|\u00a0".join(map(str, choices)) + "]"] if len(choices) > 1 else []
        comment = " ".join([field.description or "", *shown])
        lines += [f"{indent}# {line}" for line in textwrap.wrap(comment, 116 - 2 * depth, break_on_hyphens=False)]
        if isinstance(value, Section):
            lines += [f"{indent}{key}:", *_render(value, depth + 1)]
        elif isinstance(value, dict) and depth == 0:
            lines.append(f"{indent}{key}:")
            for name, member in value.items():
                lines += [f"{indent}  {name}:", *_render(member, depth + 2)]
        else:
            lines.append(f"{indent}{field.alias or key}: {yaml_value(dumped[field.alias or key])}")
    return [line.replace("\u00a0", " ") for line in lines]


def yaml_value(value: object) -> str:
    """A value as params.yaml has it, in one line."""
    if value is None:
        return "null"
    buffer = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width = True, 10_000
    yaml.representer.ignore_aliases = lambda data: True  # a list that two values share is written twice, without &id001 and *id001
    yaml.dump(value, buffer)
    return buffer.getvalue().removesuffix("...\n").strip()
