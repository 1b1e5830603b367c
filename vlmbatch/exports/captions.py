"""Captions as text files of the images' names, for diffusion fine-tuners.

Source: kohya-ss/sd-scripts (48d368f), ``train_util.py``: ``caption_extension`` beside the image, in
one folder without folders in it. It reads the first line, or, with ``enable_wildcard``, any one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from vlmbatch.errors import RunStopped, UsageError
from vlmbatch.exports.base import Example, Format, ImageMode, Sink, Unsuited
from vlmbatch.exports.carried import TAKEN, write_carried
from vlmbatch.exports.pieces import Piece
from vlmbatch.exports.selection import Drop
from vlmbatch.exports.sinks import LineSink, lines_of
from vlmbatch.exports.texts import line_of_text, no_text, texts_of
from vlmbatch.manifest.images import SUFFIXES

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
    taken = TAKEN
    options = {  # noqa: RUF012
        "extension": "of the text files (.txt)",
        "prefix": "stands before every caption, as a trigger word does",
        "existing": "texts that are there when they go beside images: skip (default) or overwrite",
    }

    def __init__(self, export: Export) -> None:
        super().__init__(export)
        given = export.options
        self._ending = _ending(given.get("extension", ".txt"))
        self._prefix = given.get("prefix", "")
        if len(self._prefix.splitlines()) > 1:
            raise UsageError(
                "the prefix has several lines, and the first line is the caption",
                hint="give it in one line",
            )
        self._existing = given.get("existing", "skip")
        if self._existing not in ("skip", "overwrite"):
            raise UsageError(
                f"existing={self._existing} is neither skip nor overwrite", hint="leave it out"
            )
        self._copies = f"{export.place}{os.sep}"

    def drops(self) -> Sequence[Drop]:
        return (no_text,)

    def records(self, example: Example) -> Iterator[dict[str, Any]]:
        image = example.images[0].path or ""
        path = Path(os.path.splitext(image)[0] + self._ending)
        beside = not str(path).startswith(self._copies)
        keeps = self._existing == "skip" or str(path) == image  # an image that is called so
        if beside and keeps and path.exists():
            raise Unsuited("caption_exists")
        texts = [line_of_text(text) for text in texts_of(example)]
        text = "".join(f"{self._prefix}{text}\n" for text in texts)
        row = {"row": example.row, "id": example.id, **self.carried(example)}
        about = {"file_name": image.removeprefix(self._copies), **row}
        yield {"path": str(path), "text": text, "about": about}

    def sink(self, piece: Piece, split: str) -> Sink:
        """Texts wait for the end: one of this export is not one that was there before."""
        return LineSink(piece.file(f"{Piece.KEPT}/{split}-{piece.number:05d}.jsonl"))

    def copy_to(self, example: Example, name: str) -> str:
        return f"{example.split}/{name}"

    def finish(self) -> None:
        """Of several rows about one image, each has its lines in the text. Holds two numbers of 8
        bytes, in a dict and a set, for each image."""
        self._check_names()
        seen = set[int]()
        for split in self.export.splits.names:
            for line in self._lines(split):
                digest = _digest(line["path"])
                _write(Path(line["path"]), line["text"], again=digest in seen)
                seen.add(digest)
            write_carried(self.export, split, (line["about"] for line in self._lines(split)))

    def _check_names(self) -> None:
        """Raises UsageError where two images would share a text: consumers look for a text by the
        image's name without its ending. Copies have names of their own."""
        images: dict[int, int] = {}
        for split in self.export.splits.names:
            for line in self._lines(split):
                image, path = line["about"]["file_name"], line["path"]
                digest = _digest(image)
                if path.startswith(self._copies):
                    continue
                if images.setdefault(_digest(path), digest) != digest:
                    raise UsageError(
                        f"{path} would be the text of {image} and of another image beside it",
                        hint="--images copy gives each a name of its own, in another folder",
                    )

    def _lines(self, split: str) -> Iterator[dict[str, Any]]:
        for piece in self.export.kept(split):
            yield from lines_of(piece)


def _ending(extension: str) -> str:
    """With its dot. Raises UsageError for one that is none, or an image's."""
    ending = "." + extension.lstrip(".")
    if not re.fullmatch(r"(\.[A-Za-z0-9_-]+)+", ending):
        raise UsageError(f"extension={extension} is no ending of files", hint="as in .txt")
    if ending.lower().endswith(SUFFIXES):
        raise UsageError(
            f"extension={extension} is one of images, which the texts would replace",
            hint="as in .txt, .caption",
        )
    return ending


def _digest(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode(errors="replace"))


def _write(path: Path, text: str, *, again: bool) -> None:
    """``again``: as further lines."""
    try:
        if again:
            with open(path, "a", encoding="utf-8") as file:
                file.write(text)
            return
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise RunStopped(
            f"cannot write {path}: {error.strerror}",
            hint="run the same command again when it can be; or --images copy, into another folder",
        ) from None


FORMAT = Captions
