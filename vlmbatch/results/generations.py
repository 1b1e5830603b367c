"""Which manifest rows become which rows of an incremental output: one file per start that had any.

``generations/NNNN.arrow`` is written before any of its rows is asked about. Rows of the output
count on from start to start, so a row's number says nothing of its place in the manifest of that
night: this file does.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vlmbatch.errors import RunStopped
from vlmbatch.intervals import Intervals
from vlmbatch.records import Range
from vlmbatch.results.files import ResultFile, list_shards
from vlmbatch.results.store import FOOTER_BYTES, GENERATIONS, Store

_NAME = re.compile(r"(\d{4,})\.arrow")
_META = b"vlmbatch"

TABLE = pa.schema(
    [
        ("row", pa.int64()),  # of the output: the first of `rows` rows, ascending
        ("position", pa.int64()),  # of the manifest: the first row; null where it has none
        ("rows", pa.int64()),
        ("kind", pa.int8()),
        ("version", pa.string()),  # of the images, where it was looked at; then `rows` is 1
    ]
)


class Kind(IntEnum):
    """Why a row is in a generation."""

    NEW = 0
    REPEATED = 1
    """Its id is that of an earlier row of the same manifest: it becomes bad_row."""
    GONE = 2
    """It was to be new in a start that was cut short, and is in no manifest any more: bad_row."""
    CHANGED = 3
    """Answered before, and its image is another one now: asked anew."""
    FAILED = 4
    """Some of its results failed, and may pass: these are asked again."""
    SEEN = 5
    """Answered before; here for its version only."""


ADDED = (Kind.NEW, Kind.REPEATED, Kind.GONE)
AGAIN = (Kind.CHANGED, Kind.FAILED)


@dataclass(frozen=True, slots=True)
class Generation:
    """What a generation file says of itself."""

    run: str
    epoch: int
    """Of the start that it was planned in."""
    manifest: str
    """The identity of that night's manifest."""
    added: tuple[Range, ...] = ()
    """The output rows that it fills: first what earlier starts left empty, then on from the end."""
    rows: int = 0
    """Of the output, once the start is through."""
    counts: dict[str, int] = field(default_factory=dict)
    """Rows by kind, in lower case."""
    codes: tuple[str, ...] = ()
    """Of the failed results that are asked again; empty means all."""
    max_attempts: int | None = None
    """Results that were asked so often are left as they are."""

    @property
    def asked(self) -> int:
        """Rows that this start has to do."""
        return sum(self.counts.get(kind.name.lower(), 0) for kind in (*ADDED, *AGAIN))

    def is_added(self, row: int) -> bool:
        """Whether the output's row is one that it fills, not one that stands and is patched."""
        return any(rows.first <= row < rows.stop for rows in self.added)

    def is_late(self, shard: ResultFile) -> bool:
        """Whether a worker of an earlier start committed it when this one was planned already: it
        has rows that were free then, and are others now."""
        if shard.patch or shard.epoch >= self.epoch:
            return False
        return shard.rows.stop > self.rows or bool(Intervals(self.added).within(shard.rows))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "added": [[rows.first, rows.stop] for rows in self.added]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Generation:
        added = tuple(Range(first, stop) for first, stop in value["added"])
        return cls(**{**value, "added": added, "codes": tuple(value["codes"])})


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of the output with the manifest rows that they are about, both without a gap."""

    rows: Range
    position: int | None
    kind: Kind


class Selection:
    """A generation as it is read: its file stays mapped, and little of it is in memory."""

    def __init__(self, source: pa.NativeFile) -> None:
        reader = pa.ipc.open_file(source)
        self.generation = _said_by(reader)
        self._batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self._firsts = [batch["row"][0].as_py() for batch in self._batches]

    def batches(self) -> list[pa.RecordBatch]:
        """As TABLE has it."""
        return self._batches

    def pieces(self, rows: Range | None = None) -> Iterator[Piece]:
        """What it has of these rows of the output, or of all, ascending; SEEN ones are left out."""
        wanted = Range(0, 2**62) if rows is None else rows
        start = max(0, bisect_right(self._firsts, wanted.first) - 1)
        for batch in self._batches[start:]:
            column = batch["row"]
            place = _at_or_before(column, wanted.first)
            for entry in _entries(batch.slice(place)):
                first, position, count, kind = entry
                if first >= wanted.stop:
                    return
                low, high = max(first, wanted.first), min(first + count, wanted.stop)
                if low < high and kind != Kind.SEEN:
                    moved = None if position is None else position + low - first
                    yield Piece(Range(low, high), moved, Kind(kind))

    def absent(self, rows: Range) -> list[int]:
        """Rows of the range that it has not: between those that are asked again."""
        return [
            row
            for gap in Intervals(piece.rows for piece in self.pieces(rows)).missing(rows)
            for row in range(gap.first, gap.stop)
        ]

    def kind_of(self, row: int) -> Kind | None:
        """Of an output row; None where it is not in the selection."""
        found = next(self.pieces(Range(row, row + 1)), None)
        return None if found is None else found.kind

    def anew(self, rows: Range) -> list[int]:
        """The rows of the range whose images have changed."""
        changed = (piece.rows for piece in self.pieces(rows) if piece.kind is Kind.CHANGED)
        return [row for each in changed for row in range(each.first, each.stop)]

    def rows_of(self, *kinds: Kind) -> Iterator[int]:
        """Output rows of these kinds, ascending."""
        wanted = pa.array([int(kind) for kind in kinds], pa.int8())
        for batch in self._batches:
            found = batch.filter(pc.is_in(batch["kind"], value_set=wanted))
            for first, _, count, _ in _entries(found):
                yield from range(first, first + count)

    def positions(self) -> list[Range]:
        """The manifest rows that are asked about, ascending."""
        asked = (Kind.NEW, *AGAIN)
        return list(
            Intervals(
                Range(piece.position, piece.position + len(piece.rows))
                for piece in self.pieces()
                if piece.kind in asked and piece.position is not None
            )
        )

    def boundaries(self, of_manifest: list[int]) -> Iterator[int]:
        """Output rows at which it is cheap to begin to read, given those of the manifest."""
        for piece in self.pieces():
            if piece.position is None or piece.kind in AGAIN:
                continue
            index = bisect_right(of_manifest, piece.position)
            stop = piece.position + len(piece.rows)
            while index < len(of_manifest) and of_manifest[index] < stop:
                yield piece.rows.first + of_manifest[index] - piece.position
                index += 1


def write_generation(path: Path, generation: Generation, batches: Iterator[pa.RecordBatch]) -> None:
    """``batches`` as TABLE has it, ascending by ``row``."""
    schema = TABLE.with_metadata({_META: json.dumps(generation.to_json()).encode()})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            if batch.num_rows:
                writer.write_batch(batch.cast(TABLE).replace_schema_metadata(schema.metadata))


def open_selection(store: Store, number: int) -> Selection:
    """Raises RunStopped where that generation is not there, or is no such file."""
    with _reading(store, number):
        return Selection(store.whole(name_of(number)))


def read_generation(store: Store, number: int) -> Generation:
    """What the file says of itself; its rows are not read. Raises RunStopped."""
    with _reading(store, number), store.ranged(name_of(number), block=FOOTER_BYTES) as file:
        return _said_by(pa.ipc.open_file(file))


@contextmanager
def _reading(store: Store, number: int) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise RunStopped(
            f"cannot read {store.at(name_of(number))}: {error}",
            hint="restore it, or delete it: it has no answers, only what a start had to do; then "
            "--detect-changes misses images of its rows that were replaced before the next start",
        ) from None


def _said_by(reader: pa.RecordBatchFileReader) -> Generation:
    return Generation.from_json(json.loads(reader.schema.metadata[_META]))


def name_of(number: int) -> str:
    return f"{GENERATIONS}/{number:04d}.arrow"


def numbers(store: Store) -> list[int]:
    """Of the generations that are there, ascending."""
    found = (_NAME.fullmatch(entry.name) for entry in store.entries(GENERATIONS))
    return sorted(int(match[1]) for match in found if match)


def newest_epoch(store: Store) -> int | None:
    """Of the start that the newest generation was planned in; None where there is none."""
    there = numbers(store)
    return read_generation(store, there[-1]).epoch if there else None


def delete_late(store: Store, generation: Generation) -> None:
    """Only the holder of the lock may."""
    store.delete(shard.name for shard in list_shards(store) if generation.is_late(shard))


def _at_or_before(rows: pa.Array, wanted: int) -> int:
    """The index of the last value that is at most ``wanted``; 0 where none is."""
    low, high = 0, len(rows)
    while low < high:
        middle = (low + high) // 2
        if rows[middle].as_py() <= wanted:
            low = middle + 1
        else:
            high = middle
    return max(0, low - 1)


_ENTRIES = 4096


def _entries(batch: pa.RecordBatch) -> Iterator[tuple[int, int | None, int, int]]:
    """(row, position, rows, kind); a few become Python's at first, then some thousand at a time."""
    start, count = 0, 4
    while start < batch.num_rows:
        some = batch.slice(start, count)
        columns = (some[name].to_pylist() for name in ("row", "position", "rows", "kind"))
        yield from zip(*columns, strict=True)
        start, count = start + count, min(4 * count, _ENTRIES)
