"""A head of the project on the cached embeddings of another teacher, which is neither built nor read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mgd_pipeline.caches.encoding import TeacherTargets
from mgd_pipeline.caches.provenance import expected_provenance
from mgd_pipeline.caches.reader import TargetCache, open_cache
from mgd_pipeline.data.classes import compare_names
from mgd_pipeline.data.manifest import ImageRow, Manifest
from mgd_pipeline.errors import (
    CacheError,
    CacheIncomplete,
    NonFiniteError,
    StaleTarget,
    WeightsError,
    shell_command,
)
from mgd_pipeline.networks.counting import multiply_accumulates_on, parameter_count
from mgd_pipeline.networks.inference import resize_logits
from mgd_pipeline.networks.weights import fitting_state, read_metadata, read_state_dict, sha256_of_state
from mgd_pipeline.params import HeadTeacher, TargetsParams
from mgd_pipeline.teachers.heads import Head
from mgd_pipeline.teachers.looks import Looks, class_scores, look_of_regions, looks_as_targets
from mgd_pipeline.training.dataset import cached_embeddings
from mgd_stages.run.loaded_teacher import LoadedTeacher, Scores, load_teacher, require_weights
from mgd_stages.run.project import Project, check_teacher
from mgd_stages.run.teacher_cache import held_out_rows


@dataclass(frozen=True)
class LoadedHead:
    """A head of params.yaml with its weights, in eval mode, and the cache whose embeddings it reads."""

    project: Project
    manifest: Manifest
    name: str
    head: Head
    cache: TargetCache
    """Of the teacher that the head is `of`"""
    labels: tuple[str, ...]
    """The names of its classes when it was trained"""
    provenance: dict[str, Any]
    """Of the targets that it would make now"""

    @property
    def channels(self) -> tuple[int, int]:
        """Classes and channels of the features of its targets."""
        return len(self.manifest.classes), 0

    def cost(self) -> tuple[int, int]:
        """Parameters, and multiply-accumulate operations on the embeddings of a view; the network behind them is not counted."""
        rows, columns = (-(-side // self.cache.layout.region_stride) for side in self.project.params.views.crop)
        embeddings = torch.zeros(1, self.cache.layout.features, rows, columns, device=self.head.mean.device)
        return parameter_count(self.head), multiply_accumulates_on(self.head, embeddings)

    def on(self, row: ImageRow) -> Scores:
        """What it says of an image, see `Scores`. Raises CacheIncomplete or StaleTarget if the cache lacks the image."""

        def scores(options: TargetsParams, mirrored: bool, size: tuple[int, ...]) -> torch.Tensor:
            logits = class_scores(self._look(row, mirrored, options).logits, self.manifest.size(row))[0]
            return resize_logits(logits, (size[0], size[1]))

        return scores

    def targets(self, row: ImageRow, *, mirrored: bool) -> TeacherTargets:
        """Raises CacheIncomplete or StaleTarget if the cache lacks the image."""
        options = self.project.params.targets
        return looks_as_targets(self._look(row, mirrored, options), self.manifest.size(row), options)[0]

    @torch.inference_mode()
    def _look(self, row: ImageRow, mirrored: bool, options: TargetsParams) -> Looks:
        embeddings = cached_embeddings(self.cache, self.manifest, row, mirrored=mirrored).astype(np.float32)
        logits = self.head(torch.from_numpy(embeddings)[None].to(self.head.mean.device))
        return look_of_regions(logits, self.manifest.size(row), options)


Loaded = LoadedTeacher | LoadedHead


def load_any(project: Project, name: str, manifest: Manifest, device: torch.device) -> Loaded:
    """Raises what `load_teacher` and `load_head` raise."""
    check_teacher(project, name)
    return (load_head if name in project.params.heads else load_teacher)(project, name, manifest, device)


def base_cache(project: Project, name: str, manifest: Manifest) -> TargetCache:
    """The finished cache whose embeddings a head reads.

    Raises CacheError if it is missing, was made from something else, has no embeddings, or lacks the images on which heads are
    measured.
    """
    params = project.params
    of = params.heads[name]
    make = shell_command("mgd-pipeline", "precompute-teachers", "--teacher", of)
    expected = expected_provenance(params.teachers[of], params.targets, manifest.classes, manifest.long_side)
    try:
        cache = open_cache(project.targets(of), expected)
    except CacheIncomplete:
        said = f"teachers.{name}: reads the embeddings of {of}, and {project.targets(of)} is not there"
        raise CacheIncomplete(f"{said}; run `{make}`") from None
    if not cache.layout.features:
        raise CacheError(f"teachers.{name}.of: {of} gives no embeddings, so that no head can read them; name another teacher")
    for row in held_out_rows(project, of, manifest):
        try:
            cache.row(manifest.key(row))
        except (CacheIncomplete, StaleTarget) as error:
            if manifest.key(row).image_id in cache.index.by_id:  # it was skipped, or its file has changed
                raise
            # DVC does not see that a cache must grow because params.yaml has a first head.
            again = shell_command("dvc", "repro", "--force", "--single-item", f"precompute-teachers@{of}")
            raise CacheIncomplete(
                f"{cache.path}: has no embeddings of the {params.evaluation.split} images, on which heads are measured "
                f"(such as {row.image_id}); run `{again if 'DVC_STAGE' in os.environ else make}`, which computes these alone"
            ) from error
    return cache


def load_head(project: Project, name: str, manifest: Manifest, device: torch.device) -> LoadedHead:
    """Raises CacheError as `base_cache`, WeightsError for weights that are missing, do not fit or belong to another cache or order
    of classes."""
    params = project.params.teachers[name]
    assert isinstance(params, HeadTeacher)
    path = require_weights(project, name)
    notes, cache = read_metadata(path), base_cache(project, name, manifest)
    again = f"run `{shell_command('mgd-pipeline', 'train-teacher', '--teacher', name)}`"
    if notes.get("kind") != "head":
        raise WeightsError(f"{path}: is no head of mgd-pipeline; {again}")
    if (noted := notes["cache"]["fingerprint"]) != cache.fingerprint:
        here = f"{cache.path} has now ({cache.fingerprint[:12]}...)"
        raise WeightsError(f"{path}: was trained on other embeddings ({noted[:12]}...) than {here}; {again}")
    state, classes = read_state_dict(path), tuple(notes["classes"])
    if fault := compare_names(f"teacher {name}", classes, manifest.classes).fault:
        raise WeightsError(f"{path}: {fault}; {again}")
    head = Head(params, cache.layout.features, len(classes))
    head.load_state_dict(fitting_state(head.state_dict(), state, path, f"teachers.{name}, a {params.head} head; {again}"))
    if bad := [key for key, value in head.state_dict().items() if not value.isfinite().all()]:
        raise NonFiniteError(f"teacher {name}: {path}: {bad[0]} holds NaN or infinity; {again}")
    expected = expected_provenance(params, project.params.targets, manifest.classes, manifest.long_side)
    made_from = {"weights_sha256": sha256_of_state(state), "trained_on": notes["trained_on"], "embeddings": cache.fingerprint}
    provenance = {**expected, "teacher": {**expected["teacher"], **made_from}}
    return LoadedHead(project, manifest, name, head.to(device).eval().requires_grad_(False), cache, classes, provenance)
