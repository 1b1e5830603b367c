"""ms-swift: messages whose ``<ref-object>`` and ``<bbox>`` stand for what ``objects`` lists.

It puts both into each model's own syntax and space when it trains. Boxes are ``[x1, y1, x2, y2]``,
points ``[x, y]``, in pixels of the image. Source: ms-swift's Custom-dataset.md, and ms-swift 4.6,
template/base.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from vlmbatch.exports.base import Example, ImageMode, Lines, Unsuited
from vlmbatch.exports.boxes import BOX_OPTIONS, BoxRules, Sieve, left_out, rounded
from vlmbatch.exports.conversations import Conversations, Turn
from vlmbatch.exports.selection import Drop
from vlmbatch.families.base import BOX_TASKS
from vlmbatch.grounding import Box, Point, Size
from vlmbatch.records import LoadedImage, Result

if TYPE_CHECKING:
    from vlmbatch.exports.exporting import Export

NONE = "There are none."
_TAGS = re.compile("<(image|video|audio|bbox|ref-object|cot-process|start-image)>")
"""What ms-swift takes for a place, wherever it stands in a text."""


class MsSwift(Lines):
    """Local images are named by absolute paths, as ms-swift advises."""

    name = "ms-swift"
    about = "conversations with boxes and points as <bbox> and objects: SPLIT.jsonl"
    images = (ImageMode.REFERENCE, ImageMode.COPY)
    opens_addresses = True
    absolute_paths = True
    talks = True
    upright = True
    options = BOX_OPTIONS
    taken = frozenset(("messages", "images", "objects", "videos", "audios", "tools", "label"))

    def __init__(self, export: Export) -> None:
        super().__init__(export)
        rules = BoxRules.of(export.options.get("labels"), export.options.get("min_box"))
        self._left_out = partial(left_out, rules, points=True)
        self._sieve = Sieve(rules)
        self._conversations = Marking(export, self._sieve)

    def drops(self) -> Sequence[Drop]:
        return (self._left_out,)

    def records(self, example: Example) -> Iterator[dict[str, Any]]:
        self._sieve.dropped = self.boxes
        images = [picture.path for picture in example.images]
        for conversation in self._conversations.of(example):
            marked = [
                turn.content for turn in conversation.turns if isinstance(turn.content, Marked)
            ]
            labels = [label for answer in marked for label in answer.labels]
            places = [place for answer in marked for place in answer.places]
            if places:
                self.boxes["exported"] += len(places)
            yield {
                "messages": messages(conversation.turns, len(images)),
                "images": images,
                "objects": {"ref": labels, "bbox": places},
                **self.carried(example),
            }


class Marked(str):
    """An answer in which tags stand for ``places``: x1 y1 x2 y2 or x y, with their labels."""

    labels: list[str]
    places: list[list[float]]


class Marking(Conversations):
    """Conversations whose boxes are tags."""

    def __init__(self, export: Export, sieve: Sieve) -> None:
        super().__init__(export.source, export.settings.wording)
        self._sieve = sieve
        self._as_json: bool | None = None

    def answer(self, result: Result) -> str:
        answer = result.answer
        assert answer is not None
        if self.tasks[result.task].kind not in BOX_TASKS or answer.boxes is None:
            return super().answer(result)
        if result.image_size is None:
            raise Unsuited("image_size_unknown")
        boxes = self._sieve.boxes(answer.boxes, result.image_size)
        points = self._sieve.points(answer.points or ())
        return marked(boxes, points, as_json=self.as_json)

    @property
    def as_json(self) -> bool:
        """The model is trained on Qwen's JSON; else it has tags of its own for ms-swift to put."""
        if self._as_json is None:
            size = Size(64, 64)
            try:
                image = LoadedImage.of_size(size, size)
                said = self.family.write([Box("a", 8, 8, 32, 32)], image=image)
            except ValueError:
                said = ""
            self._as_json = "bbox_2d" in said
        return self._as_json


def marked(boxes: Sequence[Box], points: Sequence[Point], *, as_json: bool) -> Marked:
    """ms-swift fills in texts as they are, so labels inside of JSON are escaped here."""
    labels = [*(box.label for box in boxes), *(point.label for point in points)]
    if as_json:
        keys = ["bbox_2d"] * len(boxes) + ["point_2d"] * len(points)
        items = [f'{{"{key}": <bbox>, "label": "<ref-object>"}}' for key in keys]
        answer = Marked(f"```json\n[{', '.join(items)}]\n```")
        answer.labels = [json.dumps(label, ensure_ascii=False)[1:-1] for label in labels]
    else:
        answer = Marked("<ref-object><bbox>" * len(labels) or NONE)
        answer.labels = labels
    answer.places = [list(_edges(rounded(box))) for box in boxes]
    answer.places += [[round(point.x, 3), round(point.y, 3)] for point in points]
    return answer


def messages(turns: Sequence[Turn], images: int) -> list[dict[str, str]]:
    """The images stand before the first words of the user; a text that has one of ms-swift's tags
    by chance gets a space into it."""
    found = []
    waiting = "<image>" * images
    for turn in turns:
        text: str = turn.content
        if not isinstance(text, Marked):
            text = _TAGS.sub(r"<\1 >", text)
        if turn.role == "user":
            text, waiting = waiting + text, ""
        found.append({"role": turn.role, "content": str(text)})
    return found


def _edges(box: Box) -> tuple[float, float, float, float]:
    return box.x1, box.y1, box.x2, box.y2


FORMAT = MsSwift
