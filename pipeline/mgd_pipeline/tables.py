"""All reading and writing of Parquet: between bytes and tables, only in the calling thread.

Arrow's threads hold the memory that they read until after they have reported that they are done. If that is memory of Python, and
Python ends in the meantime, the thread that frees it last is ended within a destructor, and so is the process: "terminate called
without an active exception", exit code 134, after the right answer. So no thread of Arrow sees the memory of these functions.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def open_parquet(data: bytes) -> pq.ParquetFile:
    """The metadata of a Parquet file; `read_parquet` decodes the rest. Raises pa.ArrowException for other bytes."""
    return pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)


def read_parquet(file: pq.ParquetFile) -> pa.Table:
    """All rows and columns. Raises pa.ArrowException or OSError for a file that cannot be decoded."""
    return file.read(use_threads=False)


def parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    """A table as a Parquet file; `options` go to pyarrow.parquet.write_table. The same content gives the same bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()
