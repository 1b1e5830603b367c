"""Yi-VL: a fork of LLaVA with a prompt of its own; boxes 0 to 999, never guaranteed.

Prompt: VL/README.md of 01-ai/Yi. Boxes: pixel x 999 / size (the maintainer in issue 376), as
numbers in free text. Its config looks like LLaVA's, so it is known by its name.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlmbatch.families.base import ALL_TASKS, Chat, Entry, answered, plain_text, wanted
from vlmbatch.families.json_boxes import default_label, edges, find_json, on_grid, placed
from vlmbatch.families.prose import find_lists
from vlmbatch.grounding import Box, GridSpace, Space
from vlmbatch.records import IMAGE, Answer, LoadedImage, TaskKind
from vlmbatch.tasks import Ask

SYSTEM = (
    "This is a chat between an inquisitive human and an AI assistant. Assume the role of the AI "
    "assistant. Read all the images carefully, and respond to the human's questions with "
    "informative, helpful, detailed and polite answers. "
    "这是一个好奇的人类和一个人工智能助手之间的对话。假设你扮演这个AI助手的角色。"
    "仔细阅读所有的图像，并对人类的问题做出信息丰富、有帮助、详细的和礼貌的回答。"
)
STOP = "###"


class YiVL(Chat):
    """Yi-VL; an answer ends at ``###``, where the next turn would begin."""

    name = "yi_vl"
    version = 2
    raw = True
    stop = (STOP,)
    space: Space = GridSpace(999)

    def word(self, ask: Ask) -> str:
        return f"{SYSTEM}\n\n### Human: {IMAGE}\n{super().word(ask)}\n### Assistant:"

    def word_boxes(self, ask: Ask) -> str:
        what = "the bounding box coordinate of the region this sentence describes"
        return f"Given the image, provide {what}:\n{wanted(ask)}\n"

    def plain(self, text: str) -> str:
        return plain_text(_turn(text))

    def read_boxes(
        self, kind: TaskKind, text: str, labels: tuple[str, ...], image: LoadedImage
    ) -> Answer:
        answer, default = _turn(text), default_label(kind, labels)
        found = find_json(answer, default)
        if not any(found):
            found = find_lists(answer, default, labels)
        return placed(found, answer, self.space, image)

    def write(self, boxes: Sequence[Box], *, image: LoadedImage) -> str:
        grid = (on_grid(self.space.from_pixels(box, image.size), 999) for box in boxes)
        return ", ".join(f"{box.label} {edges(box)}" for box in grid) or "There are none."


def _turn(text: str) -> str:
    """The model's own turn, without its thoughts."""
    return answered(text).partition(STOP)[0]


ENTRIES = (
    Entry(
        name=YiVL.name,
        checkpoints=("01-ai/Yi-VL-*",),
        tasks=ALL_TASKS,
        boxes="[x1, y1, x2, y2] in free text, 0 to 999",
        evidence="documented",
        matches=lambda config, model: "yi-vl" in model.lower(),
        make=lambda config: YiVL(),
        note="runs from a converted checkpoint only: 01-ai's code is not part of its checkpoints",
    ),
)
