"""FiftyOne: a FiftyOneImageDetectionDataset, ``labels.json`` beside ``data/``, a folder per split.

A box is ``[x, y, width, height]``, 0 to 1. Source: docs.voxel51.com, "Importing datasets", and
fiftyone 1.22, utils/data/importers.py.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from vlmbatch.exports.annotations import Annotations, Labelled
from vlmbatch.exports.base import Example, ImageMode
from vlmbatch.exports.boxes import shares
from vlmbatch.exports.carried import TAKEN
from vlmbatch.grounding import Box, Size


class FiftyOne(Annotations):
    """``labels`` names an image by its path below ``data`` without the ending, or by its absolute
    path where it was not copied."""

    name = "fiftyone"
    about = "boxes: SPLIT/labels.json and SPLIT/data, a FiftyOneImageDetectionDataset"
    images = (ImageMode.COPY, ImageMode.REFERENCE)
    absolute_paths = True
    taken = TAKEN

    def copy_to(self, example: Example, name: str) -> str:
        return f"{example.split}/data/{name}"

    def finish(self) -> None:
        for split in self.found:
            self.export.destination.write(f"{split}/labels.json", partial(self._write, split))
            (self.export.place / split / "data").mkdir(exist_ok=True)  # the importer looks for it
        self.write_carried()

    def _write(self, split: str, file: BinaryIO) -> None:
        classes = json.dumps(self.categories, ensure_ascii=False)
        file.write(f'{{"classes": {classes},\n"labels": {{'.encode())
        for number, image in enumerate(self.labelled(split)):
            boxes = [detection(box, image.size) for box in image.boxes]
            name = json.dumps(_name_of(image), ensure_ascii=False)
            item = f"{',' if number else ''}\n{name}: {json.dumps(boxes, ensure_ascii=False)}"
            file.write(item.encode())
        file.write(b"}}\n")


def _name_of(image: Labelled) -> str:
    if os.path.isabs(image.path):
        return image.path
    below = PurePosixPath(image.path).parts[2:]
    return str(PurePosixPath(*below).with_suffix(""))


def detection(box: Box, image: Size) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "label": box.label,
        "bounding_box": [round(share, 8) for share in shares(box, image)],
    }
    return entry if box.score is None else {**entry, "confidence": round(box.score, 6)}


FORMAT = FiftyOne
