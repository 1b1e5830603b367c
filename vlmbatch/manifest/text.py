"""Text manifests: lines with their places, decompressed where that is needed, in bounded memory."""

from __future__ import annotations

import gzip
import io
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import xxhash

from vlmbatch.errors import ManifestError
from vlmbatch.manifest.files import REMOTE_BUFFER, ManifestFile, Place, changed, reading

LINE_BYTES = 64 * 2**20
"""A longer line is a bad row; it is passed over without being held."""
CHUNK_BYTES = 2**20
START_ROWS = 1024
START_BYTES = 4 * 2**20
"""The index has a start every so many rows, and where a row begins after so many bytes."""
SAMPLE_ROWS = 1000
SAMPLE_BYTES = 8 * 2**20
COMPRESSED = (".gz", ".zst")
BOM = b"\xef\xbb\xbf"

Records = Iterator[tuple[int, Any]]
"""(place after the record, the record as its format has it)"""


def is_compressed(name: str) -> bool:
    return name.lower().endswith(COMPRESSED)


@contextmanager
def text_of(
    place: Place, seen: Callable[[bytes], None] | None = None, buffer: int = REMOTE_BUFFER
) -> Iterator[Any]:
    """The file's text as a binary stream; ``seen`` gets all bytes of the file as they are read.

    From a store it comes ``buffer`` bytes at a time."""
    with place.open() as raw:
        source = raw if place.is_local else io.BufferedReader(raw, buffer)
        source = source if seen is None else _Seen(source, seen)
        name = place.name.lower()
        if name.endswith(".gz"):
            with gzip.GzipFile(fileobj=source, mode="rb") as stream:
                yield stream
        elif name.endswith(".zst"):
            with pa.CompressedInputStream(pa.PythonFile(source, mode="r"), "zstd") as stream:
                yield stream
        else:
            yield source
        while seen is not None and source.read(CHUNK_BYTES):
            pass  # what follows the compressed text is content too


class _Seen:
    """A file that shows what is read from it."""

    def __init__(self, file: Any, seen: Callable[[bytes], None]) -> None:
        self._file = file
        self._seen = seen
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._file.read(size)
        self._seen(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        raise OSError("read from the start to the end")

    def tell(self) -> int:
        return int(self._file.tell())

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def seekable(self) -> bool:
        return False

    def readable(self) -> bool:
        return True


def lines(stream: Any, offset: int = 0) -> Iterator[tuple[int, bytes | None]]:
    r"""(place after the line, the line without its \n); None for one longer than LINE_BYTES."""
    held: list[bytes] = []
    size = 0
    while chunk := stream.read(CHUNK_BYTES):
        first, *more = chunk.split(b"\n")
        if more:
            whole = size + len(first) <= LINE_BYTES
            offset += len(first) + 1
            yield offset, b"".join([*held, first]) if whole else None
            held, size = [], 0
            for line in more[:-1]:
                offset += len(line) + 1
                yield offset, line
            first = more[-1]
        offset += len(first)
        size += len(first)
        if size <= LINE_BYTES:
            held.append(first)
        else:
            held = []
    if size:
        yield offset, b"".join(held) if size <= LINE_BYTES else None


def indexed(
    place: Place, format: str, records: Callable[[Any], Records], sample: Callable[[Any], None]
) -> ManifestFile:
    """One pass over the text: how many rows, where they begin, what the content is.

    ``sample`` gets the first records, as ``records`` gives them.
    """
    size = place.size
    digest = xxhash.xxh3_128()
    rows, starts, offsets = 0, [0], [0]
    with reading(place.path), text_of(place, digest.update) as stream:
        before = sampled = 0
        for after, record in records(stream):
            if rows and (rows - starts[-1] >= START_ROWS or before - offsets[-1] >= START_BYTES):
                starts.append(rows)
                offsets.append(before)
            if rows < SAMPLE_ROWS and sampled < SAMPLE_BYTES:
                sample(record)
                sampled += after - before
            rows += 1
            before = after
    if is_compressed(place.name):
        starts, offsets = [0], [0]
    return ManifestFile(
        place.name, size, digest.hexdigest(), rows, format, tuple(starts), tuple(offsets)
    )


def check_size(place: Place, file: ManifestFile) -> None:
    """Workers look at the size only: to read all of the text once more is the driver's part."""
    if place.size != file.size:
        raise changed(place.path)


def nearest_start(file: ManifestFile, first: int) -> tuple[int, int]:
    """(row, place) of the last start at or before the row ``first``."""
    index = bisect_right(file.starts, first) - 1
    return file.starts[index], file.offsets[index]


def refuse_utf16(place: Place) -> None:
    if is_compressed(place.name):
        return
    with place.open() as file:
        head = file.read(2)
    if head in (b"\xff\xfe", b"\xfe\xff"):
        raise ManifestError(
            f"cannot read {place.path}: it is UTF-16 text",
            hint="save it as UTF-8 (in Excel: 'CSV UTF-8')",
        )
