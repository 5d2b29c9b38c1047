"""`mgd-pipeline label-images`: masks of photos without labels from a teacher of params.yaml, for a person to correct."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mgd_pipeline.data.build import photo_rules
from mgd_pipeline.data.datasets import names_of
from mgd_pipeline.data.images import IGNORE
from mgd_pipeline.errors import ParamsError
from mgd_pipeline.params import FolderData
from mgd_pipeline.teachers.probing import output_channels
from mgd_stages.run.loaded_teacher import finished_teacher, scores_at
from mgd_stages.run.progress import console
from mgd_stages.run.project import Project
from mgd_stages.tools.predict import MaskMaker, write_masks


def label_images(
    project: Project, name: str, inputs: list[Path], output: Path, *, confidence: float, overlays: bool, device: torch.device
) -> None:
    """Writes masks/<name>.png below `output`, and on request overlays/<name>.png, as `predict` does. A mask that a person has made
    or corrected stays. No manifest is needed.

    A pixel has the teacher's most likely class, or none (255) if its probability is below `confidence`.
    Raises ParamsError for a teacher that names no classes, and for a project whose masks hold other values than class ids.
    """
    params = project.params
    if str(output) == "-":
        raise ParamsError("--output -: name a folder, such as the one that holds images/")
    if isinstance(params.data, FolderData) and (params.data.values is not None or params.data.ignore != IGNORE):
        raise ParamsError(
            f"data.values, data.ignore: label-images writes class ids and {IGNORE}, and the masks of this project hold other "
            "values; label in a project of its own, without these keys"
        )
    names = names_of(params.data)

    def load() -> MaskMaker:
        teacher = finished_teacher(project, name, names.classes)
        if output_channels(name, teacher)[0] == 0:
            raise ParamsError(f"--teacher {name}: names no classes, it gives features only; take another teacher")
        teacher.network.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

        def mask_of(image: np.ndarray) -> np.ndarray:
            size = image.shape[0], image.shape[1]
            scores = scores_at(teacher, image, params.targets, params.data.long_side, size)
            probability, best = scores.softmax(0).max(0)
            return best.masked_fill(probability < confidence, IGNORE).to(torch.uint8).cpu().numpy()

        said = f"teacher {name} sees images as its targets are made; pixels below {confidence:g} have no class ({IGNORE})"
        return MaskMaker(list(names.classes), names.palette, photo_rules(params.data), mask_of, said, "set targets.window")

    done = write_masks(load, inputs, output, overlays=overlays, keep=True)
    if not done:
        return
    means = {label: float(np.mean([one["shares"][label] for one in done])) for label in names.classes}
    without = max(0.0, 1 - sum(means.values()))
    console.print("pixels: " + ", ".join(f"{label} {100 * share:.1f} %" for label, share in {**means, "no class": without}.items()))
    if never := [label for label, share in means.items() if share == 0]:
        console.print(f"warning: no pixel of {', '.join(never)}: write other phrases in params.yaml, or a lower --confidence")
