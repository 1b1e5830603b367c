"""Results that failed."""

from __future__ import annotations

from collections import Counter

import pyarrow.compute as pc

from vlmbatch.quality.base import Answers, Measure, Metric, Share


class Failures(Measure):
    """``failed``: of all results; ``failed.CODE``: of all results, those with that error code."""

    names = ("failed",)
    families = ("failed.",)

    def __init__(self) -> None:
        self._failed = Share("failed")
        self._codes: Counter[str] = Counter()

    def add(self, answers: Answers) -> None:
        failed = pc.equal(answers.table["status"], "failed")
        self._failed.add(len(answers), [], answers)
        if not pc.any(failed).as_py():
            return
        errors = answers.column("error")
        for at in pc.indices_nonzero(failed).to_pylist():
            error = errors[at] or {}
            self._codes[error.get("code") or "unknown"] += 1
            self._failed.hit(answers, at, f"{error.get('code')}: {error.get('message')}")

    def metrics(self) -> list[Metric]:
        most = ", ".join(f"{code} {count:,}" for code, count in self._codes.most_common(3))
        of = self._failed.of
        codes = [
            Metric(f"failed.{code}", count / of, count, of)
            for code, count in self._codes.most_common()
        ]
        return [self._failed.metric(most), *codes]
