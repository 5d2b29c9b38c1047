"""The teacher cache: a Zarr v3 group for each teacher, one row an image. Its format, to the byte.

    <teacher>.zarr/
      zarr.json              group; attributes["mgd"]: format, provenance, fingerprint, layout
      logits/                (N, K, h, w) uint8 or float16
      logits_affine/         (N, 2) float32: offset and scale
      region_embeddings/     (N, D, r, c) float16 or uint8
      region_affine/         (N, D, 2) float32: offset and scale of each channel, only with uint8 embeddings
      global_descriptors/    (N, K) float32
      extents/               (N, 4) int32: image height and width, height and width of the padded network input; pixels
      images.parquet         row, image_id, image_sha256, problem, and the CRC32C of the row in each array
      commit.json            written last: size and SHA-256 of every file above, and how each shard was made

Arrays are sharded; an inner chunk is one image, compressed if the layout says so and followed by its CRC32C, and all arrays have
the same images per shard.
Cells of smaller images lie at the top left. Plain `zarr.open` reads everything. `caches.reader` reads caches, `caches.build`
makes them, docs/design/target-cache.md says how to write a reader in another language.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mgd_pipeline.access import access_error, says_nothing
from mgd_pipeline.data.manifest import ImageKey

FORMAT = 3
"""The format that is written."""
OLDEST_FORMAT = 2
"""The oldest format that is read. It differs only in the names of the arrays' axes."""
COMMIT = "commit.json"
INDEX = "images.parquet"
ARRAYS = ("logits", "logits_affine", "region_embeddings", "global_descriptors", "extents")
"""What every index has checksums of. Caches with uint8 embeddings have region_affine besides."""
AXES = {
    "logits": ("class_id", "logit_row", "logit_column"),
    "logits_affine": ("offset_scale",),
    "region_embeddings": ("feature", "region_row", "region_column"),
    "region_affine": ("feature", "offset_scale"),
    "global_descriptors": ("class_id",),
    "extents": ("extent",),
}
"""Names of a record's axes. Libraries such as xarray take all axes of one name in a group for one axis of one length."""
SHARD_BYTES = 64 * 2**20
"""A shard of the largest array holds about this much: few files for DVC, small units of work for builders."""
SHARD_ROWS = 256
"""A shard holds at most this many images, so that a small data set, too, has more than one unit of work."""
RECORD_BYTES = 2**30
"""The largest record that is read."""
MISSING = 2**64 - 1
"""Offset and size of a record that a shard does not have."""
ZSTD_LEVEL = 1
"""Higher levels make records 2 % smaller and take several times as long."""
_COMPRESSED = ("logits", "region_embeddings")
"""The other records have too few bytes to gain anything."""
_MIRRORED = "?mirrored"


def mirrored_key(key: ImageKey) -> ImageKey:
    """The key of an image's mirror image, for caches that have a row for it."""
    return ImageKey(key.image_id + _MIRRORED, key.image_sha256)


def count_images(keys: Iterable[ImageKey]) -> int:
    """How many images these keys are; a mirror image does not count."""
    return sum(not key.image_id.endswith(_MIRRORED) for key in keys)


def index_schema(arrays: Iterable[str]) -> pa.Schema:
    """Columns of images.parquet for a cache of these arrays, `Layout.arrays`."""
    return pa.schema(
        [
            pa.field("row", pa.int64(), nullable=False),
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("image_sha256", pa.string(), nullable=False),
            pa.field("problem", pa.string(), nullable=False),
            *(pa.field(f"{name}_crc32c", pa.uint32(), nullable=False) for name in arrays),
        ]
    )


