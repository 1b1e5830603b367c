"""Boxes keep their place from a grid to pixels and back, and stay inside the image."""

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.strategies import images_with_box, sizes
from vlmbatch.grounding import Box, GridSpace, Size, clip, iou

ANY = st.floats(-1e6, 1e6)
ANY_BOX = st.builds(Box, st.just("a"), ANY, ANY, ANY, ANY, st.none() | st.floats(0, 1))


def edges(box: Box) -> tuple[float, float, float, float]:
    return box.x1, box.y1, box.x2, box.y2


@examples(max_examples=200)
@given(images_with_box(), st.sampled_from([1, 64, 1000, 1024, 0.5]))
def test_pixels_to_a_grid_and_back_are_the_same_pixels(image_and_box, steps):
    size, box = image_and_box
    space = GridSpace(steps)
    back = space.to_pixels(space.from_pixels(box, size), size)
    assert back is not None
    assert back.label == box.label
    assert edges(back) == pytest.approx(edges(box), rel=1e-12, abs=1e-9)


@examples(max_examples=200)
@given(ANY_BOX, sizes(200))
def test_what_is_clipped_lies_inside_the_image_and_has_an_area(box, size):
    found = clip(box, size)
    if found is not None:
        assert 0 <= found.x1 < found.x2 <= size.width
        assert 0 <= found.y1 < found.y2 <= size.height
        assert (found.label, found.score) == (box.label, box.score)
        assert clip(found, size) == found
    else:
        x = min(max(box.x1, box.x2), size.width) <= max(min(box.x1, box.x2), 0)
        y = min(max(box.y1, box.y2), size.height) <= max(min(box.y1, box.y2), 0)
        assert x or y


@examples(max_examples=100)
@given(images_with_box())
def test_a_box_inside_is_left_alone_and_swapped_corners_are_sorted(image_and_box):
    size, box = image_and_box
    assert clip(box, size) == box
    assert clip(Box(box.label, box.x2, box.y2, box.x1, box.y1), size) == box


def test_no_box_is_left_where_nothing_is_inside():
    image = Size(10, 20)
    assert clip(Box("a", 10, 0, 12, 5), image) is None
    assert clip(Box("a", -5, 0, 0, 5), image) is None
    assert clip(Box("a", 3, 4, 3, 9), image) is None


@examples(max_examples=200)
@given(images_with_box(), images_with_box())
def test_iou_is_symmetric_and_between_0_and_1(one, other):
    a, b = one[1], other[1]
    assert 0 <= iou(a, b) <= 1 + 1e-9
    assert iou(a, b) == pytest.approx(iou(b, a))
    assert iou(a, a) == pytest.approx(1)


def test_iou_of_halves_and_neighbours():
    a = Box("a", 0, 0, 2, 2)
    assert iou(a, Box("b", 1, 0, 2, 2)) == 0.5
    assert iou(a, Box("b", 1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou(a, Box("b", 2, 0, 4, 2)) == 0


@pytest.mark.parametrize(("width", "height"), [(0, 1), (1, 0), (-1, 5)])
def test_a_size_is_at_least_one_pixel(width, height):
    with pytest.raises(ValueError, match="at least 1 x 1"):
        Size(width, height)
