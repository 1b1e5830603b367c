"""Each format of boxes, read as its documents say, gives the boxes that went in."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
import yaml
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.strategies import sizes
from vlmbatch.errors import UsageError
from vlmbatch.exports import coco, fiftyone, hf_objects, label_studio, ms_swift, yolo
from vlmbatch.exports.annotations import Labelled
from vlmbatch.exports.boxes import UNNAMED, BoxRules, Sieve, name_of
from vlmbatch.grounding import Box, Point, Size

LABELS = st.text(max_size=12) | st.sampled_from(
    [
        "cat",
        "a, b",
        'the "big" one',
        "l'arbre",
        "狗",
        "no",
        "1",
        "a: b # c",
        "<b>&amp;",
        "\\n\\",
        "{x}",
    ]
)
SCORES = st.none() | st.floats(0, 1, width=32)


@st.composite
def edges(draw: st.DrawFn, length: int) -> tuple[float, float]:
    """Two edges at least a hundredth of a pixel apart, often whole, a pixel apart, at a border."""
    step = draw(st.sampled_from([1, 100, 1e6 / 9973]))
    last = int(length * step)
    low = draw(st.sampled_from([0, last - 1]) | st.integers(0, last - 1))
    high = draw(st.sampled_from([low + 1, last]) | st.integers(low + 1, last))
    return low / step, high / step


@st.composite
def pictures(draw: st.DrawFn) -> tuple[Size, list[Box]]:
    """A size and boxes inside it, labelled with categories' names."""
    size = draw(sizes(20_000) | st.builds(Size, st.integers(1, 3), st.integers(1, 3)))
    boxes = []
    for _ in range(draw(st.integers(0, 3))):
        (x1, x2), (y1, y2) = draw(edges(size.width)), draw(edges(size.height))
        boxes.append(Box(name_of(draw(LABELS)), x1, y1, x2, y2, draw(SCORES)))
    return size, boxes


ODD = (Size(641, 427), [Box("a, b", 0, 0, 641, 427, 0.5), Box('"', 640, 426, 641, 427)])


def assert_same(found: list[Box], boxes: list[Box], *, scores: bool = False) -> None:
    assert [box.label for box in found] == [box.label for box in boxes]
    for one, other in zip(found, boxes, strict=True):
        assert (one.x1, one.y1, one.x2, one.y2) == pytest.approx(
            (other.x1, other.y1, other.x2, other.y2), abs=0.01
        )
        assert one.score == (pytest.approx(other.score, abs=1e-6) if scores else None)


def through_json(value):
    return json.loads(json.dumps(value))


@examples(max_examples=40)
@example(ODD)
@given(pictures())
def test_coco_reads_back(picture):
    size, boxes = picture
    names = sorted({box.label for box in boxes})
    entries = [coco.box_entry(names.index(box.label) + 1, box) for box in boxes]
    found = []
    for entry in through_json(entries):
        x, y, width, height = entry["bbox"]
        assert min(x, y) >= 0
        assert min(width, height) > 0
        assert x + width <= size.width + 1e-6
        assert y + height <= size.height + 1e-6
        assert entry["area"] == pytest.approx(width * height, abs=1e-3)
        label = names[entry["category_id"] - 1]
        found.append(Box(label, x, y, x + width, y + height, entry.get("score")))
    assert_same(found, boxes, scores=True)
    image = coco.image_entry(1, "a.jpg", size)
    assert image == {"id": 1, "width": size.width, "height": size.height, "file_name": "a.jpg"}


@examples(max_examples=40)
@example(ODD)
@given(pictures())
def test_yolo_reads_back(picture):
    size, boxes = picture
    names = sorted({box.label for box in boxes})
    text = "\n".join(yolo.line(names.index(box.label), box, size) for box in boxes)
    named = yaml.safe_load(yolo.data_yaml(names, {"train": "images/train"}))["names"]
    found = []
    for line in text.splitlines():
        category, *numbers = line.split(" ")
        assert all(re.fullmatch(r"[01]\.\d{8}", number) for number in numbers)
        xc, yc, width, height = map(float, numbers)
        assert max(xc, yc, width, height) <= 1
        x1, x2 = (xc - width / 2) * size.width, (xc + width / 2) * size.width
        y1, y2 = (yc - height / 2) * size.height, (yc + height / 2) * size.height
        found.append(Box(named[int(category)], x1, y1, x2, y2))
    assert_same(found, boxes)


