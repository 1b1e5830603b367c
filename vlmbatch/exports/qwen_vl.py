"""What Qwen-VL's own fine-tuning code reads: LLaVA's shape, boxes as the model itself writes them.

Qwen2.5-VL counts pixels of the image as its processor resizes it, so the pixel budget of the
training decides the numbers; Qwen2-VL, Qwen3-VL and later count from 0 to 1000. Source:
QwenLM/Qwen3-VL, qwen-vl-finetune (README.md, qwenvl/train/argument.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar

from vlmbatch.errors import UsageError
from vlmbatch.exports.base import Example, ImageMode, Lines, Unsuited
from vlmbatch.exports.boxes import BOX_OPTIONS, BoxRules, Sieve, left_out
from vlmbatch.exports.conversations import Conversations, unmarked
from vlmbatch.exports.llava import FROM
from vlmbatch.exports.selection import Drop
from vlmbatch.families import Family
from vlmbatch.families.qwen import Qwen2VL, Qwen3VL, Qwen25VL, QwenVLChat
from vlmbatch.grounding import Size
from vlmbatch.records import Result

if TYPE_CHECKING:
    from vlmbatch.exports.exporting import Export

BUDGET = {"min_pixels": 16 * 28 * 28, "max_pixels": 576 * 28 * 28}
"""What the training takes where it is not told."""


class QwenVL(Lines):
    """``data_path`` of the training is the export's folder."""

    name = "qwen-vl"
    about = "conversations for Qwen-VL's own fine-tuning, boxes as Qwen says them: SPLIT.jsonl"
    images = (ImageMode.REFERENCE, ImageMode.COPY)
    talks = True
    says_boxes = True
    upright = True
    options: ClassVar[Mapping[str, str]] = {
        **BOX_OPTIONS,
        "min_pixels": "of the training (Qwen2.5-VL's boxes depend on it); default: 12544",
        "max_pixels": "likewise; default: 451584",
    }
    taken = frozenset(("id", "image", "images", "conversations", "video", "data_path"))

    def __init__(self, export: Export) -> None:
        super().__init__(export)
        rules = BoxRules.of(export.options.get("labels"), export.options.get("min_box"))
        self._left_out = partial(left_out, rules, points=False)
        self._sieve = Sieve(rules)
        self._conversations = Qwens(export, self._sieve)

    def drops(self) -> Sequence[Drop]:
        return (self._left_out,)

    def records(self, example: Example) -> Iterator[dict[str, Any]]:
        self._sieve.dropped = self.boxes
        paths = [picture.path for picture in example.images]
        for conversation in self._conversations.of(example):
            waiting = "<image>\n" * len(paths)
            said = []
            for turn in conversation.turns:
                text = unmarked(turn.content)
                if turn.role == "system":  # every speaker but "human" is taken for the model
                    waiting += f"{text}\n"
                    continue
                said.append({"from": FROM[turn.role], "value": waiting + text})
                waiting = ""
            yield {
                "id": conversation.id,
                "image": paths[0] if len(paths) == 1 else paths,
                "conversations": said,
                **self.carried(example),
            }


class Qwens(Conversations):
    """Conversations with a Qwen-VL, whose training has this pixel budget."""

    def __init__(self, export: Export, sieve: Sieve) -> None:
        super().__init__(export.source, export.settings.wording)
        self._sieve = sieve
        self._budget = {name: _whole(name, export.options, least) for name, least in BUDGET.items()}
        if self._budget["min_pixels"] > self._budget["max_pixels"]:
            raise UsageError(
                "min_pixels={min_pixels} is more than max_pixels={max_pixels}".format_map(
                    self._budget
                ),
                hint="give both as the training has them",
            )
        if not isinstance(self.family, (QwenVLChat, Qwen2VL, Qwen3VL)):
            raise UsageError(
                f"the family {self.family.name} is no Qwen-VL, and this is for training one",
                hint="name the model that will be trained, or its family: --for-model qwen3_vl",
            )

    @cached_property
    def family(self) -> Family:
        family = super().family
        if isinstance(family, Qwen25VL):
            return Trained({"preprocessor": self._budget})
        return family

    def answer(self, result: Result) -> str:
        answer = result.answer
        assert answer is not None
        if result.image_size is None or answer.boxes is None:
            return super().answer(result)
        if answer.points and not answer.boxes:
            raise Unsuited("points")
        if answer.points:
            self._sieve.dropped["points_left_out"] += len(answer.points)
        boxes = tuple(self._sieve.boxes(answer.boxes, result.image_size))
        if boxes:
            self._sieve.dropped["exported"] += len(boxes)
        return super().answer(replace(result, answer=replace(answer, boxes=boxes)))


class Trained(Qwen25VL):
    """The training's processor resizes the image itself; nobody shrinks it before."""

    def target(self, size: Size) -> Size:
        return size


def _whole(name: str, options: Mapping[str, str], default: int) -> int:
    text = options.get(name, str(default))
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UsageError(f"{name}={text} is no number of pixels", hint=f"as in {name}={default}")
    return int(text)


FORMAT = QwenVL
