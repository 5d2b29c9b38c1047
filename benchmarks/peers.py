"""Other formats that keep the same arrays, and other readers of a teacher cache, for `reader.py` to compare with."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mgd_pipeline.caches.format import ARRAYS, Layout, array_metadata
from turns import Read

Record = Mapping[str, np.ndarray]
"""All arrays of an image."""


class Peer(NamedTuple):
    """Another way to keep the same arrays. `write` gets them whole, in memory and encoded, which spares it what ours pays for."""

    write: Callable[[Path, dict[str, np.ndarray]], object]
    open: Callable[[Path, Layout], Read]


def by_row(row_of: Callable[[str, int], np.ndarray]) -> Read:
    """A reader that copies one row after the other."""

    def read(name: str, rows: list[int], into: np.ndarray) -> None:
        for i, row in enumerate(rows):
            into[i] = row_of(name, row)

    return read


def from_bytes(layout: Layout, bytes_of: Callable[[str, int], Any]) -> Read:
    """A reader of rows that are kept as bytes."""

    def row_of(name: str, row: int) -> np.ndarray:
        shape, dtype = layout.records[name]
        return np.frombuffer(bytes_of(name, row), dtype).reshape(shape)

    return by_row(row_of)


def write_numpy(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)


def open_numpy(folder: Path, layout: Layout) -> Read:
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    return lambda name, rows, into: np.take(arrays[name], rows, axis=0, out=into)


def write_lmdb(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    import lmdb  # pyright: ignore[reportMissingImports]: an extra

    with lmdb.open(str(folder / "lmdb"), map_size=2**36, sync=False) as database, database.begin(write=True) as transaction:
        for name, values in arrays.items():
            for row, value in enumerate(values):
                transaction.put(f"{name}{row:09d}".encode(), value.tobytes())


def open_lmdb(folder: Path, layout: Layout) -> Read:
    import lmdb  # pyright: ignore[reportMissingImports]: an extra

    transaction = lmdb.open(str(folder / "lmdb"), map_size=2**36, readonly=True, lock=False).begin(buffers=True)
    return from_bytes(layout, lambda name, row: transaction.get(f"{name}{row:09d}".encode(), b""))


def write_arrow(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    import pyarrow as pa

    for name, values in arrays.items():
        size = values[0].nbytes
        column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), len(values), [None, pa.py_buffer(values)])
        table = pa.table({name: column})
        with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=256)


def open_arrow(folder: Path, layout: Layout) -> Read:
    import pyarrow as pa

    columns = {name: pa.ipc.open_file(pa.memory_map(str(folder / f"{name}.arrow"))).read_all()[name] for name in ARRAYS}
    return from_bytes(layout, lambda name, row: columns[name][row].as_buffer())


def write_hdf5(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    import h5py  # pyright: ignore[reportMissingImports]: an extra

    with h5py.File(folder / "arrays.h5", "w") as file:
        for name, values in arrays.items():
            file.create_dataset(name, data=values)


def open_hdf5(folder: Path, layout: Layout) -> Read:
    import h5py  # pyright: ignore[reportMissingImports]: an extra

    file: Any = h5py.File(folder / "arrays.h5")
    datasets = {name: file[name] for name in ARRAYS}

    def read(name: str, rows: list[int], into: np.ndarray) -> None:
        for i, row in enumerate(rows):
            datasets[name].read_direct(into, np.s_[row], np.s_[i])

    return read


def write_torch(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    import torch

    for name, values in arrays.items():
        for row, value in enumerate(values):
            torch.save(torch.from_numpy(value), folder / f"{name}{row}.pt")


def open_torch(folder: Path, layout: Layout) -> Read:
    import torch

    return by_row(lambda name, row: torch.load(folder / f"{name}{row}.pt").numpy())


PEERS = {
    "NumPy, memory-mapped .npy": Peer(write_numpy, open_numpy),
    "LMDB": Peer(write_lmdb, open_lmdb),
    "Arrow IPC, memory-mapped": Peer(write_arrow, open_arrow),
    "HDF5 (h5py)": Peer(write_hdf5, open_hdf5),
    "torch.save, a file for each": Peer(write_torch, open_torch),
}


class Format(NamedTuple):
    """A format of training data, which keeps all arrays of an image together."""

    write: Callable[[Path, dict[str, np.ndarray], int], object]
    """Writes the arrays into an empty folder; so many images may share a file."""
    open: Callable[[Path], tuple[Callable[[], Iterator[Record]], Callable[[int], Record]]]
    """What reads all records in order, and what reads a record by its number."""


def write_tar(folder: Path, arrays: dict[str, np.ndarray], per_file: int) -> None:
    """Files of safetensors in tar files, as in data sets for webdataset; Theia keeps its teachers' features so."""
    from safetensors.numpy import save

    count = len(next(iter(arrays.values())))
    for start in range(0, count, per_file):
        with tarfile.open(folder / f"{start:09d}.tar", "w") as file:
            for row in range(start, min(start + per_file, count)):
                member, data = tarfile.TarInfo(f"{row:09d}.safetensors"), save({name: a[row] for name, a in arrays.items()})
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))


