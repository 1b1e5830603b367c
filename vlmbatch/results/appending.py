"""Results that come row by row, committed as shards by the process that holds the output."""

from __future__ import annotations

from collections.abc import Iterator

from vlmbatch.records import Range, Result
from vlmbatch.results.files import write_shard
from vlmbatch.results.output import Output
from vlmbatch.results.schema import to_batch

SHARD_CHARS = 2**24


class Appending:
    """Holds results until ``rows`` rows are there, or many characters of answers; then commits.

    ``patch``: the results replace failed ones of rows that are committed. Otherwise they are all
    results of their rows.
    """

    def __init__(
        self, output: Output, *, epoch: int, model: str, rows: int, patch: bool = False
    ) -> None:
        self._output = output
        self._epoch = epoch
        self._model = model
        self._rows = rows
        self._patch = patch
        self._held: dict[int, list[Result]] = {}
        self._chars = 0

    def add(self, row: int, results: list[Result]) -> None:
        """Rows may come in any order, each once."""
        self._held[row] = results
        self._chars += sum(len(each.completion.text) for each in results if each.completion)
        if len(self._held) >= self._rows or self._chars >= SHARD_CHARS:
            self.flush()

    def flush(self) -> None:
        """Commit what is held."""
        for rows in self._ranges():
            inside = range(rows.first, rows.stop)
            results = [result for row in inside for result in self._held.pop(row, ())]
            write_shard(
                self._output.store,
                to_batch(results, model=self._model, schema=self._output.schema),
                run=self._output.run,
                epoch=self._epoch,
                rows=rows,
                patch=self._patch,
            )
        self._chars = 0

    def _ranges(self) -> Iterator[Range]:
        """Of what is held: within one part each, and without gaps unless they are patches."""
        first = last = -1
        for row in sorted(self._held):
            same_part = row // self._output.part_rows == first // self._output.part_rows
            if first >= 0 and not (same_part and (self._patch or row == last + 1)):
                yield Range(first, last + 1)
                first = -1
            first = row if first < 0 else first
            last = row
        if first >= 0:
            yield Range(first, last + 1)
