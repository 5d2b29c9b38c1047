"""Heads on the cached embeddings of a frozen EfficientNet-Lite2 on CamVid: mIoU on val, and the seconds of each part.

python docs/experiments/camvid_heads.py --root CAMVID --weights LITE2.safetensors --output OUTPUT

CAMVID has images/ and masks/, each with train/ and val/ (480 x 360 pixels). Images are worked on at 240 x 180; the backbone sees
them at their own size for cells of 16 pixels, and at twice that size for cells of 8. It runs once for each size; all heads read its
cache. Seconds are those of the processor, on one thread, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mgd_pipeline.params_file import parse_params
from mgd_stages.projects.presets import preset
from mgd_stages.run.machine import Machine
from mgd_stages.run.project import Project
from mgd_stages.stages.precompute_teachers import precompute_teachers
from mgd_stages.stages.prepare_data import prepare_data
from mgd_stages.stages.train_teacher import train_teacher

CLASSES = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"]
PARTITIONS = {12: "1/30", 46: "1/8"}
SIZES = {16: 360, 8: 720}
"""Pixels between the cells, and the shorter side at which the backbone sees an image: its last map has a stride of 32."""
HEADS: dict[str, dict[str, Any]] = {
    "linear": {"head": "linear"},
    "conv": {"head": "conv"},
    "self": {"head": "conv", "self_training": 0.9},
}
CPU = torch.device("cpu")


def project_of(folder: Path, root: Path, weights: Path, *, stride: int, labels: int, seed: int) -> Project:
    data = {"classes": CLASSES, "long_side": 240}
    raw = preset("folder", str(root), PARTITIONS[labels], data).model_dump(by_alias=True)
    backbone = {"timm": "tf_efficientnet_lite2", "weights": str(weights), "short_side": SIZES[stride]}
    heads = {name: {**head, "of": "lite2", "weights": f"data/teachers/{name}.safetensors"} for name, head in HEADS.items()}
    losses = {"region": 0.0, "image": 0.0, "pixel_teachers": ["conv"], "region_teacher": "lite2", "image_teacher": "conv"}
    raw |= {"seed": seed, "teachers": {"lite2": backbone, **heads}, "train_teachers": [], "losses": losses}
    raw["targets"] |= {"region_stride": stride, "tta": None, "window": None}
    raw["student"]["network"] = {"encoder": "tu-test_efficientnet", "decoder_channels": 32}  # no student is trained here
    raw["evaluation"] |= {"split": "val", "window": None}
    return Project(folder, parse_params(raw))


def timed(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="CamVid")
    parser.add_argument("--weights", type=Path, required=True, help="ImageNet weights of tf_efficientnet_lite2")
    parser.add_argument("--output", type=Path, required=True, help="a folder for projects, and table.md")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--strides", type=int, nargs="+", default=[16, 8], choices=list(SIZES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    root, weights, output = arguments.root.resolve(), arguments.weights.resolve(), arguments.output.resolve()
    lines = [
        "| cells | labels | head | mIoU on val, % (each seed) | backbone, s | training, s | targets and evaluation, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for stride in arguments.strides:
        of = {"root": root, "weights": weights, "stride": stride}
        base, backbone = output / f"cells-{stride}", 0.0
        for labels in PARTITIONS:
            manifest = output / f"manifest-{labels}"
            for seed in range(arguments.seeds):
                project = project_of(base / f"{labels}-{seed}", **of, labels=labels, seed=seed)
                if not manifest.exists():
                    prepare_data(project)
                    shutil.copytree(project.manifest, manifest)
                shutil.copytree(manifest, project.manifest, dirs_exist_ok=True)
                cache, place = base / "lite2.zarr", project.targets("lite2")
                if not cache.exists():
                    backbone = timed(lambda project=project: precompute_teachers(project, "lite2", device=CPU))
                    (base / "seconds.json").write_text(json.dumps(backbone))
                    place.rename(cache)
                backbone = json.loads((base / "seconds.json").read_text())
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(cache)
            for name in HEADS:
                mious, training, targets = [], [], []
                for seed in range(arguments.seeds):
                    project = project_of(base / f"{labels}-{seed}", **of, labels=labels, seed=seed)
                    training.append(timed(lambda p=project, name=name: train_teacher(p, name, Machine(CPU))))
                    targets.append(timed(lambda p=project, name=name: precompute_teachers(p, name, device=CPU)))
                    mious.append(100 * json.loads((project.results / f"teachers/{name}.json").read_text())["miou"])
                each = ", ".join(f"{miou:.1f}" for miou in mious)
                seconds = f"{backbone:.0f} | {statistics.mean(training):.1f} | {statistics.mean(targets):.1f}"
                lines.append(f"| {stride} | {labels} | {name} | **{statistics.mean(mious):.1f}** ({each}) | {seconds} |")
                (output / "table.md").write_text("\n".join(lines) + "\n")
                print(lines[-1], flush=True)


if __name__ == "__main__":
    main()
