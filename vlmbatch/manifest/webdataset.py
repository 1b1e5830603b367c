"""WebDataset: a tar whose members of the same name, one after another, are one row.

``0001.jpg``, ``0001.txt`` and ``0001.json`` give a row with ``image``, ``txt`` and the keys of the
JSON object; ``id`` and ``__key__`` are ``0001``. Source: github.com/webdataset/webdataset, "The
WebDataset Format". When planning, contents are sought over, not read.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import xxhash

from vlmbatch.errors import ManifestError
from vlmbatch.manifest import images, jsonl, text
from vlmbatch.manifest.files import (
    REMOTE_BUFFER,
    ManifestFile,
    Place,
    reading,
    refuse_packed,
)
from vlmbatch.manifest.values import schema_of

NAME = "webdataset"
CALLED = "WebDataset (.tar)"
SUFFIXES = (".tar",)
TEXTS = (
    *("txt", "text", "caption", "cls", "cls2", "question", "questions", "phrase", "label"),
    *("labels", "url"),
)
"""Members with these endings become columns of text; other endings are passed over."""
OWN = ("image", "id", "__key__")
SAMPLE_ROWS = 100
START_ROWS = 64
IMAGE_BYTES = 2**30
check = text.check_size


@dataclass(slots=True)
class Sample:
    """The members of one row: (ending, member)."""

    key: str
    members: list[tuple[str, tarfile.TarInfo]] = field(default_factory=list)

    @property
    def place(self) -> int:
        """Where its first header begins."""
        return self.members[0][1].offset


def look_at(place: Place) -> tuple[ManifestFile, pa.Schema]:
    size = place.size
    digest = xxhash.xxh3_128()
    rows, starts, offsets = 0, [], []
    found = []
    with reading(place.path), _opened(place, size) as file:
        head = file.read(tarfile.BLOCKSIZE)
        if head[257:262] != b"ustar":
            refuse_packed(place.path, head)
        for sample in _samples(file, 0, place, size):
            if rows % START_ROWS == 0:
                starts.append(rows)
                offsets.append(sample.place)
            for ending, member in sample.members:
                said = f"{sample.key}\0{ending}\0{member.offset_data}\0{member.size}\n"
                digest.update(said.encode(errors="surrogateescape"))
            if rows < SAMPLE_ROWS:
                found.append(_record(file, sample, with_images=False)[0])
            rows += 1
    schema = schema_of([{"image": None, "id": "", "__key__": ""}, *found])
    manifest_file = ManifestFile(
        place.name, size, digest.hexdigest(), rows, NAME, tuple(starts), tuple(offsets)
    )
    return manifest_file, schema


def records(
    place: Place,
    file: ManifestFile,
    first: int,
    columns: Sequence[str],
    schema: pa.Schema,
    asked: Collection[str],
) -> Iterator[tuple[dict[str, Any], str | None]]:
    kinds = {name: schema.field(name).type for name in columns}
    with reading(place.path), _opened(place, file.size) as raw:
        row, offset = text.nearest_start(file, first)
        for sample in _samples(raw, offset, place, file.size):
            if row >= first:
                record, problem = _record(raw, sample, with_images="image" in kinds)
                found, misfit = jsonl.fitting(record, None, kinds, asked)
                yield found, problem or misfit
            row += 1


@contextmanager
def _opened(place: Place, size: int) -> Iterator[Any]:
    with place.open(size) as raw:
        yield raw if place.is_local else io.BufferedReader(raw, REMOTE_BUFFER)


def _samples(file: Any, offset: int, place: Place, size: int) -> Iterator[Sample]:
    """Rows from the header at ``offset`` on. Raises ManifestError where the tar is damaged."""
    file.seek(offset)
    sample: Sample | None = None
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # or it remembers them all
            if member.offset_data + member.size > size:
                raise _damaged(place, member.offset)
            folder, slash, name = member.name.rpartition("/")
            base, dot, ending = name.partition(".")
            if not dot or not base:  # no ending, or hidden
                continue
            is_link = member.islnk() or member.issym()
            if not (member.isfile() or (is_link and _is_read(ending.lower()))):
                continue
            key = f"{folder}{slash}{base}"
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = Sample(key)
            sample.members.append((ending.lower(), member))
        end = tar.offset
    file.seek(end)
    if file.read(512).strip(b"\0"):  # tarfile takes a broken header for the end
        raise _damaged(place, end)
    if sample is not None:
        yield sample


def _is_read(ending: str) -> bool:
    return _is_image(ending) or ending in TEXTS or ending == "json"


def _is_image(ending: str) -> bool:
    return f".{ending.rpartition('.')[2]}" in images.SUFFIXES


def _record(file: Any, sample: Sample, *, with_images: bool) -> tuple[dict[str, Any], str | None]:
    """The row's columns, and what is wrong with its texts. Without images: an image has no bytes,
    which are not read."""
    pictures: list[dict[str, Any]] = []
    fields: dict[str, Any] = {}
    problem: str | None = None
    for ending, member in sample.members:
        if not member.isfile():
            problem = problem or (
                f"{_printable(member.name)} is a link to {_printable(member.linkname)}, which has "
                "no bytes of its own (tar -h --hard-dereference stores the files)"
            )
            continue
        if _is_image(ending):
            if member.size > IMAGE_BYTES:
                problem = problem or f"{member.name} has {member.size:,} bytes"
                continue
            data = _bytes_of(file, member) if with_images else b""
            pictures.append({"bytes": data, "path": _printable(member.name)})
        elif ending in TEXTS or ending == "json":
            if member.size > text.LINE_BYTES:
                problem = problem or f"{member.name} has {member.size:,} bytes"
                continue
            content = _bytes_of(file, member)
            if ending == "json":
                values, wrong = jsonl.parsed(content.removeprefix(text.BOM))
                problem = problem or (wrong and f"{member.name} {wrong}")
                fields.update(values)
                continue
            try:
                fields[ending] = content.decode().strip()
            except UnicodeDecodeError:
                problem = problem or f"{member.name} is no UTF-8 text"
    key = _printable(sample.key)
    image: Any = pictures[0] if len(pictures) == 1 else pictures or None
    return {**fields, "image": image, "id": key, "__key__": key}, problem


def _bytes_of(file: Any, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    data: bytes = file.read(member.size)
    if len(data) != member.size:
        raise OSError(f"{member.name} ends after {len(data):,} of {member.size:,} bytes")
    return data


def _printable(name: str) -> str:
    """A name that is no UTF-8 comes from tarfile with surrogates, which no file can hold."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _damaged(place: Place, offset: int) -> ManifestError:
    return ManifestError(
        f"cannot read {place.path}: the tar is damaged, or cut off, at byte {offset:,}",
        hint="check that the file is whole; compressed tars have to be decompressed first",
    )
