"""WebDataset: tar shards of ``key.jpg``, ``key.txt`` and ``key.json``, numbered without gaps.

Source: webdataset and img2dataset; a sample's files follow one another and share what stands before
the first dot of their names. Where rows may have several images, these are ``key.0.jpg`` and on.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmbatch.errors import UsageError
from vlmbatch.exports.base import Example, Format, ImageMode, Sink
from vlmbatch.exports.pieces import Piece
from vlmbatch.exports.selection import Drop
from vlmbatch.exports.sinks import line_of, synced
from vlmbatch.exports.texts import answers_of, line_of_text, no_text, texts_of
from vlmbatch.job import parse_bytes

if TYPE_CHECKING:
    from vlmbatch.exports.exporting import Export

File = tuple[str, bytes]


class WebDataset(Format):
    """``train-000000.tar`` and on. ``.txt`` holds the first answer, ``.json`` all of them."""

    name = "webdataset"
    about = "tar shards of key.jpg, key.txt, key.json"
    images = (ImageMode.EMBED,)
    options = {"shard_bytes": "of a shard, at most (1GiB)", "shard_rows": "likewise (10000)"}  # noqa: RUF012

    def __init__(self, export: Export) -> None:
        super().__init__(export)
        given = export.options
        try:
            self._bytes = int(str(parse_bytes(given.get("shard_bytes", "1GiB"))))
        except ValueError as error:
            raise UsageError(f"shard_bytes: {error}", hint="as in shard_bytes=1GiB") from None
        rows = given.get("shard_rows", "10000")
        if not rows.isascii() or not rows.isdigit() or int(rows) < 1:
            raise UsageError(
                f"shard_rows={rows} is no number of rows", hint="as in shard_rows=10000"
            )
        self._rows = int(rows)

    def drops(self) -> Sequence[Drop]:
        return (no_text,)

    def records(self, example: Example) -> Iterator[list[File]]:
        key = f"{example.row:09d}"
        files: list[File] = []
        for at, picture in enumerate(example.images):
            ending = os.path.splitext(picture.name)[1]
            at_name = f".{at}" if self.export.source.may_have_several else ""
            files.append((f"{key}{at_name}{ending}", picture.data or b""))
        size = example.images[0].size
        about = {
            "id": example.id,
            "width": size and size.width,
            "height": size and size.height,
            "answers": answers_of(example),
            **self.carried(example),
        }
        text = line_of_text(texts_of(example)[0])
        files += [(f"{key}.txt", text.encode(errors="replace")), (f"{key}.json", line_of(about))]
        yield files

    def sink(self, piece: Piece, split: str) -> Sink:
        return _Shards(piece, split, self._bytes, self._rows)

    def finish(self) -> None:
        """The shards of all pieces, under numbers of their own."""
        for split in self.export.splits.names:
            for number, shard in enumerate(self.export.kept(split)):
                name = f"{split}-{number:06d}.tar"
                self.export.destination.claim(name)
                _place(shard, self.export.place / name)


class _Shards:
    """Begins another tar where the next sample would not fit."""

    def __init__(self, piece: Piece, split: str, most_bytes: int, most_rows: int) -> None:
        self._piece, self._split = piece, split
        self._most_bytes, self._most_rows = most_bytes, most_rows
        self._tar: tarfile.TarFile | None = None
        self._file: io.BufferedWriter | None = None
        self._shards = self._rows = 0

    def add(self, record: list[File]) -> None:
        size = sum(1024 + len(data) for _, data in record)
        full = self._file is not None and (
            self._rows >= self._most_rows or self._file.tell() + size > self._most_bytes
        )
        if full:
            self.close()
        tar = self._tar or self._begun()
        for name, data in record:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        self._rows += 1

    def close(self) -> None:
        if self._tar is not None and self._file is not None:
            self._tar.close()
            synced(self._file)
        self._tar = self._file = None

    def _begun(self) -> tarfile.TarFile:
        name = f"{self._split}-{self._piece.number:05d}-{self._shards:05d}.tar"
        self._file = open(self._piece.file(f"{Piece.KEPT}/{name}"), "wb")  # noqa: SIM115
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        self._shards, self._rows = self._shards + 1, 0
        return self._tar


def _place(shard: Path, target: Path) -> None:
    """The same file under another name; may have happened before."""
    if target.exists():
        target.unlink()
    try:
        os.link(shard, target)
    except OSError:  # no hard links here
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.copyfile(shard, temporary)
        os.replace(temporary, target)


FORMAT = WebDataset
