"""The Hugging Face ImageFolder: copied images, and ``metadata.jsonl`` with their captions.

Source: ``datasets`` (5.2), ``packaged_modules/folder_based_builder``: ``file_name`` names an image
relative to the metadata's folder, ``file_names`` several.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from vlmbatch.exports.base import Example, ImageMode, Lines
from vlmbatch.exports.sinks import join
from vlmbatch.exports.texts import answers_of, texts_of

IN_FOLDERS = frozenset(("id", "file_name", "file_names", "image", "images"))
"""Columns of a folder's metadata that mean something."""


def free_in_folders(column: str) -> str:
    """``datasets`` takes any ``..._file_name`` for another image."""
    for ending in ("_file_name", "_file_names"):
        if column.endswith(ending):
            return f"{column.removesuffix(ending)}{ending.replace('file_', 'file')}"
    return column


class ImageFolder(Lines):
    """``train/metadata.jsonl``; ``text`` is the first answer's, ``answers`` has all of them."""

    name = "imagefolder"
    about = "images and metadata.jsonl, which datasets.load_dataset reads as a folder"
    images = (ImageMode.COPY,)
    taken = IN_FOLDERS | {"text", "answers"}

    def free_name(self, column: str) -> str:
        return free_in_folders(super().free_name(column))

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

    def copy_to(self, example: Example, name: str) -> str:
        return f"{example.split}/{example.row // 10_000:05d}/{name}"

    def finish(self) -> None:
        for split in self.export.splits.names:
            if pieces := self.export.kept(split):
                self.export.destination.write(f"{split}/metadata.jsonl", partial(join, pieces))


FORMAT = ImageFolder
