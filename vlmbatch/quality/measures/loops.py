"""Answers in which the model got stuck on a phrase."""

from __future__ import annotations

from vlmbatch.quality.base import Answers, Measure, Metric, Share
from vlmbatch.quality.looping import loop_in


class Loops(Measure):
    """``loops``: of the texts, those with a phrase many times in a row (looping.py)."""

    names = ("loops",)

    def __init__(self) -> None:
        self._loops = Share("loops")

    def add(self, answers: Answers) -> None:
        said = answers.said
        self._loops.add(len(said), [], said)
        for at, text in enumerate(said.texts):
            loop = loop_in(text)
            if loop is not None:
                self._loops.hit(said, at, f"{loop.phrase!r} x {loop.times}")

    def metrics(self) -> list[Metric]:
        return [self._loops.metric()]
