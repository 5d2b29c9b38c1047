"""What a teacher cache was made from, as plain JSON: its hash is the cache's identity (`caches.format.fingerprint`)."""

from __future__ import annotations

from typing import Any

from mgd_pipeline.caches.encoding import TARGETS_VERSION
from mgd_pipeline.data.classes import compare_names
from mgd_pipeline.params import FixedSizeTeacher, TargetsParams, TeacherParams


def expected_provenance(
    params: TeacherParams, targets: TargetsParams, classes: tuple[str, ...], long_side: int | None
) -> dict[str, Any]:
    """The provenance that follows from the parameters alone, without the teacher and its weights."""
    fixed = {}
    if isinstance(params, FixedSizeTeacher):  # of a network that takes every size it is dropped again, see `applying`
        how = params.fixed_size or "windows"
        fixed = {"fixed_size": {"images": how, "overlap": targets.overlap if how == "windows" else None}}
    return {
        "targets_version": TARGETS_VERSION,
        "teacher": params.identity,
        "preprocessing": {
            "long_side": long_side,
            "short_side": params.short_side,
            # Caches without a short side keep the identity that they had before this parameter existed.
            **({} if params.short_side is None else {"short_side_of": "the whole file"}),
            "resize": "PIL bilinear, antialiased",
            # Of every image before turns were applied. A turned image has a key of its own, and caches keep their identity.
            "exif_orientation": "ignored",
            "window": targets.window,
            "overlap": None if targets.window is None else targets.overlap,
            "tta": None if targets.tta is None else targets.tta.model_dump(),
            "mirrored": targets.mirrored,
            "precision": targets.precision,
            **fixed,
        },
        "classes": list(classes),
        "class_map": params.class_map,
        "encoding": {
            "logits": targets.logits,
            "stride": targets.stride,
            "top_k": targets.top_k,
            "region_embeddings": targets.region_embeddings,
            "region_stride": targets.region_stride,
            # Where they say nothing they are left out: caches keep the identity that they had before these parameters existed.
            **({"floor": targets.floor_of(len(classes)), "levels": targets.levels} if targets.logits == "log-probability" else {}),
            **({"region_levels": targets.region_levels} if targets.region_embeddings == "uint8" else {}),
            **({} if targets.compression == "none" else {"compression": targets.compression}),
        },
    }


def applying(provenance: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """`expected` as it applies to a cache: only the caches of networks that take inputs of one size record `fixed_size`."""
    preprocessing = expected.get("preprocessing", {})
    if "fixed_size" not in preprocessing or "fixed_size" in (provenance.get("preprocessing") or {}):
        return expected
    return {**expected, "preprocessing": {key: value for key, value in preprocessing.items() if key != "fixed_size"}}


def in_names_of(provenance: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """`expected` with the names that `provenance` has for the classes, where classes were only renamed; else `expected` itself.

    A cache keeps the names of the day on which it was made, so this is what its provenance is compared with.
    """
    theirs, ours = provenance.get("classes"), expected.get("classes")
    if not isinstance(theirs, list) or ours is None or compare_names("", theirs, ours).fault:
        return expected
    then, groups = dict(zip(ours, theirs, strict=True)), expected.get("class_map")
    if (prompts := expected.get("teacher", {}).get("prompts")) is not None:
        prompts = {then.get(name, name): phrases for name, phrases in prompts.items()}
        expected = {**expected, "teacher": {**expected["teacher"], "prompts": prompts}}
    if groups is None:
        return {**expected, "classes": theirs}
    groups = {then.get(name, name): members for name, members in groups.items()}
    # A map of each class to itself is none. A published teacher, which is known by its names, needs one after a renaming.
    itself = all(groups.get(name) in ([name], [number]) for number, name in enumerate(theirs))
    return {**expected, "classes": theirs, "class_map": None if itself and provenance.get("class_map") is None else groups}
