"""Intervals are a set of row numbers, whatever is put in and taken out."""

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.strategies import ranges, union
from vlmbatch.intervals import Intervals
from vlmbatch.records import Range

LIMIT = 40
STEPS = st.lists(st.tuples(st.sampled_from(["add", "remove"]), ranges(LIMIT, 12)), max_size=25)


def runs(rows: set[int]) -> list[Range]:
    """The twin's rows as maximal ranges."""
    firsts = sorted(row for row in rows if row - 1 not in rows)
    stops = sorted(row + 1 for row in rows if row + 1 not in rows)
    return [Range(first, stop) for first, stop in zip(firsts, stops, strict=True)]


@examples(max_examples=300)
@given(STEPS, ranges(LIMIT))
def test_intervals_do_what_a_set_of_integers_does(steps, window):
    intervals, twin = Intervals(), set()
    inside = union([window])
    for what, rows in steps:
        getattr(intervals, what)(rows)
        twin = twin | union([rows]) if what == "add" else twin - union([rows])
        assert list(intervals) == runs(twin)
        assert intervals.rows == len(twin)
        assert bool(intervals) == bool(twin)
        assert intervals.within(window) == runs(twin & inside)
        assert intervals.missing(window) == runs(inside - twin)
        assert intervals.covers(window) == (inside <= twin)


@examples(max_examples=100)
@given(st.lists(ranges(LIMIT, 8)), st.randoms())
def test_the_order_of_adding_does_not_matter(added, random):
    shuffled = random.sample(added, len(added))
    assert Intervals(added) == Intervals(shuffled)


def test_ranges_that_touch_become_one():
    assert list(Intervals([Range(0, 5), Range(5, 9)])) == [Range(0, 9)]
    assert repr(Intervals([Range(0, 5), Range(7, 9)])) == "Intervals(0-4, 7-8)"


@pytest.mark.parametrize(("first", "stop"), [(3, 3), (4, 3), (-1, 3)])
def test_a_range_has_at_least_one_row(first, stop):
    with pytest.raises(ValueError, match="not a range of rows"):
        Range(first, stop)
