"""Boxes and points as JSON, read however a model puts them.

Many chat models answer with ``[{"bbox_2d": [x1, y1, x2, y2], "label": "..."}]``, in a Markdown
fence or in prose, cut off at the last token, with nested or doubled brackets, as corner pairs, with
single or full-width quotes and punctuation. This is a scanner over keys and their values, not a
JSON parser: it takes what is whole, needs time linear in the text, and raises nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vlmbatch.families.base import answered, in_pixels, steps_of
from vlmbatch.grounding import Box, Point, Space
from vlmbatch.records import Answer, LoadedImage, TaskKind
from vlmbatch.tasks import Ask


class Found(NamedTuple):
    """What stands in an answer, in the model's own space."""

    boxes: list[Box]
    points: list[Point]


def find_json(text: str, default: str = "", *, yxyx: bool = False) -> Found:
    """The boxes and points under JSON keys, in order; ``default`` labels those without a label.

    Only lists with their closing bracket count, so that a number that was cut off is never taken.
    """
    scan = _Scan()
    plain = wide(text)
    for match in _TOKEN.finditer(plain):
        if match.lastgroup == "open":
            scan.on_open()
        elif match.lastgroup == "close":
            scan.on_close()
        elif match.lastgroup == "list":
            scan.on_list(match["key"].lower(), match["list"])
        elif match.lastgroup == "number":
            scan.on_number(match["key"].lower(), match["number"])
        elif match.lastgroup in _ENDS and match[match.lastgroup]:  # a label cut off is none
            start, end = match.span(_ENDS[match.lastgroup])
            scan.on_text(match["key"].lower(), text[start:end])
    found = Found([], [])
    for item in scan.done():
        label = default if item.label is None else item.label
        if len(item.numbers) == 2:
            x, y = item.numbers[::-1] if yxyx else item.numbers
            found.points.append(Point(label, x, y))
        else:
            x1, y1, x2, y2 = item.numbers
            found.boxes.append(Box(label, y1, x1, y2, x2) if yxyx else Box(label, x1, y1, x2, y2))
    return found


def read_json(
    kind: TaskKind,
    text: str,
    labels: tuple[str, ...],
    space: Space,
    image: LoadedImage,
    *,
    yxyx: bool = False,
) -> Answer:
    """The answer to a ground or detect ask; raises parse_failed."""
    answer = answered(text)
    return placed(find_json(answer, default_label(kind, labels), yxyx=yxyx), answer, space, image)


def placed(found: Found, text: str, space: Space, image: LoadedImage) -> Answer:
    """What was found, in pixels. Raises parse_failed where nothing was, nor said to be none."""
    if not found.points:
        return in_pixels(found.boxes, text, space, image)
    boxes = (space.to_pixels(box, image.size) for box in found.boxes)
    points = (space.point_to_pixels(point, image.size) for point in found.points)
    return Answer(
        boxes=tuple(box for box in boxes if box is not None),
        points=tuple(point for point in points if point is not None),
    )


def default_label(kind: TaskKind, labels: tuple[str, ...]) -> str:
    """What a box without a label is: the phrase, or the only label that was asked for."""
    return labels[0] if labels and (kind is TaskKind.GROUND or len(labels) == 1) else ""


def words_for_json(ask: Ask, form: str) -> str:
    """An ask for boxes as JSON of this form, in words of the runner's own."""
    if ask.kind is TaskKind.GROUND:
        return f"Locate {ask.question} in this image. {form}"
    return f"Detect every {', '.join(ask.labels)} in this image. {form}"


def write_json(boxes: Iterable[Box], *, key: str = "bbox_2d", yxyx: bool = False) -> str:
    """As Qwen writes it: a list in a JSON fence. Whole coordinates are written without a point."""
    items = [{key: edges(box, yxyx=yxyx), "label": box.label} for box in boxes]
    return f"```json\n{json.dumps(items, ensure_ascii=False)}\n```"


def edges(box: Box, *, yxyx: bool = False) -> list[int | float]:
    """Its four numbers in the order of the model, whole ones as int."""
    numbers = (box.x1, box.y1, box.x2, box.y2)
    if yxyx:
        numbers = (box.y1, box.x1, box.y2, box.x2)
    return [int(n) if n == int(n) else n for n in numbers]


def on_grid(box: Box, last: int, last_y: int | None = None) -> Box:
    """The box of a space from 0 to ``last`` in whole steps, with some area left."""
    x1, x2 = steps_of(box.x1, box.x2, last)
    y1, y2 = steps_of(box.y1, box.y2, last if last_y is None else last_y)
    return Box(box.label, x1, y1, x2, y2)


def wide(text: str) -> str:
    """The text with full-width punctuation and digits as ASCII; every character keeps its place.

    Quotes stay as they are: a label may hold full-width ones inside ASCII quotes.
    """
    return text.translate(_WIDE)


_WIDE = {0xFF00 + code - 0x20: code for code in range(0x21, 0x7F) if chr(code) not in "\"'\\"}
_WIDE |= dict(zip(map(ord, "【】〔〕、−"), map(ord, "[][],-"), strict=True))

