"""FiftyOne: a FiftyOneImageDetectionDataset, ``labels.json`` beside ``data/``.

A box is ``[x, y, width, height]``, 0 to 1. Source: docs.voxel51.com, "Importing datasets", and
fiftyone 1.22, utils/data/importers.py.
"""

from __future__ import annotations

from typing import Any

from vlmbatch.exports.boxes import shares
from vlmbatch.grounding import Box, Size


def detection(box: Box, image: Size) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "label": box.label,
        "bounding_box": [round(share, 8) for share in shares(box, image)],
    }
    return entry if box.score is None else {**entry, "confidence": round(box.score, 6)}
