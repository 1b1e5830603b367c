"""COCO: a JSON file with images, annotations and categories, ``instances_train.json``.

A box is ``[x, y, width, height]`` in pixels; ids count from 1, since readers take 0 for none.
Source: cocodataset.org/#format-data. ``score`` is that of COCO's results; readers of annotations
leave it alone. Captions of the same images are in a file of their own, as COCO's are.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO

from vlmbatch.exports.annotations import Annotations, Labelled
from vlmbatch.exports.base import ImageMode
from vlmbatch.exports.boxes import xywh
from vlmbatch.grounding import Box, Size


class Coco(Annotations):
    """``file_name`` is relative to the export's folder: that is the root which loaders ask for."""

    name = "coco"
    about = "boxes: instances_SPLIT.json; captions of the same run: captions_SPLIT.json"
    images = (ImageMode.COPY, ImageMode.REFERENCE)
    opens_addresses = True
    has_captions = True
    taken = frozenset(("id", "width", "height", "file_name"))

    def finish(self) -> None:
        numbers = {name: number for number, name in enumerate(self.categories, 1)}
        for split, found in self.found.items():
            write = self.export.destination.write
            if found.looked:
                entries = partial(_boxes_of, numbers)
                write(f"instances_{split}.json", partial(self._write, split, entries, numbers))
            if found.captions:
                write(f"captions_{split}.json", partial(self._write, split, _captions_of, None))

    def _write(
        self,
        split: str,
        entries_of: Callable[[Labelled], list[dict[str, Any]] | None],
        numbers: dict[str, int] | None,
        file: BinaryIO,
    ) -> None:
        """All images with something to say; what there is to say about them waits on the disk."""
        info = {"description": f"by {self.export.model}", "version": "1.0"}
        file.write(f'{{"info": {_json(info)}, "licenses": [],\n"images": ['.encode())
        with tempfile.TemporaryFile() as waiting:
            images = annotations = 0
            for image in self.labelled(split):
                entries = entries_of(image)
                if entries is None:
                    continue
                entry = image_entry(images + 1, image.path, image.size)
                file.write(_item({**entry, **image.carried}, first=not images))
                images += 1
                for entry in entries:
                    numbered = {"id": annotations + 1, "image_id": images, **entry}
                    waiting.write(_item(numbered, first=not annotations))
                    annotations += 1
            file.write(b'],\n"annotations": [')
            waiting.seek(0)
            shutil.copyfileobj(waiting, file, 2**20)
        if numbers is not None:
            categories = [
                {"id": n, "name": name, "supercategory": ""} for name, n in numbers.items()
            ]
            file.write(f'],\n"categories": {_json(categories)}}}\n'.encode())
        else:
            file.write(b"]}\n")


def image_entry(image_id: int, file_name: str, size: Size) -> dict[str, Any]:
    return {"id": image_id, "width": size.width, "height": size.height, "file_name": file_name}


def box_entry(category_id: int, box: Box) -> dict[str, Any]:
    """Without the ids of annotation and image."""
    x, y, width, height = xywh(box)
    entry: dict[str, Any] = {
        "category_id": category_id,
        "bbox": [x, y, width, height],
        "area": round(width * height, 3),
        "iscrowd": 0,
    }
    return entry if box.score is None else {**entry, "score": round(box.score, 6)}


def _boxes_of(numbers: dict[str, int], image: Labelled) -> list[dict[str, Any]] | None:
    if not image.looked:
        return None
    return [box_entry(numbers[box.label], box) for box in image.boxes]


def _captions_of(image: Labelled) -> list[dict[str, Any]] | None:
    return [{"caption": text} for text in image.captions] or None


def _item(entry: dict[str, Any], *, first: bool) -> bytes:
    return f"{'' if first else ','}\n{_json(entry)}".encode()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


FORMAT = Coco
