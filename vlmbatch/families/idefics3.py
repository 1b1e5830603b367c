"""SmolVLM, SmolVLM2 and Idefics3: plain prompts, texts only; grounding was not trained.

The processor resizes the long edge to four tiles and cuts the picture into tiles, beside the whole
of it as one more; so a larger picture holds nothing that the model sees. Tiles are 364 (Idefics3),
384 (SmolVLM 2.2B) or 512 px (256M, 500M). Source: transformers 5.19, processing_idefics3.py and
image_processing_pil_idefics3.py; sizes: vision_config and the image processor's settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from vlmbatch.families.base import TEXT_TASKS, Chat, Entry, whole
from vlmbatch.families.sizes import shrink_to_edge
from vlmbatch.grounding import Size


class Idefics3(Chat):
    """A tile is ``side`` pixels and ``tokens`` tokens, a picture ``long_edge`` pixels long; with
    ``split`` it is cut into tiles."""

    name = "idefics3"

    def __init__(self, side: int, tokens: int, long_edge: int, split: bool = True) -> None:
        self._side, self._tokens = side, tokens
        self._long_edge, self._split = long_edge, split

    def target(self, size: Size) -> Size:
        return shrink_to_edge(size, self._long_edge)

    def image_tokens(self, size: Size) -> int:
        """Also a small picture is enlarged to the long edge."""
        if not self._split:
            return self._tokens + 3
        long_edge = self._long_edge
        shape = size.width / size.height
        if size.width >= size.height:
            width, height = long_edge, int(long_edge / shape)
            height += height % 2
        else:
            width, height = int(long_edge * shape), long_edge
            width += width % 2
        columns, rows = ceil(max(width, 1) / self._side), ceil(max(height, 1) / self._side)
        return rows * ((self._tokens + 2) * columns + 1) + self._tokens + 3


def _make(config: Mapping[str, Any]) -> Idefics3:
    side = whole(config, "vision_config", "image_size", default=512)
    patch = whole(config, "vision_config", "patch_size", default=16 if side == 512 else 14)
    scale = whole(config, "scale_factor", default=4 if side == 512 else 2)
    long_edge = whole(config, "preprocessor", "size", "longest_edge", default=4 * side)
    preprocessor = config.get("preprocessor")
    split = not isinstance(preprocessor, Mapping) or preprocessor.get("do_image_splitting", True)
    return Idefics3(side, max(1, side // patch // scale) ** 2, long_edge, bool(split))


ENTRIES = (
    Entry(
        name="idefics3",
        checkpoints=(
            "HuggingFaceTB/SmolVLM-*",
            "HuggingFaceTB/SmolVLM2-*",
            "HuggingFaceM4/Idefics3-8B-Llama3",
        ),
        tasks=TEXT_TASKS,
        boxes="",
        evidence="documented",
        matches=lambda config, model_id: config.get("model_type") in ("idefics3", "smolvlm"),
        make=_make,
    ),
)
