"""KOSMOS-2: raw prompts with ``<grounding>``, boxes as two cells of a grid of 32 x 32.

``<phrase>a dog</phrase><object><patch_index_0044><patch_index_0863></object>``: the cells of the
upper left and the lower right corner, counted row by row; several boxes of one phrase are
separated by ``</delimiter_of_multi_objects/>``. A box whose corners share a row or a column has the
outer edges of its cells, else the centres of them. The picture is squashed to 224 x 224, so each
axis maps by itself. Source of prompts: microsoft/kosmos-2 model card and
transformers docs; of the cells: transformers 5.19, processing_kosmos2.py, which our tests run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from math import ceil

from vlmbatch.families.base import (
    Chat,
    Entry,
    in_pixels,
    plain_text,
    whole,
)
from vlmbatch.families.sizes import at_most
from vlmbatch.grounding import Box, GridSpace, Size
from vlmbatch.records import IMAGE, Answer, LoadedImage, TaskKind
from vlmbatch.tasks import Ask

SIDE = 32
"""Cells along each side."""

_PIECE = re.compile(
    r"<(?P<tag>/?phrase|/?object|/delimiter_of_multi_objects/|patch_index_(?P<cell>\d{1,6}))>"
)
_TAGS = re.compile(
    r"<object>(?:<patch_index_\d{1,6}>|</delimiter_of_multi_objects/>)*(?:</object>)?"
    r"|</?(?:grounding|phrase|object|image)>|</delimiter_of_multi_objects/>|<patch_index_\d{1,6}>"
)


class Kosmos2(Chat):
    """A family of one model. It names what it sees by itself, and so has no detect."""

    name = "kosmos2"
    raw = True
    space = GridSpace(1)

    def __init__(self, tokens: int = 64) -> None:
        self._tokens = tokens

    def word(self, ask: Ask) -> str:
        match ask.kind:
            case TaskKind.CAPTION:
                start = "An image of" if ask.style == "short" else "Describe this image in detail:"
                return f"{IMAGE}<grounding>{start}"
            case TaskKind.VQA:
                return f"{IMAGE}<grounding>Question: {ask.question} Answer:"
            case TaskKind.GROUND:
                return f"{IMAGE}<grounding><phrase>{ask.question}</phrase>"
            case _:
                return self.word_boxes(ask)

    def plain(self, text: str) -> str:
        return plain_text(text, _TAGS)

    def read_boxes(
        self, kind: TaskKind, text: str, labels: tuple[str, ...], image: LoadedImage
    ) -> Answer:
        found = list(objects(text))
        if kind is TaskKind.GROUND:  # the prompt holds the phrase: its boxes come without one
            of_phrase = [item for item in found if item[0] is None]
            found = of_phrase or found
        default = labels[0] if labels else ""
        boxes = [
            Box(default if phrase is None else phrase, *corners_of(first, last))
            for phrase, first, last in found
        ]
        return in_pixels(boxes, text, self.space, image)

    def write(self, boxes: Sequence[Box], *, image: LoadedImage) -> str:
        if not boxes:
            return "There is none."
        return " ".join(
            "<phrase>{}</phrase><object><patch_index_{:04}><patch_index_{:04}></object>".format(
                box.label, *cells_of(self.space.from_pixels(box, image.size))
            )
            for box in boxes
        )

    def step(self, size: Size) -> tuple[float, float]:
        """A cell, in pixels."""
        return size.width / SIDE, size.height / SIDE

    def target(self, size: Size) -> Size:
        return at_most(size, 224)

    def image_tokens(self, size: Size) -> int:
        return self._tokens + 2


def objects(text: str) -> Iterator[tuple[str | None, int, int]]:
    """(phrase, upper left cell, lower right cell) of each box, in order.

    The phrase is None where none stands right before the object. An object without its end, and
    one with an odd number of cells, gives what is whole of it.
    """
    phrase: str | None = None
    start, end, cells, inside = 0, 0, list[int](), False
    opened = False
    for match in _PIECE.finditer(text):
        tag = match["tag"]
        if tag == "phrase":
            opened, start, inside = True, match.end(), False
        elif tag == "/phrase":
            phrase = text[start : match.start()].strip() if opened else None
            opened, end, inside = False, match.end(), False
        elif tag == "object":
            if match.start() != end:
                phrase = None
            inside, cells = True, []
        elif tag in ("/object", "/delimiter_of_multi_objects/"):
            cells = []
            if tag == "/object":
                inside, phrase = False, None
        elif inside:
            cells.append(int(match["cell"]))
            if len(cells) == 2 and max(cells) < SIDE * SIDE:
                yield phrase, cells[0], cells[1]


def corners_of(first: int, last: int) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2 from 0 to 1 of two cells."""
    (top, left), (bottom, right) = divmod(first, SIDE), divmod(last, SIDE)
    before, after = (0.0, 1.0) if left == right or top == bottom else (0.5, 0.5)
    return (
        (left + before) / SIDE,
        (top + before) / SIDE,
        (right + after) / SIDE,
        (bottom + after) / SIDE,
    )


def cells_of(box: Box) -> tuple[int, int]:
    """The cells of the corners of a box from 0 to 1 (coordinate_to_patch_index)."""
    left, top = min(int(box.x1 * SIDE), SIDE - 1), min(int(box.y1 * SIDE), SIDE - 1)
    right = max(left, min(ceil(box.x2 * SIDE - 1), SIDE - 1))
    bottom = max(top, min(ceil(box.y2 * SIDE - 1), SIDE - 1))
    return top * SIDE + left, bottom * SIDE + right


ENTRIES = (
    Entry(
        name="kosmos2",
        checkpoints=("microsoft/kosmos-2-patch14-224",),
        tasks=(TaskKind.CAPTION, TaskKind.VQA, TaskKind.GROUND),
        boxes="<object><patch_index_..><patch_index_..></object>, cells of 32 x 32",
        evidence="documented",
        matches=lambda config, model_id: config.get("model_type") == "kosmos-2",
        make=lambda config: Kosmos2(whole(config, "latent_query_num", default=64)),
    ),
)
