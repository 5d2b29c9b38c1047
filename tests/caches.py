"""Small stores for tests, from a teacher that is a pure function of the image's id and needs no torch."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mgd_pipeline.caches.build import build_cache
from mgd_pipeline.caches.encoding import TARGETS_VERSION, TeacherTargets, encode_logits
from mgd_pipeline.caches.format import COMMIT, ImageKey, Layout, array_metadata, group_metadata, sealed
from mgd_pipeline.caches.reader import TargetCache, open_cache
from mgd_pipeline.caches.shards import BuildImage, Compute, Skipped

PROVENANCE: dict[str, Any] = {
    "targets_version": TARGETS_VERSION,
    "teacher": {"encoder": "resnet18", "weights_sha256": "ab", "trained_on": None},
    "classes": ["a", "b"],
}
LAYOUT = Layout(5, 6, 64, 96, 4, 16, "uint8", 4)
MADE_BY = {"device": "cpu", "batch_size": 3, "threads": 1}


def image(i: int | str, content: str = "") -> BuildImage:
    """Images of two sizes; `content` stands for the bytes of the file."""
    landscape = zlib.crc32(f"{i}".encode()) % 3 > 0
    size, frame = ((60, 90), (64, 96)) if landscape else ((33, 64), (64, 64))
    return BuildImage(ImageKey(f"image {i}", f"sha{i}{content}"), size, frame)


def images(count: int) -> list[BuildImage]:
    return [image(i) for i in range(count)]


def targets_of(key: ImageKey, layout: Layout = LAYOUT, noise: float = 0.0) -> TeacherTargets:
    """What the teacher says of an image; `noise` is the relative error of another machine's arithmetic."""
    rng = np.random.default_rng(zlib.crc32(f"{key.image_id}{key.image_sha256}".encode()))
    _, size, frame = image(key.image_id.removeprefix("image "))
    cells = frame[0] // layout.stride, frame[1] // layout.stride
    regions = -(-size[0] // layout.region_stride), -(-size[1] // layout.region_stride)
    factor = np.float32(1 + noise)
    return TeacherTargets(
        (rng.normal(size=(layout.classes, *cells)) * 5).astype(np.float32) * factor,
        (rng.normal(size=(layout.features, *regions)).astype(np.float32) * factor).astype(np.float16),
        rng.normal(size=layout.classes).astype(np.float32) * factor,
    )


def compute_with(layout: Layout = LAYOUT, noise: float = 0.0, seen: list[ImageKey] | None = None) -> Compute:
    def compute(keys: Sequence[ImageKey]) -> Iterator[TeacherTargets | Skipped]:
        for key in keys:
            if seen is not None:
                seen.append(key)
            yield (
                Skipped(f"{key.image_id}.jpg: truncated")
                if key.image_id.startswith("image bad")
                else targets_of(key, layout, noise)
            )

    return compute


def build(
    folder: Path,
    wanted: Sequence[BuildImage],
    *,
    layout: Layout = LAYOUT,
    provenance: dict[str, Any] = PROVENANCE,
    compute: Compute | None = None,
    retry_skipped: bool = True,
) -> Path:
    """A finished store at folder/t.zarr, built in folder/work."""
    build_cache(
        folder / "work",
        folder / "t.zarr",
        provenance,
        layout,
        wanted,
        compute or compute_with(layout),
        MADE_BY,
        retry_skipped=retry_skipped,
    )
    return folder / "t.zarr"


def require_right(cache: TargetCache, key: ImageKey, noises: Sequence[float] = (0.0,)) -> None:
    """Every array of an image's row is exactly what one teacher makes of that image, and of no other."""
    row = cache.row(key)
    (logits, affine, embeddings, extents) = (values[0] for values in cache.read([row]))
    descriptor = cache.record("global_descriptors", row)
    _, size, frame = image(key.image_id.removeprefix("image "))
    assert tuple(extents) == (*size, *frame)
    for noise in noises:
        expected = targets_of(key, cache.layout, noise)
        encoded = encode_logits(expected.logits, cache.layout.encoding)  # type: ignore[arg-type]
        _, h, w = encoded.values.shape
        _, r, c = expected.region_embeddings.shape
        if (
            np.array_equal(logits[:, :h, :w], encoded.values)
            and tuple(affine) == (np.float32(encoded.offset), np.float32(encoded.scale))
            and np.array_equal(embeddings[:, :r, :c], expected.region_embeddings)
            and np.array_equal(descriptor, expected.global_descriptor)
        ):
            assert not logits[:, h:].any() and not logits[:, :, w:].any()
            return
    raise AssertionError(f"{key}: row {row} is not what one teacher says of this image")


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def as_format_2(store: Path) -> Path:
    """A store as 0.1.0 wrote it, from one of today."""
    cache = open_cache(store)
    rows = int(cache.index.rows[-1]) + 1
    control = {"zarr.json": group_metadata(cache.provenance, cache.layout, 2)}
    control |= {f"{name}/zarr.json": array_metadata(cache.layout, name, rows, 2) for name in cache.layout.records}
    commit = {**cache.commit, "format": 2}
    for name, data in control.items():
        commit["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for name, data in {**control, COMMIT: sealed(commit)}.items():
        (store / name).unlink()
        (store / name).write_bytes(data)
    return store
