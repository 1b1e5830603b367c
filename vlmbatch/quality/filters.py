"""The detectors as filters: which results not to train on, and why.

``reason_of`` judges one answer by itself. What depends on other answers or images (``duplicates``,
``over_limit``, ``near``) is found in a pass of its own beforehand, as ``Doomed`` results: so it is
the same wherever an export goes on after a kill.
"""

from __future__ import annotations

import json
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from vlmbatch.quality.images import ImageHash, near_duplicates
from vlmbatch.quality.looping import loop_in
from vlmbatch.quality.measures import is_prose, is_unlike_others
from vlmbatch.quality.scratch import Scratch
from vlmbatch.quality.wordings import preamble_of, refusal_in
from vlmbatch.quality.words import hash_of
from vlmbatch.reading import CUT
from vlmbatch.tasks import Task

_TEXTS: dict[str, tuple[str, Callable[[str], object]]] = {
    "refusals": ("refusal", refusal_in),
    "preambles": ("preamble", preamble_of),
    "loops": ("loop", loop_in),
}
TRUNCATED, DUPLICATES, NEAR = "truncated", "duplicate-captions", "near-duplicate-images"
FILTERS = (*_TEXTS, TRUNCATED, DUPLICATES, NEAR)
"""What ``--drop`` takes."""

_ANSWER = [("task", pa.uint8()), ("hash", pa.uint64()), ("row", pa.int64()), ("place", pa.int64())]
_PLACED = pa.schema(_ANSWER)


def reason_of(
    text: str, names: Collection[str] = FILTERS, *, finish_reason: str | None = None
) -> str | None:
    """Why this answer should be left out: ``refusal``, ``preamble``, ``loop``, ``truncated``; None:
    it may stay. ``names``: which of FILTERS to ask; those about other answers say nothing here."""
    for name, (reason, found_in) in _TEXTS.items():
        if name in names and found_in(text):
            return reason
    return "truncated" if TRUNCATED in names and finish_reason == CUT else None


def without_preamble(text: str) -> str:
    """ "The image shows a cat." as "A cat."; the text itself where nothing would be left."""
    rest = text
    while preamble := preamble_of(rest):  # "Sure! The image shows"
        rest = rest[preamble.length :].lstrip(" \t\r\n:,;\u3001\u3002\uff0c\uff1a-*")
    if not rest or rest == text:
        return text
    return rest[0].upper() + rest[1:]


@dataclass(frozen=True)
class Unwanted:
    """Of each result of a batch, ``reason_of``: texts are judged where answers are free text,
    truncation everywhere."""

    names: frozenset[str]
    tasks: Mapping[str, Task]

    def __call__(self, batch: pa.RecordBatch) -> pa.Array:
        texts = self.names & set(_TEXTS)
        cut = self.names & {TRUNCATED}
        columns = (batch[name].to_pylist() for name in ("task", "text", "finish_reason"))
        return pa.array(
            [
                reason_of(
                    text or "",
                    self.names if is_prose(self.tasks[task]) and texts else cut,
                    finish_reason=finished,
                )
                for task, text, finished in zip(*columns, strict=True)
            ],
            pa.string(),
        )


@dataclass
class Doomed:
    """Results that are left out for this reason. 16 bytes each; added in the output's order."""

    reason: str
    rows: array[int] = field(default_factory=lambda: array("q"))
    places: array[int] = field(default_factory=lambda: array("q"))
    """Which of the row's results; ALL of them."""

    ALL = -1

    def add(self, row: int, place: int) -> None:
        self.rows.append(row)
        self.places.append(place)

    @property
    def table(self) -> pa.Table:
        """To be kept in a file."""
        columns = {
            name: pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(values)])
            for name, values in (("row", self.rows), ("place", self.places))
        }
        return pa.table(columns).replace_schema_metadata({"reason": self.reason})

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        doomed = cls(table.schema.metadata[b"reason"].decode())
        for batch in table.to_batches():
            doomed.rows.extend(batch["row"].to_pylist())
            doomed.places.extend(batch["place"].to_pylist())
        return doomed

    def __call__(self, batch: pa.RecordBatch) -> pa.Array:
        """Of each result of a batch, the reason or null."""
        none = pa.nulls(batch.num_rows, pa.string())
        if not batch.num_rows:
            return none
        rows = batch["row"].to_pylist()
        first, stop = bisect_left(self.rows, rows[0]), bisect_right(self.rows, rows[-1])
        if first == stop:
            return none
        doomed = set(zip(self.rows[first:stop], self.places[first:stop], strict=True))
        keys = zip(rows, places_of(batch).to_pylist(), strict=True)
        found = [
            self.reason if key in doomed or (key[0], self.ALL) in doomed else None for key in keys
        ]
        return pa.array(found, pa.string())


