"""All reading and writing of Parquet: between bytes and tables, in the calling thread alone.

Arrow's own threads hold what they read until after they have said that they are done. Where that is memory of Python, and Python
ends in the meantime, the thread that frees it last is ended within a destructor, and the process with it: "terminate called without
an active exception", exit code 134, after the right answer. No thread of Arrow's ever sees what these functions are given.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def open_parquet(data: bytes) -> pq.ParquetFile:
    """A Parquet file's metadata, from its bytes; `read_parquet` decodes it. Raises pa.ArrowException where these are none."""
    return pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)


def read_parquet(file: pq.ParquetFile) -> pa.Table:
    """All rows and columns. Raises pa.ArrowException or OSError for a file that cannot be decoded."""
    return file.read(use_threads=False)


def parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    """A table as a Parquet file; `options` are those of pyarrow.parquet.write_table. Same content, same bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()
