"""Label Studio: tasks with predictions, and the labeling configuration that shows them.

Places are in percent of the image, from its top left. Sources: labelstud.io/guide/predictions and
labelstud.io/guide/storage (local files).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from vlmbatch.errors import UsageError
from vlmbatch.exports.annotations import Annotations, Labelled
from vlmbatch.exports.base import Example, ImageMode, Unsuited
from vlmbatch.exports.boxes import BOX_OPTIONS, shares
from vlmbatch.grounding import Box, Point, Size
from vlmbatch.storage import scheme_of

if TYPE_CHECKING:
    from vlmbatch.exports.exporting import Export

BOXES, POINTS = "label", "point"
"""Names of the tags in the configuration."""
POINT_WIDTH = 0.75
"""How large a point is drawn, in percent of the image's width."""
PREFIX = "/data/local-files/?d="
"""Where Label Studio serves files below its document root, if it is told to serve any."""


class LabelStudio(Annotations):
    """Addresses are given as they are; files by a prefix and their path below a document root."""

    name = "label-studio"
    about = "boxes and points: tasks_SPLIT.json with predictions, labeling_config.xml"
    images = (ImageMode.COPY, ImageMode.REFERENCE)
    opens_addresses = True
    absolute_paths = True
    has_points = True
    taken = frozenset(("image", "id"))
    options: ClassVar[Mapping[str, str]] = {
        **BOX_OPTIONS,
        "prefix": f"what stands before the path of a file; default: {PREFIX}",
        "document_root": "the folder that such paths start from; default: /, as Label Studio's is",
    }

    def __init__(self, export: Export) -> None:
        super().__init__(export)
        self._prefix = export.options.get("prefix", PREFIX)
        root = export.options.get("document_root", "/")
        if not os.path.isabs(root):
            raise UsageError(
                f"document_root={root} is no absolute path",
                hint="give what LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT is set to",
            )
        self._root = root

    def records(self, example: Example) -> Iterable[dict[str, Any]]:
        if self._url(example.images[0].path or "").startswith(f"{self._prefix}../"):
            raise Unsuited("outside_the_document_root")
        return super().records(example)

    def finish(self) -> None:
        write = self.export.destination.write
        for split in self.found:
            write(f"tasks_{split}.json", partial(self._write, split))
        config = labeling_config(self.categories, self.point_labels)
        write("labeling_config.xml", lambda file: _write(config, file))

    def _write(self, split: str, file: BinaryIO) -> None:
        file.write(b"[")
        for number, image in enumerate(self.labelled(split)):
            task = task_of(image, self._url(image.path), self.export.model)
            file.write(f"{',' if number else ''}\n{json.dumps(task, ensure_ascii=False)}".encode())
        file.write(b"\n]\n")

    def _url(self, path: str) -> str:
        if scheme_of(path) is not None:
            return path
        whole = self.export.place / path  # where it is absolute, the path itself
        return self._prefix + quote(os.path.relpath(whole, self._root))


def task_of(image: Labelled, url: str, model: str) -> dict[str, Any]:
    """A task with one prediction; its score is the mean of its boxes', where all have one."""
    boxes, points = image.boxes, image.points
    result = [rectangle(i, box, image.size) for i, box in enumerate(boxes)]
    result += [keypoint(i, point, image.size) for i, point in enumerate(points, len(boxes))]
    prediction: dict[str, Any] = {"model_version": model, "result": result}
    scores = [box.score for box in boxes if box.score is not None]
    if boxes and len(scores) == len(boxes):
        prediction["score"] = round(min(1.0, max(0.0, sum(scores) / len(scores))), 6)
    return {"data": {**image.carried, "image": url, "id": image.id}, "predictions": [prediction]}


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


def _write(text: str, file: BinaryIO) -> None:
    file.write(text.encode())


FORMAT = LabelStudio
