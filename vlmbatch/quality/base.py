"""What a measure is: it sees every answer of one task once, and ends with figures.

A measure's memory must not grow with the answers: counters, a few examples, and what lies in the
``Scratch``, which is on the disk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

EXAMPLES = 5
"""So many are kept of each finding: the first ones."""
EXAMPLE_CHARS = 200

COLUMNS = (
    *("row", "id", "task", "request", "sample", "question", "text", "boxes", "points", "json"),
    *("raw", "finish_reason", "image", "image_width", "image_height", "status", "error"),
)
"""The result columns that measures need."""


class Answers:
    """Results of one task, a few thousand, in the order of the output."""

    def __init__(self, table: pa.RecordBatch) -> None:
        self.table = table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def column(self, name: str) -> Sequence[Any]:
        """As Python values."""
        return self.table[name].to_pylist()  # type: ignore[no-any-return]

    @cached_property
    def ok(self) -> Answers:
        """Those that did not fail."""
        return Answers(self.table.filter(pc.equal(self.table["status"], "ok")))

    @cached_property
    def said(self) -> Answers:
        """Those that did not fail and whose text is not blank."""
        text = pc.fill_null(self.ok.table["text"], "")
        there = pc.not_equal(pc.utf8_trim_whitespace(text), "")
        return Answers(self.ok.table.filter(there))

    @cached_property
    def texts(self) -> Sequence[str]:
        return self.column("text")

    def example(self, at: int, shown: str | None = None) -> Example:
        """``shown``: what of it to show; by default the text, else the raw answer."""
        table = self.table
        text = shown or table["text"][at].as_py() or table["raw"][at].as_py() or ""
        short = text if len(text) <= EXAMPLE_CHARS else f"{text[: EXAMPLE_CHARS - 3]}..."
        return Example(table["row"][at].as_py(), table["id"][at].as_py(), short)


@dataclass(frozen=True, slots=True)
class Example:
    """Where to look. ``text``: the beginning of what is wrong there."""

    row: int
    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure: ``count`` of ``of`` as a share from 0 to 1, or a number that is no share.

    ``value`` is None where there was nothing to measure. ``note``: what a person should know
    beside it, in a few words.
    """

    name: str
    value: float | None
    count: int | None = None
    of: int | None = None
    note: str = ""
    examples: tuple[Example, ...] = ()

    @property
    def is_share(self) -> bool:
        return self.count is not None


@dataclass(slots=True)
class Share:
    """A share that is being counted."""

    name: str
    count: int = 0
    of: int = 0
    examples: list[Example] = field(default_factory=list)

    def add(self, of: int, found: pa.BooleanArray | Sequence[int], answers: Answers) -> None:
        """``of`` answers were looked at; ``found``: which of ``answers`` have it, as a mask or as
        indices."""
        if isinstance(found, pa.BooleanArray):
            found = pc.indices_nonzero(found).to_pylist()
        self.of += of
        self.count += len(found)
        for at in found[:EXAMPLES]:
            self.show(answers, at)

    def hit(self, answers: Answers, at: int, shown: str | None = None) -> None:
        """One more has it; how many were looked at is said to ``add``."""
        self.count += 1
        self.show(answers, at, shown)

    def show(self, answers: Answers, at: int, shown: str | None = None) -> None:
        """As an example, as long as there are few."""
        if len(self.examples) < EXAMPLES:
            example = answers.example(at, shown)
            if example not in self.examples:
                self.examples.append(example)

    @property
    def value(self) -> float | None:
        return self.count / self.of if self.of else None

    def metric(self, note: str = "") -> Metric:
        examples = tuple(self.examples)
        return Metric(self.name, self.value, self.count, self.of, note, examples)


class Measure(ABC):
    """One measure of one task. ``metrics``, ``details``, ``lines`` and ``value`` are asked when
    everything has been added."""

    names: tuple[str, ...]
    """Of its metrics, as far as they do not depend on what comes."""
    families: tuple[str, ...] = ()
    """Beginnings of the names of metrics that depend on what comes: ``failed.`` of
    ``failed.image_missing``. One that has not come has the share 0."""

    @abstractmethod
    def add(self, answers: Answers) -> None: ...

    @abstractmethod
    def metrics(self) -> list[Metric]:
        """All of them; those of families that have come."""

    def details(self) -> dict[str, Any]:
        """What else the JSON should hold: histograms, lists of the most frequent."""
        return {}

    def lines(self) -> list[tuple[str, str]]:
        """(name, what is said) for figures that are no shares; shares get a line each by
        themselves."""
        return []

    def value(self, name: str) -> float | None:
        """Of one of its metrics, also of a family's that has not come."""
        values = {metric.name: metric.value for metric in self.metrics()}
        return values.get(name, 0.0)
