"""Runs with boxes, exported by the command and read as each format's consumers read it."""

from __future__ import annotations

import importlib
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from tests.exports.boxed import COLOURS, GONE, TURNED, Boxed, boxed, colour_of
from tests.harness import echo, picture, vlmbatch, write_manifest
from vlmbatch.exports import FORMATS
from vlmbatch.exports.base import Format
from vlmbatch.exports.exporting import export
from vlmbatch.families import entry_named
from vlmbatch.grounding import Box, Point, Size
from vlmbatch.records import LoadedImage, TaskKind

Found = dict[str, list[Box]]
"""The boxes by the colour of the picture that they are about."""


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Boxed:
    """A run over a manifest that names its images."""
    return boxed(tmp_path_factory.mktemp("named") / "in")


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> Boxed:
    """The same over one that holds them, all under one name."""
    return boxed(tmp_path_factory.mktemp("inline") / "in", inline=True)


def exported(run: Boxed, place: Path, form: str, *options: str) -> dict[str, Any]:
    done = vlmbatch("export", run.folder, place, "--to", form, "--json", *options)
    assert done.exit_code == 0, done
    summary: dict[str, Any] = done.json
    assert summary["results"] == summary["exported"] + sum(summary["dropped"].values()) == 16
    return summary


def image_at(path: Path, size: Size) -> str:
    """Its colour; the pixels as any reader sees them, who may not know EXIF, have this size."""
    with Image.open(path) as image:
        assert image.size == (size.width, size.height)
        return colour_of(image)


# as consumers read them


def read_coco(place: Path, split: str = "train") -> Found:
    from pycocotools.coco import COCO

    coco = COCO(str(place / f"instances_{split}.json"))
    assert sorted(coco.getImgIds()) == list(range(1, len(coco.getImgIds()) + 1))
    assert sorted(coco.getAnnIds()) == list(range(1, len(coco.getAnnIds()) + 1))
    names = {each["id"]: each["name"] for each in coco.loadCats(coco.getCatIds())}
    assert list(names) == list(range(1, len(names) + 1))
    found: Found = {}
    for image in coco.loadImgs(coco.getImgIds()):
        size = Size(image["width"], image["height"])
        boxes = found.setdefault(image_at(place / image["file_name"], size), [])
        for entry in coco.loadAnns(coco.getAnnIds(imgIds=[image["id"]])):
            x, y, width, height = entry["bbox"]
            boxes.append(Box(names[entry["category_id"]], x, y, x + width, y + height))
    return found


def read_yolo(place: Path, split: str = "train") -> Found:
    """As ultralytics does: labels by the images' paths, data.yaml's folders relative to itself."""
    data = yaml.safe_load((place / "data.yaml").read_text())
    assert "path" not in data
    found: Found = {}
    for path in sorted((place / data[split]).iterdir()):
        with Image.open(path) as image:
            size = Size(*image.size)
        boxes = found.setdefault(image_at(path, size), [])
        label = Path(str(path).replace("/images/", "/labels/")).with_suffix(".txt")
        assert not label.exists() or label.stat().st_size
        for line in label.read_text().splitlines() if label.exists() else []:
            category, *numbers = line.split()
            xc, yc, width, height = map(float, numbers)
            x1, x2 = (xc - width / 2) * size.width, (xc + width / 2) * size.width
            y1, y2 = (yc - height / 2) * size.height, (yc + height / 2) * size.height
            boxes.append(Box(data["names"][int(category)], x1, y1, x2, y2))
    return found


def regions_of(task: dict[str, Any]) -> list[tuple[str, list[float]]]:
    """Of a Label Studio task: label and edges in pixels, or the point."""
    found = []
    for region in task["predictions"][0]["result"]:
        value, width, height = region["value"], region["original_width"], region["original_height"]
        x, y = value["x"] * width / 100, value["y"] * height / 100
        (label,) = value[region["type"]]
        if region["type"] == "keypointlabels":
            found.append((label, [x, y]))
        else:
            right = (value["x"] + value["width"]) * width / 100
            found.append((label, [x, y, right, (value["y"] + value["height"]) * height / 100]))
    return found


def tasks_of(place: Path, split: str = "train") -> list[tuple[Path, dict[str, Any]]]:
    """Label Studio's tasks, with the file that each address stands for."""
    tasks = json.loads((place / f"tasks_{split}.json").read_text())
    start = "/data/local-files/?d="
    assert all(task["data"]["image"].startswith(start) for task in tasks)
    return [
        (Path("/" + unquote(task["data"]["image"].removeprefix(start))), task) for task in tasks
    ]


