"""Parquet: the footer when planning, then a few pages at a time; no row group is read whole."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from vlmbatch.errors import ManifestError
from vlmbatch.manifest.files import REMOTE_BUFFER, ManifestFile, Place, Ranges, changed, reading

NAME = "parquet"
CALLED = "Parquet (.parquet)"
SUFFIXES = (".parquet", ".parq", ".pq")
BUFFER_BYTES = REMOTE_BUFFER
BATCH_BYTES = 4 * 2**20
MAX_BATCH_ROWS = 1024
TAIL_BYTES = 2**16
"""What pyarrow asks for first, too: most footers are in it."""
HINT = "a manifest is Parquet; check that the file is whole"
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


def look_at(place: Place) -> tuple[ManifestFile, pa.Schema]:
    with reading(place.path, HINT), _opened(place) as (raw, size, footer):
        source = pq.ParquetFile(raw, pre_buffer=False)
        metadata = source.metadata
        starts, row = [], 0
        for index in range(metadata.num_row_groups):
            starts.append(row)
            row += metadata.row_group(index).num_rows
        if row != metadata.num_rows or sorted(starts) != starts or row < 0:
            raise ManifestError(
                f"cannot read {place.path}: its footer counts {metadata.num_rows:,} rows, and "
                f"{row:,} in its row groups",
                hint=HINT,
            )
        file = ManifestFile(place.name, size, footer, row, NAME, tuple(starts))
        return file, _with_partitions(source.schema_arrow, place.name)


def check(place: Place, file: ManifestFile) -> None:
    """Raises ManifestError if the file is not what it was."""
    with reading(place.path, HINT), _opened(place) as (_, size, footer):
        if (size, footer) != (file.size, file.identity):
            raise changed(place.path)


def records(
    place: Place,
    file: ManifestFile,
    first: int,
    columns: Sequence[str],
    schema: pa.Schema,
    asked: Collection[str],
) -> Iterator[tuple[dict[str, Any], str | None]]:
    for batch, partitions in batches(place, file, first, columns, MAX_BATCH_ROWS):
        for record, problem in python_values(batch):
            yield {**record, **partitions}, problem


def batches(
    place: Place, file: ManifestFile, first: int, columns: Sequence[str], most_rows: int
) -> Iterator[tuple[pa.RecordBatch, dict[str, str | None]]]:
    """The rows from ``first`` on: (columns of the file, those that its folders name, alike for all
    of its rows). A batch has about BATCH_BYTES, and no more than ``most_rows``."""
    with reading(place.path, HINT), _opened(place) as (raw, size, footer):
        if (size, footer) != (file.size, file.identity):
            raise changed(place.path)
        source = pq.ParquetFile(raw, pre_buffer=False, buffer_size=BUFFER_BYTES)
        here = set(source.schema_arrow.names)
        partitions = {
            name: value
            for name, value in partitions_of(file.name).items()
            if name in columns and name not in here
        }
        stored = [name for name in columns if name not in partitions]
        stops = [*file.starts[1:], file.rows]
        groups = [index for index, stop in enumerate(stops) if stop > first]
        skip = first - file.starts[groups[0]] if groups else 0
        batch_rows = _batch_rows(source.metadata, most_rows)
        for group in groups:  # a broken one must not take rows of another with it
            for batch in source.iter_batches(
                batch_size=batch_rows, row_groups=[group], columns=stored
            ):
                if skip >= batch.num_rows:
                    skip -= batch.num_rows
                    continue
                yield batch.slice(skip), partitions
                skip = 0


def partitions_of(name: str) -> dict[str, str | None]:
    """Columns that the folders of a partitioned dataset name: ``year=2024/part-0.parquet``."""
    pairs = [folder.partition("=") for folder in name.split("/")[:-1] if "=" in folder]
    return {
        unquote(key): None if value == NO_VALUE else unquote(value)
        for key, _, value in pairs
        if key
    }


def _with_partitions(schema: pa.Schema, name: str) -> pa.Schema:
    for column in partitions_of(name):
        if column not in schema.names:
            schema = schema.append(pa.field(column, pa.string()))
    return schema


@contextmanager
def _opened(place: Place) -> Iterator[tuple[Any, int, str]]:
    """(the file for pyarrow, its size in bytes, xxh3-128 hex of its footer)."""
    if place.is_local:
        size = place.size  # refuses what is no file
        with pa.OSFile(place.path) as raw:
            yield raw, size, _footer_of(raw, size, place.path)
    else:
        with place.open() as ranges:
            yield ranges, ranges.size, _footer_of(ranges, ranges.size, place.path)


def _footer_of(raw: Any, size: int, path: str) -> str:
    if size < 12:
        raise ManifestError(
            f"cannot read {path}: {size} bytes are no Parquet file",
            hint="write it again; a manifest without rows still has a schema",
        )
    first = max(0, size - TAIL_BYTES)
    raw.seek(first)
    tail = raw.read(size - first)
    length = int.from_bytes(tail[-8:-4], "little")
    if tail[-4:] != b"PAR1" or length + 12 > size:
        raise ManifestError(
            f"cannot read {path}: it is no Parquet file, or its end is missing", hint=HINT
        )
    if length + 8 > len(tail):
        first = size - length - 8
        raw.seek(first)
        tail = raw.read(length + 8)
    if isinstance(raw, Ranges):
        raw.keep(first, tail)  # pyarrow reads it next
    raw.seek(0, os.SEEK_SET)
    return xxhash.xxh3_128_hexdigest(tail[-8 - length : -8])


def _batch_rows(metadata: pq.FileMetaData, most: int) -> int:
    """Rows per batch so that all columns of a batch hold about BATCH_BYTES uncompressed.

    What single columns hold is not asked for: where a broken footer says it wrongly, pyarrow ends
    the process.
    """
    total = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    per_row: int = max(1, total // max(1, metadata.num_rows))
    return max(1, min(most, BATCH_BYTES // per_row))


def python_values(batch: pa.RecordBatch) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Each row's values, and which of them Python cannot hold (text that is no UTF-8, a date after
    the year 9999), if any: those are None."""
    try:
        yield from ((record, None) for record in batch.to_pylist())
        return
    except (ValueError, OverflowError):
        pass  # one bad value, and the whole batch raises
    for index in range(batch.num_rows):
        record: dict[str, Any] = {}
        problem = None
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                record[name] = column[index].as_py()
            except (ValueError, OverflowError) as error:
                record[name] = None
                why = "is no UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
                problem = problem or f"column {name!r} {why}"
        yield record, problem
