"""CogVLM: ``a dog [[123,045,678,890]]``, three digits, 0 to 999 in thousandths of the image.

Several boxes of one phrase are separated by ``;`` inside the brackets. Prompts, templates and
parser: README, utils/utils/language.py and grounding_parser.py of THUDM/CogVLM. The image is
squashed to a square.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlmbatch.families.base import (
    ALL_TASKS,
    BOX_TASKS,
    TEXT_TASKS,
    Chat,
    Entry,
    answered,
    plain_text,
    whole,
)
from vlmbatch.families.json_boxes import default_label, on_grid, placed
from vlmbatch.families.prose import find_lists
from vlmbatch.families.sizes import at_most
from vlmbatch.grounding import Box, GridSpace, Size, Space
from vlmbatch.records import IMAGE, Answer, LoadedImage, TaskKind
from vlmbatch.tasks import Ask

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
        wanted = ", ".join(ask.labels)
        boxes = "provide the bounding boxes of its location"
        return f"Can you point out every {wanted} in the image and {boxes}?"

    def read(
        self, kind: TaskKind, text: str, *, labels: tuple[str, ...], image: LoadedImage
    ) -> Answer:
        answer = answered(text)
        if kind not in BOX_TASKS:
            said = _LISTS.sub("", answer)
            return Answer(text=plain_text(said if said.strip() else text))
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


def _is(part: str) -> Callable[[Mapping[str, Any], str], bool]:
    """Their configs are alike, so the name decides."""

    def matches(config: Mapping[str, Any], model: str) -> bool:
        architectures = config.get("architectures")
        named = architectures if isinstance(architectures, list) else ()
        cogvlm = config.get("model_type") == "cogvlm" or "CogVLMForCausalLM" in named
        return cogvlm and part in model.lower()

    return matches


def _side(config: Mapping[str, Any]) -> int:
    return whole(config, "vision_config", "image_size", default=490)


_NOTE = "needs an old transformers (4.36 to 4.41) for its own code; vLLM does not have it"

ENTRIES = (
    Entry(
        name=CogVLMGrounding.name,
        checkpoints=("THUDM/cogvlm-grounding-*",),
        tasks=ALL_TASKS,
        boxes="phrase [[x1,y1,x2,y2]], thousandths",
        evidence="documented",
        matches=_is("grounding"),
        make=lambda config: CogVLMGrounding(_side(config)),
        own_code=True,
        note=_NOTE,
    ),
    Entry(
        name=CogVLMBase.name,
        checkpoints=("THUDM/cogvlm-base-*",),
        tasks=TEXT_TASKS,
        boxes="",
        evidence="documented",
        matches=_is("base"),
        make=lambda config: CogVLMBase(_side(config)),
        own_code=True,
        note=_NOTE,
    ),
    Entry(
        name=CogVLMChat.name,
        checkpoints=("THUDM/cogvlm-chat-hf",),
        tasks=ALL_TASKS,
        boxes="phrase [[x1,y1,x2,y2]], thousandths",
        evidence="documented",
        matches=_is(""),
        make=lambda config: CogVLMChat(_side(config)),
        own_code=True,
        note=_NOTE,
    ),
)
