"""Sets of row numbers as sorted, disjoint, half-open intervals."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

from vlmbatch.records import Range


class Intervals:
    """A mutable set of row numbers. Adding and removing cost O(log n) plus what they touch."""

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._firsts: list[int] = []
        self._stops: list[int] = []
        for item in ranges:
            self.add(item)

    def __iter__(self) -> Iterator[Range]:
        for first, stop in zip(self._firsts, self._stops, strict=True):
            yield Range(first, stop)

    def __bool__(self) -> bool:
        return bool(self._firsts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Intervals) and list(self) == list(other)

    def __repr__(self) -> str:
        return f"Intervals({', '.join(map(str, self))})"

    @property
    def rows(self) -> int:
        """How many rows are in the set."""
        return sum(self._stops) - sum(self._firsts)

    def add(self, new: Range) -> None:
        """Put the rows in, joined with what they touch."""
        i = bisect_left(self._stops, new.first)
        j = bisect_right(self._firsts, new.stop)
        first = min([new.first, *self._firsts[i : min(i + 1, j)]])
        stop = max([new.stop, *self._stops[max(i, j - 1) : j]])
        self._firsts[i:j] = [first]
        self._stops[i:j] = [stop]

    def remove(self, gone: Range) -> None:
        """Take the rows out; rows that are not in the set are left as they are."""
        i = bisect_right(self._stops, gone.first)
        j = bisect_left(self._firsts, gone.stop)
        if i >= j:
            return
        first, stop = self._firsts[i], self._stops[j - 1]
        rest = [(first, gone.first), (gone.stop, stop)]
        kept = [(a, b) for a, b in rest if a < b]
        self._firsts[i:j] = [a for a, _ in kept]
        self._stops[i:j] = [b for _, b in kept]

    def within(self, window: Range) -> list[Range]:
        """The parts of the set inside the window, ascending."""
        i = bisect_right(self._stops, window.first)
        j = bisect_left(self._firsts, window.stop)
        return [
            Range(max(a, window.first), min(b, window.stop))
            for a, b in zip(self._firsts[i:j], self._stops[i:j], strict=True)
        ]

    def missing(self, window: Range) -> list[Range]:
        """The parts of the window that are not in the set, ascending."""
        gaps, position = [], window.first
        for inside in self.within(window):
            if position < inside.first:
                gaps.append(Range(position, inside.first))
            position = inside.stop
        if position < window.stop:
            gaps.append(Range(position, window.stop))
        return gaps

    def covers(self, window: Range) -> bool:
        """Whether every row of the window is in the set."""
        return not self.missing(window)
