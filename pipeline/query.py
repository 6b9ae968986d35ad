"""DuckDB over the workspace's tables: queries that keep to a memory limit and spill to disk."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from itertools import groupby

import duckdb
import pyarrow as pa
import pyarrow.dataset as pads

from .storage import WorkspaceError

MEMORY_LIMIT = "1GB"


@contextlib.contextmanager
def database(memory_limit: str = MEMORY_LIMIT, **tables: pads.Dataset) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection that sees the given datasets as tables.

    Raises:
        WorkspaceError: the query needs more disk for spilling than there is.
    """
    with tempfile.TemporaryDirectory(prefix="clearshard-query-") as spill:
        connection = duckdb.connect(config={"memory_limit": memory_limit, "temp_directory": spill,
                                            "preserve_insertion_order": False, "threads": 2,
                                            "autoinstall_known_extensions": False})
        try:
            for name, dataset in tables.items():
                connection.register(name, dataset)
            yield connection
        except duckdb.OutOfMemoryException as error:
            raise WorkspaceError(f"a query ran out of memory and of disk to spill to: {error}. Make room in "
                                 "the temporary folder (TMPDIR).") from error
        finally:
            connection.close()


def cut(batches: pa.RecordBatchReader, column: str) -> Iterator[tuple[str, pa.Table]]:
    """Runs of rows with the same value of a column, of a stream that is sorted by it; holds one run at a time."""
    def pieces() -> Iterator[tuple[str, pa.RecordBatch]]:
        for batch in batches:
            start = 0
            for value, run in groupby(batch[column].to_pylist()):
                length = sum(1 for _ in run)
                yield value, batch.slice(start, length)
                start += length
    for value, run in groupby(pieces(), key=lambda piece: piece[0]):
        yield value, pa.Table.from_batches([batch for _, batch in run])
