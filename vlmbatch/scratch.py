"""Tables that grow with an output, kept out of memory by DuckDB in a folder that goes away."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from vlmbatch.errors import RunStopped


class Scratch:
    """A database that holds at most ``memory`` and spills the rest to the disk (``TMPDIR``). Used
    as a context, it deletes its files."""

    def __init__(self, memory: str) -> None:
        import duckdb  # only here: it would add a tenth of a second to the start of every run

        self._error: type[Exception] = duckdb.Error
        self._folder = tempfile.TemporaryDirectory(prefix="vlmbatch-")
        self.database = duckdb.connect(
            str(Path(self._folder.name) / "tables"),
            config={
                "memory_limit": memory,
                "temp_directory": self._folder.name,
                "preserve_insertion_order": "false",
                "autoinstall_known_extensions": "false",
                "autoload_known_extensions": "false",
            },
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        with suppress(self._error):
            self.database.close()
        self._folder.cleanup()

    def run(self, query: str, values: Sequence[Any] | Mapping[str, Any] | None = None) -> Any:
        """Raises RunStopped where the disk is full."""
        with self.reported():
            return self.database.execute(query, values or None)

    def batches(self, query: str, rows: int) -> Iterator[pa.RecordBatch]:
        """What a query finds, so many rows at a time; several may go on side by side."""
        with self.reported():
            yield from self.database.cursor().sql(query).to_arrow_reader(rows)

    def load(self, table: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
        """Makes the table. What ``batches`` raises is raised."""
        raised: list[BaseException] = []

        def passed_on() -> Iterator[pa.RecordBatch]:
            try:
                yield from batches
            except BaseException as error:
                raised.append(error)  # DuckDB makes text of it
                raise

        reader = pa.RecordBatchReader.from_batches(schema, passed_on())
        self.database.register("incoming", reader)
        try:
            self.run(f"CREATE TABLE {table} AS SELECT * FROM incoming")
        except RunStopped:
            if raised:
                raise raised[0] from None
            raise
        self.database.unregister("incoming")

    def insert(self, table: str, rows: pa.Table) -> None:
        """Columns in the order of the table's."""
        self.database.register("incoming", rows)
        self.run(f"INSERT INTO {table} SELECT * FROM incoming")
        self.database.unregister("incoming")

    @contextmanager
    def reported(self) -> Iterator[None]:
        """DuckDB's errors (a full disk) as ours."""
        try:
            yield
        except self._error as error:
            said = " ".join(str(error).split())[:200]
            raise RunStopped(
                f"cannot keep tables in {self._folder.name}: {said}",
                hint="free some space there, or name another folder with TMPDIR",
            ) from None
