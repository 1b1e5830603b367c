"""One text for many images: the sign of a model that does not look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import pyarrow as pa
import xxhash

from vlmbatch.quality.base import EXAMPLES, Answers, Example, Measure, Metric
from vlmbatch.quality.scratch import Scratch
from vlmbatch.quality.words import hash_of

MOST = 10
TEXTS = pa.schema(
    [
        pa.field("task", pa.uint8()),
        pa.field("hash", pa.uint64()),
        pa.field("image", pa.uint64()),
        pa.field("row", pa.int64()),
    ]
)
"""A line for each text. Two of ten million share a hash with a probability of 3 in a million."""


class Repeated(Measure):
    """``repeated``: of the texts, those that another image has as well, but for case, spacing and
    punctuation at the ends. ``repeated.most``: the share of the most frequent text.

    Images are told apart by their reference, and by their row where they have none; several texts
    about one image may be alike.
    """

    names = ("repeated", "repeated.most")

    def __init__(self, scratch: Scratch, number: int, results_of: Callable[[int], Answers]) -> None:
        self._scratch = scratch
        self._number = number
        self._results_of = results_of
        self._texts = 0

    def add(self, answers: Answers) -> None:
        said = answers.said
        if not len(said):
            return
        self._texts += len(said)
        hashes = [hash_of(text) for text in said.texts]
        rows = said.table["row"]
        images = _images(said.column("image"), rows.to_pylist())
        tasks = pa.array([self._number] * len(said), pa.uint8())
        columns = [tasks, pa.array(hashes, pa.uint64()), pa.array(images, pa.uint64()), rows]
        self._scratch.add("texts", pa.Table.from_arrays(columns, schema=TEXTS))

    @cached_property
    def _counts(self) -> tuple[int, int]:
        """(texts that another image has as well, how often the most frequent of them comes)"""
        [(repeated, most)] = self._scratch.ask(_COUNTS, self._number)
        return int(repeated), int(most)

    @cached_property
    def _most(self) -> list[tuple[int, Example]]:
        """(how often, where it stands first) of the most frequent repeated texts."""
        found = self._scratch.ask(_MOST, self._number, MOST)
        return [(count, self._first(value, row)) for value, count, row in found]

    def _first(self, value: int, row: int) -> Example:
        said = self._results_of(row).said
        return next(
            said.example(at) for at, text in enumerate(said.texts) if hash_of(text) == value
        )

    def metrics(self) -> list[Metric]:
        of = self._texts
        if not of:
            return [Metric("repeated", None, 0, 0), Metric("repeated.most", None, 0, 0)]
        repeated, most = self._counts
        examples = tuple(
            replace(example, text=f"{count:,} times: {example.text}")
            for count, example in self._most[:EXAMPLES]
        )
        return [
            Metric("repeated", repeated / of, repeated, of, examples=examples),
            Metric("repeated.most", most / of, most, of),
        ]

    def details(self) -> dict[str, Any]:
        if not self._texts:
            return {}
        most = [{"times": count, **asdict(example)} for count, example in self._most]
        return {"most_repeated": most}


def _images(references: Sequence[str | None], rows: Sequence[int]) -> list[int]:
    """A number for each image, mostly another for another image."""
    keys = (f"row {row}" if uri is None else uri for uri, row in zip(references, rows, strict=True))
    return [xxhash.xxh3_64_intdigest(key.encode(errors="replace")) for key in keys]


_GROUPS = "from texts where task = ? group by hash having min(image) <> max(image)"
_COUNTS = f"select coalesce(sum(n), 0), coalesce(max(n), 0) from (select count(*) as n {_GROUPS})"
_MOST = f"select hash, count(*) as n, min(row) as first {_GROUPS} order by n desc, first limit ?"
