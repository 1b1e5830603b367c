"""Answers that had to have a form: a JSON Schema, choices, a regular expression."""

from __future__ import annotations

import pyarrow.compute as pc

from vlmbatch.quality.base import Answers, Measure, Metric, Share


class Fitting(Measure):
    """``misfit``: of all that the model answered, what had not the form that was asked."""

    names = ("misfit",)

    def __init__(self) -> None:
        self._misfit = Share("misfit")

    def add(self, answers: Answers) -> None:
        answered = pc.is_valid(answers.table["raw"])
        misfit = pc.and_(answered, pc.is_null(answers.table["json"]))
        self._misfit.add(pc.sum(answered).as_py() or 0, misfit, answers)

    def metrics(self) -> list[Metric]:
        return [self._misfit.metric()]
