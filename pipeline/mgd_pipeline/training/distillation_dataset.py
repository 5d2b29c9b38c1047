"""A finished project as an ordinary data set of PyTorch: one image, one drawn view, and every teacher's targets of that view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from mgd_pipeline.caches.provenance import expected_provenance
from mgd_pipeline.caches.reader import TargetCache, open_cache
from mgd_pipeline.data.datasets import names_of
from mgd_pipeline.data.images import IGNORE
from mgd_pipeline.data.manifest import ImageRow, read_manifest
from mgd_pipeline.errors import ParamsError
from mgd_pipeline.networks.encoders import normalisation
from mgd_pipeline.networks.normalisation import Normalisation
from mgd_pipeline.params_file import load_params
from mgd_pipeline.training.batches import make_source, valid_views, view_images, view_labels, view_targets
from mgd_pipeline.training.dataset import CheckedFiles, check_rows, read_targets, refuse_hidden_labels
from mgd_pipeline.views import draw_jitter, draw_view


class DistillationDataset(Dataset[dict[str, Any]]):
    """The training images of a project whose teacher caches are finished, for a plain `DataLoader` with any number of workers.

    Item i is a dictionary that `default_collate` makes batches of (H W pixels of `views.crop`, h w = H / 4, W / 4):

    - `image_id`: str
    - `image`: (3, H, W) float32, a view of the image as train-student draws it, normalised; padding is 0
    - `label`: (H, W) int64 classes; 255 on void and padding, and everywhere of an image without a label
    - `labelled`: bool, whether the image has a label
    - `inside`: (H, W) bool, False on padding
    - `targets`: of each teacher `logits` (K, H, W) and `features` (D, h, w), both float32. Features lie at the cells of a network's
      output whose corners are aligned with the view's (`networks.SegmentationNetwork`).

    The view of item i depends on the seed, the epoch and i alone, so workers, order and resuming change nothing. Call `set_epoch`
    before each epoch: without it all epochs have the same views.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        subset: Literal["training", "labelled", "unlabelled"] = "training",
        caches: Mapping[str, str | Path] | None = None,
        normalise: Normalisation | None = None,
        seed: int | None = None,
        overrides: Sequence[str] = (),
    ) -> None:
        """`folder` has params.yaml; `overrides` change its values, such as "views.crop=[256,256]".

        `caches` maps teachers to paths or URLs of their caches. By default these are the caches below data/targets of the teachers
        that the project's losses use. `normalise` is for networks other than the project's student, `seed` replaces the project's.
        Raises ParamsError, DataError and CacheError where something is missing, changed or made from something else.
        """
        self.folder = Path(folder).resolve()
        if not (self.folder / "params.yaml").exists():
            raise ParamsError(f"{self.folder}: is not the folder of a project, it has no params.yaml; name a folder that has one")
        self.params = load_params(self.folder / "params.yaml", list(overrides))
        self.manifest = read_manifest(self.folder / "data/manifest", self.folder, names_of(self.params.data))
        if subset not in ("training", "labelled", "unlabelled"):
            raise ParamsError(f"subset: {subset!r} must be training, labelled or unlabelled")
        self.rows: list[ImageRow] = getattr(self.manifest, subset)
        used = {name: self.folder / f"data/targets/{name}.zarr" for name in self.params.losses.used_teachers}
        self.caches = {name: self._opened(name, path) for name, path in (used if caches is None else caches).items()}
        self.normalise = normalise or normalisation(self.params.student.network.encoder)
        self.seed = self.params.seed if seed is None else seed
        # Shared with worker processes, so that `set_epoch` reaches workers that are kept from one epoch to the next.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._files = CheckedFiles(self.manifest)
        check_rows(self.caches.values(), self.manifest, self.rows)
        if not self.params.losses.other_partition:
            refuse_hidden_labels(self.caches.values(), self.manifest)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draws other views from now on. Call it before the loop over a DataLoader begins: its workers read ahead."""
        if epoch < 0:
            raise ParamsError(f"epoch: {epoch} must be 0 or more")
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row, params = self.rows[index], self.params.views
        rng = np.random.default_rng([self.seed, int(self._epoch), index])
        view = draw_view(rng, self.manifest.size(row), (params.crop[0], params.crop[1]), params.scales, params.flip)
        jitter = draw_jitter(int(rng.integers(2**62)), 1)
        pixels = self._files.planes(row)
        # By its subset: a mask that the partition hides from training stays hidden here.
        labelled, size = self.manifest.subsets[row.image_id] == "labelled", (pixels.shape[1], pixels.shape[2])
        label = self._files.mask(row, size) if labelled else np.full(size, IGNORE, np.uint8)
        stored = read_targets(self.caches, self.manifest, [row], [view])
        source = make_source([row], [view], torch.from_numpy(pixels[None]), torch.from_numpy(label[None]), stored, jitter)
        targets = {}
        for name in self.caches:
            logits, features = view_targets(source, name)
            targets[name] = {"logits": logits[0], "features": features[0]}
        return {
            "image_id": row.image_id,
            "image": view_images(source, self.normalise, params.colour_jitter)[0],
            "label": view_labels(source)[0],
            "labelled": labelled,
            "inside": valid_views(source)[0],
            "targets": targets,
        }

    def _opened(self, name: str, path: str | Path) -> TargetCache:
        teacher, expected = self.params.teachers.get(name), {}
        if teacher is not None:
            expected = expected_provenance(teacher, self.params.targets, self.manifest.classes, self.manifest.long_side)
        return open_cache(path, expected)
