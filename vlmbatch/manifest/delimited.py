"""CSV and TSV: a header, then one record per row, in which quoted cells may hold line ends."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pyarrow as pa

from vlmbatch.errors import ManifestError
from vlmbatch.manifest import text
from vlmbatch.manifest.files import ManifestFile, Place, reading

NAME = "csv"
CALLED = "CSV (.csv, .tsv)"
SUFFIXES = (".csv", ".tsv", ".tab")
check = text.check_size
csv.field_size_limit(text.LINE_BYTES)

Cells = list[str] | str
"""A record's cells, or what is wrong with it."""


def look_at(place: Place) -> tuple[ManifestFile, pa.Schema]:
    text.refuse_utf16(place)
    header, delimiter = _header(place)
    file = text.indexed(place, NAME, lambda stream: _rows(stream, 0, delimiter), lambda _: None)
    return file, pa.schema([(name, pa.string()) for name in header])


def records(
    place: Place,
    file: ManifestFile,
    first: int,
    columns: Sequence[str],
    schema: pa.Schema,
    asked: Collection[str],
) -> Iterator[tuple[dict[str, Any], str | None]]:
    header, delimiter = _header(place)
    places = {name: header.index(name) for name in columns}
    with reading(place.path), text.text_of(place) as stream:
        row, offset = text.nearest_start(file, first)
        if offset:
            stream.seek(offset)
        for _, cells in _rows(stream, offset, delimiter):
            if row >= first:
                yield _record(cells, places, len(header))
            row += 1


def _record(cells: Cells, places: dict[str, int], width: int) -> tuple[dict[str, Any], str | None]:
    """Cells that are empty, or missing at the end of the record, are null."""
    if isinstance(cells, str):
        return dict.fromkeys(places), f"the record {cells}"
    record = {name: (cells[at] or None) if at < len(cells) else None for name, at in places.items()}
    if len(cells) > width:
        return record, f"the record has {len(cells)} cells, and the header {width}"
    return record, None


def _header(place: Place) -> tuple[list[str], str]:
    """(names of the columns, what separates them). Raises ManifestError where there is none."""
    with reading(place.path), text.text_of(place, buffer=text.CHUNK_BYTES) as stream:
        head = stream.read(text.CHUNK_BYTES).removeprefix(text.BOM)
    first_line = next((line for line in head.split(b"\n") if line.strip()), b"")
    if not first_line:
        raise _no_header(place, "it is empty")
    if b"\0" in first_line or len(first_line) == text.CHUNK_BYTES:
        raise _no_header(place, "its first line is no header")
    delimiter = "\t" if _is_tabbed(place.name) else ","
    if delimiter == "," and b"," not in first_line and b";" in first_line:
        delimiter = ";"  # as spreadsheets write it where the comma is a decimal point
    _, found = next(_cells(io.BytesIO(head), 0, delimiter))
    if isinstance(found, str):
        raise _no_header(place, f"its header {found}")
    names = [name.strip() or f"column {at}" for at, name in enumerate(found, 1)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ManifestError(
            f"the header of {place.path} names {twice[0]!r} more than once",
            hint="give every column another name",
        )
    return names, delimiter


def _no_header(place: Place, found: str) -> ManifestError:
    return ManifestError(
        f"cannot read {place.path}: {found}",
        hint="a CSV manifest is UTF-8 text that begins with the names of its columns",
    )


def _is_tabbed(name: str) -> bool:
    plain = name.lower()
    for suffix in text.COMPRESSED:
        plain = plain.removesuffix(suffix)
    return plain.endswith((".tsv", ".tab"))


def _rows(stream: Any, offset: int, delimiter: str) -> Iterator[tuple[int, Cells]]:
    """Records from ``offset`` on; from 0 on, those after the header."""
    found = _cells(stream, offset, delimiter)
    if offset == 0:
        next(found, None)
    yield from found


def _cells(stream: Any, offset: int, delimiter: str) -> Iterator[tuple[int, Cells]]:
    """(place after the record, its cells); blank lines are no records."""
    source = _Lines(stream, offset)
    reader = csv.reader(source, delimiter=delimiter)
    while True:
        source.begin()
        try:
            cells: Cells = next(reader)
        except StopIteration:
            return
        except (_TooLong, csv.Error) as error:
            cells = _said(error)
            reader = csv.reader(source, delimiter=delimiter)
        if cells:
            yield source.after, source.problem or cells


def _said(error: Exception) -> str:
    if "field limit" in str(error):
        return f"has a cell longer than {text.LINE_BYTES // 2**20} MiB"
    if "new-line character" in str(error):
        return "has a carriage return outside of quotes"
    return str(error)


class _TooLong(Exception):
    pass


class _Lines:
    """Lines as the csv module wants them, which takes as many as its next record has."""

    def __init__(self, stream: Any, offset: int) -> None:
        self._lines = text.lines(stream, offset)
        self._at_start = offset == 0
        self._taken = 0
        self.after = offset
        self.problem: str | None = None
        """What is wrong with a line of this record."""

    def begin(self) -> None:
        """What is read from here on is another record."""
        self.problem = None
        self._taken = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        found = next(self._lines, None)
        if found is None:  # the reader looks for more in an open quote only
            self.problem = (
                "opens a quote that is never closed, so that all to the end of the file belongs "
                f"to it: {self._taken:,} line{'s' if self._taken != 1 else ''}"
            )
            raise StopIteration
        self.after, line = found
        self._taken += 1
        if line is None:
            self._at_start = False
            raise _TooLong(f"has a line longer than {text.LINE_BYTES // 2**20} MiB")
        if self._at_start:
            line = line.removeprefix(text.BOM)
            self._at_start = False
        try:
            return line.decode() + "\n"
        except UnicodeDecodeError:
            self.problem = "is no UTF-8 text"
            return line.decode(errors="replace") + "\n"
