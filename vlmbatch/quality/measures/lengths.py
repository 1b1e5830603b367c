"""How long the texts are."""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc

from vlmbatch.quality.base import Answers, Measure, Metric
from vlmbatch.quality.histogram import Histogram, bars

_SHARES = {"p5": 0.05, "median": 0.5, "p95": 0.95}


class Lengths(Measure):
    """``words_*`` and ``chars_*``: the 5th, 50th and 95th percentile of the texts' lengths. Words
    are what spaces separate: for Chinese and Japanese look at the characters."""

    names = tuple(
        f"{name}_{label}" for name in ("words", "chars") for label in ("p5", "median", "p95")
    )

    def __init__(self) -> None:
        self._lengths = {"words": Histogram(), "chars": Histogram()}

    def add(self, answers: Answers) -> None:
        texts = pc.utf8_trim_whitespace(answers.said.table["text"])
        words = pc.list_value_length(pc.utf8_split_whitespace(texts))
        for name, lengths in (("words", words), ("chars", pc.utf8_length(texts))):
            counts = pc.value_counts(lengths).to_pylist()
            self._lengths[name].add((each["values"], each["counts"]) for each in counts)

    def metrics(self) -> list[Metric]:
        return [
            Metric(f"{name}_{label}", None if found is None else float(found))
            for name, histogram in self._lengths.items()
            for label, share in _SHARES.items()
            for found in [histogram.percentile(share)]
        ]

    def lines(self) -> list[tuple[str, str]]:
        lines = []
        for name, histogram in self._lengths.items():
            if not histogram:
                continue
            low, median, high = (histogram.percentile(share) for share in _SHARES.values())
            bins = histogram.bins()
            said = f"median {median:,}, 5 % up to {low:,}, 5 % above {high:,}"
            shown = f"{bins[0][0]:,} {bars([n for *_, n in bins])} {max(histogram.counts):,}"
            lines.append((name, f"{said}; {shown}"))
        return lines

    def details(self) -> dict[str, Any]:
        return {name: histogram.to_json() for name, histogram in self._lengths.items()}
