"""COCO: one JSON file with images, annotations and categories.

A box is ``[x, y, width, height]`` in pixels; ids count from 1, since readers take 0 for none.
Source: cocodataset.org/#format-data. ``score`` is that of COCO's results; readers of annotations
leave it alone.
"""

from __future__ import annotations

from typing import Any

from vlmbatch.exports.boxes import xywh
from vlmbatch.grounding import Box, Size


def image_entry(image_id: int, file_name: str, size: Size) -> dict[str, Any]:
    return {"id": image_id, "width": size.width, "height": size.height, "file_name": file_name}


def box_entry(annotation_id: int, image_id: int, category_id: int, box: Box) -> dict[str, Any]:
    x, y, width, height = xywh(box)
    entry: dict[str, Any] = {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [x, y, width, height],
        "area": round(width * height, 3),
        "iscrowd": 0,
    }
    if box.score is not None:
        entry["score"] = round(box.score, 6)
    return entry