def open_tar(folder: Path) -> tuple[Callable[[], Iterator[Record]], Callable[[int], Record]]:
    from safetensors.numpy import load

    paths, places = sorted(folder.glob("*.tar")), []
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        with tarfile.open(path) as file:
            places += [(descriptor, member.size, member.offset_data) for member in file]

    def in_order() -> Iterator[Record]:
        for path in paths:
            with tarfile.open(path, "r|") as file:
                for member in file:
                    data = file.extractfile(member)
                    assert data is not None
                    yield load(data.read())

    return in_order, lambda row: load(os.pread(*places[row]))


def write_litdata(folder: Path, arrays: dict[str, np.ndarray], per_file: int) -> None:
    from litdata.streaming.writer import BinaryWriter  # pyright: ignore[reportMissingImports]: an extra

    writer = BinaryWriter(str(folder), chunk_size=per_file)
    for row in range(len(next(iter(arrays.values())))):
        writer[row] = {name: values[row] for name, values in arrays.items()}
    writer.done()
    writer.merge()


def open_litdata(folder: Path) -> tuple[Callable[[], Iterator[Record]], Callable[[int], Record]]:
    from litdata import StreamingDataset  # pyright: ignore[reportMissingImports]: an extra

    dataset = StreamingDataset(str(folder))
    return lambda: iter(StreamingDataset(str(folder))), dataset.__getitem__


FORMATS = {
    "litdata, StreamingDataset": Format(write_litdata, open_litdata),
    "safetensors in tar": Format(write_tar, open_tar),
}


def open_zarr(path: Path) -> Read:
    """zarr-python's own indexing of our cache, a row at a time. Its `oindex` for lists of rows is even slower."""
    import zarr

    arrays: dict[str, Any] = {name: zarr.open_array(path / name, mode="r") for name in ARRAYS}
    return by_row(lambda name, row: arrays[name][row])


def open_tensorstore(path: Path, *, side_by_side: bool) -> Read:
    """tensorstore without its own cache, on our cache: a batch's reads one after the other, or all begun before the first ends."""
    arrays = {name: _tensorstore(path / name, write=False) for name in ARRAYS}

    def read(name: str, rows: list[int], into: np.ndarray) -> None:
        futures = (arrays[name][row].read() for row in rows)
        for i, future in enumerate(list(futures) if side_by_side else futures):
            into[i] = future.result()

    return read


def write_zarr(folder: Path, arrays: dict[str, np.ndarray], layout: Layout) -> None:
    """zarr-python at its best: whole shards, each written once, of exactly our arrays."""
    import zarr

    def opened(path: Path) -> Callable[[slice, np.ndarray], object]:
        return zarr.open_array(path, mode="r+").with_config({"write_empty_chunks": True}).__setitem__

    _write_shards(folder, arrays, layout, opened)


def write_tensorstore(folder: Path, arrays: dict[str, np.ndarray], layout: Layout) -> None:
    def opened(path: Path) -> Callable[[slice, np.ndarray], object]:
        array = _tensorstore(path, write=True)
        return lambda rows, values: array[rows].write(values).result()

    _write_shards(folder, arrays, layout, opened)


def _write_shards(
    folder: Path, arrays: dict[str, np.ndarray], layout: Layout, opened: Callable[[Path], Callable[[slice, np.ndarray], object]]
) -> None:
    for name, values in arrays.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "zarr.json").write_bytes(array_metadata(layout, name, len(values)))
        write = opened(folder / name)
        for start in range(0, len(values), layout.rows_per_shard):
            rows = slice(start, min(start + layout.rows_per_shard, len(values)))
            write(rows, values[rows])


def _tensorstore(path: Path, *, write: bool) -> Any:
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open(spec, read=not write, write=write).result()
