"""Fuyu-8B: raw prompts, boxes in half of the resized image's pixels, y before x.

``<0x00>y1 x1 y2 x2<0x01>``: each coordinate is one token of its own, so the numbers run together
where an engine decodes them like words; ``text_of`` keeps them apart. An image larger than
1920 x 1080 is shrunk into that, and never enlarged. Source: transformers 5.19,
models/fuyu/processing_fuyu.py (its own post_process_box_coordinates never returns from a box that
is malformed, which is why nothing here calls it); prompts: adept/fuyu-8b, transformers PR 27083.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from vlmbatch.families.base import Chat, Entry, in_pixels, plain_text, steps_of
from vlmbatch.grounding import Box, Size, Space
from vlmbatch.records import IMAGE, Answer, LoadedImage, TaskKind
from vlmbatch.tasks import Ask

LARGEST = Size(1920, 1080)
PATCH = 30

_TEXT_TO_BOX = (
    "When presented with a box, perform OCR to extract text contained within it. If provided with "
    "text, generate the corresponding bounding box.\n"
)
_OPEN, _CLOSE = r"(?:<0x00>|\x00|<box>)", r"(?:<0x01>|\x01|</box>)"
_NUMBER = r"[\s,▁]{0,4}(\d{1,5})"
_APART = r"(?=[\s,▁])"
_BOX = re.compile(
    _OPEN + _NUMBER + _APART + _NUMBER + _APART + _NUMBER + _APART + _NUMBER + r"\s{0,4}" + _CLOSE
)
_TAGS = re.compile(
    rf"{_OPEN}[\d\s,▁]{{0,40}}{_CLOSE}|<0x0[0-4]>|[\x00-\x04]|</?(?:box|point)>|\|ENDOFTEXT\|"
    r"|\|NEWLINE\||\|SPEAKER\|"
)
_BYTES = {f"<0x0{i}>" for i in range(5)}
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def resized(size: Size) -> Size:
    """What the processor makes of an image."""
    scale = min(LARGEST.width / size.width, LARGEST.height / size.height)
    if scale >= 1:
        return size
    return Size(max(1, int(size.width * scale)), max(1, int(size.height * scale)))


@dataclass(frozen=True, slots=True)
class HalfSpace(Space):
    """Half of the pixels of the resized image."""

    def axes(self, image: Size) -> tuple[tuple[float, float], tuple[float, float]]:
        seen = resized(image)
        return (2 * image.width / seen.width, 0.0), (2 * image.height / seen.height, 0.0)


class Fuyu(Chat):
    """A family of one model. ``text_of`` is for engines that have its tokens."""

    name = "fuyu"
    raw = True
    space = HalfSpace()

    def word(self, ask: Ask) -> str:
        match ask.kind:
            case TaskKind.CAPTION:
                if ask.style == "short":
                    return f"{IMAGE}Generate a coco-style caption.\n"
                return f"{IMAGE}Describe this image in detail.\n"
            case TaskKind.VQA:
                return f"{IMAGE}{ask.question}\n"
            case TaskKind.GROUND:
                return f"{IMAGE}{_TEXT_TO_BOX}{ask.question}"
            case _:
                return self.word_boxes(ask)

    def plain(self, text: str) -> str:
        return plain_text(text, _TAGS)

    def read_boxes(
        self, kind: TaskKind, text: str, labels: tuple[str, ...], image: LoadedImage
    ) -> Answer:
        label = labels[0] if labels else ""
        found = []
        for match in _BOX.finditer(text):
            y1, x1, y2, x2 = map(float, match.groups())
            found.append(Box(label, x1, y1, x2, y2))
        return in_pixels(found, text, self.space, image)

    def write(self, boxes: Sequence[Box], *, image: LoadedImage) -> str:
        if not boxes:
            return "none"
        texts = []
        for box in boxes:
            b = self.space.from_pixels(box, image.size)
            x1, x2 = steps_of(b.x1, b.x2, LARGEST.width)
            y1, y2 = steps_of(b.y1, b.y2, LARGEST.height)
            texts.append(f"<0x00>{y1} {x1} {y2} {x2}<0x01>")
        return " ".join(texts)

    @staticmethod
    def text_of(tokens: Sequence[str]) -> str:
        """The answer's tokens (as in the vocabulary) as text, the numbers of a box kept apart.

        Other bytes stand for the characters that no token has.
        """
        text, inside = bytearray(), False
        for token in tokens:
            if token in _BYTES:
                inside = token in ("<0x00>", "<0x02>")
                text += token.encode()
            elif inside:
                text += f" {token}".encode()
            elif byte := _BYTE.fullmatch(token):
                text.append(int(byte[1], 16))
            else:
                text += token.replace("▁", " ").encode()
        return text.decode(errors="replace").replace("<0x04>", "")

    def target(self, size: Size) -> Size:
        return resized(size)

    def image_tokens(self, size: Size) -> int:
        seen = resized(size)
        return ceil(seen.height / PATCH) * (ceil(seen.width / PATCH) + 1) + 1


ENTRIES = (
    Entry(
        name="fuyu",
        checkpoints=("adept/fuyu-8b",),
        tasks=(TaskKind.CAPTION, TaskKind.VQA, TaskKind.GROUND),
        boxes="<0x00>y1 x1 y2 x2<0x01>, half pixels of the image in 1920 x 1080",
        evidence="documented",
        matches=lambda config, model_id: config.get("model_type") == "fuyu",
        make=lambda config: Fuyu(),
        note="text to box was trained on texts in screenshots; the detailed caption is unverified",
    ),
)
