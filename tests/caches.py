"""Small teacher caches for tests, from a teacher that is a pure function of the image's id."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mgd_pipeline.caches.build import build_shards, plan_cache, publish
from mgd_pipeline.caches.encoding import TARGETS_VERSION, EncodedLogits, TeacherTargets, encode_logits
from mgd_pipeline.caches.format import COMMIT, Layout, array_metadata, group_metadata, sealed, shard_path
from mgd_pipeline.caches.reader import TargetCache, open_cache
from mgd_pipeline.caches.shard_reader import ShardReader
from mgd_pipeline.caches.shards import BuildImage, Compute, Skipped
from mgd_pipeline.data.manifest import ImageKey
from mgd_pipeline.params import TargetsParams

PROVENANCE: dict[str, Any] = {
    "targets_version": TARGETS_VERSION,
    "teacher": {"encoder": "resnet18", "weights_sha256": "ab", "trained_on": None},
    "classes": ["a", "b"],
}
LAYOUT = Layout(5, 6, 64, 96, 4, 16, "uint8", 4)
SMALL = replace(LAYOUT, region_encoding="uint8", compression="zstd")
ENCODED = TargetsParams(logits="log-probability", region_embeddings="uint8", compression="zstd")
"""How the targets of a cache with the layout SMALL are encoded."""
MADE_BY = {"device": "cpu", "batch_size": 3, "threads": 1}


USED = LAYOUT
"""The layout of caches for which a test names none. The fixture `layout` takes one after the other."""


def image(i: int | str, content: str = "") -> BuildImage:
    """Images of two sizes; `content` stands for the bytes of the file."""
    landscape = zlib.crc32(f"{i}".encode()) % 3 > 0
    size, frame = ((60, 90), (64, 96)) if landscape else ((33, 64), (64, 64))
    return BuildImage(ImageKey(f"image {i}", f"sha{i}{content}"), size, frame)


def images(count: int) -> list[BuildImage]:
    return [image(i) for i in range(count)]


def targets_of(key: ImageKey, layout: Layout | None = None, noise: float = 0.0) -> TeacherTargets:
    """What the teacher says of an image; `noise` is the relative error of another machine's arithmetic."""
    rng = np.random.default_rng(zlib.crc32(f"{key.image_id}{key.image_sha256}".encode()))
    _, size, frame = image(key.image_id.removeprefix("image "))
    layout = layout or USED
    cells = frame[0] // layout.stride, frame[1] // layout.stride
    regions = -(-size[0] // layout.region_stride), -(-size[1] // layout.region_stride)
    factor = np.float32(1 + noise)
    return TeacherTargets(
        (rng.normal(size=(layout.classes, *cells)) * 5).astype(np.float32) * factor,
        (rng.normal(size=(layout.features, *regions)).astype(np.float32) * factor).astype(np.float16),
        rng.normal(size=layout.classes).astype(np.float32) * factor,
    )


def encoded_of(key: ImageKey, layout: Layout | None = None, noise: float = 0.0) -> TeacherTargets:
    """What the writer of a cache gets of `targets_of`."""
    targets = targets_of(key, layout, noise)
    if (layout or USED).region_encoding == "float16":
        return targets
    import torch  # here alone: `make test-newest` has none

    from mgd_pipeline.caches.levels import as_targets

    logits, embeddings, descriptor = (torch.from_numpy(values)[None].float() for values in targets[:3])
    return as_targets(logits, embeddings, descriptor, ENCODED)[0]


def compute_with(layout: Layout | None = None, noise: float = 0.0, seen: list[ImageKey] | None = None) -> Compute:
    """Images whose id begins with "image bad" are skipped; `seen` gets the keys that were asked for."""

    def compute(keys: Sequence[ImageKey]) -> Iterator[TeacherTargets | Skipped]:
        for key in keys:
            if seen is not None:
                seen.append(key)
            bad = key.image_id.startswith("image bad")
            yield Skipped(f"{key.image_id}.jpg: truncated") if bad else encoded_of(key, layout, noise)

    return compute


def build(
    folder: Path,
    wanted: Sequence[BuildImage],
    *,
    layout: Layout | None = None,
    provenance: dict[str, Any] = PROVENANCE,
    compute: Compute | None = None,
    retry_skipped: bool = True,
    work: str = "work",
) -> Path:
    """A finished cache at folder/t.zarr, built in folder/work."""
    path = folder / "t.zarr"
    if (plan := plan_cache(folder / work, path, provenance, layout or USED, wanted, retry_skipped=retry_skipped)) is not None:
        build_shards(plan, plan.todo, compute or compute_with(layout), MADE_BY)
        publish(plan)
    return path


def computed(folder: Path, wanted: Sequence[BuildImage], *, retry_skipped: bool = True) -> list[ImageKey]:
    """Builds as `build` does, and says for which images the teacher was asked."""
    seen: list[ImageKey] = []
    build(folder, wanted, compute=compute_with(seen=seen), retry_skipped=retry_skipped)
    return seen


def require_right(cache: TargetCache, key: ImageKey, noises: Sequence[float] = (0.0,)) -> None:
    """Every array of an image's row is exactly what one teacher makes of that image, and of no other."""
    row = cache.row(key)
    (logits, affine, embeddings, extents, affines) = (values[0] for values in cache.read([row]))
    descriptor = cache.record("global_descriptors", row)
    _, size, frame = image(key.image_id.removeprefix("image "))
    assert tuple(extents) == (*size, *frame)
    for noise in noises:
        expected = encoded_of(key, cache.layout, noise)
        if expected.logits_affine is None:
            encoded = encode_logits(expected.logits, cache.layout.encoding)  # type: ignore[arg-type]
        else:
            encoded = EncodedLogits(expected.logits, *expected.logits_affine)
        _, h, w = encoded.values.shape
        _, r, c = expected.region_embeddings.shape
        if (
            np.array_equal(logits[:, :h, :w], encoded.values)
            and tuple(affine) == (np.float32(encoded.offset), np.float32(encoded.scale))
            and np.array_equal(embeddings[:, :r, :c], expected.region_embeddings)
            and np.array_equal(affines, np.empty((0, 2)) if expected.region_affine is None else expected.region_affine)
            and np.array_equal(descriptor, expected.global_descriptor)
        ):
            assert not logits[:, h:].any() and not logits[:, :, w:].any()
            return
    raise AssertionError(f"{key}: row {row} is not what one teacher says of this image")


def require_all_right(path: Path, wanted: Sequence[BuildImage], noises: Sequence[float] = (0.0,)) -> TargetCache:
    """As `require_right`, for all these images; returns the cache."""
    cache = open_cache(path)
    for one in wanted:
        require_right(cache, one.key, noises)
    return cache


def place_of(path: Path, name: str, row: int) -> tuple[Path, int, int]:
    """A record's file, its offset there, and its size with its checksum."""
    layout = open_cache(path).layout
    number, slot = divmod(row, layout.rows_per_shard)
    file = shard_path(path, layout, name, number)
    shard = ShardReader(file, layout.rows_per_shard, layout.stored_sizes(name), None)
    return file, shard.offsets[slot], shard.sizes[slot]


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def spoil(file: Path, place: int = -1) -> None:
    """Flips one bit of a file."""
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)


def link_into_dvc(path: Path, objects: Path) -> None:
    """Replaces all files of a cache by links to files named as DVC names them."""
    for number, file in enumerate(sorted(file for file in path.rglob("*") if file.is_file())):
        place = objects / f"cache/files/md5/{number:02x}/{number:030x}"
        place.parent.mkdir(parents=True)
        file.rename(place)
        file.symlink_to(place)


def as_format_2(path: Path) -> Path:
    """A cache of today, changed into what 0.1.0 wrote."""
    cache = open_cache(path)
    rows = int(cache.index.rows[-1]) + 1
    control = {"zarr.json": group_metadata(cache.provenance, cache.layout, 2)}
    control |= {f"{name}/zarr.json": array_metadata(cache.layout, name, rows, 2) for name in cache.layout.records}
    commit = {**cache.commit, "format": 2}
    for name, data in control.items():
        commit["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for name, data in {**control, COMMIT: sealed(commit)}.items():
        (path / name).unlink()
        (path / name).write_bytes(data)
    return path
