"""Images that a search never sees: the test split, or half of val where there is no test split."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from mgd_pipeline.data.manifest import ImageRow, Manifest
from mgd_pipeline.errors import DataError, ParamsError
from mgd_pipeline.words import counted

FEWEST = 10
"""Images of each half below which a comparison says little."""


def search_manifest(manifest: Manifest, small_val: bool) -> tuple[Manifest, list[str]]:
    """The manifest of all trials, whose paths are absolute, and the ids that moved from val to test, sorted.

    The search measures on val and never on test. Where no image of test has a mask, half of val becomes test: the images whose ids
    have the smaller SHA-256, so that the halves are the same on every machine. Raises DataError without val, ParamsError if a
    half would have fewer than `FEWEST` images, unless `small_val`.
    """
    val, test = (_measured(manifest, split) for split in ("val", "test"))
    if not val:
        raise DataError("search: val has no images with a mask, on which trials could be compared; add some")
    masks = None if manifest.masks is None else _absolute(manifest, manifest.masks)
    apart = replace(manifest, base=manifest.base, root=_absolute(manifest, manifest.root), masks=masks)
    if test:
        return apart, []
    by_hash = sorted(val, key=lambda row: hashlib.sha256(row.image_id.encode()).digest())
    held_back = {row.image_id for row in by_hash[: len(by_hash) // 2]}
    kept = len(val) - len(held_back)
    if not held_back or (len(held_back) < FEWEST and not small_val):
        remedy = "" if not held_back else f", or say --small-val to go on with fewer than {FEWEST} in a half"
        raise ParamsError(
            f"search: there is no test split, so val's {counted(len(val), 'image')} would be halved: {kept} for the search, "
            f"{len(held_back)} for the final comparison, which is too few; add a test split or images to val{remedy}"
        )
    rows = {name: replace(row, split="test") if name in held_back else row for name, row in manifest.rows.items()}
    return replace(apart, rows=rows), sorted(held_back)


def _measured(manifest: Manifest, split: str) -> list[ImageRow]:
    return [row for row in manifest.split(split) if row.mask_path is not None]


def _absolute(manifest: Manifest, folder: Path) -> Path:
    return (manifest.base / folder).absolute()
