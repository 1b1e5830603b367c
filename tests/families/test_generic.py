"""JSON boxes of models that the runner does not know, however they put them."""

import json

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.strategies import grid_boxes, mutated, reads_or_fails, seconds_to_read, sizes, upright
from vlmbatch.errors import ErrorCode, RequestFailed, UsageError
from vlmbatch.families import FAMILIES, family_for
from vlmbatch.families.generic import Generic
from vlmbatch.grounding import Box, GridSpace, Size
from vlmbatch.records import TaskKind
from vlmbatch.tasks import Ask

GENERIC = Generic()
BOXES = st.lists(grid_boxes(1000, st.text(max_size=30)), min_size=1, max_size=6)
SQUARE = Size(1000, 1000)


def objects(boxes: list[Box]) -> list[dict]:
    return [{"bbox_2d": [b.x1, b.y1, b.x2, b.y2], "label": b.label} for b in boxes]


def read(kind: TaskKind, text: str, size: Size = SQUARE, *labels: str):
    return GENERIC.read(kind, text, labels=labels, image=upright(size))


@examples(max_examples=200)
@given(
    BOXES,
    sizes(),
    st.booleans(),
    st.sampled_from([None, 1, "\t"]),
    st.booleans(),
    st.sampled_from(["{}", "```json\n{}\n```", "Here they are: {}<|im_end|>"]),
)
def test_boxes_in_json_come_back_with_their_labels(boxes, size, ascii, indent, label_first, frame):
    items = objects(boxes)
    if label_first:
        items = [dict(reversed(item.items())) for item in items]
    text = frame.replace("{}", json.dumps(items, ensure_ascii=ascii, indent=indent))
    found = read(TaskKind.DETECT, text, size, "a").boxes
    assert [b.label for b in found] == [b.label for b in boxes]
    for box, got in zip(boxes, found, strict=True):
        back = GridSpace(1000).from_pixels(got, size)
        edges = (back.x1, back.y1, back.x2, back.y2)
        assert edges == pytest.approx((box.x1, box.y1, box.x2, box.y2), abs=1e-6)


def test_a_box_without_a_label_has_that_of_the_phrase_and_never_its_neighbours():
    boxes = [{"bbox_2d": [edge, edge, 5, 5]} for edge in (0, 1, 2)]
    text = json.dumps([boxes[0], {**boxes[1], "label": "b"}, boxes[2]])
    assert [b.label for b in read(TaskKind.GROUND, text, SQUARE, "x").boxes] == ["x", "b", "x"]
    assert [b.label for b in read(TaskKind.DETECT, text, SQUARE, "x").boxes] == ["x", "b", "x"]
    found = read(TaskKind.DETECT, text, SQUARE, "x", "y").boxes
    assert [b.label for b in found] == ["", "b", ""]


def test_an_answer_that_was_cut_off_keeps_its_whole_boxes():
    text = '[{"bbox_2d": [0, 0, 500, 500], "label": "a"}, {"bbox_2d": [1, 1, 500, 500], "lab'
    assert [b.label for b in read(TaskKind.DETECT, text).boxes] == ["a", ""]
    text = '[{"bbox_2d": [0, 0, 500, 500], "label": "a"}, {"bbox_2d": [1, 1, 5'
    assert read(TaskKind.DETECT, text).boxes == (Box("a", 0, 0, 500, 500),)


def test_odd_numbers_and_places():
    text = '{"bbox_2d":[ 900.5 ,-3, 100,2000 ]}'
    assert read(TaskKind.GROUND, text, SQUARE, "x").boxes == (Box("x", 100, 0, 900.5, 1000),)
    assert read(TaskKind.GROUND, '{"bbox_2d": [1, 1, 1, 9]}', SQUARE, "x").boxes == ()
    nested = '[[{"bbox_2d": [[900, 700, 100, 200]], "label": "a"}]]'
    assert read(TaskKind.DETECT, nested).boxes == (Box("a", 100, 200, 900, 700),)
    thought = f"<think>{nested}</think>" + '{"bbox_2d": [0, 0, 1, 1], "label": "红色的猫"}'
    assert read(TaskKind.DETECT, thought).boxes == (Box("红色的猫", 0, 0, 1, 1),)


@pytest.mark.parametrize(
    "text", ["[]", "[ ]", "```json\n[]\n```", "None", "There are none.", "图中没有猫。"]
)
def test_some_ways_to_say_that_there_is_none(text):
    assert read(TaskKind.DETECT, text).boxes == ()


@pytest.mark.parametrize("text", ["", "a cat", '[{"bbox_2d": [1, 2, 3]}]', "[0, 0, 5, 5]"])
def test_an_answer_without_boxes_fails(text):
    with pytest.raises(RequestFailed) as caught:
        read(TaskKind.DETECT, text)
    assert caught.value.failure.code is ErrorCode.PARSE_FAILED


