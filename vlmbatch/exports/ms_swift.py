"""ms-swift: messages whose ``<ref-object>`` and ``<bbox>`` stand for what ``objects`` lists.

It puts both into each model's own syntax and space when it trains. Boxes are ``[x1, y1, x2, y2]``,
points ``[x, y]``, in pixels of the image. Source: ms-swift's Custom-dataset.md, and ms-swift 4.6,
template/base.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vlmbatch.exports.boxes import rounded
from vlmbatch.grounding import Box, Point

NONE = "There are none."


def answer(
    boxes: Sequence[Box], points: Sequence[Point], *, as_json: bool
) -> tuple[str, dict[str, Any]]:
    """The assistant's turn and its ``objects``.

    ``as_json``: the JSON that Qwen2.5-VL and later are trained on; ms-swift fills in texts as they
    are, so labels are escaped here. Else reference and box in turn, between the tags of the model.
    """
    labels = [*(box.label for box in boxes), *(point.label for point in points)]
    places = [list(edges(rounded(box))) for box in boxes]
    places += [[round(point.x, 3), round(point.y, 3)] for point in points]
    if as_json:
        keys = ["bbox_2d"] * len(boxes) + ["point_2d"] * len(points)
        items = [f'{{"{key}": <bbox>, "label": "<ref-object>"}}' for key in keys]
        labels = [json.dumps(label, ensure_ascii=False)[1:-1] for label in labels]
        text = f"```json\n[{', '.join(items)}]\n```"
    else:
        text = "<ref-object><bbox>" * len(labels) or NONE
    return text, {"ref": labels, "bbox": places, "bbox_type": "real"}


def edges(box: Box) -> tuple[float, float, float, float]:
    return box.x1, box.y1, box.x2, box.y2
