"""Run by `make test-newest` in both environments: a teacher cache that the other environment wrote, as all readers see it.

    python tests/newest/read_cache.py FOLDER

FOLDER has what `make_cache.py` made elsewhere: caches, and what mgd-pipeline reads from them, <array>.npy of rows in `rows.npy`.
"""

from __future__ import annotations

import asyncio
import sys
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import tensorstore
import zarr

from mgd_pipeline.caches.reader import open_cache
from mgd_pipeline.caches.verify import verify_cache


def readers(path: Path, name: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of an array as each program of this environment reads them."""
    arrays = {"zarr": np.asarray(zarr.open_group(path, mode="r")[name])}
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path / name}/"}}
    arrays["tensorstore"] = asyncio.run(_read(spec))
    for program, pipeline in PIPELINES.items():
        with zarr.config.set({"codec_pipeline.path": pipeline}):
            arrays[program] = np.asarray(zarr.open_array(path / name, mode="r"))
    if find_spec("xarray"):
        import dask.array
        import xarray  # pyright: ignore[reportMissingImports]: the project's environment lacks it

        with warnings.catch_warnings():
            # About commit.json and images.parquet, which are not parts of Zarr, and about metadata in one place.
            warnings.simplefilter("ignore")
            arrays |= {
                "xarray": xarray.open_zarr(path)[name].to_numpy(),
                "xarray, not consolidated": xarray.open_zarr(path, consolidated=False)[name].to_numpy(),
                "xarray by dask": xarray.open_zarr(path, consolidated=False, chunks={"image": 4})[name].compute().to_numpy(),
                "dask.array": dask.array.from_zarr(str(path), component=name).compute(),
            }
            dimensions = xarray.open_zarr(path, consolidated=False).logits.dims
            assert dimensions == ("image", "class_id", "logit_row", "logit_column"), dimensions
    cache = open_cache(path)
    ours = {"mgd-pipeline": np.stack([cache.record(name, row) for row in rows.tolist()])}
    return ours | {program: values[rows] for program, values in arrays.items()}


async def _read(spec: dict) -> np.ndarray:
    return await (await tensorstore.open(spec, read=True)).read()


def _pipelines() -> dict[str, str]:
    """Other ways in which this zarr can decode: zarrs, and the faster pipeline of zarr 3.4, which is not its default."""
    import zarr.core.codec_pipeline as own

    pipelines = {"FusedCodecPipeline": f"{own.__name__}.FusedCodecPipeline"} if hasattr(own, "FusedCodecPipeline") else {}
    if find_spec("zarrs"):
        import zarrs  # noqa: F401  # pyright: ignore[reportMissingImports]

        pipelines["zarrs"] = "zarrs.ZarrsCodecPipeline"
    return pipelines


PIPELINES = _pipelines()


def main(cache: Path, values: Path) -> None:
    rows, programs = np.load(values / "rows.npy"), []
    for file in sorted(values.glob("*.npy")):
        if file.stem == "rows":
            continue
        expected, read = np.load(file), readers(cache, file.stem, rows)
        for program, array in read.items():
            assert array.dtype == expected.dtype, (file.stem, program, array.dtype)
            assert array.tobytes() == expected.tobytes(), (file.stem, program)
        programs = list(read)
    damages: list[str] = []
    verify_cache(cache, 1.0, damages.append)
    assert not damages, damages
    versions = ", ".join(f"{name} {version(name)}" for name in ("zarr", "numpy", "pyarrow", "tensorstore"))
    print(f"{cache}: {len(rows)} rows are equal in {', '.join(programs)} (Python {sys.version.split()[0]}, {versions})")


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Object at .* is not recognized as a component of a Zarr hierarchy")
        for kind in ("plain", "small"):
            main(Path(sys.argv[1], kind, "t.zarr"), Path(sys.argv[1], kind, "values"))
