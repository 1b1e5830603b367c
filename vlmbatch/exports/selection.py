"""Which results are exported, why not the others, and into which split their rows go."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from vlmbatch.errors import UsageError
from vlmbatch.records import ImageRef

Drop = Callable[[pa.RecordBatch], "pa.Array"]
"""Of a batch of results, for each the reason to leave it out (a string), or null."""


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
        try:
            self._holds(pa.RecordBatch.from_pylist([], schema=schema))
        except duckdb.Error as error:
            said = str(error).partition("LINE 1")[0]
            said = " ".join(said.split())
            raise UsageError(
                f"--where {expression!r} is no condition on the results: {said}",
                hint="it is SQL over their columns, as in: "
                "\"finish_reason = 'stop' and task = 'caption'\"",
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


class Splits:
    """Shares of the images, by a hash of the image: one image is always in the same split."""

    def __init__(self, text: str | None) -> None:
        """``train=0.9,val=0.1``; None: all is ``train``. Raises UsageError."""
        self.shares = [("train", 1.0)] if text is None else _shares(text)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.shares]

    def of(self, image: ImageRef) -> str:
        """A row with several images goes where its first one does."""
        if len(self.shares) == 1:
            return self.shares[0][0]
        content = image.data if image.data is not None else (image.uri or "").encode()
        place = xxhash.xxh3_64_intdigest(content) / 2**64
        for name, share in self.shares:
            if place < share:
                return name
            place -= share
        return self.shares[-1][0]


def _shares(text: str) -> list[tuple[str, float]]:
    shares = []
    for item in text.split(","):
        name, _, number = item.strip().partition("=")
        try:
            share = float(number)
        except ValueError:
            share = 0.0
        if not re.fullmatch(r"[A-Za-z0-9_]+", name) or not 0 < share <= 1:
            raise UsageError(
                f"--split {text!r}: {item.strip()!r} is no NAME=SHARE",
                hint="as in --split train=0.9,val=0.1",
            )
        shares.append((name, share))
    total = sum(share for _, share in shares)
    if abs(total - 1) > 1e-6 or len({name for name, _ in shares}) < len(shares):
        raise UsageError(
            f"--split {text!r}: the shares of different names must add up to 1, not {total:g}",
            hint="as in --split train=0.9,val=0.1",
        )
    return shares
