"""Boxes between tags: ``<ref>two apples</ref><box>(302,257),(582,671)</box><box>...</box>``.

The tags, and how the numbers between them are put, differ between families; the reader takes any
brackets and separators.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from vlmbatch.families.base import Chat, answered, plain_text
from vlmbatch.families.json_boxes import NUMBER, Found, default_label, find_json, placed, wide
from vlmbatch.families.prose import find_lists
from vlmbatch.grounding import Box, Point, Space
from vlmbatch.records import Answer, LoadedImage, TaskKind

Kind = Literal["", "ref", "box", "quad", "point"]
Pair = tuple[str, str]

_NUMBERS = re.compile(NUMBER, re.ASCII)
_NOT_NUMBERS = re.compile(r"[^][()<>{}\s\d.,;eE-]", re.ASCII)
_EACH = {"box": 4, "quad": 8, "point": 2}


class _Piece(NamedTuple):
    """A stretch of text and between which tags it stands; not closed if an end tag is missing."""

    kind: Kind
    text: str
    closed: bool


class Tags:
    """The tags of one family, each as (opening, closing)."""

    def __init__(
        self,
        *,
        box: Pair,
        ref: Pair | None = None,
        quad: Pair | None = None,
        point: Pair | None = None,
    ) -> None:
        kinds: list[tuple[Kind, Pair | None]] = [
            ("ref", ref),
            ("box", box),
            ("quad", quad),
            ("point", point),
        ]
        self._opens: dict[str, Kind] = {pair[0]: kind for kind, pair in kinds if pair}
        self._closes: dict[str, Kind] = {pair[1]: kind for kind, pair in kinds if pair}
        self._tag = re.compile("|".join(map(re.escape, (*self._opens, *self._closes))))
        self.box, self.ref = box, ref

    def find(self, text: str, default: str = "") -> Found:
        """Boxes and points between the tags, labelled by the last reference before them.

        A quadrilateral gives the box around it.
        """
        found = Found([], [])
        label = default
        for piece in self._pieces(text):
            if piece.kind == "ref":
                label = piece.text.strip()
            elif piece.kind:
                for numbers in _groups(piece):
                    if piece.kind == "point":
                        found.points.append(Point(label, *numbers))
                    else:
                        xs, ys = numbers[0::2], numbers[1::2]
                        corners = (min(xs), min(ys), max(xs), max(ys))
                        found.boxes.append(Box(label, *corners))
        return found

    def plain(self, text: str) -> str:
        """The answer without thinking, tags and numbers; references stay. Raises parse_failed."""
        text = answered(text)
        kept = (piece.text for piece in self._pieces(text) if not any(_groups(piece)))
        words = "".join(kept)
        return plain_text(words if words.strip() else text)

    def written(self, label: str, numbers: str) -> str:
        ref = "" if self.ref is None else f"{self.ref[0]}{label}{self.ref[1]}"
        return f"{ref}{self.box[0]}{numbers}{self.box[1]}"

    def _pieces(self, text: str) -> Iterator[_Piece]:
        kind: Kind = ""
        start = 0
        for match in self._tag.finditer(text):
            piece = text[start : match.start()]
            yield _Piece(kind, piece, closed=self._closes.get(match[0]) == kind)
            kind = self._opens.get(match[0], "")
            start = match.end()
        yield _Piece(kind, text[start:], closed=False)


def _groups(piece: _Piece) -> Iterator[list[float]]:
    """The numbers of a piece in groups of a box, a quadrilateral or a point.

    Nothing where it holds words, or another count of numbers; without its end tag, only what has
    its closing bracket, since the last number may be cut off.
    """
    each = _EACH.get(piece.kind)
    text = wide(piece.text)
    if each is None:
        return
    if not piece.closed:
        text = text[: _cut(text)]
    if _NOT_NUMBERS.search(text):
        return
    numbers = [float(match[0]) for match in _NUMBERS.finditer(text)]
    if piece.closed and len(numbers) % each:
        return
    for i in range(0, len(numbers) - each + 1, each):
        yield numbers[i : i + each]


def _cut(text: str) -> int:
    """The end of the last closing bracket."""
    return max(text.rfind(bracket) for bracket in "])>};") + 1


class Tagged(Chat):
    """A chat family with tags; where an answer has none of them, JSON and bare lists count too."""

    tags: Tags
    space: Space

    def plain(self, text: str) -> str:
        return self.tags.plain(text)

    def read_boxes(
        self, kind: TaskKind, text: str, labels: tuple[str, ...], image: LoadedImage
    ) -> Answer:
        answer, default = answered(text), default_label(kind, labels)
        found = self.tags.find(answer, default)
        if not any(found):
            found = find_json(answer, default)
        if not any(found):
            found = find_lists(answer, default, labels)
        return placed(found, answer, self.space, image)
