"""DeepSeek-VL 1, 1.3B and 7B (hybrid: a second encoder for 1024 px); no boxes are documented.

The chat checkpoints have a chat template; where it was lost, ``frame`` is the conversation of
deepseek-ai/DeepSeek-VL (deepseek_vl/utils/conversation.py, documented), which also ends an answer
at ``User:``. The base checkpoints have none: they continue a text. An image is padded to a square,
576 tokens (transformers 5.19, processing_deepseek_vl.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmbatch.families.base import TEXT_TASKS, Chat, Entry, whole
from vlmbatch.families.sizes import shrink_to_edge
from vlmbatch.grounding import Size
from vlmbatch.records import IMAGE, TaskKind
from vlmbatch.tasks import Ask

_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)


class DeepseekVL(Chat):
    """The chat checkpoints; ``long_edge`` is what the larger encoder sees, an image ``tokens``."""

    name = "deepseek_vl"
    version = 2
    stop: tuple[str, ...] = ("User:",)
    frame: str | None = _SYSTEM + "\n\nUser: " + IMAGE + "{text}\n\nAssistant:"

    def __init__(self, long_edge: int, tokens: int) -> None:
        self._long_edge, self._tokens = long_edge, tokens

    def target(self, size: Size) -> Size:
        return shrink_to_edge(size, self._long_edge)

    def image_tokens(self, size: Size) -> int:
        return self._tokens


class DeepseekVLBase(DeepseekVL):
    """The base checkpoints: a text to continue. The wording is the runner's (unverified)."""

    name = "deepseek_vl_base"
    version = 1
    raw = True
    stop = ()
    frame = None

    def word(self, ask: Ask) -> str:
        match ask.kind:
            case TaskKind.VQA:
                return f"{IMAGE}Question: {ask.question}\nAnswer:"
            case TaskKind.CAPTION:
                start = "A photo of" if ask.style == "short" else "A detailed description:"
                return f"{IMAGE}{start}"
            case _:
                return self.word_boxes(ask)


def _is_deepseek(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") in ("deepseek_vl", "deepseek_vl_hybrid")


def _edge_and_tokens(config: Mapping[str, Any]) -> tuple[int, int]:
    side = whole(config, "vision_config", "image_size", default=384)
    tokens = max(1, side // whole(config, "vision_config", "patch_size", default=16)) ** 2
    if config.get("model_type") == "deepseek_vl_hybrid":
        side = whole(config, "high_res_vision_config", "image_size", default=1024)
    return side, tokens


ENTRIES = (
    Entry(
        name="deepseek_vl_base",
        checkpoints=(
            "deepseek-community/deepseek-vl-1.3b-base",
            "deepseek-community/deepseek-vl-7b-base",
        ),
        tasks=(TaskKind.CAPTION, TaskKind.VQA),
        boxes="",
        evidence="unverified",
        matches=lambda config, model_id: _is_deepseek(config) and "base" in model_id,
        make=lambda config: DeepseekVLBase(*_edge_and_tokens(config)),
        note="known by its name only: chat and base have the same config.json",
    ),
    Entry(
        name="deepseek_vl",
        checkpoints=(
            "deepseek-community/deepseek-vl-1.3b-chat",
            "deepseek-community/deepseek-vl-7b-chat",
        ),
        tasks=TEXT_TASKS,
        boxes="",
        evidence="documented",
        matches=lambda config, model_id: _is_deepseek(config),
        make=lambda config: DeepseekVL(*_edge_and_tokens(config)),
    ),
)
