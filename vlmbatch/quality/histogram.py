"""Counts of whole numbers, and how they look in a line of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

_BARS = " ▁▂▃▄▅▆▇█"
DISTINCT = 100_000
"""Longer texts than this many characters are counted as this long."""


class Histogram:
    """Counts numbers from 0 to DISTINCT one by one: percentiles are exact, memory is bounded."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def add(self, values: Iterable[tuple[int, int]]) -> None:
        """(number, how often)"""
        for value, times in values:
            self.counts[min(value, DISTINCT)] += times

    def __len__(self) -> int:
        return self.counts.total()

    def percentile(self, share: float) -> int | None:
        """The smallest number that at least this share of all does not exceed."""
        left = share * len(self)
        for value in sorted(self.counts):
            left -= self.counts[value]
            if left <= 0:
                return value
        return None

    def bins(self, number: int = 20) -> list[tuple[int, int, int]]:
        """(from, to, how many) of so many bins at most, all of one width, ``to`` exclusive."""
        if not self.counts:
            return []
        low, high = min(self.counts), max(self.counts) + 1
        width = -(-(high - low) // number)
        starts = range(low, high, width)
        sums = [0] * len(starts)
        for value, times in self.counts.items():
            sums[(value - low) // width] += times
        return [(start, start + width, n) for start, n in zip(starts, sums, strict=True)]

    def to_json(self) -> dict[str, Any]:
        bins = self.bins()
        first, width = (bins[0][0], bins[0][1] - bins[0][0]) if bins else (0, 1)
        return {"first": first, "width": width, "counts": [count for *_, count in bins]}


def bars(counts: Sequence[int]) -> str:
    """One character for each count, as high as its share of the largest; blank only for 0."""
    most = max(counts, default=0)
    return "".join(_BARS[-(-8 * count // most)] if count else "·" for count in counts)
