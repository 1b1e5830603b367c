"""Lance datasets: one version of a folder, read a little at a time."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pyarrow as pa
import xxhash

from vlmbatch.manifest.files import ManifestFile, Place, changed
from vlmbatch.manifest.parquet import BATCH_BYTES, MAX_BATCH_ROWS, python_values
from vlmbatch.manifest.tables import library, reading_table, storage_options

NAME = "lance"
CALLED = "a Lance dataset"
SUFFIXES = ()
BUFFER_BYTES = 16 * 2**20
"""What Lance reads ahead at most; its own default is 2 GiB."""
INLINE_ROWS = 32
"""Rows in memory at once where they may hold images: the size of a file tells little of theirs, as
they may be compressed."""


def look_at(place: Place) -> tuple[ManifestFile, pa.Schema]:
    with reading_table(place, "Lance dataset"):
        dataset = _opened(place)
        fragments = [fragment.metadata for fragment in dataset.get_fragments()]
        starts, row = [], 0
        for fragment in fragments:
            starts.append(row)
            row += fragment.num_rows
        size = sum(_size(fragment) for fragment in fragments)
        identity = _identity(dataset, fragments)
        file = ManifestFile(
            place.name, size, identity, row, NAME, tuple(starts), version=dataset.version
        )
        return file, dataset.schema


def check(place: Place, file: ManifestFile) -> None:
    """Raises ManifestError if its version is not what it was."""
    with reading_table(place, "Lance dataset"):
        dataset = _opened(place)
        fragments = [fragment.metadata for fragment in dataset.get_fragments()]
        if _identity(dataset, fragments) != file.identity:
            raise changed(place.path)


def records(
    place: Place,
    file: ManifestFile,
    first: int,
    columns: Sequence[str],
    schema: pa.Schema,
    asked: Collection[str],
) -> Iterator[tuple[dict[str, Any], str | None]]:
    with reading_table(place, "Lance dataset"):
        text = all(pa.types.is_string(schema.field(name).type) for name in columns)
        most = MAX_BATCH_ROWS if text else INLINE_ROWS
        row_bytes = max(1, file.size // max(1, file.rows))
        scanner = _opened(place).scanner(
            columns=list(columns),
            offset=first,
            batch_size=max(1, min(most, BATCH_BYTES // row_bytes)),
            io_buffer_size=BUFFER_BYTES,
            batch_readahead=1,
            fragment_readahead=1,
            scan_in_order=True,
            blob_handling="all_binary",
        )
        for batch in scanner.to_batches():
            yield from python_values(batch)


def _opened(place: Place) -> Any:
    lance = library("lance", "lance", CALLED)
    # It warns of any fork; what starts processes here lets them execute something else at once.
    warnings.filterwarnings("ignore", "lance is not fork-safe", UserWarning)
    return lance.dataset(place.path, version=place.version, storage_options=storage_options())


def _size(fragment: Any) -> int:
    return sum(file.file_size_bytes or 0 for file in fragment.files)


def _identity(dataset: Any, fragments: Sequence[Any]) -> str:
    """xxh3-128 hex over the version and each fragment's files, whose names are never used again."""
    digest = xxhash.xxh3_128(f"{dataset.version}\n".encode())
    for fragment in fragments:
        deleted = fragment.deletion_file
        names = "\0".join(file.path for file in fragment.files)
        digest.update(f"{fragment.id}\0{fragment.physical_rows}\0{names}\n".encode())
        if deleted is not None:
            said = f"{deleted.read_version}\0{deleted.id}\0{deleted.num_deleted_rows}\n"
            digest.update(said.encode())
    return digest.hexdigest()
