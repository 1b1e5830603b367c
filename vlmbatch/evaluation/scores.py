"""What is counted of one task, and the numbers that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

EXACT, GROUNDED, DETECTED = "exact match", "boxes at IoU 0.5", "detection at IoU 0.5"
_Z = NormalDist().inv_cdf(0.975)


@dataclass(slots=True)
class Score:
    """One task's references, each judged once. ``n`` = ``right`` + wrong ones; of the wrong ones
    ``failed`` have a failed result and ``missing`` none.

    A request for boxes is right if every wanted box is paired with a found one and none is left
    over: Acc@0.5 where one is wanted, in general Pr@(F1=1, IoU>=0.5) of GREC (arXiv 2308.16182).
    """

    metric: str
    n: int = 0
    right: int = 0
    failed: int = 0
    missing: int = 0
    boxes_wanted: int = 0
    boxes_found: int = 0
    boxes_paired: int = 0
    most_frequent: tuple[str, int] | None = None
    """Of texts: the reference answer that would be right most often, and how often."""

    @property
    def accuracy(self) -> float | None:
        return _share(self.right, self.n)

    @property
    def precision(self) -> float | None:
        return _share(self.boxes_paired, self.boxes_found)

    @property
    def recall(self) -> float | None:
        return _share(self.boxes_paired, self.boxes_wanted)

    @property
    def f1(self) -> float | None:
        return _share(2 * self.boxes_paired, self.boxes_found + self.boxes_wanted)

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {"metric": self.metric, "n": self.n}
        if self.metric == DETECTED:
            names = ("boxes_wanted", "boxes_found", "boxes_paired", "precision", "recall", "f1")
            value |= {name: getattr(self, name) for name in names}
        else:
            value["right"] = self.right
            value["accuracy"] = self.accuracy
            value["interval"] = [round(each, 6) for each in wilson(self.right, self.n)]
        if self.metric == EXACT:
            answer, count = self.most_frequent or ("", 0)
            baseline = {"answer": answer, "accuracy": _share(count, self.n)}
            value["most_frequent"] = baseline
        return {**value, "failed": self.failed, "missing": self.missing}

    def as_text(self, task: str) -> str:
        """For a person; two or three lines."""
        if self.metric == DETECTED:
            lines = [
                f"{task}: {self.metric}: precision {_percent(self.precision)}, recall "
                f"{_percent(self.recall)}, F1 {_percent(self.f1)}",
                f"  {self.boxes_paired:,} of {self.boxes_wanted:,} boxes found, "
                f"{self.boxes_found - self.boxes_paired:,} others, in {self.n:,} requests",
            ]
        else:
            low, high = wilson(self.right, self.n)
            lines = [
                f"{task}: {self.right:,} of {self.n:,} right ({self.metric}): "
                f"{_percent(self.accuracy)} (95 % interval {_percent(low)} to {_percent(high)})"
            ]
        if self.most_frequent is not None:
            answer, count = self.most_frequent
            lines.append(f"  always {shown(answer)} would be {_percent(_share(count, self.n))}")
        if self.failed or self.missing:
            lines.append(
                f"  among the wrong: {self.failed:,} failed, {self.missing:,} without a result"
            )
        return "\n".join(lines)


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson's score (1927), which takes all ``n`` as
    independent."""
    if n == 0:
        return 0.0, 1.0
    share, square = right / n, _Z * _Z
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = _Z / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def shown(text: str, length: int = 60) -> str:
    """In quotes, on one line, cut to a length."""
    text = " ".join(text.split())
    return repr(text if len(text) <= length else f"{text[: length - 3]}...")


def _share(part: int, whole: int) -> float | None:
    """To six places; None where there is nothing to have a share of."""
    return round(part / whole, 6) if whole else None


def _percent(share: float | None) -> str:
    return "undefined" if share is None else f"{100 * share:.2f} %"
