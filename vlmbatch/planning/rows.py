"""The rows that a run would still do, and what is asked about them; read as a run reads them."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from statistics import fmean

from vlmbatch.answering import RowRequests
from vlmbatch.manifest import Columns, Manifest, RowStream
from vlmbatch.records import IMAGE, Range, Request, Row
from vlmbatch.resolve import Asking

COUNTED_ROWS = 200_000
"""Of at most so many rows the requests are counted one by one: a few seconds."""
SHOWN_ROWS, SHOWN_REQUESTS = 3, 12
READ_ROWS = 2048
"""Where images lie in the manifest, a sample reads about so many rows at most: those before a row,
from the last one at which reading can begin, are read with it."""


@dataclass(frozen=True, slots=True)
class Requests:
    """How many requests the rows give that are to do. ``counted``: ``exact`` (each row gives as
    many), ``counted`` (from every row), or ``estimated`` (from the sample)."""

    count: int
    counted: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request as the family words it; ``<image>`` stands where the image goes."""

    row: int
    task: str
    prompt: str
    question: str | None
    problem: str | None = None


class RowsToDo:
    """The rows that are to do, and their requests."""

    def __init__(self, manifest: Manifest, pending: Sequence[Range], asking: Asking) -> None:
        self.pending = pending
        self.count = sum(map(len, pending))
        self._manifest = manifest
        self._asking = asking
        self._of = RowRequests(asking).of

    @cached_property
    def _starts(self) -> list[int]:
        return list(self._manifest.boundaries())

    def sample(self, count: int) -> Iterator[tuple[Row, list[Request]]]:
        """About so many rows, spread over those to do; the same ones each time."""
        chance = random.Random(0)
        reach = READ_ROWS // max(1, min(count, len(self._starts)))
        ends = list(accumulate(map(len, self.pending)))
        numbers = set()
        for index in range(min(count, self.count)):
            low, high = (self.count * i // min(count, self.count) for i in (index, index + 1))
            place = chance.randrange(low, high)
            part = bisect_right(ends, place)
            row = self.pending[part].stop - (ends[part] - place)
            if not self._asking.columns.images_as_uris:
                start = self._starts[bisect_right(self._starts, row) - 1]
                row = max(self.pending[part].first, start + (row - start) % reach)
            numbers.add(row)
        yield from ((row, self._of(row)) for row in self._at(sorted(numbers)))

    def prompts(self) -> list[Prompt]:
        """The requests of the first rows to do."""
        first = [row for rows in self.pending[:SHOWN_ROWS] for row in range(*_ends(rows))]
        asked = [
            request
            for row in self._at(first[:SHOWN_ROWS])
            for request in self._of(row)
            if request.sample == 0
        ]
        return [
            Prompt(
                each.row,
                each.task,
                each.prompt.replace(IMAGE, "<image>"),
                each.question,
                None if each.problem is None else each.problem.message,
            )
            for each in asked[:SHOWN_REQUESTS]
        ]

    def requests(self, sample: Sequence[int]) -> Requests:
        """Counted where that is cheap. ``sample``: how many requests some of the rows have."""
        asking, columns = self._asking, self._asking.columns
        if not _lists(self._manifest, columns):
            each = len(asking.tasks) * asking.num_samples
            return Requests(self.count * each, "exact")
        uris = columns.images_as_uris
        cheap = uris or all(file.format == "parquet" for file in self._manifest.files)
        if cheap and self.count <= COUNTED_ROWS:
            stream = RowStream(self._manifest, columns, images=uris)
            count = sum(len(self._of(row)) for rows in self.pending for row in stream.rows(rows))
            return Requests(count, "counted")
        mean = fmean(sample or [0])
        return Requests(round(self.count * mean), "estimated")

    def _at(self, numbers: Iterable[int]) -> Iterator[Row]:
        """These rows, ascending."""
        stream = RowStream(self._manifest, self._asking.columns)
        for number in numbers:
            yield from stream.rows(Range(number, number + 1))


def _ends(rows: Range) -> tuple[int, int]:
    return rows.first, min(rows.stop, rows.first + SHOWN_ROWS)


def _lists(manifest: Manifest, columns: Columns) -> bool:
    """Whether a row may give several requests of a task: it has a column of questions, or answers
    to be judged."""
    if manifest.answers is not None:
        return True
    for name in ("question", "questions", "phrase"):
        theirs = columns.names[name]
        if theirs in manifest.schema.names:
            kind = str(manifest.schema.field(theirs).type)
            if name == "questions" or "list" in kind:
                return True
    return False