NUMBER = r"-?\d{1,6}(?:\.\d{0,20})?(?:[eE](?:-\d{1,3}|\+?\d{1,2}))?"
_NUMBER = re.compile(NUMBER, re.ASCII)
_SEPARATOR = re.compile(r"[\s,;]+")
_TOKEN = re.compile(
    r"""
    (?P<open>\{) | (?P<close>\})
    | ["'“]? \b (?P<key>[a-z]\w{0,31}+) ["'”]? \s*+ : \s*+
      (?: (?P<list>[\[(] [][()\d\s.,;eE+-]*+)
        | "(?P<double>(?:[^"\\\n]|\\.)*+)(?P<d_end>"?)
        | '(?P<single>(?:[^'\\\n]|\\.)*+)(?P<s_end>'?)
        | “(?P<curly>[^”\n]*+)(?P<c_end>”?)
        | (?P<number>-?\d[\w.+-]{0,40}+)
      )
    """,
    re.VERBOSE | re.IGNORECASE | re.ASCII,
)
_ENDS = {"d_end": "double", "s_end": "single", "c_end": "curly"}
_INNERMOST = re.compile(r"[\[(]([^][()]*+)[\])]")

_TWO_D = ("", "2d", "_2d")
_BOXES = ("bbox", "box", "bounding_box", "boundingbox", "coordinates", "coords")
_BOX = frozenset(f"{name}{two_d}" for name in _BOXES for two_d in _TWO_D)
_POINT = frozenset(f"point{two_d}" for two_d in _TWO_D)
_LABEL = frozenset(
    ["label", "name", "class", "category", "object", "phrase", "text_content", "text"]
)
_CORNER = {
    f"{axis}{style}": at
    for at, axis, styles in (
        (0, "x", ("_min", "min", "1")),
        (1, "y", ("_min", "min", "1")),
        (2, "x", ("_max", "max", "2")),
        (3, "y", ("_max", "max", "2")),
        (4, "x", ("",)),
        (5, "y", ("",)),
    )
    for style in styles
}


@dataclass(slots=True)
class _Item:
    numbers: Sequence[float]
    label: str | None = None


@dataclass(slots=True)
class _Object:
    """What one pair of braces holds; ``corners`` by their place in x1 y1 x2 y2 x y."""

    items: list[_Item] = field(default_factory=list)
    corners: dict[int, float] = field(default_factory=dict)
    label: str | None = None


class _Scan:
    """Items with the label of their own object, wherever in it that stands."""

    def __init__(self) -> None:
        self._items: list[_Item] = []
        self._open: list[_Object | None] = [None]  # None: nothing of interest in it so far

    def on_open(self) -> None:
        self._open.append(None)

    def on_close(self) -> None:
        corners = self._finish(self._open.pop())
        if not self._open:
            self._open.append(None)
        elif corners is not None and corners.label is None:
            self._innermost.items.append(corners)  # "bbox": {"x1": 1, ...}, "label": ...

    def on_list(self, key: str, value: str) -> None:
        if key in _BOX or key in _POINT:
            found = [_Item(numbers) for numbers in numbers_of(value, point=key in _POINT)]
            self._items += found
            self._innermost.items += found

    def on_number(self, key: str, value: str) -> None:
        if key in _CORNER and _NUMBER.fullmatch(value):
            self._innermost.corners[_CORNER[key]] = float(value)

    def on_text(self, key: str, value: str) -> None:
        if key in _LABEL and (key == "label" or self._innermost.label is None):
            self._innermost.label = unquoted(value)

    def done(self) -> list[_Item]:
        while self._open:
            self._finish(self._open.pop())
        return self._items

    @property
    def _innermost(self) -> _Object:
        innermost = self._open[-1] = self._open[-1] or _Object()
        return innermost

    def _finish(self, closed: _Object | None) -> _Item | None:
        """Labels what the object holds; gives the box or point whose corners are its keys."""
        corners = None
        if closed is None:
            return None
        for names in ((0, 1, 2, 3), (4, 5)):
            if all(at in closed.corners for at in names):
                corners = _Item([closed.corners[at] for at in names])
                self._items.append(corners)
                closed.items.append(corners)
        for item in closed.items:
            if item.label is None:
                item.label = closed.label
        return corners


def numbers_of(text: str, *, point: bool = False) -> Iterator[tuple[float, ...]]:
    """Fours (or pairs) of numbers in the innermost closed brackets; two pairs in a row are a four.

    A list with another count of numbers is not one of boxes.
    """
    waiting: tuple[float, ...] = ()
    for match in _INNERMOST.finditer(text):
        numbers = plain_numbers(match[1])
        if point and len(numbers) == 2:
            yield numbers
        elif not point and len(numbers) == 2:
            waiting += numbers
            if len(waiting) == 4:
                yield waiting
                waiting = ()
        elif not point and len(numbers) % 4 == 0:
            for i in range(0, len(numbers), 4):
                yield numbers[i : i + 4]


def plain_numbers(text: str) -> tuple[float, ...]:
    """The numbers of a text that holds nothing else, separated by commas, semicolons or spaces."""
    parts = [part for part in _SEPARATOR.split(text) if part]
    if not all(_NUMBER.fullmatch(part) for part in parts):
        return ()
    return tuple(map(float, parts))


def unquoted(raw: str) -> str:
    """The text between a JSON string's quotes; as it is where its escapes are not JSON's."""
    try:
        value = str(json.loads(f'"{raw}"', strict=False))
    except ValueError:
        value = raw
    return _LONE.sub("\N{REPLACEMENT CHARACTER}", value)


_LONE = re.compile("[\ud800-\udfff]")  # half a character, which UTF-8 does not have
