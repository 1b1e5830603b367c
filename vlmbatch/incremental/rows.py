"""The rows of a generation, read from tonight's manifest under their numbers in the output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from vlmbatch.manifest import RowStream
from vlmbatch.records import Range, Row
from vlmbatch.results.generations import Kind, Piece, Selection
from vlmbatch.results.output import Output
from vlmbatch.results.retry import Earlier, FailedResults

REPEATED = "an earlier row of the manifest has the same id"
GONE = "it left the manifest before it was asked about"


def earlier_of(selection: Selection, output: Output) -> Earlier:
    """Which results of a row the generation asks for again: where it is there for what failed."""
    generation = selection.generation
    failed = FailedResults(output, set(generation.codes), max_attempts=generation.max_attempts)

    def earlier(row: int) -> Mapping[tuple[int, int], int] | None:
        return failed.attempts(row) if selection.kind_of(row) is Kind.FAILED else None

    return earlier


class SelectedRows:
    """Reads as a RowStream does; ranges are of the output's rows. A row that is not in the
    selection is left out."""

    def __init__(self, stream: RowStream, selection: Selection) -> None:
        self._stream = stream
        self._selection = selection

    def rows(self, wanted: Range) -> Iterator[Row]:
        for piece in self._selection.pieces(wanted):
            yield from self._rows_of(piece)

    def absent(self, wanted: Range) -> list[int]:
        return self._selection.absent(wanted)

    def _rows_of(self, piece: Piece) -> Iterator[Row]:
        first, count = piece.rows.first, len(piece.rows)
        if piece.position is None:
            yield from (Row(row, "", (), {}, GONE) for row in range(first, first + count))
            return
        shift = first - piece.position
        for row in self._stream.rows(Range(piece.position, piece.position + count)):
            problem = REPEATED if piece.kind is Kind.REPEATED else row.problem
            yield replace(row, row=row.row + shift, problem=problem)
