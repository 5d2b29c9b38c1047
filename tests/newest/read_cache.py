"""Run by `make test-newest` in an environment of its own, without mgd-pipeline: a store, as the newest readers see it.

    python tests/newest/read_store.py STORE VALUES

STORE is a target cache, VALUES a folder with what mgd-pipeline reads from it: <array>.npy, of the rows in `rows.npy`.
"""

from __future__ import annotations

import asyncio
import sys
import warnings
from pathlib import Path

import dask.array
import numpy as np
import tensorstore
import xarray  # pyright: ignore[reportMissingImports]: it is in that environment alone
import zarr


def readers(store: Path, name: str) -> dict[str, np.ndarray]:
    """An array as each of them reads it."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of commit.json and images.parquet, which are no parts of Zarr, and of metadata in one place
        found = {
            "xarray": xarray.open_zarr(store)[name].to_numpy(),
            "xarray, not consolidated": xarray.open_zarr(store, consolidated=False)[name].to_numpy(),
            "xarray by dask": xarray.open_zarr(store, consolidated=False, chunks={"image": 4})[name].compute().to_numpy(),
            "dask.array": dask.array.from_zarr(str(store), component=name).compute(),
            "zarr": np.asarray(zarr.open_group(store, mode="r")[name]),
        }
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        import zarrs  # noqa: F401  # pyright: ignore[reportMissingImports]

        found["zarrs"] = np.asarray(zarr.open_array(store / name, mode="r"))
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{store / name}/"}}
    found["tensorstore"] = asyncio.run(_read(spec))
    return found


async def _read(spec: dict) -> np.ndarray:
    return await (await tensorstore.open(spec, read=True)).read()


def main(store: Path, values: Path) -> None:
    rows = np.load(values / "rows.npy")
    for path in sorted(values.glob("*.npy")):
        if path.stem == "rows":
            continue
        expected = np.load(path)
        for reader, found in readers(store, path.stem).items():
            assert found.dtype == expected.dtype, (path.stem, reader, found.dtype)
            assert found[rows].tobytes() == expected.tobytes(), (path.stem, reader)
        print(f"{path.stem}: {expected.shape[0]} rows {expected.dtype}, equal in all readers")
    dataset = xarray.open_zarr(store, consolidated=False)
    assert dataset.logits.dims == ("image", "class_id", "logit_row", "logit_column"), dataset.logits.dims
    versions = {module.__name__: getattr(module, "__version__", "") for module in (zarr, xarray, dask)}
    print(f"read by Python {sys.version.split()[0]}, {versions}, zarrs and tensorstore")


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Object at .* is not recognized as a component of a Zarr hierarchy")
        main(Path(sys.argv[1]), Path(sys.argv[2]))
