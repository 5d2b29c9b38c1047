"""The index of a teacher cache, images.parquet: which image each row belongs to, and the checksums of its records."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mgd_pipeline.caches.commit import REBUILD, read_control
from mgd_pipeline.caches.format import index_schema
from mgd_pipeline.caches.remote import Place
from mgd_pipeline.data.manifest import ImageKey
from mgd_pipeline.errors import CacheError
from mgd_pipeline.tables import open_parquet, read_parquet

_REMEMBERED = 2**16
"""Images whose positions `Index.find` remembers, in up to 12 MB."""


class Index:
    """The rows of a cache: the image of each row, the checksums of its records, or why it has no targets.

    A cache has up to 17 million rows, and every process that reads it has an index. So the index keeps arrays, 150 bytes a row.
    Lists and dictionaries take five times as much. They are made only for tools and errors that ask for them.
    """

    def __init__(self, table: pa.Table) -> None:
        self.rows: np.ndarray = table["row"].to_numpy()
        """(N,) int64, ascending"""
        self._ids, self._sha256s, self._problems = (table[n].combine_chunks() for n in ("image_id", "image_sha256", "problem"))
        self.has_targets: np.ndarray = pc.call_function("equal", [self._problems, pa.scalar("")]).to_numpy(zero_copy_only=False)
        """(N,) bool; a row without targets has a problem."""
        self.checksums: dict[str, np.ndarray] = {
            column.removesuffix("_crc32c"): table[column].to_numpy() for column in table.column_names if column.endswith("_crc32c")
        }
        """(N,) uint32 for each array"""
        self._remembered: dict[ImageKey, int] = {}
        """Positions of images that were asked for: training on a small set asks for the same images again and again."""

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, position: int) -> ImageKey:
        """The image of a row, by its position in this index."""
        return ImageKey(self._ids[position].as_py(), self._sha256s[position].as_py())

    def find(self, key: ImageKey) -> int | None:
        """Position of the last row of an image that has targets; None if there is none."""
        if (known := self._remembered.get(key)) is not None:
            return known
        for position in reversed(self.positions(key.image_id)):
            if self.has_targets[position] and self.key(position) == key:
                if len(self._remembered) < _REMEMBERED:
                    self._remembered[key] = position
                return position
        return None

    def positions(self, image_id: str) -> list[int]:
        """Positions of all rows of an id, with targets or without, ascending."""
        hashes, positions = self._by_hash
        wanted, place, of_id = hash(image_id), bisect_left(hashes, hash(image_id)), []
        while place < len(hashes) and hashes[place] == wanted:
            if self._ids[positions[place]].as_py() == image_id:
                of_id.append(positions[place])
            place += 1
        return of_id

    @cached_property
    def _by_hash(self) -> tuple[memoryview, memoryview]:
        """Hashes of all rows' ids, ascending, and the rows' positions in this index: (N,) int64 each.

        Both are memoryviews, because NumPy takes a microsecond for each element that it gives to Python.
        """
        hashes = np.fromiter((hash(image_id) for image_id, _ in self._iterate()), np.int64, len(self))
        positions = np.argsort(hashes, kind="stable")
        return hashes[positions].data, positions.data

    def _iterate(self) -> Iterator[tuple[str, str]]:
        for start in range(0, len(self), 2**16):
            yield from zip(*(column.slice(start, 2**16).to_pylist() for column in (self._ids, self._sha256s)), strict=True)

    @cached_property
    def keys(self) -> list[ImageKey]:
        """The image of each row."""
        return [ImageKey(*key) for key in self._iterate()]

    @cached_property
    def problems(self) -> list[str]:
        """Why each row has no targets; empty if it has."""
        return self._problems.to_pylist()

    @cached_property
    def place(self) -> dict[ImageKey, int]:
        """Position in this index of each image that has targets; of several rows for one image the last."""
        return {key: i for i, (key, there) in enumerate(zip(self.keys, self.has_targets.tolist(), strict=True)) if there}

    @cached_property
    def by_id(self) -> dict[str, int]:
        """Position of the last row of each id, with targets or without."""
        return {key.image_id: i for i, key in enumerate(self.keys)}

    def stored(self, rows_per_shard: int) -> np.ndarray:
        """How many records each shard holds: (shards,) int64."""
        shards = self.rows // rows_per_shard
        return np.bincount(shards[self.has_targets], minlength=int(shards.max(initial=-1)) + 1)


def read_index(path: Path, arrays: Sequence[str]) -> tuple[Index, int]:
    """images.parquet of a cache with these `Layout.arrays`, and the generation that it notes. Raises CacheError for a file that
    mgd-pipeline did not write."""
    return parse_index(path, read_control(path), arrays)


def parse_index(path: Place, data: bytes, arrays: Sequence[str]) -> tuple[Index, int]:
    """As `read_index`, from the file's content. Only plain, uncompressed columns are decoded: they cannot grow in memory."""
    try:
        file = open_parquet(data)
        meta = file.metadata
        columns = [meta.row_group(g).column(c) for g in range(meta.num_row_groups) for c in range(meta.num_columns)]
        plain = all(column.compression == "UNCOMPRESSED" and set(column.encodings) <= {"PLAIN", "RLE"} for column in columns)
        if not plain or not file.schema_arrow.equals(index_schema(arrays), check_metadata=False):
            raise CacheError(f"{path}: is not the index of a teacher cache; {REBUILD}")
        if sum(column.total_compressed_size for column in columns) > len(data):
            raise CacheError(f"{path}: claims more than it holds; {REBUILD}")
        table = read_parquet(file)
        table.validate(full=True)
        generation = int((file.schema_arrow.metadata or {})[b"generation"])
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise CacheError(f"{path}: not a readable index ({' '.join(str(error).split())[:100]}); {REBUILD}") from None
    rows = table["row"].to_numpy()
    if len(rows) and (rows[0] < 0 or (np.diff(rows) <= 0).any() or rows[-1] >= 2**40):
        raise CacheError(f"{path}: rows are not in ascending order; {REBUILD}")
    return Index(table), generation