@examples(max_examples=40)
@example(ODD)
@given(pictures())
def test_label_studio_reads_back(picture):
    size, boxes = picture
    points = [Point(box.label, box.x1, box.y2) for box in boxes]
    labelled = Labelled("id", "a.jpg", size, boxes, points)
    task = through_json(label_studio.task_of(labelled, "/a.jpg", "m@1"))
    names = sorted({box.label for box in boxes})
    config = ElementTree.fromstring(label_studio.labeling_config(names, names))
    known = {
        (tag.tag.lower(), tag.get("name"), tag.get("toName"), label.get("value"))
        for tag in config
        for label in tag
    }
    assert config.find("Image").get("value") == "$image"
    assert task["data"] == {"image": "/a.jpg", "id": "id"}
    (prediction,) = task["predictions"]
    assert 0 <= prediction.get("score", 0) <= 1
    found, found_points = [], []
    for region in prediction["result"]:
        value = region["value"]
        (label,) = value[region["type"]]
        assert (region["type"], region["from_name"], region["to_name"], label) in known
        assert (region["original_width"], region["original_height"]) == (size.width, size.height)
        x, y = value["x"] * size.width / 100, value["y"] * size.height / 100
        if region["type"] == "keypointlabels":
            found_points.append(Point(label, x, y))
        else:
            x2 = (value["x"] + value["width"]) * size.width / 100
            y2 = (value["y"] + value["height"]) * size.height / 100
            found.append(Box(label, x, y, x2, y2, region.get("score")))
    assert_same(found, boxes, scores=True)
    assert [point.label for point in found_points] == [point.label for point in points]
    for one, other in zip(found_points, points, strict=True):
        assert (one.x, one.y) == pytest.approx((other.x, other.y), abs=0.01)
    assert len({region["id"] for region in prediction["result"]}) == 2 * len(boxes)


@examples(max_examples=40)
@example(ODD)
@given(pictures())
def test_fiftyone_reads_back(picture):
    size, boxes = picture
    found = []
    for entry in through_json([fiftyone.detection(box, size) for box in boxes]):
        x, y, width, height = entry["bounding_box"]
        x2, y2 = (x + width) * size.width, (y + height) * size.height
        found.append(
            Box(entry["label"], x * size.width, y * size.height, x2, y2, entry.get("confidence"))
        )
    assert_same(found, boxes, scores=True)


@examples(max_examples=40)
@example(ODD)
@given(pictures())
def test_hf_objects_read_back(picture):
    size, boxes = picture
    row = hf_objects.row_of(Labelled("id", "train/0/a.jpg", size, boxes))
    objects = through_json(row)["objects"]
    assert row["file_name"] == "0/a.jpg"
    found = [
        Box(label, x, y, x + width, y + height)
        for (x, y, width, height), label in zip(objects["bbox"], objects["categories"], strict=True)
    ]
    assert_same(found, [Box(b.label, b.x1, b.y1, b.x2, b.y2) for b in boxes])
    assert objects["scores"] == [box.score for box in boxes]


def filled_in(text: str, objects: dict) -> str:
    """As ms-swift fills the tags in for Qwen2.5-VL: pixels, rounded."""
    refs, boxes = iter(objects["ref"]), iter(objects["bbox"])
    replaced = re.sub("<bbox>", lambda _: str([round(v) for v in next(boxes)]), text)
    replaced = re.sub("<ref-object>", lambda _: next(refs), replaced)
    assert next(refs, None) is None
    assert next(boxes, None) is None
    return replaced


