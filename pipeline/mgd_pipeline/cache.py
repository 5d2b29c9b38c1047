"""The target cache: a Zarr v3 group for each teacher, one row an image. Written shard by shard, published whole.

    <teacher>.zarr/
      zarr.json              group; attributes["mgd"]: provenance, fingerprint, geometry
      logits/                (N, K, h, w) uint8 or float16
      logits_affine/         (N, 2) float32: offset and scale
      region_embeddings/     (N, D, r, c) float16
      global_descriptors/    (N, K) float32
      extents/               (N, 4) int32: image height and width, height and width of the padded network input; pixels
      images.parquet         row, image_id, image_sha256, and the CRC32C of the row in each array
      commit.json            written last: size and SHA-256 of every file above

Arrays are sharded; an inner chunk is one image, followed by its CRC32C, and all arrays have the same images per shard.
Cells of smaller images lie at the top left. Plain `zarr.open` reads everything; the reader here only saves Zarr's fixed
cost of about a millisecond a record by keeping shard indexes, and checks every record. It imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mgd_pipeline.errors import CacheError, CacheIncomplete, NonFiniteError, ProvenanceMismatch, StaleTarget
from mgd_pipeline.targets import TARGETS_VERSION, TeacherTargets, encode_embeddings, encode_logits, require_finite

COMMIT = "commit.json"
INDEX = "images.parquet"
SHARD_BYTES = 64 * 2**20
"""A shard of the largest array holds about this much: few files for DVC, small units of work for builders."""
_MISSING = 2**64 - 1


class ImageKey(NamedTuple):
    """What a row belongs to: the image's id and the SHA-256 of its file."""

    image_id: str
    image_sha256: str


class CachedTargets(NamedTuple):
    """A batch of rows as stored, on their canvas."""

    logits: np.ndarray
    """(B, K, h, w) uint8 or float16"""
    affine: np.ndarray
    """(B, 2) float32: offset, scale"""
    region_embeddings: np.ndarray
    """(B, D, r, c) float16"""
    extents: np.ndarray
    """(B, 4) int32: image height, width, frame height, width"""