@dataclass(frozen=True)
class Layout:
    """Shapes of a cache's records; `height` and `width` are those of the largest padded network input, pixels.

    With 0 `classes` a cache has neither logits nor descriptors, with 0 `features` no region embeddings. Fields with a default are
    written only where they differ from it: caches of before these fields existed keep their bytes.
    """

    classes: int
    features: int
    height: int
    width: int
    stride: int
    region_stride: int
    encoding: str
    """of the logits: uint8 or float16"""
    rows_per_shard: int
    region_encoding: str = "float16"
    """of the region embeddings: float16 or uint8"""
    compression: str = "none"
    """of logits and region embeddings: none or zstd"""

    @cached_property
    def _all_records(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        cells = (self.height // self.stride, self.width // self.stride)
        regions = (-(-self.height // self.region_stride), -(-self.width // self.region_stride))
        return {
            "logits": ((self.classes, *cells), np.dtype(self.encoding)),
            "logits_affine": ((2 if self.classes else 0,), np.dtype("float32")),
            "region_embeddings": ((self.features, *regions), np.dtype(self.region_encoding)),
            "region_affine": ((0 if self.region_encoding == "float16" else self.features, 2), np.dtype("float32")),
            "global_descriptors": ((self.classes,), np.dtype("float32")),
            "extents": ((4,), np.dtype("int32")),
        }

    @property
    def arrays(self) -> tuple[str, ...]:
        """The arrays that the index has checksums of, in its order. A teacher may lack some of them."""
        return tuple(name for name in self._all_records if name in ARRAYS or self.region_encoding != "float16")

    @cached_property
    def records(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of one row of each array that the cache has, in the order of `arrays`."""
        return {name: (shape, dtype) for name, (shape, dtype) in self._all_records.items() if 0 not in shape}

    def nothing(self, name: str, rows: int) -> np.ndarray:
        """(rows, ...) without values: rows of an array that the cache does not have."""
        shape, dtype = self._all_records[name]
        return np.empty((rows, *shape), dtype)

    def bytes_of(self, name: str) -> int:
        """Bytes of one row of an array, without compression and without its checksum."""
        shape, dtype = self.records[name]
        return math.prod(shape) * dtype.itemsize

    @property
    def record_bytes(self) -> int:
        """Bytes of one row of all arrays, with checksums and entries in the shards' indexes; before compression."""
        return sum(self.bytes_of(name) + 4 + 16 for name in self.records)

    def is_compressed(self, name: str) -> bool:
        return self.compression == "zstd" and name in _COMPRESSED

    def stored_sizes(self, name: str) -> range:
        """The sizes, in bytes, that a record of an array may have in a shard's file, with its checksum."""
        size = self.bytes_of(name)
        if not self.is_compressed(name):
            return range(size + 4, size + 5)
        # A frame of Zstandard has 10 bytes at least. For bytes that it cannot compress it has 3 more than for 128 KiB of them each.
        return range(10 + 4, size + size // 256 + 64 + 5)

    def shard_sizes(self, name: str, records: int) -> range:
        """The sizes, in bytes, that the file of a shard with this many records may have."""
        stored, index = self.stored_sizes(name), self.rows_per_shard * 16 + 4
        return range(records * stored[0] + index, records * stored[-1] + index + 1)


def plan_layout(
    classes: int,
    features: int,
    height: int,
    width: int,
    stride: int,
    region_stride: int,
    encoding: str,
    shard_bytes: int = SHARD_BYTES,
    **small: str,
) -> Layout:
    """The layout of a cache: rows per shard is the largest power of two whose shard of the largest array fits `shard_bytes`.

    `small` are the fields of a layout that have a default.
    """
    one = Layout(classes, features, height, width, stride, region_stride, encoding, 1, **small)
    largest = max(one.bytes_of(name) for name in one.records)
    rows = 1
    while rows * 2 * largest <= shard_bytes and rows < SHARD_ROWS:
        rows *= 2
    return replace(one, rows_per_shard=rows)


_ZSTD = {"name": "zstd", "configuration": {"checksum": False, "level": ZSTD_LEVEL}}


def canonical(value: object) -> bytes:
    """JSON with sorted keys, without spaces, in UTF-8: the same bytes for the same value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def fingerprint(provenance: dict[str, Any]) -> str:
    """Identity of a cache: the hash of its canonical provenance."""
    return hashlib.sha256(canonical(provenance)).hexdigest()[:32]


def sealed(body: dict[str, Any]) -> bytes:
    """A control file: canonical JSON that carries its own hash."""
    return canonical({**body, "self": hashlib.sha256(canonical(body)).hexdigest()})


def sha256_file(path: Path) -> str:
    """SHA-256 of a file. Raises OSError if there is no such file, AccessError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        if says_nothing(error):
            raise access_error(path, error) from None
        raise


def shard_name(layout: Layout, name: str, shard: int) -> str:
    """A shard's file, relative to the cache."""
    return "/".join([name, "c", str(shard), *["0"] * len(layout.records[name][0])])


def shard_path(cache: Path, layout: Layout, name: str, shard: int) -> Path:
    return cache / shard_name(layout, name, shard)


def group_metadata(provenance: dict[str, Any], layout: Layout, version: int = FORMAT) -> bytes:
    """The cache's own zarr.json, in a version of the format."""
    defaults = {field.name: field.default for field in fields(layout)}
    written = {name: value for name, value in asdict(layout).items() if value != defaults[name]}
    mgd = {"format": version, "provenance": provenance, "fingerprint": fingerprint(provenance), "layout": written}
    return canonical({"zarr_format": 3, "node_type": "group", "attributes": {"mgd": mgd}})


def array_metadata(layout: Layout, name: str, rows: int, version: int = FORMAT) -> bytes:
    """An array's zarr.json, in a version of the format.

    It is not written by zarr: so all versions of zarr make the same bytes, and the reader can demand exactly these bytes.
    """
    shape, dtype = layout.records[name]
    axes = AXES[name] if version > OLDEST_FORMAT else ("channel", "row", "column")[: len(shape)]
    little: dict[str, Any] = {"name": "bytes"} if dtype.itemsize == 1 else {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": [1, *shape],
        "codecs": [little, *([_ZSTD] if layout.is_compressed(name) else []), {"name": "crc32c"}],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        # With the index at the start, a shard that lost its end would read as zeros.
        "index_location": "end",
    }
    return canonical(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [rows, *shape],
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [layout.rows_per_shard, *shape]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            # Plain zarr shows this for a missing shard: NaN warns a program that reads without the commit.
            "fill_value": "NaN" if dtype.kind == "f" else 0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "dimension_names": ["image", *axes],
            "attributes": {},
        }
    )
