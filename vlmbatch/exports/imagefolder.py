"""The Hugging Face ImageFolder: copied images, and ``metadata.parquet`` with their captions.

Source: ``datasets`` (5.2), ``packaged_modules/folder_based_builder``: ``file_name`` names an image
relative to the metadata's folder, ``file_names`` several. All splits must have the same types,
which JSON lines have not where a column is null throughout a split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from vlmbatch.exports.base import SPLITS_OF_DATASETS, Example, Format, ImageMode, Sink
from vlmbatch.exports.pieces import Piece
from vlmbatch.exports.selection import Drop
from vlmbatch.exports.sinks import ParquetSink, join_tables
from vlmbatch.exports.texts import answers_of, no_text, texts_of

IN_FOLDERS = frozenset(("id", "file_name", "file_names", "image", "images"))
"""Columns of a folder's metadata that mean something."""
_ANSWER = pa.struct([pa.field(name, pa.string()) for name in ("task", "question", "text", "json")])


def free_in_folders(column: str) -> str:
    """``datasets`` takes any ``..._file_name`` for another image."""
    for ending in ("_file_name", "_file_names"):
        if column.endswith(ending):
            return f"{column.removesuffix(ending)}{ending.replace('file_', 'file')}"
    return column


class ImageFolder(Format):
    """``train/metadata.parquet``; ``text`` is the first answer's, ``answers`` has all of them."""

    name = "imagefolder"
    about = "images and metadata.parquet, which datasets.load_dataset reads as a folder"
    images = (ImageMode.COPY,)
    split_names = SPLITS_OF_DATASETS
    taken = IN_FOLDERS | {"text", "answers"}

    def free_name(self, column: str) -> str:
        return free_in_folders(super().free_name(column))

    def drops(self) -> Sequence[Drop]:
        return (no_text,)

    def schema(self) -> pa.Schema:
        several = self.export.source.may_have_several
        names = ("file_names", pa.list_(pa.string())) if several else ("file_name", pa.string())
        columns = [names, ("id", pa.string()), ("text", pa.string())]
        fields = [pa.field(name, kind) for name, kind in (*columns, ("answers", pa.list_(_ANSWER)))]
        return pa.schema([*fields, *self.carried_fields()])

    def records(self, example: Example) -> Iterator[dict[str, Any]]:
        start, several = len(example.split) + 1, self.export.source.may_have_several
        names = [(picture.path or "")[start:] for picture in example.images]
        yield {
            **({"file_names": names} if several else {"file_name": names[0]}),
            "id": example.id,
            "text": texts_of(example)[0],
            "answers": answers_of(example),
            **self.carried(example),
        }

    def sink(self, piece: Piece, split: str) -> Sink:
        place = piece.file(f"{Piece.KEPT}/{split}-{piece.number:05d}.parquet")
        return ParquetSink(place, self.schema())

    def copy_to(self, example: Example, name: str) -> str:
        return f"{example.split}/{example.row // 10_000:05d}/{name}"

    def finish(self) -> None:
        for split in self.export.splits.names:
            if pieces := self.export.kept(split):
                build = partial(join_tables, pieces, self.schema())
                self.export.destination.write(f"{split}/metadata.parquet", build)


FORMAT = ImageFolder
