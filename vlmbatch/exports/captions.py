"""Captions as text files of the images' names, for diffusion fine-tuners.

Source: kohya-ss/sd-scripts (48d368f), ``train_util.py``: ``caption_extension`` beside the image, in
one folder without folders in it. It reads the first line, or, with ``enable_wildcard``, any one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vlmbatch.errors import UsageError
from vlmbatch.exports.base import Example, Format, ImageMode, Sink, Unsuited
from vlmbatch.exports.pieces import Piece
from vlmbatch.exports.texts import line_of_text, texts_of

if TYPE_CHECKING:
    from vlmbatch.exports.exporting import Export


class Captions(Format):
    """Copied, images and texts are in ``train/``. Referenced, texts go beside the images where
    these lie, and a text that is there stays, unless ``existing`` says otherwise."""

    name = "captions"
    about = "a text file beside each image, for diffusion fine-tuners; one line for each answer"
    images = (ImageMode.COPY, ImageMode.REFERENCE)
    several_images = False
    absolute_paths = True
    options = {  # noqa: RUF012
        "extension": "of the text files (.txt)",
        "prefix": "stands before every caption, as a trigger word does",
        "existing": "texts that are there when they go beside images: skip (default) or overwrite",
    }

    def __init__(self, export: Export) -> None:
        super().__init__(export)
        given = export.options
        self._ending = "." + given.get("extension", ".txt").lstrip(".")
        self._prefix = given.get("prefix", "")
        self._existing = given.get("existing", "skip")
        if self._existing not in ("skip", "overwrite"):
            raise UsageError(f"existing={self._existing!r} is neither skip nor overwrite")
        self._copies = f"{export.place}{os.sep}"

    def records(self, example: Example) -> Iterator[tuple[Path, str]]:
        path = Path(os.path.splitext(example.images[0].path or "")[0] + self._ending)
        beside = not str(path).startswith(self._copies)
        if beside and self._existing == "skip" and path.exists():
            raise Unsuited("caption_exists")
        texts = [line_of_text(text) for text in texts_of(example)]
        yield path, "".join(f"{self._prefix}{text}\n" for text in texts)

    def sink(self, piece: Piece, split: str) -> Sink:
        return _Texts()

    def copy_to(self, example: Example, name: str) -> str:
        return f"{example.split}/{name}"


class _Texts:
    """Writes each text where it belongs; a piece that is made again writes the same."""

    def add(self, record: tuple[Path, str]) -> None:
        path, text = record
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(text, encoding="utf-8", errors="replace")
        os.replace(temporary, path)

    def close(self) -> None: ...


FORMAT = Captions