@examples(max_examples=40)
@example(ODD)
@given(pictures())
def test_ms_swift_reads_back(picture):
    _, boxes = picture
    points = [Point(box.label, box.x2, box.y1) for box in boxes]
    for as_json in (True, False):
        text = ms_swift.marked(boxes, points, as_json=as_json)
        objects = through_json({"ref": text.labels, "bbox": text.places})
        count = 2 * len(boxes)
        assert [text.count("<ref-object>"), text.count("<bbox>")] == [count, count]
        assert [len(objects["ref"]), len(objects["bbox"])] == [count, count]
        labels = [json.loads(f'"{ref}"') if as_json else ref for ref in objects["ref"]]
        places = zip(labels, objects["bbox"], strict=True)
        found = [Box(label, *place) for label, place in places if len(place) == 4]
        assert_same(found, [Box(b.label, b.x1, b.y1, b.x2, b.y2) for b in boxes])
        pairs = [place for place in objects["bbox"] if len(place) == 2]
        assert [tuple(pair) for pair in pairs] == [
            pytest.approx((point.x, point.y), abs=0.01) for point in points
        ]
        if as_json:
            answer = filled_in(text, objects)
            items = json.loads(answer.removeprefix("```json\n").removesuffix("\n```"))
            assert [item["label"] for item in items] == [p.label for p in (*boxes, *points)]


@examples(max_examples=40)
@given(pictures(), st.lists(LABELS, min_size=1, max_size=3), st.floats(0, 40))
def test_the_sieve_keeps_or_counts_every_box(picture, labels, least):
    size, boxes = picture
    try:
        rules = BoxRules.of(",".join(labels), None)
    except UsageError:  # none, or one twice
        rules = BoxRules()
    sieve = Sieve(BoxRules(rules.labels, least))
    kept = sieve.boxes(boxes, size)
    assert len(kept) + sum(sieve.dropped.values()) == len(boxes)
    for box in kept:
        assert not rules.labels or box.label in rules.labels
        short = min(box.x2 - box.x1, box.y2 - box.y1)
        if least >= 1:
            assert short >= least - 0.01


@given(st.text())
def test_a_category_is_a_line_that_xml_and_yaml_carry(label):
    name = name_of(label)
    assert name
    assert name == name_of(name)
    assert name.splitlines() == [name]
    config = ElementTree.fromstring(label_studio.labeling_config([name], []))
    assert config.find("RectangleLabels/Label").get("value") == name
    assert yaml.safe_load(yolo.data_yaml([name], {}))["names"] == {0: name}


def test_labels_are_taken_whatever_their_case_and_given_as_they_were_asked_for():
    sieve = Sieve(BoxRules.of("Person, car", None))
    image, edge = Size(10, 10), (1.0, 1.0, 4.0, 4.0)
    found = sieve.boxes([Box("car", *edge), Box("PERSON ", *edge), Box("", *edge)], image)
    assert [box.label for box in found] == ["car", "Person"]
    assert sieve.points([Point("Car", 1, 2), Point("bus", 1, 2)]) == [Point("car", 1, 2)]
    assert sieve.dropped == {"other_label": 2}
    assert [box.label for box in Sieve(BoxRules()).boxes([Box("", *edge)], image)] == [UNNAMED]


@pytest.mark.parametrize(("least", "kept"), [("5", 1), ("4", 2), ("0.2", 1), ("10%", 2), (None, 2)])
def test_small_boxes_are_left_out_by_pixels_or_by_their_share(least, kept):
    sieve = Sieve(BoxRules.of(None, least))
    boxes = [Box("a", 0, 0, 4, 40), Box("a", 0, 0, 8, 8)]
    assert len(sieve.boxes(boxes, Size(40, 40))) == kept
    assert sieve.dropped == ({"too_small": 2 - kept} if kept < 2 else {})


def test_a_box_of_no_thousandth_is_left_out():
    sieve = Sieve(BoxRules())
    assert sieve.boxes([Box("a", 9.99991, 0, 10, 5)], Size(10, 10)) == []
    assert sieve.dropped == {"too_small": 1}


@pytest.mark.parametrize("labels", ["", " , ", "a,b,A"])
def test_labels_that_make_no_sense_are_refused(labels):
    with pytest.raises(UsageError, match="--labels"):
        BoxRules.of(labels, None)


@pytest.mark.parametrize("least", ["big", "-1", "120%", "nan", "inf"])
def test_a_size_that_is_none_is_refused(least):
    with pytest.raises(UsageError, match="--min-box is no size"):
        BoxRules.of(None, least)
