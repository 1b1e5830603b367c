"""JSON boxes as models really put them: fenced, cut off, nested, turned round, in Chinese."""

import json

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.strategies import grid_boxes
from vlmbatch.families.json_boxes import find_json, numbers_of, on_grid, write_json
from vlmbatch.families.prose import find_lists
from vlmbatch.grounding import Box, Point

BOXES = st.lists(grid_boxes(1000, st.text(max_size=30)), max_size=6)
CAT = Box("cat", 1, 2, 30, 40)


@examples(max_examples=200)
@given(BOXES, st.booleans())
def test_what_is_written_is_read_again(boxes, yxyx):
    text = write_json(boxes, key="box_2d", yxyx=yxyx)
    assert find_json(text, "x", yxyx=yxyx).boxes == boxes


@pytest.mark.parametrize(
    "text",
    [
        '```json\n[\n\t{"bbox_2d": [1, 2, 30, 40], "label": "cat"}\n]\n```',
        '{"bbox_2d": [1, 2, 30, 40], "label": "cat"}',
        'Here it is: {"label": "cat", "bbox_2d": [1, 2, 30, 40]}. Anything else?',
        "[{'bbox_2d': [1, 2, 30, 40], 'label': 'cat'}]",
        '[{"bbox_2d": [[1, 2, 30, 40]], "label": "cat"}]',
        '[[{"bbox_2d": [[[1, 2], [30, 40]]], "label": "cat"}]]',
        '{"label": "cat", "bbox": [(1, 2), (30, 40)]}',
        '{"objects": [{"name": "cat", "box": [1.0, 2.0, 3e1, 40.]}]}',
        '{"name": "cat", "bbox": {"x1": 1, "y1": 2, "x2": 30, "y2": 40}}',
        '{"bbox": {"xmin": 1, "ymin": 2, "xmax": 30, "ymax": 40}, "label": "cat"}',
        '{"x_min": 1, "y_min": 2, "x_max": 30, "y_max": 40, "label": "cat"}',
        '{"text_content": "Meow", "bbox_2d": [1, 2, 30, 40], "label": "cat", "n": {"a": "}"}}',
        '{"note": "a } and a {", "bbox_2d": [1, 2, 30, 40], "label": "cat"}',
        "bbox_2d: [1, 2, 30, 40], label: 'cat'",
        "｛“bbox_2d”：［１，２，３０，４０］，“label”：“cat”｝",
        '{"bbox_2d"：【1、2、30、40】，"label"："cat"}',
        '{"bbox_2d": [1, 2, 30, 40], "label": "cat"',
        '[{"bbox_2d": [1, 2, 30, 40], "label": "cat"}, {"bbox_2d": [5, 6, 7, 8',
    ],
)
def test_the_ways_to_put_one_box(text):
    assert find_json(text).boxes == [CAT]


def test_several_boxes_of_one_label():
    text = '{"label": "cat", "bbox_2d": [[1, 2, 30, 40], [5, 6, 7, 8]]}'
    assert find_json(text).boxes == [CAT, Box("cat", 5, 6, 7, 8)]
    text = '{"bbox_2d": [1, 2, 30, 40, 5, 6, 7, 8], "label": "cat"}'
    assert find_json(text).boxes == [CAT, Box("cat", 5, 6, 7, 8)]


@pytest.mark.parametrize(
    "text",
    [
        '{"bbox_2d": [1, 2, 3]}',
        '{"bbox_2d": [1, 2, 3, 4, 5]}',
        '{"bbox_2d": [1, 2, 3, 45',
        '{"bbox_2d": ["a", "b", "c", "d"]}',
        '{"bbox_2d": [1, 2, 3, 12345678]}',
        '{"bbox_2d": [1, 2, 3, ٤]}',
        '{"bbox_2d": null, "label": "cat"}',
        '{"size": [1, 2, 3, 4]}',
        "[1, 2, 3, 4]",
        '{"x1": 1, "y1": 2, "x2": 3}',
    ],
)
def test_what_is_no_box(text):
    assert find_json(text) == ([], [])


