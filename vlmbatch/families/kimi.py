"""Kimi-VL: ``{"bbox_2d": [0.280, 0.500, 0.520, 0.700]}``, 0 to 1 over the image.

The syntax is what users saw (Kimi-VL issue 56); no prompt for boxes is documented, the one here
asks for that form. The Thinking models put their thoughts between ``◁think▷`` and ``◁/think▷``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vlmbatch.families.base import ALL_TASKS, Chat, Entry, whole
from vlmbatch.families.json_boxes import read_json, words_for_json, write_json
from vlmbatch.grounding import Box, GridSpace, Size, Space
from vlmbatch.records import Answer, LoadedImage, TaskKind
from vlmbatch.tasks import Ask

_FORM = (
    'Answer with JSON only: [{"bbox_2d": [x1, y1, x2, y2], "label": "..."}], '
    "coordinates from 0 to 1 relative to the image, or [] if there is none."
)


class Kimi(Chat):
    """Kimi-VL."""

    name = "kimi_vl"
    space: Space = GridSpace(1)

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        config = config or {}
        self._patch = whole(config, "preprocessor", "patch_size", default=14)
        self._limit = whole(config, "preprocessor", "in_token_limit", default=4096)

    def word_boxes(self, ask: Ask) -> str:
        return words_for_json(ask, _FORM)

    def read(
        self, kind: TaskKind, text: str, *, labels: tuple[str, ...], image: LoadedImage
    ) -> Answer:
        text = text.replace("◁think▷", "<think>").replace("◁/think▷", "</think>")
        return super().read(kind, text, labels=labels, image=image)

    def read_boxes(
        self, kind: TaskKind, text: str, labels: tuple[str, ...], image: LoadedImage
    ) -> Answer:
        return read_json(kind, text, labels, self.space, image)

    def write(self, boxes: Sequence[Box], *, image: LoadedImage) -> str:
        own = (self.space.from_pixels(box, image.size) for box in boxes)
        return write_json(Box(b.label, *_thousandths(b.x1, b.y1, b.x2, b.y2)) for b in own)

    def step(self, size: Size) -> tuple[float, float]:
        """Pixels between two coordinates as ``write`` puts them, with three decimals."""
        return size.width / 1000, size.height / 1000

    def target(self, size: Size) -> Size:
        """As vLLM's kimi_vl.py has it, until it lets the size alone: at most so many patches."""
        while (patches := size.width // self._patch * (size.height // self._patch)) > self._limit:
            scale = math.sqrt(self._limit / patches)
            size = Size(max(1, int(size.width * scale)), max(1, int(size.height * scale)))
        return size

    def image_tokens(self, size: Size) -> int | None:
        """One for every 2 x 2 patches of the size, padded to them."""
        given, cell = self.target(size), 2 * self._patch
        return math.ceil(given.width / cell) * math.ceil(given.height / cell)


def _thousandths(*numbers: float) -> list[float]:
    """Rounded to 0.001 from 0 to 1, two ends never the same."""
    x1, y1, x2, y2 = (min(max(round(n * 1000), 0), 1000) for n in numbers)
    x1, y1 = min(x1, 999), min(y1, 999)
    return [n / 1000 for n in (x1, y1, max(x2, x1 + 1), max(y2, y1 + 1))]


ENTRIES = (
    Entry(
        name=Kimi.name,
        checkpoints=("moonshotai/Kimi-VL-*",),
        tasks=ALL_TASKS,
        boxes='JSON "bbox_2d", 0 to 1',
        evidence="unverified",
        architectures=("KimiVLForConditionalGeneration",),
        matches=lambda config, model: config.get("model_type") == "kimi_vl",
        make=Kimi,
        own_code=True,
        note="boxes as users reported them; vLLM brings the code for the model, not the processor",
    ),
)
