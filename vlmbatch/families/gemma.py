"""Gemma 3, 3n and 4.

Gemma 3 and 3n have no documented boxes. Gemma 4 is asked for those of Google's Gemini,
``[{"box_2d": [y1, x1, y2, x2], "label": "..."}]`` from 0 to 1000 (Gemini's documentation); that
Gemma 4 follows it is not verified. Image sizes and costs: transformers' gemma3 and gemma4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vlmbatch.families.base import (
    ALL_TASKS,
    TEXT_TASKS,
    Chat,
    Entry,
    whole,
)
from vlmbatch.families.json_boxes import on_grid, read_json, words_for_json, write_json
from vlmbatch.families.sizes import at_most, shrink_to_pixels
from vlmbatch.grounding import Box, GridSpace, Size, Space
from vlmbatch.records import Answer, LoadedImage, TaskKind
from vlmbatch.tasks import Ask

_FORM = (
    'Answer with JSON only: [{"box_2d": [ymin, xmin, ymax, xmax], "label": "..."}], '
    "coordinates from 0 to 1000, or [] if there is none."
)


class Gemma3(Chat):
    """Gemma 3: every image squashed to one square, without pan and scan."""

    name = "gemma3"

    def __init__(self, side: int = 896, tokens: int = 256) -> None:
        self._side, self._tokens = side, tokens

    def target(self, size: Size) -> Size:
        return at_most(size, self._side)

    def image_tokens(self, size: Size) -> int | None:
        return self._tokens


class Gemma3n(Gemma3):
    """Gemma 3n."""

    name = "gemma3n"


class Gemma4(Chat):
    """Gemma 4: as many patches as the budget allows, the shape about kept."""

    name = "gemma4"
    space: Space = GridSpace(1000)

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        config = config or {}
        self._tokens = whole(config, "preprocessor", "max_soft_tokens", default=280)
        patch = whole(config, "preprocessor", "patch_size", default=16)
        self._cell = patch * whole(config, "preprocessor", "pooling_kernel_size", default=3)

    def word_boxes(self, ask: Ask) -> str:
        return words_for_json(ask, _FORM)

    def read_boxes(
        self, kind: TaskKind, text: str, labels: tuple[str, ...], image: LoadedImage
    ) -> Answer:
        return read_json(kind, text, labels, self.space, image, yxyx=True)

    def write(self, boxes: Sequence[Box], *, image: LoadedImage) -> str:
        grid = (on_grid(self.space.from_pixels(box, image.size), 1000) for box in boxes)
        return write_json(grid, key="box_2d", yxyx=True)

    def target(self, size: Size) -> Size:
        return shrink_to_pixels(size, self._tokens * self._cell**2)

    def image_tokens(self, size: Size) -> int | None:
        """Whole cells of the image, scaled up or down to the budget; a thin one has one row.

        Source: ``get_aspect_ratio_preserving_size`` of transformers' gemma4 image processor.
        """
        given = self.target(size)
        scale = math.sqrt(self._tokens * self._cell**2 / given.pixels)
        columns = math.floor(scale * given.width / self._cell)
        rows = math.floor(scale * given.height / self._cell)
        if rows == 0:
            rows, columns = 1, min(given.width // given.height, self._tokens)
        elif columns == 0:
            rows, columns = min(given.height // given.width, self._tokens), 1
        return rows * columns


ENTRIES = (
    Entry(
        name=Gemma3.name,
        checkpoints=("google/gemma-3-*-it",),
        tasks=TEXT_TASKS,
        boxes="",
        evidence="documented",
        matches=lambda config, model: config.get("model_type") == "gemma3",
        make=lambda config: Gemma3(
            whole(config, "preprocessor", "size", "height", default=896),
            whole(config, "mm_tokens_per_image", default=256),
        ),
    ),
    Entry(
        name=Gemma3n.name,
        checkpoints=("google/gemma-3n-*-it",),
        tasks=TEXT_TASKS,
        boxes="",
        evidence="unverified",
        matches=lambda config, model: config.get("model_type") == "gemma3n",
        make=lambda config: Gemma3n(
            whole(config, "preprocessor", "size", "height", default=768),
            whole(config, "vision_soft_tokens_per_image", default=256),
        ),
        note="the image's size and cost are not verified",
    ),
    Entry(
        name=Gemma4.name,
        checkpoints=("google/gemma-4-*-it",),
        tasks=ALL_TASKS,
        boxes='JSON "box_2d", y1 x1 y2 x2, 0 to 1000',
        evidence="unverified",
        matches=lambda config, model: config.get("model_type") in ("gemma4", "gemma4_unified"),
        make=Gemma4,
        note="that its boxes are Gemini's is not verified",
    ),
)
