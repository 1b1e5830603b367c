"""The bundled model: coloured shapes, boxes as location tokens.

It shows how a family is written. The model sees every picture squashed to 64 x 64 pixels and
answers with four location tokens per box, ``<loc_x1><loc_y1><loc_x2><loc_y2>``: edges counted from
0 to 64 over the picture's width and height, x2 and y2 exclusive. Several boxes are separated by
``;``, a detect answer names each box's label before it, and ``none`` means that nothing was found.
Source: examples/demo_model/README.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlmbatch.families.base import (
    ALL_TASKS,
    Chat,
    Entry,
    shown,
    steps_of,
    unreadable,
    whole,
)
from vlmbatch.grounding import Box, GridSpace, Size
from vlmbatch.records import Answer, LoadedImage, TaskKind
from vlmbatch.tasks import Ask

_BOX = re.compile(r"<loc_(\d{1,3})><loc_(\d{1,3})><loc_(\d{1,3})><loc_(\d{1,3})>")
_LABEL_CHARS = 80


class Demo(Chat):
    """Family of the bundled model and of models fine-tuned from it."""

    name = "demo"
    version = 1
    space = GridSpace(64)

    def __init__(self, side: int = 64, tokens: int = 67) -> None:
        self._side, self._tokens = side, tokens

    def word(self, ask: Ask) -> str:
        match ask.kind:
            case TaskKind.VQA:
                return ask.question or ""
            case TaskKind.GROUND:
                return f"Locate: {ask.question}"
            case TaskKind.DETECT:
                return f"Detect: {', '.join(ask.labels)}"
            case TaskKind.OCR:
                return "Read the text."
            case _:
                how = "briefly" if ask.style == "short" else "in detail"
                return f"Describe the image {how}."

    def read_boxes(
        self, kind: TaskKind, text: str, labels: tuple[str, ...], image: LoadedImage
    ) -> Answer:
        phrase = labels[0] if labels else ""
        boxes = []
        for match in _BOX.finditer(text):
            x1, y1, x2, y2 = map(float, match.groups())
            before = text[max(0, match.start() - _LABEL_CHARS) : match.start()]
            label = re.split("[<>;]", before)[-1].strip()
            named = phrase if kind is TaskKind.GROUND else label
            box = self.space.to_pixels(Box(named, x1, y1, x2, y2), image.size)
            if box is not None:
                boxes.append(box)
        if not boxes and "none" not in text:
            raise unreadable(f"no box in the answer {shown(text)}")
        return Answer(boxes=tuple(boxes))

    def write(self, boxes: Sequence[Box], *, image: LoadedImage) -> str:
        texts = []
        for box in boxes:
            b = self.space.from_pixels(box, image.size)
            (x1, x2), (y1, y2) = steps_of(b.x1, b.x2, 64), steps_of(b.y1, b.y2, 64)
            texts.append(f"{box.label} <loc_{x1}><loc_{y1}><loc_{x2}><loc_{y2}>")
        return " ; ".join(texts) or "none"

    def target(self, size: Size) -> Size:
        return Size(self._side, self._side)

    def image_tokens(self, size: Size) -> int:
        return self._tokens


def _make(config: Mapping[str, Any]) -> Demo:
    side = whole(config, "vision_config", "image_size", default=64)
    patch = whole(config, "vision_config", "patch_size", default=8)
    scale = whole(config, "scale_factor", default=1)
    return Demo(side, max(1, side // patch // scale) ** 2 + 3)


ENTRIES = (
    Entry(
        name="demo",
        checkpoints=("demo",),
        tasks=ALL_TASKS,
        boxes="<loc_x1><loc_y1><loc_x2><loc_y2>, edges from 0 to 64",
        evidence="run",
        matches=lambda config, model_id: False,  # named by its config.json: vlmbatch_family
        make=_make,
    ),
)
