"""PaliGemma 1 and 2: short task prompts, boxes as location tokens, y before x.

``<locY1><locX1><locY2><locX2> label ; ...`` with four digits, 1024 bins from 0 to 1023 over each
axis; the picture is squashed to a square. A segmentation adds ``<segNNN>`` codes, which are
dropped. Source: ai.google.dev/gemma/docs/paligemma (prompts), google-research/big_vision
segmentation.py (rounds to 1023 and divides by it; Hugging Face's demos divide by 1024).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlmbatch.families.base import (
    ALL_TASKS,
    Chat,
    Entry,
    in_pixels,
    plain_text,
    steps_of,
    whole,
)
from vlmbatch.families.sizes import at_most
from vlmbatch.grounding import Box, GridSpace, Size
from vlmbatch.records import IMAGE, Answer, LoadedImage, TaskKind
from vlmbatch.tasks import Ask

_LOC = r"<loc(\d{4})>"
_BOX = re.compile(rf"{_LOC}{_LOC}{_LOC}{_LOC}(?:<seg\d{{3}}>)*([^;<]{{0,200}})")
_TAGS = re.compile(r"<loc\d{4}>|<seg\d{3}>|<image>")


class PaliGemma(Chat):
    """``side`` pixels in, ``patch`` pixels per token and side."""

    name = "paligemma"
    raw = True
    space = GridSpace(1023)

    def __init__(self, side: int = 224, patch: int = 14) -> None:
        self._side, self._patch = side, patch

    def word(self, ask: Ask) -> str:
        match ask.kind:
            case TaskKind.VQA:
                return f"{IMAGE}answer en {ask.question}"
            case TaskKind.GROUND:
                return f"{IMAGE}detect {ask.question}"
            case TaskKind.DETECT:
                return f"{IMAGE}detect {' ; '.join(ask.labels)}"
            case TaskKind.OCR:
                return f"{IMAGE}ocr"
            case _:
                return f"{IMAGE}{'caption' if ask.style == 'short' else 'describe'} en"

    def plain(self, text: str) -> str:
        return plain_text(text, _TAGS)

    def read_boxes(
        self, kind: TaskKind, text: str, labels: tuple[str, ...], image: LoadedImage
    ) -> Answer:
        phrase = labels[0] if labels else ""
        found = []
        for match in _BOX.finditer(text):
            y1, x1, y2, x2 = map(float, match.groups()[:4])
            said = match[5].strip()
            found.append(Box(phrase if kind is TaskKind.GROUND else said, x1, y1, x2, y2))
        return in_pixels(found, text, self.space, image)

    def write(self, boxes: Sequence[Box], *, image: LoadedImage) -> str:
        if not boxes:
            return "none"
        texts = []
        for box in boxes:
            b = self.space.from_pixels(box, image.size)
            (x1, x2), (y1, y2) = steps_of(b.x1, b.x2, 1023), steps_of(b.y1, b.y2, 1023)
            texts.append(f"<loc{y1:04}><loc{x1:04}><loc{y2:04}><loc{x2:04}> {box.label}")
        return " ; ".join(texts)

    def target(self, size: Size) -> Size:
        return at_most(size, self._side)

    def image_tokens(self, size: Size) -> int:
        return (self._side // self._patch) ** 2


def _make(config: Mapping[str, Any]) -> PaliGemma:
    side = whole(config, "vision_config", "image_size", default=224)
    return PaliGemma(side, whole(config, "vision_config", "patch_size", default=14))


ENTRIES = (
    Entry(
        name="paligemma",
        checkpoints=("google/paligemma-3b-*", "google/paligemma2-*"),
        tasks=ALL_TASKS,
        boxes="<locYYYY><locXXXX><locYYYY><locXXXX> label, 0 to 1023",
        evidence="documented",
        matches=lambda config, model_id: config.get("model_type") == "paligemma",
        make=_make,
        note="a pt checkpoint knows only the tasks that it was tuned on; take a mix one",
    ),
)