def places_of(batch: pa.RecordBatch) -> pa.Array:
    """(request, sample) as one number that sorts alike."""
    requests = pc.multiply(batch["request"].cast(pa.int64()), 2**16)
    return pc.add(requests, batch["sample"].cast(pa.int64()))


def duplicates(batches: Iterable[pa.RecordBatch], tasks: Mapping[str, Task]) -> Doomed:
    """All but the first of the texts of a task that are the same but for case, spacing and
    punctuation at the ends; not of questions, whose answers may well be alike."""
    numbers = {name: n for n, (name, task) in enumerate(tasks.items()) if is_unlike_others(task)}

    def hashes(batch: pa.RecordBatch) -> Iterator[tuple[int, int, int]]:
        for at, (task, text) in enumerate(_columns(batch, "task", "text")):
            if task in numbers and text and text.strip():
                yield at, numbers[task], hash_of(text)

    return _ranked("duplicate_caption", batches, hashes, limit=1)


def over_limit(batches: Iterable[pa.RecordBatch], tasks: Mapping[str, Task], limit: int) -> Doomed:
    """Results each of whose labels has come ``limit`` times before, in the order of the output.

    Labels are those of boxes, choices, and answers to questions, by task; results of other tasks
    have none, and stay.
    """
    numbers = {name: number for number, name in enumerate(tasks)}

    def hashes(batch: pa.RecordBatch) -> Iterator[tuple[int, int, int]]:
        for at, (task, text, value, boxes) in enumerate(
            _columns(batch, "task", "text", "json", "boxes")
        ):
            for label in _labels(tasks[task], text, value, boxes):
                digest = xxhash.xxh3_64_intdigest(label.encode(errors="replace"))
                yield at, numbers[task], digest

    return _ranked("label_is_full", batches, hashes, limit=limit)


def near(hashes: Iterable[tuple[int, ImageHash]]) -> Doomed:
    """Rows whose image looks like that of an earlier row: (row, its first image's hash)."""
    doomed = Doomed("near_duplicate_image")
    for row, _ in near_duplicates(hashes):
        doomed.add(row, Doomed.ALL)
    return doomed


def _ranked(
    reason: str,
    batches: Iterable[pa.RecordBatch],
    hashes: Callable[[pa.RecordBatch], Iterator[tuple[int, int, int]]],
    *,
    limit: int,
) -> Doomed:
    """Results all of whose hashes have come ``limit`` times before. ``hashes``: of a batch, (which
    result, a number for the task, a hash)."""
    doomed = Doomed(reason)
    with Scratch({"answers": _PLACED}) as scratch:
        for batch in batches:
            found = list(hashes(batch))
            if not found:
                continue
            at, tasks, values = (list(column) for column in zip(*found, strict=True))
            of = pa.array(at)
            columns = [pa.array(tasks, pa.uint8()), pa.array(values, pa.uint64())]
            columns += [pc.take(batch["row"], of), pc.take(places_of(batch), of)]
            scratch.add("answers", pa.Table.from_arrays(columns, schema=_PLACED))
        for some in scratch.stream(_RANKED, limit):
            for row, place in some:
                doomed.add(row, place)
    return doomed


_RANKED = """
    select row, place from (
        select row, place, row_number() over (partition by task, hash order by row, place) as rank
        from (select distinct * from answers)
    ) group by row, place having min(rank) > ? order by row, place
"""


def _columns(batch: pa.RecordBatch, *names: str) -> Iterator[tuple[Any, ...]]:
    return zip(*(batch[name].to_pylist() for name in names), strict=True)


def _labels(task: Task, text: Any, value: Any, boxes: Any) -> set[str]:
    if isinstance(boxes, list):
        return {str(box["label"]).strip().lower() for box in boxes}
    if task.structure is not None:
        chosen = json.loads(value) if isinstance(value, str) else None
        return {chosen.strip().lower()} if isinstance(chosen, str) else set()
    if is_prose(task) and not is_unlike_others(task) and isinstance(text, str):
        return {text.strip().rstrip(".").lower()}
    return set()
