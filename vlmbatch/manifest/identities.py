"""The ids of all rows of a manifest, without reading its rows: for tables of 100 million.

The ids are those of ``row_of``. Of Parquet only the columns are read that say the id; the other
formats go through ``RowStream``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, repeat
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from vlmbatch.errors import ManifestError, ManifestUnreachable, UsageError
from vlmbatch.manifest import parquet
from vlmbatch.manifest.columns import (
    ASKED,
    Columns,
    asked_piece,
    default_id,
    fields_of,
    image_piece,
    images_of,
    is_embedded,
    is_string,
    sized,
)
from vlmbatch.manifest.files import ManifestFile, Place
from vlmbatch.manifest.manifest import Manifest, RowStream
from vlmbatch.records import Range
from vlmbatch.storage import UNCHANGED

BATCH_ROWS = 2**16
STREAMED_ROWS = 2**12
_URIS = pa.list_(pa.string())
Found = tuple[pa.Array, pa.Array | None]
"""The ids of some rows, and the references of their images where they are wanted."""


def identities(
    manifest: Manifest, columns: Columns, *, limit: int | None = None, images: bool = False
) -> Iterator[pa.RecordBatch]:
    """(position: int64, id: string) of the first ``limit`` rows, in order; at most BATCH_ROWS at a
    time.

    With ``images`` also (images: list<string>): the references that the row names; null in a
    manifest that holds the images itself. Raises ManifestError where a file changed since it was
    listed, and ManifestUnreachable.
    """
    rows = manifest.rows if limit is None else min(limit, manifest.rows)
    found = _Identities(manifest, columns, images)
    yield from _batches(
        some
        for file, start, stop in _pieces(manifest, rows)
        for some in found.of_file(file, start, stop)
    )


def streamed(
    manifest: Manifest, columns: Columns, *, limit: int | None = None, images: bool = False
) -> Iterator[pa.RecordBatch]:
    """The same, of rows that are read whole: the slow twin."""
    rows = manifest.rows if limit is None else min(limit, manifest.rows)
    found = _Identities(manifest, columns, images)
    yield from _batches(found.of_rows(0, rows))


def check_identifiable(manifest: Manifest, columns: Columns) -> None:
    """Raises UsageError where nothing but the images' bytes tells the rows apart."""
    if _holds_images(manifest, columns) and not columns.has_id:
        raise UsageError(
            "--incremental over embedded images needs an id column: column "
            f"{columns.names['image']!r} holds the images, and there is no {columns.names['id']!r}",
            hint="name the column that tells the rows apart with --column id=NAME",
        )


def _batches(found: Iterable[Found]) -> Iterator[pa.RecordBatch]:
    position = 0
    for ids, uris in found:
        columns = {
            "position": pa.array(range(position, position + len(ids)), pa.int64()),
            "id": ids,
        }
        if uris is not None:
            columns["images"] = uris
        yield pa.RecordBatch.from_pydict(columns)
        position += len(ids)


def _pieces(manifest: Manifest, rows: int) -> Iterator[tuple[ManifestFile, int, int]]:
    """(a file, the first row and the row after the last that are wanted of it)."""
    start = 0
    for file in manifest.files:
        stop = min(start + file.rows, rows)
        if start < stop:
            yield file, start, stop
        start += file.rows


