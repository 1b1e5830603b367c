"""Answers that were cut at --max-tokens."""

from __future__ import annotations

import pyarrow.compute as pc

from vlmbatch.quality.base import Answers, Measure, Metric, Share
from vlmbatch.reading import CUT


class Truncated(Measure):
    """``truncated``: of all that the model answered, also where reading the answer failed."""

    names = ("truncated",)

    def __init__(self) -> None:
        self._cut = Share("truncated")

    def add(self, answers: Answers) -> None:
        reason = answers.table["finish_reason"]
        answered = len(reason) - reason.null_count
        self._cut.add(answered, pc.fill_null(pc.equal(reason, CUT), False), answers)

    def metrics(self) -> list[Metric]:
        return [self._cut.metric()]
