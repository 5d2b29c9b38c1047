"""Parquet is read and written in one place, in the calling thread: no thread of Arrow's frees memory while Python ends."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from caches import build, images
from mgd_pipeline.tables import open_parquet, parquet_bytes, read_parquet

REPOSITORY = Path(__file__).parents[1]

OF_ARROW = {f"pa.{name}" for name in ("ipc", "csv", "memory_map", "OSFile", "PythonFile", "input_stream")}

# What a busy machine does by chance, on purpose: the main thread goes first wherever it may, so that a thread of Arrow's, if it
# holds Python's memory, frees it last; and Python ends while that thread waits for it.
ENDS_FIRST = """
import os, sys, time

class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(0.05)

slow = Slow()
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
READ
threads = [int(name) for name in os.listdir("/proc/self/task") if int(name) != os.getpid()]
for thread in threads:
    os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
try:
    os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
except PermissionError:
    pass  # then it happens now and then, as on a busy machine
sys.setswitchinterval(5)
READ
os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
for thread in threads:
    os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
end = time.perf_counter() + 0.05
while time.perf_counter() < end:
    pass
"""


def ends(read: str, cwd: Path) -> subprocess.CompletedProcess[bytes]:
    script = ENDS_FIRST.replace("READ", read)
    return subprocess.run([sys.executable, "-c", script], cwd=cwd, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.skipif(sys.platform != "linux", reason="the order of threads is set as Linux sets it")
def test_a_process_that_read_a_store_ends_as_it_should(tmp_path: Path) -> None:
    build(tmp_path, images(11))
    for _ in range(5):
        done = ends("from mgd_pipeline.caches.reader import open_cache; open_cache('t.zarr')", tmp_path)
        assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="only root may set the order of threads, which makes it certain"
)
def test_the_proof_above_can_fail(tmp_path: Path) -> None:
    """The same file, read in Arrow's own threads."""
    store = build(tmp_path, images(11))
    whole = f"pq.ParquetFile(pa.BufferReader(open('{store}/images.parquet', 'rb').read())).read()"
    read = f"import pyarrow as pa, pyarrow.parquet as pq; {whole}"
    assert any(b"terminate called" in ends(read, tmp_path).stderr for _ in range(10))


def test_nothing_else_reads_or_writes_tables() -> None:
    found = []
    for path in REPOSITORY.glob("*/mgd_*/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            if path.name != "tables.py" and any(
                name.startswith(("pyarrow.", "pandas")) and name != "pyarrow.compute" for name in names
            ):
                found.append(f"{path.name}:{node.lineno}")  # type: ignore[attr-defined]
            if isinstance(node, ast.Attribute) and ast.unparse(node) in OF_ARROW:
                found.append(f"{path.name}:{node.lineno}")
    assert found == []


def test_bytes_and_tables_are_those_of_pyarrow(tmp_path: Path) -> None:
    table = pa.table({"a": pa.array([1, 2, None]), "b": ["x", "Straße", ""]}).replace_schema_metadata({"k": "v"})
    cases: list[dict[str, Any]] = [{}, {"compression": "zstd"}, {"compression": "none", "use_dictionary": False}]
    for options in cases:
        pq.write_table(table, tmp_path / "plain.parquet", **options)
        data = parquet_bytes(table, **options)
        assert data == (tmp_path / "plain.parquet").read_bytes()
        assert read_parquet(open_parquet(data)).equals(table, check_metadata=True)
