"""Florence-2: task tokens instead of prompts, boxes as location tokens.

``cat<loc_x1><loc_y1><loc_x2><loc_y2>...`` with 1000 bins per axis, which mean their centres:
(bin + 0.5) / 1000. A label stands once before all of its boxes; a text in a region has eight
values, its four corners; a shape has its points between ``<poly>`` and ``</poly>``. Of corners and
points the box around them is kept. The picture is squashed to 768 x 768. Source: transformers
5.19, models/florence2/processing_florence2.py, which our tests run; microsoft/Florence-2-* model
cards. Questions cannot be asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

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

BINS = 1000
_WRAP = re.compile(r"</?s>|<pad>")
_PIECE = re.compile(r"((?:<loc_\d{1,4}>|</?poly>|<sep>)+)")
_VALUES = re.compile(r"<poly>|<loc_(\d{1,4})>")
_TAGS = re.compile(r"<loc_\d{1,4}>|</?poly>|<sep>|<pad>|</?(?:od|ocr|grounding)>")


class Florence2(Chat):
    """The checkpoints of florence-community; ``-ft`` ones are better at phrases."""

    name = "florence2"
    raw = True
    space = GridSpace(BINS, offset=0.5)

    def __init__(self, side: int = 768, tokens: int = 577) -> None:
        self._side, self._tokens = side, tokens

    def word(self, ask: Ask) -> str:
        match ask.kind:
            case TaskKind.CAPTION:
                token = "<CAPTION>" if ask.style == "short" else "<MORE_DETAILED_CAPTION>"
                return IMAGE + token
            case TaskKind.GROUND:
                return f"{IMAGE}<CAPTION_TO_PHRASE_GROUNDING>{ask.question}"
            case TaskKind.DETECT if len(ask.labels) == 1:
                return f"{IMAGE}<OPEN_VOCABULARY_DETECTION>{ask.labels[0]}"
            case TaskKind.DETECT:
                return f"{IMAGE}<CAPTION_TO_PHRASE_GROUNDING>{'. '.join(ask.labels)}."
            case TaskKind.OCR:
                return IMAGE + ("<OCR>" if ask.style == "short" else "<OCR_WITH_REGION>")
            case _:
                return self.word_boxes(ask)

    def read(
        self, kind: TaskKind, text: str, *, labels: tuple[str, ...], image: LoadedImage
    ) -> Answer:
        if kind is TaskKind.OCR and "<loc_" in text:
            return self._read_regions(text, image)
        return super().read(kind, text, labels=labels, image=image)

    def plain(self, text: str) -> str:
        return plain_text(text, _TAGS)

    def read_boxes(
        self, kind: TaskKind, text: str, labels: tuple[str, ...], image: LoadedImage
    ) -> Answer:
        text = _WRAP.sub("", text)
        if not text.strip():  # as transformers has it: nothing was found
            return Answer(boxes=())
        default = labels[0] if kind is TaskKind.GROUND and labels else ""
        found = [
            Box(label or default, *values)
            for label, shapes in labelled(text)
            for shape in shapes
            for values in boxes_of(shape)
        ]
        return in_pixels(found, text, self.space, image)

    def _read_regions(self, text: str, image: LoadedImage) -> Answer:
        """Texts, one a line, and the boxes around their four corners."""
        texts, boxes = [], []
        for label, shapes in labelled(_WRAP.sub("", text)):
            texts.append(label)
            values = [value for _, shape in shapes for value in shape]
            for at in range(0, len(values) - 7, 8):
                box = Box(label, *around(values[at : at + 8]))
                placed = self.space.to_pixels(box, image.size)
                boxes += [] if placed is None else [placed]
        return Answer(text=plain_text("\n".join(filter(None, texts))), boxes=tuple(boxes))

    def write(self, boxes: Sequence[Box], *, image: LoadedImage) -> str:
        texts = []
        for box in boxes:
            b = self.space.from_pixels(box, image.size)
            (x1, x2), (y1, y2) = _bins(b.x1, b.x2), _bins(b.y1, b.y2)
            texts.append(f"{box.label}<loc_{x1}><loc_{y1}><loc_{x2}><loc_{y2}>")
        return "".join(texts)

    def target(self, size: Size) -> Size:
        return at_most(size, self._side)

    def image_tokens(self, size: Size) -> int:
        return self._tokens


Shape = tuple[bool, list[float]]
"""Whether it is a shape of points, and its values."""


def labelled(text: str) -> Iterator[tuple[str, list[Shape]]]:
    """What stands before location tokens, and the tokens' values, split where shapes begin."""
    pieces = _PIECE.split(text)
    for label, locations in zip(pieces[::2], pieces[1::2], strict=False):
        shapes: list[Shape] = [(False, [])]
        for match in _VALUES.finditer(locations):
            if match[1] is None:
                shapes.append((True, []))
            else:
                shapes[-1][1].append(min(float(match[1]), BINS - 1))
        yield label.strip(), shapes


def boxes_of(shape: Shape) -> Iterator[tuple[float, float, float, float]]:
    """Fours of values, or the one box around the points of a shape."""
    is_polygon, values = shape
    if is_polygon:
        if len(values) >= 4:
            yield around(values)
        return
    for at in range(0, len(values) - 3, 4):
        x1, y1, x2, y2 = values[at : at + 4]
        yield x1, y1, x2, y2


def around(values: Sequence[float]) -> tuple[float, float, float, float]:
    """The box around points x, y, x, y, ..."""
    xs, ys = values[: len(values) // 2 * 2 : 2], values[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def _bins(low: float, high: float) -> tuple[int, int]:
    """The bins of two edges, never the same one; ``low`` and ``high`` count from bin centres."""
    first, second = int(low + 0.5), int(high + 0.5)
    first = min(max(first, 0), BINS - 2)
    return first, min(max(second, first + 1), BINS - 1)


ENTRIES = (
    Entry(
        name="florence2",
        checkpoints=("florence-community/Florence-2-*", "microsoft/Florence-2-*"),
        tasks=(TaskKind.CAPTION, TaskKind.GROUND, TaskKind.DETECT, TaskKind.OCR),
        boxes="label<loc_x1><loc_y1><loc_x2><loc_y2>, centres of 1000 bins",
        evidence="documented",
        matches=lambda config, model_id: config.get("model_type") == "florence2",
        make=lambda config: Florence2(
            whole(config, "preprocessor", "size", "height", default=768),
            whole(config, "preprocessor", "image_seq_length", default=577),
        ),
        note="several labels are asked as the phrases of a caption (unverified); microsoft/* have "
        "their own code and weights that transformers' class does not load",
    ),
)