def read_label_studio(place: Path, split: str = "train") -> Found:
    return {
        colour_of(path): [
            Box(label, *place) for label, place in regions_of(task) if len(place) == 4
        ]
        for path, task in tasks_of(place, split)
    }


def read_fiftyone(place: Path, split: str = "train") -> Found:
    """As its importer does: names are paths below data/, without their ending."""
    labels = json.loads((place / split / "labels.json").read_text())
    data = place / split / "data"
    paths = {str(p.relative_to(data).with_suffix("")): p for p in data.rglob("*") if p.is_file()}
    found: Found = {}
    for name, entries in labels["labels"].items():
        path = Path(name) if os.path.isabs(name) else paths.pop(name)
        with Image.open(path) as image:
            width, height = image.size
        boxes = found.setdefault(colour_of(path), [])
        for entry in entries:
            assert entry["label"] in labels["classes"]
            x, y, w, h = entry["bounding_box"]
            boxes.append(
                Box(entry["label"], x * width, y * height, (x + w) * width, (y + h) * height)
            )
    assert not paths
    return found


def read_hf_objects(place: Path, split: str = "train") -> Found:
    import datasets

    cache = str(place.parent / f"{place.name}-cache")
    split = "validation" if split == "val" else split  # whatever its folder is called
    rows = datasets.load_dataset("imagefolder", data_dir=str(place), split=split, cache_dir=cache)
    found: Found = {}
    for row in rows:
        assert row["image"].size == (row["width"], row["height"])
        objects = row["objects"]
        with row["image"] as image:
            colour = colour_of(image)
        found[colour] = [
            Box(label, x, y, x + width, y + height)
            for (x, y, width, height), label in zip(
                objects["bbox"], objects["categories"], strict=True
            )
        ]
    return found


READERS: dict[str, Callable[..., Found]] = {
    "coco": read_coco,
    "yolo": read_yolo,
    "label-studio": read_label_studio,
    "fiftyone": read_fiftyone,
    "hf-objects": read_hf_objects,
}


def assert_same(found: Found, wanted: Found) -> None:
    assert set(found) == set(wanted)
    for colour, boxes in wanted.items():
        assert [box.label for box in found[colour]] == [box.label for box in boxes]
        for one, other in zip(found[colour], boxes, strict=True):
            assert (one.x1, one.y1, one.x2, one.y2) == pytest.approx(
                (other.x1, other.y1, other.x2, other.y2), abs=0.01
            )


@pytest.mark.parametrize("form", READERS)
def test_every_box_is_about_the_same_pixels(form: str, named: Boxed, tmp_path: Path) -> None:
    summary = exported(named, tmp_path / "out", form)
    assert_same(READERS[form](tmp_path / "out"), named.boxes)
    assert summary["dropped"]["failed"] == 2
    assert summary["images"] == {"copied": 7, "made_anew": 2 if form == "yolo" else 1}
    points = {"exported": 8} if form == "label-studio" else {"exported": 7, "points_left_out": 1}
    assert summary["boxes"] == points
    again = exported(named, tmp_path / "out", form)
    assert again["pieces_resumed"] == again["pieces"] == 3
    assert (again["boxes"], again["records"]) == (summary["boxes"], summary["records"])


@pytest.mark.parametrize("form", READERS)
def test_images_in_the_manifest_are_one_each_whatever_their_names(
    form: str, inline: Boxed, tmp_path: Path
) -> None:
    """The two rows about one picture cannot be known to be about one."""
    exported(inline, tmp_path / "out", form)
    if form == "coco":
        content = json.loads((tmp_path / "out" / "instances_train.json").read_text())
        assert len(content["images"]) == 7
    if form in ("coco", "yolo"):  # whose readers add up what is about one colour
        assert_same(READERS[form](tmp_path / "out"), inline.boxes)


@pytest.mark.parametrize("form", ["coco", "fiftyone", "label-studio"])
def test_named_images_stay_where_they_are_but_for_turned_ones(
    form: str, named: Boxed, tmp_path: Path
) -> None:
    summary = exported(named, tmp_path / "out", form, "--images", "reference")
    assert summary["images"] == {"referenced": 6, "copied": 1, "made_anew": 1}
    assert_same(READERS[form](tmp_path / "out"), named.boxes)
    (copy,) = [p for p in (tmp_path / "out").rglob("*") if p.suffix in (".jpg", ".png", ".gif")]
    assert colour_of(copy) == COLOURS[TURNED]


