"""Axolotl's multimodal chats: JSON lines whose messages have content blocks.

Source: ``docs/multimodal.qmd`` of axolotl-ai-cloud/axolotl (067b021): an image block names a
``path``. Relative paths start where the trainer does, so ours are absolute.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlmbatch.exports.base import Example, ImageMode, Lines
from vlmbatch.exports.conversations import unmarked


class Axolotl(Lines):
    """A line for each conversation; the images stand before the first user's words."""

    name = "axolotl"
    about = "JSON lines for axolotl (type: chat_template): messages with content blocks"
    images = (ImageMode.REFERENCE, ImageMode.COPY)
    absolute_paths = True
    talks = True
    says_boxes = True
    upright = True
    taken = frozenset(("id", "messages", "images", "image"))

    def records(self, example: Example) -> Iterator[dict[str, Any]]:
        for conversation in self.export.conversations.of(example):
            waiting = [{"type": "image", "path": picture.path or ""} for picture in example.images]
            messages = []
            for turn in conversation.turns:
                content = [{"type": "text", "text": unmarked(turn.content)}]
                if turn.role == "user":
                    content, waiting = [*waiting, *content], []
                messages.append({"role": turn.role, "content": content})
            yield {"id": conversation.id, "messages": messages, **self.carried(example)}


FORMAT = Axolotl
