"""The Hugging Face ImageFolder: copied images, and ``metadata.jsonl`` with their captions.

Source: ``datasets`` (5.2), ``packaged_modules/folder_based_builder``: ``file_name`` names an image
relative to the metadata's folder, ``file_names`` several. All splits must have the same types;
where a column is null throughout one split and not another, JSON lines say two, and the metadata
is Parquet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlmbatch.exports.base import SPLITS_OF_DATASETS, Example, Format, ImageMode, Sink
from vlmbatch.exports.pieces import Piece
from vlmbatch.exports.selection import Drop
from vlmbatch.exports.sinks import ParquetSink, join_tables, join_tables_as_lines
from vlmbatch.exports.texts import answers_of, no_text, texts_of

IN_FOLDERS = frozenset(("id", "file_name", "file_names", "image", "images"))
"""Columns of a folder's metadata that mean something."""
_ANSWER = pa.struct([pa.field(name, pa.string()) for name in ("task", "question", "text", "json")])


def allowed_in_folders(column: str) -> str:
    """``datasets`` takes any ``..._file_name`` for another image."""
    for ending in ("_file_name", "_file_names"):
        if column.endswith(ending):
            return f"{column.removesuffix(ending)}{ending.replace('file_', 'file')}"
    return column


class ImageFolder(Format):
    """``train/metadata.jsonl``; ``text`` is the first answer's, ``answers`` has all of them."""

    name = "imagefolder"
    about = "images and metadata.jsonl, which datasets.load_dataset reads as a folder"
    images = (ImageMode.COPY,)
    split_names = SPLITS_OF_DATASETS
    taken = IN_FOLDERS | {"text", "answers"}

    def allowed(self, name: str) -> str:
        return allowed_in_folders(name)

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
        kept = {name: self.export.kept(name) for name in self.export.splits.names}
        kept = {name: pieces for name, pieces in kept.items() if pieces}
        as_lines = len(set(map(_without_values, kept.values()))) == 1
        for split, pieces in kept.items():
            if as_lines:
                build, ending = partial(join_tables_as_lines, pieces), "jsonl"
            else:
                build, ending = partial(join_tables, pieces, self.schema()), "parquet"
            self.export.destination.write(f"{split}/metadata.{ending}", build)


def _without_values(pieces: Sequence[Path]) -> frozenset[str]:
    """Columns, also those in structs, that are null in every row, or lists without anything."""
    columns, with_values = set[str](), set[str]()
    for path in pieces:
        metadata = pq.read_metadata(path)
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for chunk in map(group.column, range(group.num_columns)):
                columns.add(chunk.path_in_schema)
                if chunk.statistics is None or chunk.statistics.null_count < chunk.num_values:
                    with_values.add(chunk.path_in_schema)
    return frozenset(columns - with_values)


FORMAT = ImageFolder