@pytest.mark.parametrize("form", ["llava", "sharegpt", "axolotl", "jsonl"])
def test_trainers_that_do_not_know_exif_get_turned_images_upright(
    form: str, named: Boxed, tmp_path: Path
) -> None:
    summary = exported(named, tmp_path / "out", form)
    assert summary["images"] == {"referenced": 6, "copied": 1, "made_anew": 1}
    text = (tmp_path / "out" / f"train.json{'' if form == 'llava' else 'l'}").read_text()
    lines = json.loads(text) if form == "llava" else list(map(json.loads, text.splitlines()))
    (path,) = {
        line["image"]
        if form == "llava"
        else line["messages"][0]["content"][0]["path"]
        if form == "axolotl"
        else line["images"][0]
        for line in lines
        if line["id"] == f"id-{TURNED}"
    }
    with Image.open(tmp_path / "out" / path) as image:
        assert image.size == (30, 40)
        assert colour_of(image) == COLOURS[TURNED]


@pytest.mark.parametrize("form", READERS)
def test_splits_share_the_categories_and_divide_the_images(
    form: str, named: Boxed, tmp_path: Path
) -> None:
    exported(named, tmp_path / "out", form, "--split", "train=0.5,val=0.5")
    train, val = (READERS[form](tmp_path / "out", split) for split in ("train", "val"))
    assert train
    assert val
    assert not set(train) & set(val)
    assert_same({**train, **val}, named.boxes)
    if form == "coco":
        contents = [
            json.loads((tmp_path / "out" / f"instances_{split}.json").read_text())["categories"]
            for split in ("train", "val")
        ]
        assert contents[0] == contents[1]


RULES = ["--labels", "dog,CAT,bus", "--min-box", "1.1"]


