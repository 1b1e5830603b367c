"""Phi-3.5-vision and Phi-4-multimodal: texts only, no boxes are documented.

Costs: ``calc_hd_transform_size`` of Phi-3.5-vision's own image processor, and transformers'
phi4_multimodal image processor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vlmbatch.families.base import TEXT_TASKS, Chat, Entry, whole
from vlmbatch.families.sizes import tile_grid
from vlmbatch.grounding import Size


class Phi35(Chat):
    """Phi-3.5-vision: an overview and up to ``crops`` tiles, 144 tokens each."""

    name = "phi3_v"
    tile = 336

    def __init__(self, crops: int = 4) -> None:
        self._crops = crops

    def image_tokens(self, size: Size) -> int | None:
        columns, rows = self._tiles(size)
        return (columns * rows + 1) * 144 + 1 + (rows + 1) * 12

    def _tiles(self, size: Size) -> tuple[int, int]:
        """(columns, rows): the long edge takes as many tiles as fit; the other is padded."""
        ratio = max(size.width, size.height) / min(size.width, size.height)
        long = 1
        while (long + 1) * math.ceil((long + 1) / ratio) <= self._crops:
            long += 1
        short = max(1, math.ceil(int(long * self.tile / ratio) / self.tile))
        return (long, short) if size.width >= size.height else (short, long)


class Phi4(Chat):
    """Phi-4-multimodal: an overview and tiles of 448 px, less the padding."""

    name = "phi4_multimodal"
    tile = 448
    patch = 14

    def __init__(self, crops: int = 36) -> None:
        self._crops = crops

    def image_tokens(self, size: Size) -> int | None:
        columns, rows = math.ceil(size.width / self.tile), math.ceil(size.height / self.tile)
        if columns * rows > self._crops:
            columns, rows = tile_grid(size, self.tile, self._crops)
        across, down = columns * self.tile, rows * self.tile
        scale_x, scale_y = across / size.width, down / size.height
        if scale_x < scale_y:
            padding = 0, down - int(size.height * scale_x)
        else:
            padding = across - int(size.width * scale_y), 0
        if min(across - padding[0], down - padding[1]) < 10:
            return None  # the processor refuses such a shape
        seen_x, seen_y = (
            math.ceil((edge // self.patch - pad // self.patch) / 2)
            for edge, pad in zip((across, down), padding, strict=True)
        )
        return 256 + 1 + seen_x * seen_y + seen_y + 16


def _of_phi35(config: Mapping[str, Any]) -> Phi35:
    return Phi35(whole(config, "preprocessor", "num_crops", default=4))


def _of_phi4(config: Mapping[str, Any]) -> Phi4:
    return Phi4(whole(config, "preprocessor", "dynamic_hd", default=36))


ENTRIES = (
    Entry(
        name=Phi35.name,
        checkpoints=("microsoft/Phi-3.5-vision-instruct", "microsoft/Phi-3-vision-*"),
        tasks=TEXT_TASKS,
        boxes="",
        evidence="documented",
        architectures=("Phi3VForCausalLM",),
        matches=lambda config, model: config.get("model_type") == "phi3_v",
        make=_of_phi35,
        own_code=True,
        requirements=(
            "transformers==4.43.0",
            "tokenizers==0.19.1",
            "huggingface_hub==0.36.2",
        ),
        note="its own code needs torchvision too; vLLM has the model",
    ),
    Entry(
        name=Phi4.name,
        checkpoints=("microsoft/Phi-4-multimodal-instruct",),
        tasks=TEXT_TASKS,
        boxes="",
        evidence="documented",
        architectures=("Phi4MMForCausalLM",),
        matches=lambda config, model: config.get("model_type") in ("phi4_multimodal", "phi4mm"),
        make=_of_phi4,
        own_code=True,
        note="in vLLM with its own code; transformers has the model, not this checkpoint's form",
    ),
)
