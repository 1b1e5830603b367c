"""Pixtral and Mistral-Small 3: chat template, no documented boxes.

The picture keeps its shape, is shrunk to a long edge (1024 px for Pixtral 12B, 1540 for
Mistral-Small 3.1) and costs a token per 16 (28) pixels and one per row. Source: transformers 5.19,
models/pixtral/processing_pixtral.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, floor
from typing import Any

from vlmbatch.families.base import TEXT_TASKS, Chat, Entry, whole
from vlmbatch.grounding import Size


class Pixtral(Chat):
    """``patch`` pixels a token along each side, after merging."""

    name = "pixtral"

    def __init__(self, long_edge: int, patch: int) -> None:
        self._long_edge, self._patch = long_edge, patch

    def target(self, size: Size) -> Size:
        ratio = max(size.width, size.height) / self._long_edge
        if ratio <= 1:
            return size
        return Size(max(1, floor(size.width / ratio)), max(1, floor(size.height / ratio)))

    def image_tokens(self, size: Size) -> int:
        seen = self.target(size)
        columns, rows = ceil(seen.width / self._patch), ceil(seen.height / self._patch)
        return (columns + 1) * rows


def _make(config: Mapping[str, Any]) -> Pixtral:
    patch = whole(config, "vision_config", "patch_size", default=16)
    merge = whole(config, "spatial_merge_size", default=1)
    return Pixtral(whole(config, "vision_config", "image_size", default=1024), patch * merge)


def _matches(config: Mapping[str, Any], model_id: str) -> bool:
    kind = config.get("model_type")
    vision = config.get("vision_config") or {}
    of_pixtral = isinstance(vision, Mapping) and vision.get("model_type") == "pixtral"
    return kind in ("pixtral", "mistral3") or (kind == "llava" and of_pixtral)


ENTRIES = (
    Entry(
        name="pixtral",
        checkpoints=("mistral-community/pixtral-12b", "mistralai/Mistral-Small-3.*"),
        tasks=TEXT_TASKS,
        boxes="",
        evidence="documented",
        matches=_matches,
        make=_make,
    ),
)