@dataclass(frozen=True)
class Layout:
    """Shapes of a store; `height` and `width` are those of the largest padded network input, pixels."""

    rows: int
    classes: int
    features: int
    height: int
    width: int
    stride: int
    region_stride: int
    encoding: str
    rows_per_shard: int

    def record_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape of one row and dtype, for each array."""
        cells = (self.height // self.stride, self.width // self.stride)
        regions = (-(-self.height // self.region_stride), -(-self.width // self.region_stride))
        return {
            "logits": ((self.classes, *cells), self.encoding),
            "logits_affine": ((2,), "float32"),
            "region_embeddings": ((self.features, *regions), "float16"),
            "global_descriptors": ((self.classes,), "float32"),
            "extents": ((4,), "int32"),
        }

    @property
    def record_bytes(self) -> int:
        return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in self.record_shapes().values())

    def shards(self) -> list[range]:
        return [range(start, min(start + self.rows_per_shard, self.rows)) for start in range(0, self.rows, self.rows_per_shard)]


def plan_layout(
    rows: int,
    classes: int,
    features: int,
    height: int,
    width: int,
    stride: int,
    region_stride: int,
    encoding: str,
    shard_bytes: int = SHARD_BYTES,
) -> Layout:
    """The layout of a store: rows per shard is the largest power of two whose shard of the largest array fits `shard_bytes`."""
    layout = Layout(rows, classes, features, height, width, stride, region_stride, encoding, rows_per_shard=1)
    largest = max(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in layout.record_shapes().values())
    count = 1
    while count * 2 * largest <= shard_bytes and count < rows:
        count *= 2
    return replace(layout, rows_per_shard=count)


def fingerprint(provenance: dict[str, Any]) -> str:
    """Identity of a store: hash of its canonical provenance."""
    return hashlib.sha256(_canonical(provenance)).hexdigest()[:32]


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


# --- building ---------------------------------------------------------------------------------------------------------


def begin_store(work: Path, provenance: dict[str, Any], layout: Layout) -> Path:
    """Creates, or finds again after a kill, the unfinished store in a work folder that no other store shares."""
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

    store = work / "store.zarr"
    if (store / "zarr.json").exists() and (work / "begun").exists():
        return store
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    geometry = {"logits_stride": layout.stride, "logits_align_corners": True, "region_stride": layout.region_stride}
    group = zarr.create_group(
        store,
        zarr_format=3,
        attributes={"mgd": {"provenance": provenance, "fingerprint": fingerprint(provenance), "geometry": geometry}},
    )
    for name, (shape, dtype) in layout.record_shapes().items():
        # The sharding codec is spelled out because the index must stand at the end: at the start, truncation reads as zeros.
        sharding = ShardingCodec(
            chunk_shape=(1, *shape),
            codecs=[BytesCodec(), Crc32cCodec()],
            index_codecs=[BytesCodec(), Crc32cCodec()],
            index_location="end",
        )
        group.create_array(
            name,
            shape=(layout.rows, *shape),
            chunks=(layout.rows_per_shard, *shape),
            dtype=dtype,
            serializer=sharding,
            filters=None,
            compressors=None,
            config={"write_empty_chunks": True},
            dimension_names=("image", *("channel", "row", "column")[: len(shape)]),
        )
    _write_synced(work / "begun", b"")
    return store


def shard_done(work: Path, shard: int) -> bool:
    """Whether a shard of an unfinished store has its receipt, and the files still have the size that it states."""
    try:
        receipt = json.loads((work / f"receipt-{shard:05d}.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return all((work / name).is_file() and (work / name).stat().st_size == size for name, size in receipt.items())


def write_shard(
    work: Path,
    layout: Layout,
    shard: int,
    images: Sequence[ImageKey],
    targets: Sequence[TeacherTargets],
    extents: np.ndarray,
) -> None:
    """Writes one whole shard, all arrays, and its receipt; images and targets in row order, `extents` (rows, 4) int32.

    Raises NonFiniteError naming the image where a teacher said NaN or infinity; nothing of the shard is recorded then.
    """
    import zarr

    rows = layout.shards()[shard]
    blocks = {name: np.zeros((len(rows), *shape), dtype=dtype) for name, (shape, dtype) in layout.record_shapes().items()}
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        try:
            encoded = encode_logits(target.logits, layout.encoding)  # pyright: ignore[reportArgumentType]
            embeddings = encode_embeddings(target.region_embeddings)
            require_finite(target.global_descriptor, "global descriptor")
        except NonFiniteError as error:
            raise NonFiniteError(f"image {image.image_id}: {error}") from None
        _, h, w = encoded.values.shape
        blocks["logits"][i, :, :h, :w] = encoded.values
        blocks["logits_affine"][i] = encoded.offset, encoded.scale
        blocks["region_embeddings"][i, :, : embeddings.shape[1], : embeddings.shape[2]] = embeddings
        blocks["global_descriptors"][i] = target.global_descriptor
    blocks["extents"][:] = extents
    group = zarr.open_group(work / "store.zarr", mode="r+", zarr_format=3)
    sizes = {}
    for name, block in blocks.items():
        array = group[name]
        assert isinstance(array, zarr.Array)
        # Array.__setitem__ reads the configuration of this handle, not that of its creation.
        array.with_config({"write_empty_chunks": True})[rows.start : rows.stop] = block
        path = _shard_path(work / "store.zarr", name, shard, block.ndim)
        _sync(path)
        sizes[str(path.relative_to(work))] = path.stat().st_size
    _write_synced(work / f"receipt-{shard:05d}.json", _canonical(sizes))


def publish_store(work: Path, layout: Layout, output: Path, images: Iterable[ImageKey]) -> None:
    """Writes the index and the commit, and renames the finished store to `output` (replacing a former one)."""
    store = work / "store.zarr"
    keys = list(images)
    # Each record's own checksum binds it to its row: a whole shard in another one's place would pass its own.
    checksums = {
        f"{name}_crc32c": pa.array([_stored_checksum(store, layout, name, row) for row in range(len(keys))], pa.uint32())
        for name in layout.record_shapes()
    }
    table = pa.table(
        {
            "row": pa.array(range(len(keys)), pa.int64()),
            "image_id": pa.array([key.image_id for key in keys], pa.string()),
            "image_sha256": pa.array([key.image_sha256 for key in keys], pa.string()),
            **checksums,
        }
    )
    pq.write_table(table, store / INDEX)
    _sync(store / INDEX)
    for leftover in store.rglob("*.partial"):
        leftover.unlink()
    files = {
        str(path.relative_to(store)): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name != COMMIT
    }
    body = {"format": 1, "rows": len(keys), "files": files}
    _write_synced(store / COMMIT, _canonical({**body, "self": hashlib.sha256(_canonical(body)).hexdigest()}))
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.exists():
        # The old store moves aside first: a rename cannot replace a folder that is not empty.
        aside = work / "replaced.zarr"
        os.rename(output, aside)
    os.rename(store, output)
    shutil.rmtree(work)


def _stored_checksum(store: Path, layout: Layout, name: str, row: int) -> int:
    shape, _ = layout.record_shapes()[name]
    shard, inner = divmod(row, layout.rows_per_shard)
    path = _shard_path(store, name, shard, len(shape) + 1)
    with open(path, "rb") as file:
        offset, size = (int(value) for value in read_shard_index(file.fileno(), layout.rows_per_shard, path)[inner])
        return struct.unpack("<I", os.pread(file.fileno(), 4, offset + size - 4))[0]


def _write_synced(path: Path, data: bytes) -> None:
    beside = path.with_name(path.name + f".{os.getpid()}.tmp")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shard_path(store: Path, name: str, shard: int, dimensions: int) -> Path:
    return store.joinpath(name, "c", str(shard), *["0"] * (dimensions - 1))


# --- reading ----------------------------------------------------------------------------------------------------------


class TargetCache:
    """A finished store, opened for reading. `open_cache` checks it first."""

    def __init__(self, path: Path, attributes: dict[str, Any], layout: Layout, index: pa.Table) -> None:
        self.path = path
        self.provenance: dict[str, Any] = attributes["provenance"]
        self.fingerprint: str = attributes["fingerprint"]
        self.geometry: dict[str, Any] = attributes["geometry"]
        self.layout = layout
        ids, hashes = index["image_id"].to_pylist(), index["image_sha256"].to_pylist()
        self._index = {image_id: (row, sha256) for row, (image_id, sha256) in enumerate(zip(ids, hashes, strict=True))}
        self._checksums = {name: index[f"{name}_crc32c"].to_numpy() for name in layout.record_shapes()}
        self._shards: dict[tuple[str, int], tuple[int, np.ndarray]] = {}

    @property
    def image_ids(self) -> list[str]:
        """In the order of the rows."""
        return list(self._index)

    def row(self, key: ImageKey) -> int:
        """The row of an image.

        Raises CacheIncomplete if the image has none, StaleTarget if its file has changed since the teacher saw it.
        """
        if key.image_id not in self._index:
            raise CacheIncomplete(
                f"{self.path}: has no targets for image {key.image_id!r}; run `mgd-pipeline precompute-teachers` again"
            )
        row, sha256 = self._index[key.image_id]
        if sha256 != key.image_sha256:
            raise StaleTarget(
                f"{self.path}: image {key.image_id!r} has changed since its targets were made (its SHA-256 was {sha256[:12]}..., "
                f"is {key.image_sha256[:12]}...); run `mgd-pipeline precompute-teachers` again"
            )
        return row

    def read(self, rows: Sequence[int]) -> CachedTargets:
        """Rows as one batch, in the order asked for; raises CacheError naming the record that is damaged or missing."""
        names = ("logits", "logits_affine", "region_embeddings", "extents")
        return CachedTargets(*(np.stack([self._record(name, row) for row in rows]) for name in names))

    def global_descriptor(self, row: int) -> np.ndarray:
        """(K,) float32: the teacher's mean logits over the whole image."""
        return self._record("global_descriptors", row)

    def _record(self, name: str, row: int) -> np.ndarray:
        shape, dtype = self.layout.record_shapes()[name]
        shard, inner = divmod(row, self.layout.rows_per_shard)
        descriptor, chunks = self._open_shard(name, shard, len(shape) + 1)
        offset, size = (int(v) for v in chunks[inner])
        expected = int(np.prod(shape)) * np.dtype(dtype).itemsize + 4
        if offset == _MISSING or size != expected:
            raise CacheError(f"{self.path}: {name} of row {row} is missing or has a wrong size; {_REBUILD}")
        data = os.pread(descriptor, size, offset)
        checksum = google_crc32c.value(data[:-4])
        if len(data) != size or checksum != struct.unpack("<I", data[-4:])[0]:
            raise CacheError(f"{self.path}: {name} of row {row} is damaged (checksum differs); {_REBUILD}")
        if checksum != self._checksums[name][row]:
            raise CacheError(f"{self.path}: {name} of row {row} belongs to another place; {_REBUILD}")
        return np.frombuffer(data, dtype=dtype, count=int(np.prod(shape))).reshape(shape)

    def _open_shard(self, name: str, shard: int, dimensions: int) -> tuple[int, np.ndarray]:
        if (name, shard) not in self._shards:
            path = _shard_path(self.path, name, shard, dimensions)
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise CacheError(f"{path}: shard cannot be opened: {error.strerror}; {_REBUILD}") from None
            try:
                self._shards[name, shard] = descriptor, read_shard_index(descriptor, self.layout.rows_per_shard, path)
            except CacheError:
                os.close(descriptor)
                raise
        return self._shards[name, shard]

    def close(self) -> None:
        for descriptor, _ in self._shards.values():
            os.close(descriptor)
        self._shards.clear()


