"""Any model with a chat template: plain prompts, and boxes as JSON from 0 to 1000.

The box convention is a guess of the runner's for models that it does not know; many recent models
were trained on it.
"""

from __future__ import annotations

import json
import re

from vlmbatch.families.base import CAPTIONS, OCR, plain_text, shown, unreadable
from vlmbatch.grounding import Box, GridSpace, Size
from vlmbatch.records import Answer, LoadedImage, TaskKind
from vlmbatch.tasks import Ask

_JSON_FORM = (
    'Answer with JSON only: [{"bbox_2d": [x1, y1, x2, y2], "label": "..."}], '
    "coordinates from 0 to 1000, or [] if there is none."
)
_NUMBER = r"\s*(-?\d{1,6}(?:\.\d{1,6})?)\s*"
_BOX = re.compile(rf'"bbox_2d"\s*:\s*\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]')
_LABEL = re.compile(r'"label"\s*:\s*("(?:[^"\\]|\\.){0,200}")')
_NONE = re.compile(r"\[\s*\]|\bnone\b|\bno such\b|\bthere (?:is|are) no", re.IGNORECASE)


class Generic:
    """The fallback family."""

    name = "generic"
    version = 1
    space = GridSpace(1000)

    def word(self, ask: Ask) -> str:
        match ask.kind:
            case TaskKind.VQA:
                return ask.question or ""
            case TaskKind.GROUND:
                return f"Locate {ask.question} in this image. {_JSON_FORM}"
            case TaskKind.DETECT:
                return f"Detect every {', '.join(ask.labels)} in this image. {_JSON_FORM}"
            case TaskKind.OCR:
                return OCR
            case _:
                return CAPTIONS[ask.style]

    def read(
        self, kind: TaskKind, text: str, *, labels: tuple[str, ...], image: LoadedImage
    ) -> Answer:
        if kind not in (TaskKind.GROUND, TaskKind.DETECT):
            return Answer(text=plain_text(text))
        default = labels[0] if kind is TaskKind.GROUND and labels else ""
        found = []
        matches = list(_BOX.finditer(text))
        ends = [0, *(match.end() for match in matches)]
        starts = [*(match.start() for match in matches), len(text)]
        for i, match in enumerate(matches):
            label = _label_of(text[ends[i] : starts[i]], text[ends[i + 1] : starts[i + 1]])
            x1, y1, x2, y2 = (float(number) for number in match.groups())
            found.append(Box(default if label is None else label, x1, y1, x2, y2))
        if not found and not _NONE.search(text):
            raise unreadable(f"no box in the answer {shown(text)}")
        boxes = (self.space.to_pixels(box, image.size) for box in found)
        return Answer(boxes=tuple(box for box in boxes if box is not None))

    def target(self, size: Size) -> Size:
        return size


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


class Idefics3(Generic):
    """SmolVLM and Idefics3: plain prompts; grounding was not trained, so boxes are a guess.

    The processor resizes the long edge to four tiles (families of 364, 384 or 512 px tiles), so a
    larger picture holds nothing that the model sees.
    """

    name = "idefics3"

    def __init__(self, tile: int) -> None:
        self._long_edge = 4 * tile

    def target(self, size: Size) -> Size:
        long_edge = max(size.width, size.height)
        if long_edge <= self._long_edge:
            return size
        scale = self._long_edge / long_edge
        return Size(max(1, round(size.width * scale)), max(1, round(size.height * scale)))
