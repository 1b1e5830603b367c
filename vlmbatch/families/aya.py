"""Aya Vision: chat template, no boxes.

The picture is squashed to a grid of up to 12 tiles of 364 px of about its shape, beside the whole
of it as one more; 169 tokens each, and one that names the tile. Source: transformers 5.19,
models/aya_vision/processing_aya_vision.py and got_ocr2/image_processing_pil_got_ocr2.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmbatch.families.base import TEXT_TASKS, Chat, Entry, whole
from vlmbatch.families.sizes import tile_grid
from vlmbatch.grounding import Size

TILES = 12


class AyaVision(Chat):
    """A tile is ``side`` pixels and ``tokens`` tokens."""

    name = "aya_vision"

    def __init__(self, side: int, tokens: int) -> None:
        self._side, self._tokens = side, tokens

    def image_tokens(self, size: Size) -> int:
        columns, rows = tile_grid(size, self._side, TILES)
        tiles = columns * rows if columns * rows > 1 else 0
        return self._tokens + 3 + tiles * (self._tokens + 1)


def _make(config: Mapping[str, Any]) -> AyaVision:
    side = whole(config, "vision_config", "image_size", default=364)
    patch = whole(config, "vision_config", "patch_size", default=14)
    factor = whole(config, "downsample_factor", default=2)
    return AyaVision(side, max(1, side // (patch * factor)) ** 2)


ENTRIES = (
    Entry(
        name="aya_vision",
        checkpoints=("CohereLabs/aya-vision-*",),
        tasks=TEXT_TASKS,
        boxes="",
        evidence="documented",
        matches=lambda config, model_id: config.get("model_type") == "aya_vision",
        make=_make,
    ),
)
