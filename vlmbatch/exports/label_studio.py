"""Label Studio: tasks with predictions, and the labeling configuration that shows them.

Places are in percent of the image, from its top left. Source: labelstud.io/guide/predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

from vlmbatch.exports.boxes import shares
from vlmbatch.grounding import Box, Point, Size

BOXES, POINTS = "label", "point"
"""Names of the tags in the configuration."""
POINT_WIDTH = 0.75
"""How large a point is drawn, in percent of the image's width."""


def rectangle(number: int, box: Box, image: Size) -> dict[str, Any]:
    """``number`` tells it from the others of its prediction."""
    x, y, width, height = (round(100 * share, 6) for share in shares(box, image))
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": 0}
    region = _region(number, "rectanglelabels", BOXES, box.label, value, image)
    return region if box.score is None else {**region, "score": round(box.score, 6)}


def keypoint(number: int, point: Point, image: Size) -> dict[str, Any]:
    x, y = (round(v, 6) for v in (100 * point.x / image.width, 100 * point.y / image.height))
    value = {"x": x, "y": y, "width": POINT_WIDTH}
    return _region(number, "keypointlabels", POINTS, point.label, value, image)


def _region(
    number: int, kind: str, tag: str, label: str, value: dict[str, Any], image: Size
) -> dict[str, Any]:
    return {
        "id": f"r{number}",
        "type": kind,
        "from_name": tag,
        "to_name": "image",
        "original_width": image.width,
        "original_height": image.height,
        "image_rotation": 0,
        "value": {**value, kind: [label]},
    }


def task(
    image_url: str, model: str, boxes: Sequence[Box], points: Sequence[Point], image: Size
) -> dict[str, Any]:
    """A task with one prediction; its score is the mean of its boxes', where all have one."""
    result = [rectangle(i, box, image) for i, box in enumerate(boxes)]
    result += [keypoint(i, point, image) for i, point in enumerate(points, start=len(boxes))]
    prediction: dict[str, Any] = {"model_version": model, "result": result}
    scores = [box.score for box in boxes if box.score is not None]
    if boxes and len(scores) == len(boxes):
        prediction["score"] = round(min(1.0, max(0.0, sum(scores) / len(scores))), 6)
    return {"data": {"image": image_url}, "predictions": [prediction]}


def labeling_config(box_labels: Sequence[str], point_labels: Sequence[str]) -> str:
    """XML to paste into a project's settings."""
    lines = ["<View>", '  <Image name="image" value="$image" zoom="true"/>']
    for tag, name, labels in (
        ("RectangleLabels", BOXES, box_labels),
        ("KeyPointLabels", POINTS, point_labels),
    ):
        if labels:
            lines.append(f'  <{tag} name="{name}" toName="image">')
            lines += [f"    <Label value={quoteattr(label)}/>" for label in labels]
            lines.append(f"  </{tag}>")
    return "\n".join([*lines, "</View>"]) + "\n"
