"""The input table: files as one sequence of rows, of which any range can be read."""

from __future__ import annotations

import base64
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import pyarrow as pa
import xxhash

from vlmbatch.errors import ManifestError, ManifestUnreachable
from vlmbatch.manifest import images
from vlmbatch.manifest.answers import Answers
from vlmbatch.manifest.columns import ASKED, Columns, row_of
from vlmbatch.manifest.files import ManifestFile, Place, in_order
from vlmbatch.manifest.formats import FORMATS, OPEN
from vlmbatch.manifest.listing import Filters, list_files, sizes_below
from vlmbatch.manifest.schemas import common_schema
from vlmbatch.manifest.values import schema_of_both, settled
from vlmbatch.records import Range, Row


@dataclass(frozen=True, slots=True)
class Manifest:
    """The input table: files in the order of their paths, one sequence of rows over them."""

    folder: str
    """Relative image paths start here: a local path, or the URI of a place in a store."""
    files: tuple[ManifestFile, ...]
    schema: pa.Schema
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What was decided in listing it."""
    answers: Answers | None = None
    """Of another run about these rows, to be judged; then the rows are those that it answered."""

    @property
    def rows(self) -> int:
        return self.answers.rows if self.answers else sum(file.rows for file in self.files)

    def rows_within(self, limit: int | None) -> int:
        """How many rows a run with this ``--limit`` has."""
        return min(self.rows, limit or self.rows)

    @property
    def identity(self) -> str:
        """xxh3-128 hex over each file's name, size and identity, and what the answers are."""
        digest = xxhash.xxh3_128()
        for file in self.files:
            digest.update(f"{file.name}\0{file.size}\0{file.identity}\n".encode())
        if self.answers is not None:
            digest.update(self.answers.identity.encode())
        return digest.hexdigest()

    @property
    def extent(self) -> str:
        """``200 rows in 3 files``, ``200 images``, ``200 rows of answers in OUTPUT``."""
        if self.answers is not None:
            return f"{self.rows:,} rows of answers in {self.answers.place}"
        if self.files[0].format == images.NAME:
            return f"{self.rows:,} image{'s' if self.rows != 1 else ''}"
        files, version = len(self.files), self.files[0].version
        if version is not None:
            of = f"version {version:,} of a table" if files == 1 else f"{files:,} tables"
            return f"{self.rows:,} rows in {of}"
        return f"{self.rows:,} rows in {files:,} file{'s' if files != 1 else ''}"

    def boundaries(self) -> Iterator[int]:
        """Row numbers at which it is cheap to begin, ascending: of files, of row groups."""
        row = 0
        for file in self.files:
            for start in file.starts:
                yield row + start
            row += file.rows

    def to_json(self) -> dict[str, Any]:
        """As run.json keeps it: the list that a resume uses again."""
        schema = base64.b64encode(self.schema.serialize()).decode()
        files = [file.to_json() for file in self.files]
        found = {"folder": self.folder, "schema": schema, "files": files}
        return found if self.answers is None else {**found, "answers": self.answers.to_json()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Manifest:
        """As run.json has it; only the first file is looked at, each other when it is opened."""
        files = tuple(ManifestFile.from_json(file) for file in stored["files"])
        folder = stored["folder"]
        first = files[0]
        FORMATS[first.format].check(Place(folder, first.name, first.version), first)
        answers = stored.get("answers")
        return cls(
            folder,
            files,
            stored_schema(stored),
            answers=None if answers is None else Answers.from_json(answers),
        )


def stored_schema(stored: Mapping[str, Any]) -> pa.Schema:
    """The columns of the manifest that run.json has."""
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(stored["schema"])))


def stored_rows(stored: Mapping[str, Any]) -> int:
    """How many rows it has: ``Manifest.rows``, without a look at its files."""
    answers = stored.get("answers")
    return int(answers["rows"] if answers else sum(file["rows"] for file in stored["files"]))


def changes(stored: Mapping[str, Any], now: Manifest) -> str | None:
    """Which files are not what they were in the manifest that run.json has, in a line; None where
    all are."""
    before = {file["name"]: ManifestFile.from_json(file) for file in stored["files"]}
    there = {file.name: file for file in now.files}
    said = [
        *(f"{name} is gone" for name in before.keys() - there.keys()),
        *(f"{name} is new" for name in there.keys() - before.keys()),
        *(
            _change(before[name], file)
            for name, file in there.items()
            if name in before
            and (file.size, file.identity) != (before[name].size, before[name].identity)
        ),
    ]
    said.sort()
    more = f", and {len(said) - 3:,} more" if len(said) > 3 else ""
    return f"{', '.join(said[:3])}{more}" if said else None


def _change(before: ManifestFile, now: ManifestFile) -> str:
    if now.format == images.NAME:
        return f"images from {now.name} on have other sizes"
    if now.size == before.size:
        return f"{now.name} has other content"
    return f"{now.name} had {before.size:,} bytes, and has {now.size:,}"


