"""Files that take records: lines of JSON, Parquet."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP_ROWS = 1000
ROW_GROUP_BYTES = 64 * 2**20
"""So much of a Parquet file is held before it is written; small row groups let readers stream."""


class LineSink:
    """JSON objects, one per line."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=2**20)  # noqa: SIM115  until close

    def add(self, record: Any) -> None:
        self._file.write(line_of(record))

    def close(self) -> None:
        synced(self._file)


class ParquetSink:
    """Rows of one schema."""

    def __init__(self, path: Path | BinaryIO, schema: pa.Schema) -> None:
        self._schema = schema
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._held: list[dict[str, Any]] = []
        self._bytes = 0

    def add(self, record: Any) -> None:
        self._held.append(record)
        self._bytes += _size_of(record)
        if len(self._held) >= ROW_GROUP_ROWS or self._bytes >= ROW_GROUP_BYTES:
            self._write()

    def close(self) -> None:
        try:
            self._write()
        finally:
            self._writer.close()

    def _write(self) -> None:
        if self._held:
            columns = [
                pa.array([record.get(field.name) for record in self._held], type=field.type)
                for field in self._schema
            ]
            self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))
        self._held, self._bytes = [], 0


def line_of(record: Any) -> bytes:
    """A line of JSON; what JSON has no form for (a date, a decimal) is text, NaN is null."""
    try:
        text = json.dumps(record, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        text = json.dumps(_plain(record), ensure_ascii=False, default=str)
    return text.encode(errors="replace") + b"\n"


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """What a LineSink took."""
    with open(path, "rb") as file:
        for line in file:
            yield json.loads(line)


def join(
    pieces: Iterable[Path],
    file: BinaryIO,
    *,
    begin: bytes = b"",
    between: bytes = b"",
    end: bytes = b"",
) -> None:
    """The lines of all pieces, in order; ``between`` stands before every one but the first."""
    file.write(begin)
    before = b""
    for path in pieces:
        with open(path, "rb") as lines:
            if not between:
                shutil.copyfileobj(lines, file, 2**20)
                continue
            for line in lines:
                file.write(before + line)
                before = between
    file.write(end)


def join_tables(pieces: Iterable[Path], schema: pa.Schema, file: BinaryIO) -> None:
    """The rows of all pieces, in order; some thousands are held at a time."""
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for path in pieces:
            for batch in pq.ParquetFile(path).iter_batches(ROW_GROUP_ROWS, use_threads=False):
                writer.write_batch(batch)


def join_tables_as_lines(pieces: Iterable[Path], file: BinaryIO) -> None:
    """The same as lines of JSON."""
    for path in pieces:
        for batch in pq.ParquetFile(path).iter_batches(ROW_GROUP_ROWS, use_threads=False):
            file.writelines(map(line_of, batch.to_pylist()))


def synced(file: BinaryIO) -> None:
    """Everything written lies on the disk; the file is closed."""
    with file:
        file.flush()
        os.fsync(file.fileno())


def _size_of(value: Any) -> int:
    """About how many bytes a record holds."""
    match value:
        case bytes() | str():
            return len(value)
        case dict():
            return sum(map(_size_of, value.values()))
        case list() | tuple():
            return sum(map(_size_of, value))
    return 8


def _plain(value: Any) -> Any:
    """Without numbers that JSON does not have."""
    match value:
        case float() if value != value or value in (float("inf"), float("-inf")):
            return None
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    return value
