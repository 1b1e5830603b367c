"""Which boxes are right: pairs of a reference's and an answer's boxes, by IoU."""

from __future__ import annotations

from collections.abc import Sequence

from vlmbatch.grounding import Box, iou

IOU = 0.5
"""From here on two boxes are the same, as in Acc@0.5 of referring expressions."""


def pairs(wanted: Sequence[Box], found: Sequence[Box], *, labels: bool = False) -> int:
    """How many pairs of a wanted and a found box there can be, each box in one pair at most.

    A pair has an IoU of at least IOU and, with ``labels``, one label (whatever its case; a wanted
    box with an empty one takes any). The most that there can be, a maximum matching, depends on no
    order and no score: a language model's boxes have none.
    """
    near = [
        [
            at
            for at, box in enumerate(found)
            if (not labels or _same(want, box)) and _near(want, box)
        ]
        for want in wanted
    ]
    mate_of_found: dict[int, int] = {}
    mate_of_wanted: dict[int, int] = {}
    return sum(_pair(each, near, mate_of_found, mate_of_wanted) for each in range(len(wanted)))


def _pair(
    start: int, near: list[list[int]], mate_of_found: dict[int, int], mate_of_wanted: dict[int, int]
) -> bool:
    """Whether one more pair can be had with this wanted box, if others change theirs (an augmenting
    path, breadth first)."""
    reached_from: dict[int, int] = {}
    waiting = [start]
    for want in waiting:
        for at in near[want]:
            if at in reached_from:
                continue
            reached_from[at] = want
            if at in mate_of_found:
                waiting.append(mate_of_found[at])
                continue
            free: int | None = at
            while free is not None:
                taker = reached_from[free]
                given_up = mate_of_wanted.get(taker)
                mate_of_found[free], mate_of_wanted[taker] = taker, free
                free = given_up
            return True
    return False


def _near(a: Box, b: Box) -> bool:
    return iou(a, b) >= IOU


def _same(wanted: Box, found: Box) -> bool:
    label = wanted.label.strip().casefold()
    return not label or label == found.label.strip().casefold()
