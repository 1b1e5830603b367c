"""The answers of another run, row by row beside the rows that they are about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from vlmbatch.errors import ManifestError
from vlmbatch.judging import given_of
from vlmbatch.manifest.files import reading
from vlmbatch.records import Given
from vlmbatch.results.files import part_numbered
from vlmbatch.results.store import Store, open_store

_NEEDED = (
    *("row", "id", "task", "question", "text", "boxes", "points", "image_width", "image_height"),
    *("status", "error"),
)


@dataclass(frozen=True, slots=True)
class Answers:
    """A finished output. Whatever changes one of its parts gives that part another epoch."""

    place: str
    """The address of the output."""
    run: str
    rows: int
    part_rows: int
    epochs: tuple[int, ...]
    """Of its parts, by number."""

    @property
    def identity(self) -> str:
        return f"{self.run} {self.rows} {' '.join(map(str, self.epochs))}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Answers:
        return cls(**{**stored, "epochs": tuple(stored["epochs"])})

    def from_row(self, first: int) -> Iterator[tuple[int, str, tuple[Given, ...]]]:
        """(row, its id, its answers by request and sample), from ``first`` on.

        Raises ManifestError where a part is not what it was."""
        store = open_store(self.place)
        for number in range(first // self.part_rows, len(self.epochs)):
            records = self._records(store, number, first)
            for (row, identity), of_row in groupby(records, lambda each: (each["row"], each["id"])):
                yield row, identity, tuple(map(given_of, of_row))

    def _records(self, store: Store, number: int, first: int) -> Iterator[Mapping[str, Any]]:
        with reading(self.place):
            part = part_numbered(store, number)
            if part is None or (part.run, part.epoch) != (self.run, self.epochs[number]):
                raise ManifestError(
                    f"the answers in {self.place} changed since this run was planned",
                    hint="run the same command again to see what changed",
                )
            for batch in part.batches(columns=_NEEDED):
                if batch["row"][-1].as_py() >= first:
                    for record in batch.to_pylist():
                        if record["row"] >= first:
                            yield record
