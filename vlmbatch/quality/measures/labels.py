"""How often each label comes."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vlmbatch.quality.base import Answers, Measure, Metric
from vlmbatch.quality.scratch import Scratch

MOST = 20
LABELS = pa.schema(
    [pa.field("task", pa.uint8()), pa.field("label", pa.string()), pa.field("n", pa.int64())]
)
"""How often a label comes in a batch; to be summed up."""


class Labels(Measure):
    """``labels``: different ones. ``top_label``: the share of the most frequent. ``evenness``: the
    entropy of their shares over its maximum; 1 if all come alike, 0 if only one comes.
    ``labels_unseen``: of those asked for, how many never came. ``label.NAME``: its share.

    Labels are the same but for case and spaces around them.
    """

    names: tuple[str, ...] = ("labels", "top_label", "evenness")
    families = ("label.",)

    def __init__(self, scratch: Scratch, number: int, asked: Sequence[str] = ()) -> None:
        self._scratch = scratch
        self._number = number
        self._asked = sorted({_label(label) for label in asked})
        if self._asked:
            self.names = (*Labels.names, "labels_unseen")

    @abstractmethod
    def _labels_in(self, answers: Answers) -> pa.Array:
        """Labels of these answers, nulls allowed."""

    def add(self, answers: Answers) -> None:
        labels = pc.utf8_lower(pc.utf8_trim_whitespace(self._labels_in(answers).drop_null()))
        counts = pc.value_counts(labels)
        if len(counts):
            tasks = pa.array([self._number] * len(counts), pa.uint8())
            columns = [tasks, counts.field("values"), counts.field("counts")]
            self._scratch.add("labels", pa.Table.from_arrays(columns, schema=LABELS))

    @cached_property
    def _sums(self) -> tuple[int, int, float]:
        """(different labels, all labels, entropy of their shares in nats)"""
        [(different, total, weighted)] = self._scratch.ask(
            "select count(*), coalesce(sum(n), 0)::bigint, coalesce(sum(n * ln(n)), 0) from "
            f"({_COUNTED})",
            self._number,
        )
        entropy = math.log(total) - weighted / total if total else 0.0
        return different, total, max(0.0, entropy)

    @cached_property
    def _most(self) -> list[tuple[str, int]]:
        found = self._scratch.ask(f"{_COUNTED} order by n desc, label limit ?", self._number, MOST)
        return [(label, count) for label, count in found]

    @cached_property
    def _unseen(self) -> list[str]:
        return [label for label in self._asked if not self._count(label)]

    def _count(self, label: str) -> int:
        found = self._scratch.ask(
            f"select n from ({_COUNTED}) where label = ?", self._number, label
        )
        return int(found[0][0]) if found else 0

    def metrics(self) -> list[Metric]:
        different, total, entropy = self._sums
        most = self._most
        top = most[0][1] if most else 0
        note = ", ".join(f"{label!r} {count:,}" for label, count in most[:5])
        metrics = [
            Metric("labels", float(different)),
            Metric("top_label", top / total if total else None, top, total, note),
            Metric("evenness", entropy / math.log(different) if different > 1 else None),
        ]
        if self._asked:
            metrics.append(Metric("labels_unseen", float(len(self._unseen))))
        return metrics

    def lines(self) -> list[tuple[str, str]]:
        different, total, entropy = self._sums
        if not total:
            return []
        even = f", evenness {entropy / math.log(different):.2f}" if different > 1 else ""
        lines = [("labels", f"{different:,} different among {total:,}{even}")]
        if self._unseen:
            shown = ", ".join(map(repr, self._unseen[:10]))
            more = f" and {len(self._unseen) - 10} more" if len(self._unseen) > 10 else ""
            lines.append(("never", f"{shown}{more}"))
        return lines

    def details(self) -> dict[str, Any]:
        unseen = {"unseen": self._unseen} if self._asked else {}
        return {"labels": {"most": dict(self._most), **unseen}}

    def value(self, name: str) -> float | None:
        if not name.startswith("label."):
            return super().value(name)
        total = self._sums[1]
        return self._count(_label(name.removeprefix("label."))) / total if total else None


class BoxLabels(Labels):
    """The labels of boxes."""

    def _labels_in(self, answers: Answers) -> pa.Array:
        boxes = pc.list_flatten(answers.ok.table["boxes"])
        return pc.struct_field(boxes, "label")


class AnswerLabels(Labels):
    """Whole answers: the choice that was made, or what a question was answered with, without a
    full stop at the end."""

    def _labels_in(self, answers: Answers) -> pa.Array:
        said = answers.said
        if self._asked:  # the column json has the choice itself
            texts = [value and str(json.loads(value)) for value in answers.ok.column("json")]
            return pa.array(texts, pa.string())
        return pc.utf8_rtrim(pc.utf8_trim_whitespace(said.table["text"]), ".")


def _label(text: str) -> str:
    return text.strip().lower()


_COUNTED = "select label, sum(n)::bigint as n from labels where task = ? group by label"
