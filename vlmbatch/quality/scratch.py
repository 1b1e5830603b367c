"""What grows with the output while it is looked at: tables that are filled, and then asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from vlmbatch import scratch

MEMORY = "256MB"
INSERT_ROWS = 65_536


class Scratch(scratch.Scratch):
    """Rows wait until there are enough of them to be worth an insertion."""

    def __init__(self, tables: Mapping[str, pa.Schema]) -> None:
        super().__init__(MEMORY)
        self._waiting: dict[str, list[pa.Table]] = {name: [] for name in tables}
        for name, schema in tables.items():
            self.load(name, schema, iter(()))

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
        found = self.run(query, values)
        with self.reported():
            while some := found.fetchmany(INSERT_ROWS):
                yield some

    def _insert(self, table: str) -> None:
        waiting = self._waiting[table]
        if waiting:
            self.insert(table, pa.concat_tables(waiting))
            waiting.clear()
