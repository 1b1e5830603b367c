"""What grows with the output while it is measured, kept out of memory by DuckDB.

Texts are kept as 64-bit hashes (two of ten million texts share one with a probability of 3 in a
million), labels as counts per batch. DuckDB is held to ``MEMORY`` and spills to a temporary folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from vlmbatch.errors import RunStopped

MEMORY = "256MB"
INSERT_ROWS = 65_536

TEXTS = pa.schema(
    [
        pa.field("task", pa.uint8()),
        pa.field("hash", pa.uint64()),
        pa.field("image", pa.uint64()),
        pa.field("row", pa.int64()),
    ]
)
LABELS = pa.schema(
    [pa.field("task", pa.uint8()), pa.field("label", pa.string()), pa.field("n", pa.int64())]
)
_TYPES = {"uint8": "utinyint", "uint64": "ubigint", "int64": "bigint", "string": "varchar"}


class Scratch:
    """Two tables: ``texts`` (one line per text) and ``labels`` (counts, to be summed up).

    A context manager: its files go when it ends.
    """

    def __init__(self) -> None:
        import duckdb

        self._folder = tempfile.TemporaryDirectory(prefix="vlmbatch-quality-")
        self._error = duckdb.Error
        self._db = duckdb.connect(
            config={
                "memory_limit": MEMORY,
                "temp_directory": self._folder.name,
                "threads": 2,
                "preserve_insertion_order": False,
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
            }
        )
        self._waiting: dict[str, list[pa.Table]] = {"texts": [], "labels": []}
        for name, schema in (("texts", TEXTS), ("labels", LABELS)):
            columns = ", ".join(f"{field.name} {_TYPES[str(field.type)]}" for field in schema)
            self._db.execute(f"create table {name} ({columns})")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._db.close()
        self._folder.cleanup()

    def add(self, table: str, rows: pa.Table) -> None:
        waiting = self._waiting[table]
        waiting.append(rows)
        if sum(each.num_rows for each in waiting) >= INSERT_ROWS:
            self._insert(table)

    def ask(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows of a query over all that was added."""
        for table in self._waiting:
            self._insert(table)
        with _explained(self._error):
            found: list[tuple[Any, ...]] = self._db.execute(query, list(values)).fetchall()
        return found

    def _insert(self, table: str) -> None:
        waiting = self._waiting[table]
        if not waiting:
            return
        self._db.register("waiting", pa.concat_tables(waiting))
        with _explained(self._error):
            self._db.execute(f"insert into {table} select * from waiting")
        self._db.unregister("waiting")
        waiting.clear()


@contextmanager
def _explained(kind: type[Exception]) -> Iterator[None]:
    """DuckDB's errors (a full disk) as ours."""
    try:
        yield
    except kind as error:
        reason = str(error).splitlines()[0]
        raise RunStopped(
            f"cannot count what is repeated in {tempfile.gettempdir()}: {reason}",
            hint="free some space there, or name another folder in TMPDIR",
        ) from None