def open_manifest(
    paths: Sequence[str],
    stored: Mapping[str, Any] | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Manifest:
    """The manifest that these files, folders and globs name; ``stored`` is an earlier listing.

    ``include`` and ``exclude`` are globs that filter what is found. Raises ManifestError, naming
    the file and what was found, or ManifestUnreachable.
    """
    if stored is not None:
        folder = stored["folder"]
        before = [ManifestFile.from_json(file) for file in stored["files"]]
        if before[0].format == images.NAME:
            names = (name for file in before for name in images.names_of(file))
            now = images.check_is_whole(before, sizes_below(folder, names))
            return Manifest(folder, tuple(now), images.SCHEMA)
        places = [(Place(folder, file.name, file.version), file.format) for file in before]
        return _looked_at(folder, places, ())
    listing = list_files(paths, Filters(include, exclude))
    if listing.format == images.NAME:
        pieces = tuple(images.listed(listing.sizes))
        return Manifest(listing.folder, pieces, images.SCHEMA, listing.notes)
    places = [(Place(listing.folder, name), listing.format) for name in listing.names]
    return _looked_at(listing.folder, places, listing.notes)


def _looked_at(
    folder: str, places: Sequence[tuple[Place, str]], notes: tuple[str, ...]
) -> Manifest:
    files: list[ManifestFile] = []
    schema: pa.Schema | None = None
    looks = [partial(FORMATS[format].look_at, place) for place, format in places]
    looked = in_order(looks, one_by_one=places[0][0].is_local)
    for (place, format), (file, found) in zip(places, looked, strict=True):
        if schema is None:
            schema = found
        elif format in OPEN:
            schema = schema_of_both(schema, found)
        elif (both := common_schema(schema, found)) is not None:
            schema = both
        else:
            raise ManifestError(
                f"{place.path} has other columns than {places[0][0].path} "
                f"({_columns(found)} against {_columns(schema)})",
                hint="give a manifest whose files agree on column names and types",
            )
        files.append(file)
    assert schema is not None  # list_files raises where there is no file
    if not schema.names and not any(file.rows for file in files):
        raise ManifestError(
            f"{places[0][0].path} has no rows, and so no columns",
            hint="of a CSV without rows the header, of a Parquet file its schema says the columns",
        )
    if places[0][1] in OPEN:
        schema = settled(schema)
    return Manifest(folder, tuple(files), schema, notes)


class RowStream:
    """Rows of ranges, in order. A range that begins further on, before the next place at which it
    is cheap to begin, is read in the open file, past what lies between."""

    def __init__(self, manifest: Manifest, columns: Columns, *, images: bool = True) -> None:
        """``images`` False: of Parquet, that column is not read, and every row has one stand-in."""
        self._manifest = manifest
        self._columns = columns
        self._images = images
        image = columns.names["image"]
        self._to_read = [name for name in columns.to_read if images or name != image]
        self._asked = {columns.names[name] for name in ("image", "id", *ASKED)}
        self._position = -1
        self._open: Iterator[Row] = iter(())

    def rows(self, wanted: Range) -> Iterator[Row]:
        """The rows of this range, one at a time. Raises ManifestError if the file changed, and
        ManifestUnreachable."""
        first = self._position if self._reads_on_to(wanted.first) else wanted.first
        if first != self._position:
            self._open = iter(())  # closes the file
            self._open = self._rows_from(first)
        for row in range(first, wanted.stop):
            self._position = -1  # after an error there is nothing to go on in
            try:
                found = next(self._open, None)
            except (ManifestError, ManifestUnreachable) as error:
                raise type(error)(f"at row {row}: {error.message}", hint=error.hint) from None
            if found is None:
                raise ManifestError(f"the manifest ends before row {row}, which was counted")
            self._position = row + 1
            if row >= wanted.first:
                yield found

    def absent(self, wanted: Range) -> list[int]:
        """The rows of the range that ``rows`` leaves out: none."""
        return []

    @cached_property
    def _starts(self) -> list[int]:
        return list(self._manifest.boundaries())

    def _reads_on_to(self, row: int) -> bool:
        if not 0 <= self._position <= row:
            return False
        return self._position == row or (
            self._starts[bisect_right(self._starts, row) - 1] <= self._position
        )

    def _rows_from(self, first: int) -> Iterator[Row]:
        rows, answers = self._rows_of_files(first), self._manifest.answers
        if answers is None:
            yield from rows
            return
        for row, (number, identity, given) in zip(rows, answers.from_row(first), strict=False):
            if (row.row, row.id) != (number, identity):
                raise ManifestError(
                    f"the manifest has row {row.row} with the id {row.id!r}, and {answers.place} "
                    f"answers about row {number} with the id {identity!r}",
                    hint="judge with the --column options that it was made with",
                )
            yield replace(row, answers=given)

    def _rows_of_files(self, first: int) -> Iterator[Row]:
        start = 0
        for file in self._manifest.files:
            if file.rows and first < start + file.rows:
                yield from self._rows_of_file(file, start, max(first, start))
            start += file.rows

    def _rows_of_file(self, file: ManifestFile, start: int, first: int) -> Iterator[Row]:
        place = Place(self._manifest.folder, file.name, file.version)
        format = FORMATS[file.format]
        if file.format != "parquet":  # which looks by itself
            format.check(place, file)
        records = format.records(
            place,
            file,
            first - start,
            self._to_read,
            self._manifest.schema,
            self._asked,
        )
        row = first
        for record, problem in records:
            if row == start + file.rows:  # more than were counted: the file has grown
                break
            if not self._images:
                record[self._columns.names["image"]] = "not read"
            yield row_of(record, row, self._columns, problem)
            row += 1
        if row < start + file.rows:
            raise ManifestError(
                f"{place.path} ends after {row - start:,} rows, and {file.rows:,} were counted",
                hint="run the same command again to see what changed",
            )


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)
