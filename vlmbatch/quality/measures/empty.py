"""Answers that hold nothing."""

from __future__ import annotations

import pyarrow.compute as pc

from vlmbatch.quality.base import Answers, Measure, Metric, Share


class Empty(Measure):
    """``empty``: of the good results, those without boxes and points where boxes were asked for,
    and with a blank text elsewhere."""

    names = ("empty",)

    def __init__(self) -> None:
        self._empty = Share("empty")

    def add(self, answers: Answers) -> None:
        table = answers.ok.table
        blank = pc.equal(pc.utf8_trim_whitespace(pc.fill_null(table["text"], "")), "")
        boxes = pc.list_value_length(table["boxes"])
        points = pc.fill_null(pc.list_value_length(table["points"]), 0)
        no_places = pc.equal(pc.add(boxes, points), 0)
        nothing = pc.if_else(pc.is_valid(boxes), no_places, blank)
        self._empty.add(len(answers.ok), nothing, answers.ok)

    def metrics(self) -> list[Metric]:
        return [self._empty.metric()]
