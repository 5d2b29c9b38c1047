"""Parquet is read and written in one place, in the calling thread: no thread of Arrow's frees memory while Python ends."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from caches import build, images

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
def test_a_process_that_read_a_cache_ends_as_it_should(tmp_path: Path) -> None:
    build(tmp_path, images(11))
    for _ in range(5):
        done = ends("from mgd_pipeline.caches.reader import open_cache; open_cache('t.zarr')", tmp_path)
        assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="only root may set the order of threads, which makes it certain"
)
def test_the_proof_above_can_fail(tmp_path: Path) -> None:
    """The same file, read in Arrow's own threads."""
    build(tmp_path, images(11))
    whole = "pq.ParquetFile(pa.BufferReader(open('t.zarr/images.parquet', 'rb').read())).read()"
    read = f"import pyarrow as pa, pyarrow.parquet as pq; {whole}"
    assert any(b"terminate called" in ends(read, tmp_path).stderr for _ in range(10))


def uses_of_arrow(source: str) -> list[str]:
    """What a text imports of pyarrow besides its compute functions, of pandas, and the readers and writers of Arrow it names."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names.append(ast.unparse(node))
    return [name for name in names if name in OF_ARROW or (name.startswith(("pyarrow.", "pandas")) and name != "pyarrow.compute")]


def test_nothing_else_reads_or_writes_tables() -> None:
    sources = [path for path in REPOSITORY.glob("*/mgd_*/**/*.py") if path.name != "tables.py"]
    assert len(sources) > 60 and any("caches" in path.parts for path in sources), "folders, too"
    assert [path for path in sources if uses_of_arrow(path.read_text(encoding="utf-8"))] == []
    assert uses_of_arrow("import pyarrow.parquet as pq") and uses_of_arrow("from pyarrow import csv") and uses_of_arrow("pa.ipc")