class _Identities:
    def __init__(self, manifest: Manifest, columns: Columns, images: bool) -> None:
        self._manifest = manifest
        self._columns = columns
        self._image, self._id = columns.names["image"], columns.names["id"]
        self._images = images
        self._embedded = _holds_images(manifest, columns)
        self._alone = RowStream(manifest, columns)

    def of_file(self, file: ManifestFile, start: int, stop: int) -> Iterator[Found]:
        """Rows [start, stop), which this file holds; it begins with row ``start``."""
        if file.format == "parquet":
            return self._of_parquet(file, start, stop)
        if self._embedded and self._columns.has_id and self._id != self._image:
            return self._of_ids(start, stop)
        return self.of_rows(start, stop)

    def of_rows(self, start: int, stop: int) -> Iterator[Found]:
        """Of rows that are read whole."""
        if start == stop:
            return
        stream = RowStream(self._manifest, self._columns).rows(Range(start, stop))
        pairs = ((row.id, [image.uri for image in row.images]) for row in stream)
        while some := list(islice(pairs, STREAMED_ROWS)):
            ids = pa.array([identity for identity, _ in some], pa.string())
            yield ids, self._uris((uris for _, uris in some), len(some))

    def _of_ids(self, start: int, stop: int) -> Iterator[Found]:
        """Of rows whose images, which are in the manifest, are not read."""
        names = {"image": self._image, **{name: name for name in ("id", *ASKED)}}
        columns = Columns(names, fields=(self._id,), has_id=False)
        stream = RowStream(self._manifest, columns, images=False).rows(Range(start, stop))
        values = (row.fields[self._id] for row in stream)
        while some := list(islice(values, STREAMED_ROWS)):
            yield self._filled(_texts(some), start), self._uris((), len(some))
            start += len(some)

    def _of_parquet(self, file: ManifestFile, start: int, stop: int) -> Iterator[Found]:
        place, columns = Place(self._manifest.folder, file.name), self._columns
        # What the default id takes of each row: our name, the column's.
        asked = fields_of({name: name for name in columns.fields}, columns)
        asked = {ours: asked[ours] for ours in ASKED if ours in asked}
        with_images = not columns.has_id or (self._images and not self._embedded)
        wanted = [self._id] if columns.has_id else list(asked.values())
        wanted = list(dict.fromkeys([self._image, *wanted] if with_images else wanted))
        batches = parquet.batches(place, file, 0, wanted, BATCH_ROWS)
        while start < stop:
            with _at(start):
                found = next(batches, None)
                if found is None:
                    raise ManifestError(
                        f"{place.path} ends before the {file.rows:,} rows that were counted",
                        hint="run the same command again to see what changed",
                    )
            batch, partitions = found
            rows = min(batch.num_rows, stop - start)
            read = {
                name: pa.array([value] * rows, pa.string()) for name, value in partitions.items()
            }
            read |= zip(batch.schema.names, batch.slice(0, rows).columns, strict=True)
            images = _values(read[self._image]) if with_images else []
            as_they_are = not columns.has_id and _are_hashed_as_they_are(read[self._image])
            if columns.has_id:
                ids = self._filled(_as_text(read[self._id]), start)
            else:
                said = {ours: _values(read[theirs]) for ours, theirs in asked.items()}
                ids = pa.array(_default_ids(images, said, as_they_are), pa.string())
            yield ids, self._uris(map(_named, images), rows)
            start += rows

    def _filled(self, ids: pa.Array, start: int) -> pa.Array:
        """Rows without an id get the default one; these few are read whole."""
        without = pc.fill_null(pc.equal(ids, ""), True)
        rows = pc.indices_nonzero(without).to_pylist()
        if not rows:
            return ids
        alone = (self._alone.rows(Range(start + row, start + row + 1)) for row in rows)
        default = [found.id for each in alone for found in each]
        return pc.replace_with_mask(ids, without, pa.array(default, pa.string()))

    def _uris(self, uris: Iterable[list[str | None]], rows: int) -> pa.Array | None:
        if not self._images:
            return None
        return pa.nulls(rows, _URIS) if self._embedded else pa.array(list(uris), _URIS)


def _holds_images(manifest: Manifest, columns: Columns) -> bool:
    return is_embedded(manifest.schema.field(columns.names["image"]).type)


@contextmanager
def _at(row: int) -> Iterator[None]:
    """Errors say where, as those of RowStream."""
    try:
        yield
    except (ManifestError, ManifestUnreachable) as error:
        raise type(error)(f"at row {row}: {error.message}", hint=error.hint) from None


def _as_text(column: pa.Array) -> pa.Array:
    """Each value as ``str`` writes it; null or "" where there is none."""
    plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    if pa.types.is_integer(plain.type):
        return plain.cast(pa.string())
    if is_string(plain.type):
        try:
            plain.validate(full=True)
            return plain.cast(pa.string())
        except pa.ArrowInvalid:
            pass  # a text that is no UTF-8 counts as null, and only that one
    return _texts(_values(column))


def _texts(values: Iterable[Any]) -> pa.Array:
    return pa.array([None if value is None else str(value) for value in values], pa.string())


def _values(column: pa.Array) -> list[Any]:
    """As Python has them; None where it cannot hold one."""
    try:
        values: list[Any] = column.to_pylist()
        return values
    except (ValueError, OverflowError):
        pass
    batch = pa.record_batch([column], ["value"])
    return [record["value"] for record, _ in parquet.python_values(batch)]


def _are_hashed_as_they_are(images: pa.Array) -> bool:
    """Whether no reference has anything that ``without_secrets`` takes out: seen at once, since
    that is most of the time that an id takes."""
    if not is_string(images.type):
        return False
    plain = pc.match_substring_regex(images.cast(pa.string()), f"^(?:{UNCHANGED})$")
    return bool(pc.all(plain, min_count=0).as_py())


def _default_ids(
    images: Sequence[Any], asked: Mapping[str, Sequence[Any]], as_they_are: bool
) -> Iterator[str]:
    """``default_id`` of each row; quick where the image is one reference."""
    digest = xxhash.xxh3_128_hexdigest
    piece_of = sized if as_they_are else image_piece
    rows = zip(*asked.values(), strict=True) if asked else repeat((), len(images))
    for image, values in zip(images, rows, strict=True):
        if type(image) is str:
            piece = piece_of(image) if image else b""
            if values:
                piece += b"".join(map(asked_piece, asked, values))
            yield digest(piece)
        else:
            yield default_id(images_of(image)[0], dict(zip(asked, values, strict=True)))


def _named(image: Any) -> list[str | None]:
    if type(image) is str:  # as most are
        return [image] if image else []
    return [ref.uri for ref in images_of(image)[0]]
