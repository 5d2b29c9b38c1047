"""Other formats that keep the same arrays, for `reader.py` to compare with: how each writes them whole, and reads rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mgd_pipeline.caches.format import ARRAYS, Layout

Read = Callable[[str, list[int], np.ndarray], object]
"""Reads rows of one array into a buffer of their shape."""


class Peer(NamedTuple):
    """Another way to keep the same arrays. `write` gets them whole, in memory and encoded, which spares it what ours pays for."""

    write: Callable[[Path, dict[str, np.ndarray]], object]
    open: Callable[[Path, Layout], Read]


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

    def read(name: str, rows: list[int], into: np.ndarray) -> None:
        _, dtype = layout.records[name]
        for i, row in enumerate(rows):
            into[i] = np.frombuffer(transaction.get(f"{name}{row:09d}".encode(), b""), dtype).reshape(into.shape[1:])

    return read


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

    def read(name: str, rows: list[int], into: np.ndarray) -> None:
        _, dtype = layout.records[name]
        for i, row in enumerate(rows):
            into[i] = np.frombuffer(columns[name][row].as_buffer(), dtype).reshape(into.shape[1:])

    return read


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

    def read(name: str, rows: list[int], into: np.ndarray) -> None:
        for i, row in enumerate(rows):
            into[i] = torch.load(folder / f"{name}{row}.pt").numpy()

    return read


PEERS = {
    "NumPy, memory-mapped .npy": Peer(write_numpy, open_numpy),
    "LMDB": Peer(write_lmdb, open_lmdb),
    "Arrow IPC, memory-mapped": Peer(write_arrow, open_arrow),
    "HDF5 (h5py)": Peer(write_hdf5, open_hdf5),
    "torch.save, a file for each": Peer(write_torch, open_torch),
}