def test_a_long_answer_is_shown_cut():
    with pytest.raises(RequestFailed) as caught:
        read(TaskKind.DETECT, "blah " * 10_000)
    assert len(caught.value.failure.message) < 150


def test_text_answers_lose_special_tokens_only():
    assert read(TaskKind.OCR, "<s>a < b <i>c</i><|im_end|>").text == "a < b <i>c</i>"
    with pytest.raises(RequestFailed, match="the model answered nothing"):
        read(TaskKind.OCR, "<|endoftext|>\n")


@examples(max_examples=300)
@given(st.text(max_size=200) | mutated(BOXES.map(lambda boxes: json.dumps(objects(boxes)))))
def test_whatever_the_text_is_it_is_read_or_fails_to_parse(text):
    reads_or_fails(GENERIC, text)


@pytest.mark.parametrize(
    "piece",
    [
        "a",
        " ",
        "[ ",
        '"bbox_2d"',
        '"bbox_2d"' + " " * 2000,
        '"bbox_2d": [1' + " " * 2000,
        '"bbox_2d": [1,2,3,4]',
        '{"bbox_2d": [1,2,3,4], "label": "a"}',
        '"label"',
        '"label": "',
        '"label": "' + "\\" * 199,
        '"label": "' + "b" * 199,
        '"label"' + " " * 2000,
        "there is n",
        "<|" + "a" * 47,
    ],
)
def test_a_long_answer_is_read_in_linear_time(piece):
    assert seconds_to_read(GENERIC, piece) < 5  # what is quadratic takes an hour


def test_the_family_is_decided_by_the_config():
    assert family_for({"model_type": "unheard-of"}).name == "generic"
    assert family_for({}).name == "generic"
    assert family_for({"model_type": "smolvlm"}).name == "idefics3"
    assert family_for({"model_type": "idefics3", "vision_config": None}).name == "idefics3"
    for name in FAMILIES:
        assert family_for({"model_type": "smolvlm"}, name).name == name
    with pytest.raises(UsageError, match="unknown family 'qwen'") as caught:
        family_for({}, "qwen")
    assert all(name in caught.value.hint for name in FAMILIES)


@examples(max_examples=100)
@given(sizes(), st.sampled_from([364, 384, 512]))
def test_idefics3_never_sees_more_than_four_tiles_along_an_edge(size, tile):
    family = family_for({"model_type": "smolvlm", "vision_config": {"image_size": tile}})
    target = family.target(size)
    assert max(target.width, target.height) <= max(4 * tile, 1)
    assert target == size or max(target.width, target.height) == 4 * tile
    assert abs(target.width * size.height - target.height * size.width) <= max(
        size.width, size.height
    )
    assert GENERIC.target(size) == size


@pytest.mark.parametrize("name", ["generic", "idefics3"])
def test_texts_are_asked_for_in_plain_words(name):
    family = family_for({}, name)
    assert family.word(Ask(TaskKind.VQA, question="why?")) == "why?"
    assert family.word(Ask(TaskKind.CAPTION)) != family.word(Ask(TaskKind.CAPTION, "detailed"))


def test_boxes_are_asked_for_by_phrase_or_labels():
    assert "the red dot" in GENERIC.word(Ask(TaskKind.GROUND, question="the red dot"))
    detect = GENERIC.word(Ask(TaskKind.DETECT, labels=("cat", "dog")))
    assert "cat, dog" in detect
    assert '"bbox_2d"' in detect


@pytest.mark.parametrize(
    ("space", "numbers"),
    [
        ("0-1000", [250, 500, 500, 750]),
        ("0-1000-yxyx", [500, 250, 750, 500]),
        ("0-999", [249.75, 499.5, 499.5, 749.25]),
        ("0-100", [25, 50, 50, 75]),
        ("0-1", [0.25, 0.5, 0.5, 0.75]),
        ("pixels", [100, 100, 200, 150]),
    ],
)
def test_its_guess_of_the_box_space_can_be_mended(space, numbers):
    family = family_for({}, "generic", box_space=space)
    text = json.dumps({"bbox_2d": numbers, "label": "a"})
    (box,) = family.read(TaskKind.DETECT, text, labels=(), image=upright(Size(400, 200))).boxes
    assert (box.x1, box.y1, box.x2, box.y2) == pytest.approx((100, 100, 200, 150))
    (point,) = family.read(
        TaskKind.GROUND,
        json.dumps({"point_2d": numbers[:2]}),
        labels=("a",),
        image=upright(Size(400, 200)),
    ).points
    assert (point.x, point.y) == pytest.approx((100, 100))
