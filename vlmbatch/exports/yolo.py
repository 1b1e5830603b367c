"""YOLO, as ultralytics trains on it: ``labels/SPLIT/NAME.txt`` for ``images/SPLIT/NAME.jpg``.

A line is ``class xc yc width height``, 0 to 1; a sixth number, such as a score, is refused. Source:
docs.ultralytics.com/datasets/detect and ultralytics 8.4, data/utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import BinaryIO

import yaml

from vlmbatch.exports.annotations import Annotations
from vlmbatch.exports.base import Example, ImageMode
from vlmbatch.exports.boxes import shares
from vlmbatch.exports.carried import TAKEN
from vlmbatch.grounding import Box, Size

LABELS = "labels"
_KEYS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}


class Yolo(Annotations):
    """Images are always copied: labels are found by putting ``labels`` for ``images`` into their
    paths. An image without boxes has no label file, and counts as background."""

    name = "yolo"
    about = "boxes: data.yaml, images/SPLIT, labels/SPLIT, for ultralytics and its like"
    images = (ImageMode.COPY,)
    endings = frozenset(("jpg", "png", "webp", "bmp"))
    split_names = _KEYS
    taken = TAKEN

    def copy_to(self, example: Example, name: str) -> str:
        return f"images/{example.split}/{name}"

    def finish(self) -> None:
        numbers = {name: number for number, name in enumerate(self.categories)}
        self.export.destination.claim(LABELS)
        for split in self.found:
            folder = self.export.place / LABELS / split
            folder.mkdir(parents=True, exist_ok=True)
            for image in self.labelled(split):
                lines = [line(numbers[box.label], box, image.size) for box in image.boxes]
                if lines:
                    stem = PurePosixPath(image.path).stem
                    (folder / f"{stem}.txt").write_text("\n".join(lines) + "\n")
        folders = {split: f"images/{split}" for split in self.found}
        text = data_yaml(list(numbers), folders)
        self.export.destination.write("data.yaml", partial(_write, text))
        self.write_carried()


def line(category: int, box: Box, image: Size) -> str:
    """``category`` counts from 0."""
    x, y, width, height = shares(box, image)
    numbers = (x + width / 2, y + height / 2, width, height)
    return " ".join([str(category), *(f"{number:.8f}" for number in numbers)])


def data_yaml(categories: Sequence[str], folders: Mapping[str, str]) -> str:
    """``folders``: of the images of each split, relative to the file.

    It has no ``path``: ultralytics takes a relative one for a folder below its own settings' folder
    of data sets, and the file's own folder where there is none. ``train`` and ``val`` are required.
    """
    paths = {_KEYS[split]: folder for split, folder in folders.items() if split in _KEYS}
    some = next(iter(folders.values()), "images")
    train = paths.get("train", some)
    names = dict(enumerate(categories))
    content = {"train": train, "val": train, **paths, "names": names}
    return yaml.safe_dump(content, allow_unicode=True, sort_keys=False, width=1000)


def _write(text: str, file: BinaryIO) -> None:
    file.write(text.encode())


FORMAT = Yolo
