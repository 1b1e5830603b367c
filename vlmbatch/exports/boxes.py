"""What the formats of boxes share: which boxes go out, under which names, and their numbers.

Ours are xyxy in pixels of the upright image, x2 and y2 exclusive, so a width is x2 - x1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pyarrow as pa

from vlmbatch.errors import UsageError
from vlmbatch.grounding import Box, Point, Size
from vlmbatch.records import Result
from vlmbatch.results.schema import to_results

BOX_OPTIONS = {
    "labels": "only these categories, in this order: person,car",
    "min_box": "no box with a shorter side: in pixels (8), or of the image's (0.01, 1%)",
}
"""What ``BoxRules`` are made of."""

UNNAMED = "object"
"""The category of a box that the model gave no label."""

_BLANKS = re.compile("[\0-\x20\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff]+")


def name_of(label: str) -> str:
    """The label as a category's name: in one line, of characters that XML and YAML can hold."""
    return _BLANKS.sub(" ", label).strip() or UNNAMED


def rounded(box: Box) -> Box:
    """Corners in thousandths of a pixel; those inside of the image stay inside of it."""
    x1, y1, x2, y2 = (round(edge, 3) for edge in (box.x1, box.y1, box.x2, box.y2))
    return Box(box.label, x1, y1, x2, y2, box.score)


def xywh(box: Box) -> list[float]:
    """Left, top, width and height, in pixels."""
    b = rounded(box)
    return [b.x1, b.y1, round(b.x2 - b.x1, 3), round(b.y2 - b.y1, 3)]


def shares(box: Box, image: Size) -> list[float]:
    """Left, top, width and height as shares of the image's, 0 to 1."""
    x, y, width, height = box.x1, box.y1, box.x2 - box.x1, box.y2 - box.y1
    return [x / image.width, y / image.height, width / image.width, height / image.height]


@dataclass(frozen=True, slots=True)
class BoxRules:
    """Which boxes and points go out."""

    labels: tuple[str, ...] = ()
    """Only these categories, in this order, whatever the case of a box's label. Empty: all."""
    min_box: float = 0.0
    """The least of a box's shorter side: in pixels; below 1, as a share of the image's side."""

    @classmethod
    def of(cls, labels: str | None, min_box: str | None) -> BoxRules:
        """As options say them: ``cat,dog``; ``8``, ``0.01`` or ``1%``. Raises UsageError."""
        names = tuple(name_of(label) for label in (labels or "").split(",") if label.strip())
        if labels is not None and not names:
            raise UsageError("--labels names nothing", hint="as in --labels person,car")
        twice = [name for name, n in Counter(map(str.casefold, names)).items() if n > 1]
        if twice:
            raise UsageError(f"--labels has {twice[0]!r} twice", hint="whatever the case")
        return cls(names, _least_side(min_box))

    def is_large_enough(self, box: Box, image: Size) -> bool:
        width, height = box.x2 - box.x1, box.y2 - box.y1
        if self.min_box < 1:
            return min(width / image.width, height / image.height) >= self.min_box
        return min(width, height) >= self.min_box


def _least_side(text: str | None) -> float:
    if text is None:
        return 0.0
    number, is_percent = text.removesuffix("%"), text.endswith("%")
    try:
        value = float(number) / (100 if is_percent else 1)
    except ValueError:
        value = -1.0
    if 0 <= value < (1 if is_percent else float("inf")):
        return value
    raise UsageError(
        f"--min-box is no size: {text!r}",
        hint="pixels, as in 8, or a share of the image's width or height, as in 0.01 or 1%",
    )


class Sieve:
    """Applies the rules, and counts what they leave out."""

    def __init__(self, rules: BoxRules) -> None:
        self._rules = rules
        self._names = {label.casefold(): label for label in rules.labels}
        self.dropped: Counter[str] = Counter()
        """Boxes and points of ``other_label``, and boxes that are ``too_small``."""

    def boxes(self, boxes: Iterable[Box], image: Size) -> list[Box]:
        """Those that go out, labelled with their category; each has some area when rounded."""
        kept = []
        for box in boxes:
            name, b = self.category(box.label), rounded(box)
            if name is None:
                self.dropped["other_label"] += 1
            elif b.x1 >= b.x2 or b.y1 >= b.y2 or not self._rules.is_large_enough(box, image):
                self.dropped["too_small"] += 1
            else:
                kept.append(replace(b, label=name))
        return kept

    def points(self, points: Iterable[Point]) -> list[Point]:
        kept = []
        for point in points:
            name = self.category(point.label)
            if name is None:
                self.dropped["other_label"] += 1
            else:
                kept.append(Point(name, round(point.x, 3), round(point.y, 3)))
        return kept

    def category(self, label: str) -> str | None:
        """The category of a label; None: it has none."""
        name = name_of(label)
        return self._names.get(name.casefold()) if self._names else name


def left_out(rules: BoxRules, batch: pa.RecordBatch, *, points: bool) -> pa.Array:
    """A Drop, with the rules: answers whose boxes (and ``points``) are all left out. As an answer
    to a question they would say that there is nothing."""

    def reason(result: Result) -> str | None:
        answer, size = result.answer, result.image_size
        if answer is None or size is None:
            return None
        sieve, boxes, dots = Sieve(rules), answer.boxes or (), answer.points or ()
        dots = dots if points else ()
        kept = [*sieve.boxes(boxes, size), *sieve.points(dots)]
        return "boxes_left_out" if not kept and (boxes or dots) else None

    if not rules.labels and not rules.min_box:
        return pa.nulls(batch.num_rows, pa.string())
    return pa.array(map(reason, to_results(batch)), pa.string())
