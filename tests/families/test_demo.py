"""The bundled model's answers become boxes in pixels, or a failure that says what was answered."""

import re

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.strategies import grid_boxes, mutated, reads_or_fails, seconds_to_read, sizes, upright
from vlmbatch.errors import ErrorCode, RequestFailed, Stage
from vlmbatch.families import family_for
from vlmbatch.families.demo import Demo
from vlmbatch.grounding import Box, GridSpace, Size
from vlmbatch.records import TaskKind
from vlmbatch.tasks import Ask

DEMO = Demo()
LABELS = st.text(st.characters(codec="utf-8", exclude_characters="<>;"), max_size=40)
BOXES = st.lists(grid_boxes(64, LABELS.map(str.strip)), min_size=1, max_size=6)


def answer(boxes: list[Box], *, labelled: bool) -> str:
    """As the model writes it."""
    return " ; ".join(
        (f"{b.label} " if labelled else "")
        + "".join(f"<loc_{edge:.0f}>" for edge in (b.x1, b.y1, b.x2, b.y2))
        for b in boxes
    )


def read(kind: TaskKind, text: str, size: Size, *labels: str):
    return DEMO.read(kind, text, labels=labels, image=upright(size))


@examples(max_examples=200)
@given(BOXES, sizes())
def test_every_box_of_a_detect_answer_comes_back_with_its_label(boxes, size):
    found = read(TaskKind.DETECT, answer(boxes, labelled=True), size, "a", "b").boxes
    grid = GridSpace(64)
    assert [b.label for b in found] == [b.label for b in boxes]
    for box, got in zip(boxes, found, strict=True):
        back = grid.from_pixels(got, size)
        edges = (back.x1, back.y1, back.x2, back.y2)
        assert edges == pytest.approx((box.x1, box.y1, box.x2, box.y2), abs=1e-6)


@examples(max_examples=100)
@given(BOXES, sizes())
def test_every_box_of_a_ground_answer_has_the_phrase_as_its_label(boxes, size):
    text = answer(boxes, labelled=False)
    found = read(TaskKind.GROUND, text, size, "the red dot").boxes
    assert {b.label for b in found} == {"the red dot"}
    assert len(found) == len(boxes)


def test_pixels_are_those_of_the_original_image():
    text = "red square <loc_0><loc_32><loc_64><loc_64>"
    (box,) = read(TaskKind.DETECT, text, Size(640, 480)).boxes
    assert box == Box("red square", 0, 240, 640, 480)
    (swapped,) = read(TaskKind.GROUND, "<loc_64><loc_64><loc_0><loc_32>", Size(640, 480), "x").boxes
    assert swapped == Box("x", 0, 240, 640, 480)
    (clipped,) = read(TaskKind.GROUND, "<loc_0><loc_32><loc_999><loc_65>", Size(64, 64), "x").boxes
    assert clipped == Box("x", 0, 32, 64, 64)


def test_none_means_that_nothing_was_found():
    assert read(TaskKind.DETECT, "none", Size(9, 9)).boxes == ()
    assert read(TaskKind.GROUND, " none</s>", Size(9, 9), "x").boxes == ()


def test_other_tasks_answer_with_text_without_special_tokens():
    assert read(TaskKind.VQA, " red<eos></s> ", Size(9, 9)).text == "red"
    assert read(TaskKind.CAPTION, "a <loc_1> b", Size(9, 9)).boxes is None


@pytest.mark.parametrize("kind", [TaskKind.GROUND, TaskKind.DETECT, TaskKind.VQA])
def test_an_answer_that_is_none_fails_and_is_shown(kind):
    with pytest.raises(RequestFailed) as caught:
        read(kind, "<eos> \n</s>", Size(9, 9), "x")
    failure = caught.value.failure
    assert (failure.code, failure.stage) == (ErrorCode.PARSE_FAILED, Stage.PARSE)
    with pytest.raises(RequestFailed, match=re.escape("'<loc_1><loc_2><loc_3>'")):
        read(TaskKind.GROUND, "<loc_1><loc_2><loc_3>", Size(9, 9), "x")


@examples(max_examples=300)
@given(st.text(max_size=200) | mutated(BOXES.map(lambda boxes: answer(boxes, labelled=True))))
def test_whatever_the_text_is_it_is_read_or_fails_to_parse(text):
    reads_or_fails(DEMO, text)


@pytest.mark.parametrize(
    "piece", ["a", "<", "<loc_1>", "<loc_", "<loc_1><loc_2><loc_3><loc_", ";", "<|a"]
)
def test_a_long_answer_is_read_in_linear_time(piece):
    assert seconds_to_read(DEMO, piece) < 5  # what is quadratic takes an hour


def test_the_family_is_named_by_the_config_and_sees_64_pixels():
    family = family_for({"vlmbatch_family": "demo", "vision_config": {"image_size": 64}})
    assert family.name == "demo"
    assert family.target(Size(1000, 3)) == Size(64, 64)


def test_each_task_has_its_own_words():
    asks = [
        Ask(TaskKind.CAPTION),
        Ask(TaskKind.CAPTION, style="detailed"),
        Ask(TaskKind.VQA, question="why?"),
        Ask(TaskKind.GROUND, question="dot", labels=("dot",)),
        Ask(TaskKind.DETECT, labels=("a", "b")),
        Ask(TaskKind.OCR),
    ]
    assert [DEMO.word(ask) for ask in asks] == [
        "Describe the image briefly.",
        "Describe the image in detail.",
        "why?",
        "Locate: dot",
        "Detect: a, b",
        "Read the text.",
    ]
