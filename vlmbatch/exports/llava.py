"""LLaVA's JSON: one list for each split.

Source: ``docs/Finetune_Custom_Data.md`` of haotian-liu/LLaVA (c121f04). One image per entry, whose
path is joined to the trainer's ``--image_folder``: the export's folder. LLaVA opens files only.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from vlmbatch.exports.base import Example, ImageMode, Lines
from vlmbatch.exports.conversations import unmarked
from vlmbatch.exports.sinks import join

FROM = {"system": "system", "user": "human", "assistant": "gpt"}
"""The speakers as LLaVA and ShareGPT name them."""


class Llava(Lines):
    """``train.json``. A system message has no place in LLaVA's own conversations, and comes first
    in the user's words."""

    name = "llava"
    about = "a JSON list for LLaVA's trainers: id, image, conversations"
    images = (ImageMode.REFERENCE, ImageMode.COPY)
    several_images = False
    talks = True
    says_boxes = True
    upright = True
    taken = frozenset(("id", "image", "conversations"))

    def records(self, example: Example) -> Iterator[dict[str, Any]]:
        for conversation in self.export.conversations.of(example):
            turns: list[dict[str, str]] = []
            waiting = "<image>\n"
            for turn in conversation.turns:
                text = unmarked(turn.content)
                if turn.role == "system":
                    waiting += f"{text}\n"
                    continue
                turns.append({"from": FROM[turn.role], "value": waiting + text})
                waiting = ""
            yield {
                "id": conversation.id,
                "image": example.images[0].path,
                "conversations": turns,
                **self.carried(example),
            }

    def finish(self) -> None:
        for split in self.export.splits.names:
            if pieces := self.export.kept(split):
                build = partial(join, pieces, begin=b"[\n", between=b",", end=b"]\n")
                self.export.destination.write(f"{split}.json", build)


FORMAT = Llava
