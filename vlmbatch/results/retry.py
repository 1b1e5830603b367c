"""Which results failed, and so are asked again by ``vlmbatch retry``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from vlmbatch.intervals import Intervals
from vlmbatch.records import Range

if TYPE_CHECKING:
    from vlmbatch.results.output import Output


Earlier = Callable[[int], Mapping[tuple[int, int], int] | None]
"""Of a row: the attempts so far of those of its results, by (request, sample), that are asked
again, and no other of its results is; None where all that the row gives is asked, anew."""


def asked_anew(row: int) -> None:
    """An Earlier: every row is."""


class FailedResults:
    """The failed results of an output, one part at a time in memory. Empty codes mean all."""

    def __init__(self, output: Output, codes: Set[str], *, max_attempts: int | None = None) -> None:
        """``max_attempts``: only those that were asked less often."""
        self._output = output
        self._codes = codes
        self._max_attempts = 2**31 if max_attempts is None else max_attempts
        self._number = -1
        self._attempts: dict[int, dict[tuple[int, int], int]] = {}

    def attempts(self, row: int) -> dict[tuple[int, int], int]:
        """By (request, sample), for each result of this row that failed: its attempts so far."""
        number = row // self._output.part_rows
        if number != self._number:
            self._attempts = {}
            for batch in self._output.results(self._output.part_range(number)):
                failed = _failed(batch, self._codes)
                for record in failed.select(["row", "request", "sample", "attempts"]).to_pylist():
                    if record["attempts"] < self._max_attempts:
                        of_row = self._attempts.setdefault(record["row"], {})
                        of_row[record["request"], record["sample"]] = record["attempts"]
            self._number = number
        return self._attempts.get(row, {})

    def rows(self) -> Iterator[int]:
        """The rows with a failed result, ascending."""
        last = -1
        for batch in self._output.results():
            for row in _failed(batch, self._codes)["row"].to_pylist():
                if row != last:
                    last = row
                    yield row

    def ranges(self, width: int) -> Iterator[Range]:
        """Ranges of at most ``width`` rows that hold every failed row, within one part each."""
        return ranges_of(self.rows(), width, self._output.part_rows)


def ranges_of(
    rows: Iterable[int], width: int, part_rows: int, *, apart: Intervals | None = None
) -> Iterator[Range]:
    """Ranges of at most ``width`` rows that hold every one of these, ascending, within one part
    each; and none of the rows ``apart``."""
    first = stop = -1
    for row in rows:
        if first >= 0 and (
            row - first >= width
            or row // part_rows != first // part_rows
            or (apart is not None and apart.within(Range(first, row)))
        ):
            yield Range(first, stop)
            first = -1
        first = row if first < 0 else first
        stop = row + 1
    if first >= 0:
        yield Range(first, stop)


def _failed(batch: pa.RecordBatch, codes: Set[str]) -> pa.RecordBatch:
    mask = pc.equal(batch["status"], "failed")
    if codes:
        code = pc.struct_field(batch["error"], "code")
        named = pc.is_in(code, value_set=pa.array(sorted(codes), pa.string()))
        mask = pc.and_(mask, named)
    return batch.filter(mask)
