"""Delta tables: the Parquet files of one version, which the table's log names.

The log is read when the run is planned; workers read the Parquet files alone.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import xxhash

from vlmbatch.errors import ManifestError
from vlmbatch.manifest import parquet
from vlmbatch.manifest.files import ManifestFile, Place, in_order
from vlmbatch.manifest.tables import library, reading_table, storage_options
from vlmbatch.storage import scheme_of

NAME = "delta"
CALLED = "a Delta table"
SUFFIXES = ()


def look_at(place: Place) -> tuple[ManifestFile, pa.Schema]:
    deltalake = library("deltalake", "delta", CALLED)
    with reading_table(place, "Delta table"):
        table = deltalake.DeltaTable(
            place.path, version=place.version, storage_options=storage_options()
        )
        _refuse_unreadable(table, place.path)
        added = pa.table(table.get_add_actions())
        schema = pa.schema(table.schema().to_arrow())
        version = table.version()
    names = [unquote(path) for path in added["path"].to_pylist()]
    outside = next(filter(_is_outside, names), None)
    if outside is not None:
        raise ManifestError(
            f"{place.path} has files outside of its folder: {outside[:200]}",
            hint="a shallow clone cannot be read: give the table that it was made of",
        )
    added = added.append_column("name", pa.array(names, pa.string())).sort_by("name")
    below = [Place(place.path, name) for name in added["name"].to_pylist()]
    looks = [partial(parquet.look_at, each) for each in below]
    files = [file for file, _ in in_order(looks, one_by_one=place.is_local)]
    digest = xxhash.xxh3_128(f"{version}\n".encode())
    starts, row = [], 0
    for file in files:
        digest.update(f"{file.name}\0{file.size}\0{file.identity}\n".encode())
        starts += [row + start for start in file.starts]
        row += file.rows
    return (
        ManifestFile(
            place.name,
            sum(file.size for file in files),
            digest.hexdigest(),
            row,
            NAME,
            tuple(starts),
            listing=_packed(files, added),
            version=version,
        ),
        schema,
    )


def check(place: Place, file: ManifestFile) -> None:
    """A worker looks at the first Parquet file only, and at each other when it opens it."""
    first = next(_unpacked(file), None)
    if first is not None:
        parquet.check(Place(place.path, first[0].name), first[0])


def records(
    place: Place,
    file: ManifestFile,
    first: int,
    columns: Sequence[str],
    schema: pa.Schema,
    asked: Collection[str],
) -> Iterator[tuple[dict[str, Any], str | None]]:
    start = 0
    for part, values in _unpacked(file):
        if first < start + part.rows:
            own = {name: value for name, value in values.items() if name in columns}
            where = Place(place.path, part.name)
            found = parquet.records(where, part, max(0, first - start), columns, schema, asked)
            # Older files lack the columns that the table was given later.
            yield from (({**dict.fromkeys(columns), **row, **own}, wrong) for row, wrong in found)
        start += part.rows


def _is_outside(name: str) -> bool:
    return scheme_of(name) is not None or name.startswith("/") or ".." in name.split("/")


def _refuse_unreadable(table: Any, path: str) -> None:
    """Of what a log may say of its files, rows without deletion vectors and columns with their own
    names are what a reader of Parquet reads."""
    features = table.protocol().reader_features or []
    if "deletionVectors" in features and any(b.num_rows for b in table.deletion_vectors()):
        raise ManifestError(
            f"{path} has deletion vectors: its Parquet files hold rows that were deleted",
            hint="write them anew with REORG TABLE ... APPLY (PURGE), or give a copy of the table",
        )
    mapping = table.metadata().configuration.get("delta.columnMapping.mode", "none")
    if mapping != "none":
        raise ManifestError(
            f"{path} maps its columns by {mapping}: in its Parquet files they have other names",
            hint="write it as a table without column mapping, and give that",
        )


def _packed(files: Sequence[ManifestFile], added: pa.Table) -> str:
    """The Parquet files, and the values of the partition columns of each, as an Arrow stream."""
    columns = {
        "name": pa.array([file.name for file in files], pa.string()),
        "size": pa.array([file.size for file in files], pa.int64()),
        "identity": pa.array([file.identity for file in files], pa.string()),
        "rows": pa.array([file.rows for file in files], pa.int64()),
        "starts": pa.array([file.starts for file in files], pa.list_(pa.int64())),
    }
    if "partition" in added.column_names:
        columns["partition"] = added["partition"].combine_chunks()
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return base64.b64encode(sink.getvalue()).decode()


def _unpacked(file: ManifestFile) -> Iterator[tuple[ManifestFile, dict[str, Any]]]:
    """(a Parquet file, its values of partition columns), in the order of the rows."""
    for batch in pa.ipc.open_stream(base64.b64decode(file.listing)):
        for each in batch.to_pylist():
            values = each.pop("partition", None) or {}
            starts = tuple(each.pop("starts"))
            yield ManifestFile(**each, format=parquet.NAME, starts=starts), values
