"""What Qwen-VL's own fine-tuning code reads: LLaVA's shape, boxes as the model itself writes them.

Qwen2.5-VL counts pixels of the image as its processor resizes it, so the pixel budget of the
training decides the numbers; Qwen2-VL, Qwen3-VL and later count from 0 to 1000. Source:
QwenLM/Qwen3-VL, qwen-vl-finetune (README.md, qwenvl/train/argument.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vlmbatch.errors import UsageError
from vlmbatch.exports.base import Example, ImageMode, Lines, Unsuited
from vlmbatch.exports.boxes import BOX_OPTIONS, BoxRules, Sieve
from vlmbatch.exports.conversations import Conversations, family_of
from vlmbatch.families import Family
from vlmbatch.families.qwen import Qwen2VL, Qwen3VL, QwenVLChat
from vlmbatch.records import Answer, Result

if TYPE_CHECKING:
    from vlmbatch.exports.exporting import Export

BUDGET = {"min_pixels": 16 * 28 * 28, "max_pixels": 576 * 28 * 28}
"""What the training takes where it is not told."""
_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}


class QwenVL(Lines):
    """``data_path`` of the training is the export's folder."""

    name = "qwen-vl"
    about = "conversations for Qwen-VL's own fine-tuning, boxes as Qwen says them: SPLIT.jsonl"
    images = (ImageMode.REFERENCE, ImageMode.COPY)
    talks = True
    upright = True
    options = {
        **BOX_OPTIONS,
        "min_pixels": "of the training (Qwen2.5-VL's boxes depend on it); default: 12544",
        "max_pixels": "likewise; default: 451584",
    }
    taken = frozenset(("id", "image", "images", "conversations", "video", "data_path"))

    def __init__(self, export: Export) -> None:
        super().__init__(export)
        self._sieve = Sieve(BoxRules.of(export.options.get("labels"), export.options.get("min_box")))
        self._conversations = Qwens(export, self._sieve)
        self._conversations.check_boxes()

    def records(self, example: Example) -> Iterator[dict[str, Any]]:
        self._sieve.dropped = self.boxes
        paths = [picture.path for picture in example.images]
        images = {"image": paths[0]} if len(paths) == 1 else {"image": paths}
        for conversation in self._conversations.of(example):
            waiting = "<image>\n" * len(paths)
            said = []
            for turn in conversation.turns:
                text = turn.content.replace("<image>", "<image >").replace("<video>", "<video >")
                if turn.role == "user":
                    text, waiting = waiting + text, ""
                said.append({"from": _ROLES[turn.role], "value": text})
            yield {"id": conversation.id, **images, "conversations": said}
