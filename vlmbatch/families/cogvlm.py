"""CogVLM: ``a dog [[123,045,678,890]]``, three digits, 0 to 999 in thousandths of the image.

Several boxes of one phrase are separated by ``;`` inside the brackets. Prompts, templates and
parser: README, utils/utils/language.py and grounding_parser.py of THUDM/CogVLM. The image is
squashed to a square.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlmbatch.families.base import (
    ALL_TASKS,
    TEXT_TASKS,
    Chat,
    Entry,
    answered,
    wanted,
    whole,
    words_beside,
)
from vlmbatch.families.json_boxes import default_label, on_grid, placed
from vlmbatch.families.prose import find_lists
from vlmbatch.families.sizes import at_most
from vlmbatch.grounding import Box, GridSpace, Size, Space
from vlmbatch.records import IMAGE, Answer, LoadedImage, TaskKind
from vlmbatch.tasks import Ask

REQUIREMENTS = (
    "transformers==4.41.2",
    "tokenizers==0.19.1",
    "huggingface_hub==0.36.2",
    "sentencepiece==0.2.1",
    "einops==0.8.1",
)
"""The last transformers whose ``generate`` its code fits; the authors' is 4.35."""

_LISTS = re.compile(r"[ \t]?\[\[[\d,;\s]*+\]\]")


class CogVLM(Chat):
    """What its checkpoints share; ``question`` puts an ask into the checkpoint's template."""

    raw = True

    def __init__(self, side: int = 490) -> None:
        self._side = side

    def word(self, ask: Ask) -> str:
        return f"{IMAGE}{self.question(ask)}"

    def question(self, ask: Ask) -> str:
        if ask.kind is TaskKind.CAPTION and ask.style == "short":
            return "Describe the image."
        return super().word(ask)

    def target(self, size: Size) -> Size:
        return at_most(size, self._side)

    def image_tokens(self, size: Size) -> int | None:
        return (self._side // 14) ** 2 + 2


class CogVLMBase(CogVLM):
    """cogvlm-base-*: it continues the text, and knows questions by their template."""

    name = "cogvlm_base"

    def question(self, ask: Ask) -> str:
        if ask.kind in (TaskKind.VQA, TaskKind.OCR):
            return f"Question: {super().question(ask)} Short answer:"
        return super().question(ask)


class CogVLMGrounding(CogVLM):
    """cogvlm-grounding-*: the base template, so the question alone is the prompt."""

    name = "cogvlm_grounding"
    space: Space = GridSpace(1000)

    def word_boxes(self, ask: Ask) -> str:
        if ask.kind is TaskKind.GROUND:
            return f"Where is {ask.question}? answer in [[x0,y0,x1,y1]] format."
        boxes = "provide the bounding boxes of its location"
        return f"Can you point out every {wanted(ask)} in the image and {boxes}?"

    def plain(self, text: str) -> str:
        return words_beside(_LISTS, text)

    def read_boxes(
        self, kind: TaskKind, text: str, labels: tuple[str, ...], image: LoadedImage
    ) -> Answer:
        answer = answered(text)
        found = find_lists(answer, default_label(kind, labels), labels)
        return placed(found, answer, self.space, image)

    def write(self, boxes: Sequence[Box], *, image: LoadedImage) -> str:
        written = []
        for box in boxes:
            b = on_grid(self.space.from_pixels(box, image.size), 999)
            numbers = ",".join(f"{round(n):03}" for n in (b.x1, b.y1, b.x2, b.y2))
            written.append(f"{box.label} [[{numbers}]]")
        return ", ".join(written) or "There are none."


class CogVLMChat(CogVLMGrounding):
    """cogvlm-chat."""

    name = "cogvlm_chat"

    def question(self, ask: Ask) -> str:
        return f"Question: {super().question(ask)} Answer:"


def _entry(
    family: type[CogVLM],
    checkpoints: str,
    part: str,
    *,
    boxes: str = "",
    tasks: tuple[TaskKind, ...],
) -> Entry:
    """Their configs are alike, so ``part`` of the name decides."""

    def matches(config: Mapping[str, Any], model: str) -> bool:
        architectures = config.get("architectures")
        named = architectures if isinstance(architectures, list) else ()
        cogvlm = config.get("model_type") == "cogvlm" or "CogVLMForCausalLM" in named
        return cogvlm and part in model.lower()

    return Entry(
        name=family.name,
        checkpoints=(checkpoints,),
        tasks=tasks,
        boxes=boxes,
        evidence="documented",
        architectures=("CogVLMForCausalLM",),
        matches=matches,
        make=lambda config: family(whole(config, "vision_config", "image_size", default=490)),
        own_code=True,
        requirements=REQUIREMENTS,
        note="its own code needs xformers and torchvision too, those that belong to the torch",
    )


_BOXES = "phrase [[x1,y1,x2,y2]], thousandths"

ENTRIES = (
    _entry(CogVLMGrounding, "THUDM/cogvlm-grounding-*", "grounding", boxes=_BOXES, tasks=ALL_TASKS),
    _entry(CogVLMBase, "THUDM/cogvlm-base-*", "base", tasks=TEXT_TASKS),
    _entry(CogVLMChat, "THUDM/cogvlm-chat-hf", "", boxes=_BOXES, tasks=ALL_TASKS),
)
