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
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mgd_pipeline.caches.reader import open_cache
from mgd_pipeline.data.manifest import read_manifest
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
HEADER = "| cells | labels | head | mIoU on val, % (each seed) | training, s | targets and evaluation, s |"
CPU = torch.device("cpu")


def project_of(folder: Path, root: Path, weights: Path, *, stride: int, partition: object, seed: int) -> Project:
    data = {"classes": CLASSES, "long_side": 240, "partition": partition}
    raw = preset("folder", str(root), "1/8", data).model_dump(by_alias=True)
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


def manifests(output: Path, of: dict[str, Any], *, few: bool) -> dict[int, Path]:
    """By number of labels a project whose data/manifest is that partition. With `few`, all other training images are left out but
    the labelled ones of the other partition, so that both read one cache."""
    folders = {labels: output / f"partition-{labels}" for labels in PARTITIONS}
    drawn = {labels: project_of(folders[labels], **of, partition=share, seed=0) for labels, share in PARTITIONS.items()}
    for project in drawn.values():
        if not project.manifest.exists():
            prepare_data(project)
    if not few:
        return folders
    ids = {labels: [row.image_id for row in read_manifest(p.manifest, p.base).labelled] for labels, p in drawn.items()}
    for labels, others in ((12, 46), (46, 12)):
        folder = folders[labels] / "few"
        folder.mkdir(exist_ok=True)
        (folder / "labelled.txt").write_text("\n".join(ids[labels]))
        (folder / "unlabelled.txt").write_text("\n".join(name for name in ids[others] if name not in ids[labels]))
        lists = {"labelled": "labelled.txt", "unlabelled": "unlabelled.txt"}
        if not (folder / "data").exists():
            prepare_data(project_of(folder, **of, partition=lists, seed=0))
        folders[labels] = folder
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="CamVid")
    parser.add_argument("--weights", type=Path, required=True, help="ImageNet weights of tf_efficientnet_lite2")
    parser.add_argument("--output", type=Path, required=True, help="a folder for projects, and tables")
    parser.add_argument("--stride", type=int, default=16, choices=list(SIZES))
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--few", action="store_true", help="leave out unlabelled images, which only self-training reads")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stride, output = arguments.stride, arguments.output.resolve()
    of = {"root": arguments.root.resolve(), "weights": arguments.weights.resolve(), "stride": stride}
    base = output / f"cells-{stride}"
    table = base / f"{'-'.join(arguments.heads)}.md"
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(f"{HEADER}\n{'|---' * 6}|\n")
    folders = manifests(output, of, few=arguments.few)
    for name in arguments.heads:
        for labels, folder in folders.items():
            partition = {"labelled": "labelled.txt", "unlabelled": "unlabelled.txt"} if arguments.few else PARTITIONS[labels]
            mious, training, targets = [], [], []
            for seed in range(arguments.seeds):
                project = project_of(base / f"{labels}-{seed}", **of, partition=partition, seed=seed)
                shutil.copytree(folder / "data/manifest", project.manifest, dirs_exist_ok=True)
                share_backbone(project, base)
                training.append(timed(partial(train_teacher, project, name, Machine(CPU))))
                targets.append(timed(partial(precompute_teachers, project, name, device=CPU)))
                mious.append(100 * json.loads((project.results / f"teachers/{name}.json").read_text())["miou"])
            each = ", ".join(f"{miou:.1f}" for miou in mious)
            line = (
                f"| {stride} | {labels} | {name} | **{statistics.mean(mious):.1f}** ({each}) | {statistics.mean(training):.1f} | "
            )
            with open(table, "a", encoding="utf-8") as file:
                print(line + f"{statistics.mean(targets):.1f} |", file=file)
    print(table.read_text() + (base / "backbone.txt").read_text())


def share_backbone(project: Project, base: Path) -> None:
    """The cache of the backbone, which the first project makes."""
    cache, place = base / "lite2.zarr", project.targets("lite2")
    if not cache.exists():
        seconds = timed(partial(precompute_teachers, project, "lite2", device=CPU))
        place.rename(cache)
        made = open_cache(cache)
        size = made.layout.bytes_of("region_embeddings")
        (base / "backbone.txt").write_text(
            f"backbone: {len(made.index)} images in {seconds:.0f} s, {size} bytes of embeddings each\n"
        )
    if not place.is_symlink():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(cache)


if __name__ == "__main__":
    main()