def read_shard_index(descriptor: int, rows_per_shard: int, path: Path) -> np.ndarray:
    """(rows, 2) uint64: offset and size of each record of a shard, from the index at its end; CacheError if it is damaged."""
    length = rows_per_shard * 16 + 4
    data = os.pread(descriptor, length, max(0, os.fstat(descriptor).st_size - length))
    if len(data) != length or google_crc32c.value(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
        raise CacheError(f"{path}: the shard's index is damaged; {_REBUILD}")
    return np.frombuffer(data[:-4], "<u8").reshape(-1, 2)


_REBUILD = "restore the store (`dvc checkout --force`), or remove it and run `mgd-pipeline precompute-teachers`"


def open_cache(path: str | Path, expected: dict[str, Any] | None = None) -> TargetCache:
    """Opens a finished store after checking its commit, the sizes of its files, its metadata and its provenance.

    `expected` holds the provenance fields that the caller can vouch for; a differing field raises ProvenanceMismatch with
    both values. Raises CacheIncomplete where there is no finished store, CacheError where files are missing or changed.
    """
    path = Path(path)
    commit = _read_commit(path)
    for name, entry in commit["files"].items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry["size"]:
            found = "is missing" if size is None else f"has {size} bytes, not {entry['size']}"
            raise CacheError(f"{file}: {found}; {_REBUILD}")
        if not name.split("/")[1:2] == ["c"] and _sha256(file) != entry["sha256"]:
            raise CacheError(f"{file}: differs from what was committed; {_REBUILD}")
    attributes = json.loads((path / "zarr.json").read_text())["attributes"]["mgd"]
    provenance = attributes["provenance"]
    difference = provenance_difference(provenance, expected or {})
    if provenance.get("targets_version") != TARGETS_VERSION:
        difference.insert(0, f"targets_version: the store has {provenance.get('targets_version')}, this code {TARGETS_VERSION}")
    if difference:
        raise ProvenanceMismatch(
            f"{path}: was made from something else: {'; '.join(difference)}. Run `mgd-pipeline precompute-teachers` again, "
            "or go back to the parameters that made it"
        )
    index = pq.read_table(path / INDEX)
    arrays = {name: json.loads((path / name / "zarr.json").read_text()) for name in ("logits", "region_embeddings")}
    shapes = {name: array["shape"] for name, array in arrays.items()}
    stride = attributes["geometry"]["logits_stride"]
    layout = Layout(
        rows=len(index),
        classes=shapes["logits"][1],
        features=shapes["region_embeddings"][1],
        height=shapes["logits"][2] * stride,
        width=shapes["logits"][3] * stride,
        stride=stride,
        region_stride=attributes["geometry"]["region_stride"],
        encoding=arrays["logits"]["data_type"],
        rows_per_shard=arrays["logits"]["chunk_grid"]["configuration"]["chunk_shape"][0],
    )
    return TargetCache(path, attributes, layout, index)


def provenance_difference(found: dict[str, Any], expected: dict[str, Any], prefix: str = "") -> list[str]:
    """One text for each field of `expected` that `found` has otherwise, with both values."""
    lines: list[str] = []
    for key, value in expected.items():
        have = found.get(key)
        if isinstance(value, dict) and isinstance(have, dict):
            lines += provenance_difference(have, value, f"{prefix}{key}.")
        elif have != value:
            lines.append(f"{prefix}{key}: the store has {have!r}, the parameters say {value!r}")
    return lines


def _read_commit(path: Path) -> dict[str, Any]:
    try:
        commit = json.loads((path / COMMIT).read_text())
    except FileNotFoundError:
        state = "is not finished" if path.exists() else "does not exist"
        raise CacheIncomplete(f"{path}: {state}; run `mgd-pipeline precompute-teachers`") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise CacheError(f"{path / COMMIT}: damaged; {_REBUILD}") from None
    body = {key: value for key, value in commit.items() if key != "self"} if isinstance(commit, dict) else {}
    if not body or commit.get("self") != hashlib.sha256(_canonical(body)).hexdigest():
        raise CacheError(f"{path / COMMIT}: damaged; {_REBUILD}")
    return commit
