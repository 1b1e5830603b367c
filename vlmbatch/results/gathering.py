"""Gathering: shards into parts, in the background while a run goes on, and at its end."""

from __future__ import annotations

import threading

from vlmbatch.intervals import Intervals
from vlmbatch.records import Range
from vlmbatch.results.output import Output


class Gatherer:
    """Writes a part in the background as soon as all of its rows are committed."""

    def __init__(self, output: Output, committed: Intervals) -> None:
        """``committed``: before; of a part that has other rows than these and those to come,
        nothing is gathered before the end."""
        self._output = output
        self._committed = committed
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._due: list[int] = []

    def committed(self, rows: Range) -> None:
        self._committed.add(rows)
        number = rows.first // self._output.part_rows
        if self._committed.covers(self._output.part_range(number)):
            self._due.append(number)
        self._go_on()

    def _go_on(self) -> None:
        self._check()
        if self._due and (self._thread is None or not self._thread.is_alive()):
            number = self._due.pop(0)
            self._thread = threading.Thread(target=self._gather, args=(number,))
            self._thread.start()

    def _gather(self, number: int) -> None:
        try:
            self._output.gather(number)
        except BaseException as error:
            self._error = error

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._check()


def gather_all(output: Output, *, whole_only: bool) -> None:
    """Write the parts whose rows are committed without a gap; the last one may be short.

    ``whole_only``: not yet those that lack rows at their end, unless they have been written before.
    """
    view = output.view()
    for number in view.numbers(output.part_rows):
        output.gather_if_gapless(number, whole_only=whole_only, view=view)
