"""Run by `make test-newest` in an environment of its own, without mgd-pipeline: a teacher cache, as the newest readers see it.

    python tests/newest/read_cache.py CACHE VALUES

CACHE is a teacher cache, VALUES a folder with what mgd-pipeline reads from it: <array>.npy, of the rows in `rows.npy`.
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


def readers(path: Path, name: str) -> dict[str, np.ndarray]:
    """An array as each program reads it."""
    with warnings.catch_warnings():
        # About commit.json and images.parquet, which are not parts of Zarr, and about metadata in one place.
        warnings.simplefilter("ignore")
        arrays = {
            "xarray": xarray.open_zarr(path)[name].to_numpy(),
            "xarray, not consolidated": xarray.open_zarr(path, consolidated=False)[name].to_numpy(),
            "xarray by dask": xarray.open_zarr(path, consolidated=False, chunks={"image": 4})[name].compute().to_numpy(),
            "dask.array": dask.array.from_zarr(str(path), component=name).compute(),
            "zarr": np.asarray(zarr.open_group(path, mode="r")[name]),
        }
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        import zarrs  # noqa: F401  # pyright: ignore[reportMissingImports]

        arrays["zarrs"] = np.asarray(zarr.open_array(path / name, mode="r"))
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path / name}/"}}
    arrays["tensorstore"] = asyncio.run(_read(spec))
    return arrays


async def _read(spec: dict) -> np.ndarray:
    return await (await tensorstore.open(spec, read=True)).read()


def main(cache: Path, values: Path) -> None:
    rows = np.load(values / "rows.npy")
    for file in sorted(values.glob("*.npy")):
        if file.stem == "rows":
            continue
        expected = np.load(file)
        for reader, array in readers(cache, file.stem).items():
            assert array.dtype == expected.dtype, (file.stem, reader, array.dtype)
            assert array[rows].tobytes() == expected.tobytes(), (file.stem, reader)
        print(f"{file.stem}: {expected.shape[0]} rows {expected.dtype}, equal in all readers")
    dataset = xarray.open_zarr(cache, consolidated=False)
    assert dataset.logits.dims == ("image", "class_id", "logit_row", "logit_column"), dataset.logits.dims
    versions = {module.__name__: getattr(module, "__version__", "") for module in (zarr, xarray, dask)}
    print(f"read by Python {sys.version.split()[0]}, {versions}, zarrs and tensorstore")


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Object at .* is not recognized as a component of a Zarr hierarchy")
        main(Path(sys.argv[1]), Path(sys.argv[2]))
