"""Hugging Face `datasets`: an ImageFolder, whose metadata has ``objects`` as lists of one length.

A box is ``[x, y, width, height]`` in pixels. Source: huggingface.co/docs/datasets/image_dataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmbatch.exports.boxes import xywh
from vlmbatch.grounding import Box


def objects(boxes: Sequence[Box]) -> dict[str, Any]:
    return {"bbox": [xywh(box) for box in boxes], "categories": [box.label for box in boxes]}
