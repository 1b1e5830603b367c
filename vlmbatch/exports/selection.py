"""Which results are exported, and why not the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from vlmbatch.errors import UsageError

Drop = Callable[[pa.RecordBatch], "pa.Array"]
"""Of a batch of results, for each the reason to leave it out (a string), or null."""

WHERE = "it is SQL over their columns, as in: \"finish_reason = 'stop' and task = 'caption'\""


class Selection:
    """Leaves out failed results, and what the user does not want; counts by reason.

    ``where``: an SQL expression over the result columns, as DuckDB reads it. ``drops``: further
    ones, asked in order; the first reason counts.
    """

    def __init__(
        self,
        schema: pa.Schema,
        *,
        where: str | None = None,
        min_chars: int | None = None,
        max_chars: int | None = None,
        drops: Sequence[Drop] = (),
        changed: Callable[[pa.RecordBatch], pa.RecordBatch] | None = None,
    ) -> None:
        """``changed``: what results become before anything but their failure is looked at.

        Raises UsageError for an expression that does not fit the columns.
        """
        asked: list[Drop] = []
        if where is not None:
            asked.append(Where(where, schema))
        if min_chars is not None and max_chars is not None and min_chars > max_chars:
            raise UsageError(
                f"no text has {min_chars} characters or more and {max_chars} or fewer",
                hint="--min-chars is the smaller one",
            )
        if min_chars is not None or max_chars is not None:
            asked.append(lambda batch: _by_length(batch, min_chars, max_chars))
        self._drops = [*asked, *drops]
        self._changed = changed
        self.results = 0
        self.dropped: Counter[str] = Counter()

    def kept(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The results of the batch that are exported."""
        self.results += batch.num_rows
        batch = self._without(_failed, batch)
        if self._changed is not None:
            batch = self._changed(batch)
        for drop in self._drops:
            batch = self._without(drop, batch)
        return batch

    def _without(self, drop: Drop, batch: pa.RecordBatch) -> pa.RecordBatch:
        reasons = drop(batch)
        if reasons.null_count == len(reasons):
            return batch
        for found in pc.value_counts(reasons.drop_null()).to_pylist():
            self.dropped[found["values"]] += found["counts"]
        return batch.filter(pc.is_null(reasons))


class Where:
    """``where``: results for which an SQL expression is false, or null."""

    def __init__(self, expression: str, schema: pa.Schema) -> None:
        import duckdb

        self._expression = expression
        self._duckdb = duckdb.connect(config={"threads": "1", "enable_external_access": "false"})
        if not expression.strip():
            raise UsageError("--where says nothing", hint=WHERE)
        try:
            self._holds(pa.RecordBatch.from_pylist([], schema=schema))
        except duckdb.Error as error:
            said = str(error).partition("LINE 1")[0]
            said = " ".join(said.split())
            raise UsageError(
                f"--where {expression!r} is no condition on the results: {said}",
                hint=WHERE,
            ) from None

    def __call__(self, batch: pa.RecordBatch) -> pa.Array:
        import duckdb

        try:
            holds = self._holds(batch)
        except duckdb.Error as error:
            said = str(error).partition("\n")[0]
            raise UsageError(
                f"--where {self._expression!r} fails on a result: {said}",
                hint="try_cast(... as ...) is null where a value does not fit",
            ) from None
        return pc.if_else(holds, pa.scalar(None, pa.string()), "where")

    def _holds(self, batch: pa.RecordBatch) -> pa.Array:
        self._duckdb.register("results", pa.Table.from_batches([batch]))
        query = f"SELECT coalesce(({self._expression})::BOOLEAN, false) AS holds FROM results"
        found: pa.Table = self._duckdb.sql(query).to_arrow_table()
        if found.num_rows != batch.num_rows:
            raise UsageError(
                f"--where {self._expression!r} is no condition on a result: it is about several",
                hint="it is asked of each result by itself; count and sum over OUTPUT/*.parquet",
            )
        return found["holds"].combine_chunks()


def _failed(batch: pa.RecordBatch) -> pa.Array:
    is_ok = pc.equal(batch["status"], "ok")
    return pc.if_else(is_ok, pa.scalar(None, pa.string()), "failed")


def _by_length(batch: pa.RecordBatch, least: int | None, most: int | None) -> pa.Array:
    """By characters of ``text``; answers without a text (boxes) are neither."""
    length = pc.utf8_length(batch["text"])
    none = pa.scalar(None, pa.string())
    long = none if most is None else pc.if_else(pc.greater(length, most), "too_long", none)
    if least is None:
        return long
    return pc.if_else(pc.fill_null(pc.less(length, least), False), "too_short", long)
