"""Boxes that nobody can use: specks, the whole image, one thing twice."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from operator import itemgetter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vlmbatch.quality.base import EXAMPLES, Answers, Measure, Metric, Share
from vlmbatch.quality.histogram import bars

TINY = 0.0005
"""Share of the image's area: 23 x 23 pixels of 1024 x 1024."""
WHOLE = 0.95
"""Likewise."""
SAME = 0.9
"""Intersection over union of two boxes that are one."""
_CORNERS = ("label", "x1", "y1", "x2", "y2")
COMPARED = 100
"""So many boxes of an answer are compared with each other: it takes time by their square."""


class Boxes(Measure):
    """Of the boxes, ``boxes_tiny`` are smaller than TINY, ``boxes_whole`` cover WHOLE of the image,
    and ``boxes_twice`` have the label and the place of an earlier box of the same answer.
    ``boxes_per_answer`` is the mean, ``boxes_most`` the most."""

    names = ("boxes_tiny", "boxes_whole", "boxes_twice", "boxes_per_answer", "boxes_most")

    def __init__(self) -> None:
        self._tiny, self._whole, self._twice = map(
            Share, ("boxes_tiny", "boxes_whole", "boxes_twice")
        )
        self._numbers: Counter[int] = Counter()

    def add(self, answers: Answers) -> None:
        ok = answers.ok
        boxes = ok.table["boxes"]
        lengths = pc.list_value_length(boxes)
        for number in pc.value_counts(lengths.drop_null()).to_pylist():
            self._numbers[number["values"]] += number["counts"]
        parents = pc.list_parent_indices(boxes)
        self._twice.add(len(parents), [], ok)
        flat = pc.list_flatten(boxes)
        share = _shares(ok.table, parents, flat)
        sized = len(share) - share.null_count
        for found, mask in (
            (self._tiny, pc.less(share, TINY)),
            (self._whole, pc.greater_equal(share, WHOLE)),
        ):
            hits = pc.indices_nonzero(pc.fill_null(mask, False))
            found.of += sized
            found.count += len(hits)
            for at in hits[:EXAMPLES].to_pylist():
                found.show(
                    ok,
                    parents[at].as_py(),
                    _shown(tuple(flat[at].as_py()[name] for name in _CORNERS)),
                )
        corners = zip(*(pc.struct_field(flat, name).to_pylist() for name in _CORNERS), strict=True)
        several = list(zip(parents.to_pylist(), corners, strict=True))
        for at, group in groupby(several, key=itemgetter(0)):
            for earlier, box in _same([box for _, box in group][:COMPARED]):
                self._twice.count += 1
                if len(self._twice.examples) < EXAMPLES:
                    self._twice.show(ok, at, f"{_shown(earlier)}, {_shown(box)}")

    def metrics(self) -> list[Metric]:
        answers = self._numbers.total()
        boxes = sum(number * times for number, times in self._numbers.items())
        return [
            self._tiny.metric(f"below {TINY:.2%} of the image"),
            self._whole.metric(f"{WHOLE:.0%} of the image and more"),
            self._twice.metric("same label, same place"),
            Metric("boxes_per_answer", boxes / answers if answers else None),
            Metric("boxes_most", float(max(self._numbers)) if answers else None),
        ]

    def lines(self) -> list[tuple[str, str]]:
        answers = self._numbers.total()
        if not answers:
            return []
        mean = sum(number * times for number, times in self._numbers.items()) / answers
        few = [self._numbers[number] for number in range(10)]
        more = answers - sum(few)
        histogram = f"0 to 9: {bars(few)}" + (f", more: {more:,}" if more else "")
        return [("boxes", f"{mean:.1f} per answer, at most {max(self._numbers):,}; {histogram}")]

    def details(self) -> dict[str, Any]:
        return {"boxes_per_answer": {str(n): self._numbers[n] for n in sorted(self._numbers)}}


def _shares(table: pa.RecordBatch, parents: pa.Array, boxes: pa.Array) -> pa.Array:
    """Each box's share of its image's area; null where the image's size is not known."""
    x1, y1, x2, y2 = (pc.struct_field(boxes, name) for name in ("x1", "y1", "x2", "y2"))
    area = pc.multiply(pc.subtract(x2, x1), pc.subtract(y2, y1))
    sides = [table[name].cast(pa.float64()) for name in ("image_width", "image_height")]
    return pc.divide(area.cast(pa.float64()), pc.take(pc.multiply(*sides), parents))


def _same(boxes: list[tuple[Any, ...]]) -> list[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """(the first that is the same, box) of each box that has come before; boxes are _CORNERS."""
    found = []
    for at, box in enumerate(boxes):
        for earlier in boxes[:at]:
            if box[0] == earlier[0] and _iou(box, earlier) >= SAME:
                found.append((earlier, box))
                break
    return found


def _iou(a: tuple[Any, ...], b: tuple[Any, ...]) -> float:
    """Intersection over union."""
    width = min(a[3], b[3]) - max(a[1], b[1])
    height = min(a[4], b[4]) - max(a[2], b[2])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    areas = (a[3] - a[1]) * (a[4] - a[2]) + (b[3] - b[1]) * (b[4] - b[2])
    return float(both / (areas - both))


def _shown(box: tuple[Any, ...]) -> str:
    label, *corners = box
    return f"{label} [{', '.join(f'{corner:.0f}' for corner in corners)}]"
