"""Pairs of boxes by IoU 0.5: as many as a search through all pairings finds."""

from itertools import permutations

from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.strategies import grid_boxes
from vlmbatch.evaluation.boxes import IOU, pairs
from vlmbatch.grounding import Box, iou


def box(x1: float, y1: float, x2: float, y2: float, label: str = "") -> Box:
    return Box(label, x1, y1, x2, y2)


def by_search(wanted: list[Box], found: list[Box], *, labels: bool) -> int:
    """The most pairs over all orders: the slow twin of ``pairs``."""

    def fits(want: Box, have: Box) -> bool:
        same = not want.label or want.label.casefold() == have.label.casefold()
        return iou(want, have) >= IOU and (same or not labels)

    padded = [*found, *[None] * len(wanted)]
    return max(
        (
            sum(have is not None and fits(want, have) for want, have in zip(wanted, order))  # noqa: B905
            for order in permutations(padded, len(wanted))
        ),
        default=0,
    )


# On a small grid boxes are near to several others, so that greedy pairing would lose some.
SOME = st.lists(grid_boxes(4, st.sampled_from(["cat", "Cat", "dog", ""])), max_size=4)


@given(wanted=SOME, found=SOME, labels=st.booleans())
@examples(max_examples=300, deadline=None)
def test_there_are_as_many_pairs_as_there_can_be(
    wanted: list[Box], found: list[Box], labels: bool
) -> None:
    assert pairs(wanted, found, labels=labels) == by_search(wanted, found, labels=labels)


@given(wanted=SOME, found=SOME)
def test_pairing_knows_no_sides_and_no_order(wanted: list[Box], found: list[Box]) -> None:
    count = pairs(wanted, found)
    assert count == pairs(found, wanted) == pairs(wanted[::-1], found[::-1])
    assert pairs(wanted, wanted) == len(wanted)


def test_one_that_could_have_two_leaves_one_to_another() -> None:
    wide, left, right = box(0, 0, 10, 10), box(0, 0, 6, 10), box(4, 0, 10, 10)
    found = [box(0, 0, 9, 10), left]
    assert iou(right, found[0]) >= IOU > iou(right, left)
    assert pairs([wide, right], found) == 2  # the first of both would be taken by ``wide``


def test_half_is_enough_and_less_is_not() -> None:
    want = box(0, 0, 2, 2)
    assert pairs([want], [box(0, 0, 2, 1)]) == 1
    assert pairs([want], [box(0, 0, 2, 0.99)]) == 0


def test_a_box_said_twice_is_found_once() -> None:
    want = box(0, 0, 8, 8, "cat")
    assert pairs([want], [want, want], labels=True) == 1
    assert pairs([want], [box(0, 0, 8, 8, "dog")], labels=True) == 0
    assert pairs([box(0, 0, 8, 8)], [box(0, 0, 8, 8, "dog")], labels=True) == 1


def test_a_whole_chain_of_boxes_changes_its_mates() -> None:
    """Each wanted box takes the wrong one of two at first, until the last one has none."""
    wanted = [box(4 * i, 0, 4 * i + 10, 1) for i in range(300)]
    found = [box(4 * i - 2, 0, 4 * i + 8, 1) for i in range(300)]
    assert pairs(wanted, found[::-1]) == 300