@pytest.mark.parametrize(
    ("form", "key", "none"),
    [
        ("ms-swift", "messages", "```json\n[]\n```"),
        ("qwen-vl", "conversations", "```json\n[]\n```"),
    ],
)
def test_an_answer_without_any_box_left_is_no_answer(
    form: str, key: str, none: str, named: Boxed, tmp_path: Path
) -> None:
    """ "Where is the tree?" is not answered by "nowhere" for want of the label."""
    summary = exported(named, tmp_path / "out", form, *RULES)
    assert summary["dropped"] == {"failed": 2, "boxes_left_out": 4}
    assert summary["boxes"] == {"exported": 2, "other_label": 1}
    lines = [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    assert [len(line[key]) for line in lines] == [4, 2, 4, 2, 4, 2, 2]  # 2: the caption alone
    empty = [row for row, line in enumerate(lines) if none in line[key][-1].values()]
    assert empty == [4]  # in which there was nothing


@pytest.mark.parametrize("form", READERS)
def test_labels_and_sizes_choose_boxes(form: str, named: Boxed, tmp_path: Path) -> None:
    summary = exported(named, tmp_path / "out", form, *RULES)
    points = 1 if form == "label-studio" else 0  # it is no cat
    assert summary["boxes"]["other_label"] == 3 + points
    assert summary["boxes"]["too_small"] == 2  # of one pixel, and as the one about 1.02 wide
    assert summary["boxes"]["exported"] == 2
    found = READERS[form](tmp_path / "out")
    kept = [(box.label, colour) for colour, boxes in found.items() for box in boxes]
    assert kept == [("CAT", "#ff0000"), ("dog", "#ff0000")]
    if form == "coco":
        content = json.loads((tmp_path / "out" / "instances_train.json").read_text())
        assert [each["name"] for each in content["categories"]] == ["dog", "CAT", "bus"]
    if form == "yolo":
        names = yaml.safe_load((tmp_path / "out" / "data.yaml").read_text())["names"]
        assert names == {0: "dog", 1: "CAT", 2: "bus"}


@pytest.mark.parametrize("form", READERS)
def test_an_export_that_ended_while_it_joined_its_pieces_goes_on_to_the_same_files(
    form: str, named: Boxed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy made for a second row about an image is gone by then."""
    exported(named, tmp_path / "whole", form)
    module = importlib.import_module(f"vlmbatch.exports.{FORMATS[form]}")
    with monkeypatch.context() as patch:
        patch.setattr(module, "FORMAT", dying(module.FORMAT))
        with pytest.raises(Died):
            export(str(named.folder), str(tmp_path / "out"), form)
    summary = exported(named, tmp_path / "out", form)
    assert summary["pieces_resumed"] == 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


class Died(Exception):
    pass


def dying(kind: type[Format]) -> type[Format]:
    """The format, but it dies when it has joined all pieces, before anybody notes that."""

    def finish(self: Format) -> None:
        kind.finish(self)
        raise Died

    return type(kind.__name__, (kind,), {"finish": finish})


def contents(place: Path) -> dict[str, bytes]:
    files = [path for path in place.rglob("*") if path.is_file() and "__vlmbatch" not in path.parts]
    here = str(place)[1:].encode()  # Label Studio's tasks say where the folder is
    return {str(path.relative_to(place)): path.read_bytes().replace(here, b"") for path in files}


def test_coco_has_the_captions_in_a_file_of_their_own(named: Boxed, tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    summary = exported(named, tmp_path / "out", "coco")
    assert summary["dropped"] == {"failed": 2}
    coco = COCO(str(tmp_path / "out" / "captions_train.json"))
    found = {
        colour_of(tmp_path / "out" / image["file_name"]): [
            each["caption"] for each in coco.loadAnns(coco.getAnnIds(imgIds=[image["id"]]))
        ]
        for image in coco.loadImgs(coco.getImgIds())
    }
    wanted: dict[str, list[str]] = {}
    for row in range(len(COLOURS)):
        if row != GONE:
            wanted.setdefault(COLOURS[row], []).append(f"caption {row}.")
    assert found == wanted
    (image,) = coco.loadImgs([1])
    assert image["licence"] == "cc0"


def test_label_studio_has_points_and_a_configuration_for_all_labels(
    named: Boxed, tmp_path: Path
) -> None:
    exported(named, tmp_path / "out", "label-studio")
    config = ElementTree.parse(tmp_path / "out" / "labeling_config.xml")
    labels = {tag: [e.get("value") for e in config.findall(f"{tag}/Label")] for tag in TAGS}
    assert labels["RectangleLabels"] == sorted({b.label for bs in named.boxes.values() for b in bs})
    assert labels["KeyPointLabels"] == ["nose"]
    found: dict[str, list[Point]] = {}
    for path, task in tasks_of(tmp_path / "out"):
        assert task["data"]["licence"] == "cc0"
        assert task["predictions"][0]["model_version"] == "echo"
        for label, place in regions_of(task):
            if len(place) == 2:
                found.setdefault(colour_of(path), []).append(Point(label, *place))
    assert found == {
        colour: [
            Point(p.label, pytest.approx(p.x, abs=0.01), pytest.approx(p.y, abs=0.01))
            for p in points
        ]
        for colour, points in named.points.items()
    }


TAGS = ("RectangleLabels", "KeyPointLabels")


def test_label_studio_finds_files_below_its_document_root(named: Boxed, tmp_path: Path) -> None:
    root = named.manifest.parent / "photos"
    args = ["--images=reference", f"--format-arg=document_root={root}"]
    args += ["--format-arg=prefix=https://pictures.example/?at="]
    summary = exported(named, tmp_path / "out", "label-studio", *args)
    tasks = json.loads((tmp_path / "out" / "tasks_train.json").read_text())
    assert [task["data"]["image"] for task in tasks] == [
        "https://pictures.example/?at=sub/one.png",
        "https://pictures.example/?at=a%20b.png",  # its last row comes later
        "https://pictures.example/?at=none.png",
        "https://pictures.example/?at=moving.gif",
        "https://pictures.example/?at=one.png",
    ]
    assert summary["dropped"]["outside_the_document_root"] == 1  # the turned one, copied
    bad = ["--format-arg=document_root=photos"]
    done = vlmbatch("export", named.folder, tmp_path / "x", "--to", "label-studio", *bad)
    assert done.exit_code == 2
    assert "document_root=photos is no absolute path" in done.stderr


def answers(place: Path, key: str, speaker: str, model: str, text: str) -> list[tuple[Any, str]]:
    """Of lines of conversations: each, and the last answer in it."""
    lines = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    assert all(line[key][-1][speaker] == model for line in lines)
    return [(line, line[key][-1][text]) for line in lines]


def test_ms_swift_fills_the_tags_in_as_the_model_said_it(named: Boxed, tmp_path: Path) -> None:
    exported(named, tmp_path / "out", "ms-swift")
    raw = [row["raw"] for row in named.rows if row["task"] == "detect"]
    found = answers(tmp_path / "out", "messages", "role", "assistant", "content")
    for (line, text), said in zip(found, raw, strict=True):
        (path,) = line["images"]
        assert os.path.isabs(path)
        with Image.open(path) as image:
            width, height = image.size
        for place in line["objects"]["bbox"]:  # 0 to 1000, as ms-swift's template for Qwen3-VL
            sizes = (width, height) * (len(place) // 2)
            steps = [round(v / size * 1000) for v, size in zip(place, sizes, strict=True)]
            text = text.replace("<bbox>", str(steps), 1)
        for label in line["objects"]["ref"]:
            text = text.replace("<ref-object>", label, 1)
        fence = re.compile(r"^```json\n|\n```$")
        assert json.loads(fence.sub("", text)) == json.loads(fence.sub("", said))
        assert [m["role"] for m in line["messages"]] == ["user", "assistant"] * 2
        assert line["messages"][0]["content"].startswith("<image>")
        assert "".join(m["content"] for m in line["messages"]).count("<image>") == 1
        assert line["licence"] == "cc0"


def test_ms_swift_has_tags_of_its_own_for_models_without_json(named: Boxed, tmp_path: Path) -> None:
    exported(named, tmp_path / "out", "ms-swift", "--for-model", "internvl")
    found = answers(tmp_path / "out", "messages", "role", "assistant", "content")
    assert found[0][1] == "<ref-object><bbox><ref-object><bbox>"
    assert found[0][0]["objects"]["ref"] == [box.label for box in named.boxes[COLOURS[0]][:2]]
    assert found[4][1] == "There are none."


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwens_own_training_gets_the_space_of_each_qwen(
    family: str, named: Boxed, tmp_path: Path
) -> None:
    """Read back by the family, of an image as large as its processor makes it in training."""
    summary = exported(
        named,
        tmp_path / "out",
        "qwen-vl",
        f"--for-model={family}",
        "--format-arg=max_pixels=100352",
        "--format-arg=min_pixels=784",
        "--system=Be exact.",
    )
    config = {"preprocessor": {"max_pixels": 100352, "min_pixels": 784}}
    reader = entry_named(family).make(config)
    found: Found = {}
    for line, text in answers(tmp_path / "out", "conversations", "from", "gpt", "value"):
        with Image.open(tmp_path / "out" / line["image"]) as image:
            size, colour = Size(*image.size), colour_of(image)
        assert [turn["from"] for turn in line["conversations"]] == ["human", "gpt"] * 2
        assert line["conversations"][0]["value"].startswith("<image>\nBe exact.\n")
        image = LoadedImage.of_size(size, size)
        answer = reader.read(TaskKind.DETECT, text, labels=("x",), image=image)
        found.setdefault(colour, []).extend(answer.boxes or ())
        seen = reader.seen(size) if family == "qwen2_5_vl" else Size(1000, 1000)
        steps = (size.width / seen.width, size.height / seen.height)
        done = len(found[colour]) - len(answer.boxes or ())
        for one, other in zip(answer.boxes or (), named.boxes[colour][done:], strict=False):
            assert one.label == other.label
            assert (one.x1, one.x2) == pytest.approx((other.x1, other.x2), abs=1.01 * steps[0])
            assert (one.y1, one.y2) == pytest.approx((other.y1, other.y2), abs=1.01 * steps[1])
    assert {colour: len(boxes) for colour, boxes in found.items()} == {
        colour: len(boxes) for colour, boxes in named.boxes.items()
    }
    assert summary["boxes"] == {"exported": 7, "points_left_out": 1}


@pytest.mark.parametrize(
    ("form", "options", "said"),
    [
        ("qwen-vl", ["--for-model=internvl"], "the family internvl is no Qwen-VL"),
        ("qwen-vl", ["--format-arg=max_pixels=many"], "max_pixels=many is no number of pixels"),
        ("coco", ["--labels=,"], "--labels names nothing"),
        ("coco", ["--min-box=big"], "--min-box is no size: 'big'"),
        ("yolo", ["--images=reference"], "the format yolo does not reference images"),
        ("trl", ["--labels=cat"], "the format trl has no setting 'labels'"),
        ("trl", ["--format-arg=completion=yes"], "completion=yes is neither true nor false"),
        ("webdataset", ["--format-arg=shard_rows=few"], "shard_rows=few is no number of rows"),
        ("captions", ["--format-arg=extension=../x.txt"], "extension=../x.txt is no ending"),
        ("captions", ["--format-arg=extension="], "extension= is no ending"),
        ("captions", ["--format-arg=extension=.PNG"], "extension=.PNG is one of images"),
        ("captions", ["--format-arg=prefix=a\nb"], "the prefix has several lines"),
        ("captions", ["--format-arg=existing=no"], "existing=no is neither skip nor overwrite"),
        ("sharegpt", ["--format-arg=name=a,b"], "name=a,b is no name of a data set"),
        ("qwen-vl", ["--format-arg=max_pixels=1"], "min_pixels=12544 is more than max_pixels=1"),
        ("coco", ["--split=__vlmbatch=1"], "is no NAME=SHARE"),
        ("yolo", ["--split=learn=0.5,val=0.5"], "cannot tell the splits learn, val apart"),
        ("trl", ["--split=train=0.5,holdout=0.5"], "cannot tell the splits train, holdout apart"),
        ("imagefolder", ["--split=val=0.5,dev=0.5"], "cannot tell the splits val, dev apart"),
        ("coco", ["--where="], "--where says nothing"),
        ("jsonl", ["--min-chars=9", "--max-chars=8"], "no text has 9 characters or more and 8"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    form: str, options: list[str], said: str, named: Boxed, tmp_path: Path
) -> None:
    done = vlmbatch("export", named.folder, tmp_path / "out", "--to", form, *options)
    assert done.exit_code == 2, done
    assert said in done.stderr
    assert "->" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["captions", "imagefolder", "webdataset"])
def test_boxes_are_no_answers_where_only_texts_are(form: str, named: Boxed, tmp_path: Path) -> None:
    summary = exported(named, tmp_path / "out", form)
    assert summary["dropped"] == {"failed": 2, "no_text": 7}
    assert summary["exported"] == summary["records"]["train"] == 7


@pytest.fixture(scope="module")
def pointed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions, and a box, a point, and nothing in three pictures."""
    place = tmp_path_factory.mktemp("pointed")
    found = [
        [{"bbox_2d": [0, 0, 500, 500], "label": "a"}],
        [{"point_2d": [9, 9], "label": "a"}],
        [],
    ]
    replies = [[f"caption {i}.", json.dumps(each)] for i, each in enumerate(found)]
    pictures = [picture(40, 30, colour) for colour in ("red", "green", "blue")]
    manifest = write_manifest(place / "m.parquet", {"image": pictures, "reply": replies})
    run = vlmbatch(
        *("run", manifest, "-t", "caption", "-t", "detect", "--labels=a", "--family=qwen3_vl"),
        *(*echo(reply_from="reply"), "-o", place / "out"),
    )
    assert run.exit_code == 0, run
    return place / "out"


@pytest.mark.parametrize("form", READERS)
def test_an_image_with_points_alone_is_not_taken_for_empty(
    form: str, pointed: Path, tmp_path: Path
) -> None:
    done = vlmbatch("export", pointed, tmp_path / "out", "--to", form, "--json")
    assert done.exit_code == 0, done
    points = {} if form == "label-studio" else {"points": 1}
    captions = {} if form == "coco" else {"no_boxes": 3}
    assert done.json["dropped"] == {**points, **captions}
    if form == "coco":
        content = json.loads((tmp_path / "out/instances_train.json").read_text())
        assert [image["id"] for image in content["images"]] == [1, 2]
        content = json.loads((tmp_path / "out/captions_train.json").read_text())
        assert len(content["images"]) == 3
    elif form == "yolo":
        assert len(list((tmp_path / "out/images/train").iterdir())) == 2


def test_metadata_of_hf_objects_has_its_types_without_any_box(named: Boxed, tmp_path: Path) -> None:
    exported(named, tmp_path / "out", "hf-objects", "--labels", "bus")
    table = pq.read_table(tmp_path / "out" / "train" / "metadata.parquet")
    assert str(table.schema.field("objects").type).startswith("struct<bbox: list<element: list<")
    assert all(not boxes for boxes in read_hf_objects(tmp_path / "out").values())
