"""Any model with a chat template: plain prompts, and boxes as JSON from 0 to 1000.

The box convention is a guess of the runner's for models that it does not know; many recent models
were trained on it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from vlmbatch.families.base import (
    ALL_TASKS,
    Chat,
    Entry,
    answered,
    in_pixels,
    steps_of,
)
from vlmbatch.families.json_boxes import words_for_json
from vlmbatch.grounding import Box, GridSpace
from vlmbatch.records import Answer, LoadedImage, TaskKind
from vlmbatch.tasks import Ask

_JSON_FORM = (
    'Answer with JSON only: [{"bbox_2d": [x1, y1, x2, y2], "label": "..."}], '
    "coordinates from 0 to 1000, or [] if there is none."
)
_NUMBER = r"\s*(-?\d{1,6}(?:\.\d{1,6})?)\s*"
_BOX = re.compile(rf'"bbox_2d"\s*:\s*\[(?:\s*\[)?{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]')
_LABEL = re.compile(r'"label"\s*:\s*("(?:[^"\\]|\\.){0,200}")')


class Generic(Chat):
    """The fallback family."""

    name = "generic"
    version = 2
    space = GridSpace(1000)

    def word_boxes(self, ask: Ask) -> str:
        return words_for_json(ask, _JSON_FORM)

    def read_boxes(
        self, kind: TaskKind, text: str, labels: tuple[str, ...], image: LoadedImage
    ) -> Answer:
        text = answered(text)
        default = labels[0] if kind is TaskKind.GROUND and labels else ""
        return in_pixels(json_boxes(text, default), text, self.space, image)

    def write(self, boxes: Sequence[Box], *, image: LoadedImage) -> str:
        items = []
        for box in boxes:
            b = self.space.from_pixels(box, image.size)
            x1, x2 = steps_of(b.x1, b.x2, 1000)
            y1, y2 = steps_of(b.y1, b.y2, 1000)
            items.append({"bbox_2d": [x1, y1, x2, y2], "label": box.label})
        return json.dumps(items, ensure_ascii=False)


def json_boxes(text: str, default: str) -> Iterator[Box]:
    """The objects with ``bbox_2d``, also of JSON that was cut off or stands between other text."""
    matches = list(_BOX.finditer(text))
    ends = [0, *(match.end() for match in matches)]
    starts = [*(match.start() for match in matches), len(text)]
    for i, match in enumerate(matches):
        label = _label_of(text[ends[i] : starts[i]], text[ends[i + 1] : starts[i + 1]])
        x1, y1, x2, y2 = (float(number) for number in match.groups())
        yield Box(default if label is None else label, x1, y1, x2, y2)


def _label_of(before: str, after: str) -> str | None:
    """The label in the box's own object: what stands around the box, up to the next boxes."""
    label = _LABEL.search(after)
    if label is None or "}" in after[: label.start()]:
        *_, label = [None, *_LABEL.finditer(before)]
        if label is None or "}" in before[label.end() :]:
            return None
    try:
        return str(json.loads(label[1], strict=False))
    except ValueError:  # an escape that JSON does not have
        return label[1][1:-1]


ENTRIES = (
    Entry(
        name="generic",
        checkpoints=("any other with a chat template",),
        tasks=ALL_TASKS,
        boxes="JSON, bbox_2d, 0 to 1000 (a guess)",
        evidence="unverified",
        matches=lambda config, model_id: True,
        make=lambda config: Generic(),
    ),
)
