"""What grows with the output while it is looked at, kept out of memory by DuckDB.

DuckDB is held to ``MEMORY`` and spills to a temporary folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from vlmbatch.errors import RunStopped

MEMORY = "256MB"
INSERT_ROWS = 65_536
_TYPES = {
    "uint8": "utinyint",
    "uint64": "ubigint",
    "int64": "bigint",
    "int32": "integer",
    "string": "varchar",
}


class Scratch:
    """Tables that are filled, then asked. A context manager: its files go when it ends."""

    def __init__(self, tables: Mapping[str, pa.Schema]) -> None:
        import duckdb

        self._folder = tempfile.TemporaryDirectory(prefix="vlmbatch-quality-")
        self._error = duckdb.Error
        self._db = duckdb.connect(
            config={
                "memory_limit": MEMORY,
                "temp_directory": self._folder.name,
                "threads": "2",
                "preserve_insertion_order": "false",
                "autoinstall_known_extensions": "false",
                "autoload_known_extensions": "false",
            }
        )
        self._waiting: dict[str, list[pa.Table]] = {name: [] for name in tables}
        for name, schema in tables.items():
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
        """Columns as in the table's schema, in its order."""
        waiting = self._waiting[table]
        waiting.append(rows)
        if sum(each.num_rows for each in waiting) >= INSERT_ROWS:
            self._insert(table)

    def ask(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """All rows of a query over what was added."""
        return [row for some in self.stream(query, *values) for row in some]

    def stream(self, query: str, *values: Any) -> Iterator[list[tuple[Any, ...]]]:
        """The same, some thousands at a time. One at a time: the next query ends it."""
        for table in self._waiting:
            self._insert(table)
        with _explained(self._error):
            self._db.execute(query, list(values))
            while some := self._db.fetchmany(INSERT_ROWS):
                yield some

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
            f"cannot count in {tempfile.gettempdir()}: {reason}",
            hint="free some space there, or name another folder in TMPDIR",
        ) from None