def test_labels_are_those_of_their_own_object():
    text = '{"label": "all", "of": [{"bbox": [0, 0, 1, 1]}, {"label": "b", "bbox": [0, 0, 2, 2]}]}'
    assert [box.label for box in find_json(text, "x").boxes] == ["x", "b"]
    text = '[{"bbox_2d": [1, 2, 30, 40], "label": "a ca'
    assert find_json(text, "x").boxes == [Box("x", 1, 2, 30, 40)]


@pytest.mark.parametrize(
    ("written", "label"),
    [
        (r"\u732b\"\n", '猫"\n'),
        ("猫，（黑）：［１］", "猫，（黑）：［１］"),
        (r"\ud83d\ude00", "😀"),
        (r"half \ud83d", "half \N{REPLACEMENT CHARACTER}"),
        (r"C:\Users", r"C:\Users"),
    ],
)
def test_labels_are_kept_as_they_are_meant(written, label):
    text = f'{{"bbox_2d": [1, 2, 30, 40], "label": "{written}"}}'
    assert find_json(text).boxes == [Box(label, 1, 2, 30, 40)]


def test_points():
    text = '```json\n[{"point_2d": [12, 34], "label": "eye"}, {"x": 0.5, "y": 1.2e-05}]\n```'
    assert find_json(text, "d").points == [Point("eye", 12, 34), Point("d", 0.5, 1.2e-05)]
    assert find_json('{"point_2d": [[1, 2], [3, 4]]}').points == [Point("", 1, 2), Point("", 3, 4)]
    assert find_json('{"point": [1, 2]}', yxyx=True).points == [Point("", 2, 1)]


def test_a_deep_answer_is_no_problem():
    assert find_json("[{" * 50_000 + '"bbox_2d": [1, 2, 3, 4]').boxes == [Box("", 1, 2, 3, 4)]
    assert find_json("}" * 50_000 + '"bbox_2d": [1, 2, 3, 4]').boxes == [Box("", 1, 2, 3, 4)]


@examples(max_examples=100)
@given(st.lists(st.tuples(*[st.floats(-99999, 99999)] * 4), max_size=3))
def test_numbers_as_python_writes_them(fours):
    assert list(numbers_of(json.dumps(fours))) == fours


def test_whole_steps_keep_some_area():
    assert on_grid(Box("a", 0.4, 999.9, 0.3, 1200), 1000) == Box("a", 0, 999, 1, 1000)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The cat is at [1, 2, 30, 40].", [("The cat is at", 1)]),
        ("cat: [[1, 2, 30, 40], [5, 6, 7, 8]]", [("cat", 1), ("cat", 5)]),
        ("cat (1,2),(30,40) and dog (5,6),(7,8)", [("cat", 1), ("and dog", 5)]),
        ("I see (2) cats <1 2 30 40>; none [a], [1, 2, 3]", [("cats", 1)]),
        ("猫：【1，2，30，40】", [("猫", 1)]),
        ("[1, 2, 30, 4", []),
    ],
)
def test_lists_in_prose(text, found):
    boxes = find_lists(text, "", ()).boxes
    assert [(box.label, box.x1) for box in boxes] == found


def test_lists_in_prose_take_the_label_that_was_asked_for():
    text = "A man with hot dogs [1, 2, 30, 40]"
    assert [box.label for box in find_lists(text, "", ("dog", "a", "hot dog")).boxes] == ["hot dog"]
    assert [box.label for box in find_lists("这是红猫[1, 2, 3, 4]", "", ("猫", "狗")).boxes] == [
        "猫"
    ]
    text = "The Cat sits at [1, 2, 30, 40], the dog at [5, 6, 7, 8]"
    assert [box.label for box in find_lists(text, "", ("cat", "dog")).boxes] == ["cat", "dog"]
    assert [box.label for box in find_lists(text, "it", ("cat", "dog")).boxes] == ["it", "it"]
