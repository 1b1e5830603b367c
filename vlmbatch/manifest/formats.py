"""What kinds of files a manifest may have, and how a file's kind is told."""

from __future__ import annotations

import tarfile
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol

import pyarrow as pa

from vlmbatch.errors import ManifestError
from vlmbatch.manifest import delimited, delta, images, jsonl, lance, parquet, webdataset
from vlmbatch.manifest.files import ManifestFile, Place, reading, refuse_packed
from vlmbatch.manifest.text import COMPRESSED


class Format(Protocol):
    """A module that reads one kind of files."""

    NAME: str
    CALLED: str
    SUFFIXES: tuple[str, ...]

    def look_at(self, place: Place) -> tuple[ManifestFile, pa.Schema]:
        """The file's identity, rows and cheap starts, and its columns."""

    def check(self, place: Place, file: ManifestFile) -> None:
        """Raises ManifestError where it is quickly seen that the file is not what it was."""

    def records(
        self,
        place: Place,
        file: ManifestFile,
        first: int,
        columns: Sequence[str],
        schema: pa.Schema,
        asked: Collection[str],
    ) -> Iterator[tuple[dict[str, Any], str | None]]:
        """The file's rows from ``first`` on: (these columns' values, what is wrong with the row).

        ``schema`` is the whole manifest's; ``asked``: columns that say what is asked, or hold
        images, in which nothing may be read as something else."""


FORMATS: dict[str, Format] = {
    module.NAME: module for module in (parquet, jsonl, delimited, webdataset, images, delta, lance)
}
TABLES = ("parquet", "jsonl", "csv")
"""In a folder, these are the manifest, whatever else is there."""
OPEN = ("jsonl", "webdataset")
"""Formats without a schema: the files' columns are put together."""
KNOWN = ", ".join(each.CALLED for each in FORMATS.values())


def format_of(name: str) -> str | None:
    """By the ending of the name; text may be compressed."""
    plain = name.lower()
    for suffix in COMPRESSED:
        if plain.endswith(suffix):
            plain = plain.removesuffix(suffix)
            return next((kind for kind in ("jsonl", "csv") if _has_suffix(plain, kind)), None)
    return next((kind for kind in FORMATS if _has_suffix(plain, kind)), None)


def sniffed(place: Place) -> str:
    """By the first bytes; raises ManifestError, naming what is known."""
    with reading(place.path), place.open(place.size) as file:
        head = file.read(1024)
    if head[:4] == b"PAR1":
        return "parquet"
    if head[257:262] == b"ustar" or (len(head) >= 512 and _is_header(head[:512])):
        return "webdataset"
    refuse_packed(place.path, head)
    start = head.lstrip(b"\xef\xbb\xbf \r\n\t")
    if start[:1] == b"{":
        return "jsonl"
    if start[:1] == b"[":
        raise ManifestError(
            f"{place.path} is a JSON array; a manifest has one JSON object per line",
            hint=f"jq -c '.[]' {place.path} > rows.jsonl",
        )
    what = "empty" if not head else "of no kind that is known by its name or its first bytes"
    raise ManifestError(f"cannot read {place.path}: it is {what}", hint=f"a manifest is {KNOWN}")


def _has_suffix(plain: str, kind: str) -> bool:
    return plain.endswith(FORMATS[kind].SUFFIXES)


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True
