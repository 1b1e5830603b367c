"""Every format, from every kind of manifest, read again as its consumers read it."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pytest
import yaml

from tests.exports import outputs
from tests.exports.outputs import COLOURS, ROWS, TASKS, Finished, answered, box_text, colour_of
from tests.harness import vlmbatch
from tests.s3 import S3Server
from vlmbatch.exports import FORMATS
from vlmbatch.exports.base import ImageMode, plain_type, with_features
from vlmbatch.exports.own import format_named
from vlmbatch.exports.trl import IMAGE

Found = dict[str, tuple[list[str], list[str]]]
"""By id: the colours of the images, and the answers: texts, and boxes as ``box_text`` has them."""
KINDS = ("paths", "inline", "pairs", "s3")


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server
) -> Iterator[dict[str, Finished]]:
    """A finished run over each kind of manifest."""
    place = tmp_path_factory.mktemp("outputs")
    with s3_server.in_environment():
        manifests: dict[str, Path | str] = {
            "paths": outputs.paths(place / "paths"),
            "inline": outputs.inline(place / "inline"),
            "pairs": outputs.some_pairs(place / "pairs"),
            "s3": outputs.on_s3(place / "s3", s3_server.fs(), "exports"),
        }
        yield {
            kind: Finished(answered(manifest, place / f"{kind}-out", boxes=True), kind == "pairs")
            for kind, manifest in manifests.items()
        }


def exported(output: Finished, place: Path, form: str, *options: str) -> dict[str, Any]:
    """The summary, which adds up."""
    done = vlmbatch("export", output.folder, place, "--to", form, "--json", *options)
    assert done.exit_code == 0, done
    summary: dict[str, Any] = done.json
    assert summary["results"] == len(TASKS) * ROWS
    assert summary["results"] == summary["exported"] + sum(summary["dropped"].values())
    assert summary["pieces"] == 2
    return summary


# as consumers read them


def loaded(kind: str, place: Path, **where: Any) -> Any:
    """By ``datasets``, in a cache of its own."""
    import datasets

    if where:
        where = {"data_files": {"train": str(place / where["data_files"])}}
    else:
        where = {"data_dir": str(place)}
    cache = str(place.parent / f"{place.name}-cache")
    return datasets.load_dataset(kind, split="train", cache_dir=cache, **where)


def said(messages: list[dict[str, Any]]) -> list[str]:
    """What the assistant says, after the right questions."""
    roles = [message["role"] for message in messages]
    assert roles == ["user", "assistant"] * (len(roles) // 2)
    return [str(message["content"]) for message in messages[1::2]]


def read_trl(place: Path) -> Found:
    return {
        row["id"]: ([colour_of(image) for image in row["images"]], said(row["messages"]))
        for row in loaded("parquet", place)
    }


def read_hub(place: Path) -> Found:
    import datasets

    cache = str(place.parent / "hub-cache")
    rows = datasets.load_dataset(str(place), split="train", cache_dir=cache)
    return {
        row["id"]: ([colour_of(image) for image in row["images"]], said(row["messages"]))
        for row in rows
    }


def image_at(place: Path, name: str) -> str:
    """Its colour; the name is as an export of local files or addresses has it."""
    if name.startswith("s3://"):
        import fsspec

        with fsspec.open(name, "rb") as opened:
            return colour_of(opened.read())
    return colour_of((place / name).read_bytes())


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_sharegpt(place: Path) -> Found:
    entry = json.loads((place / "dataset_info.json").read_text())["vlmbatch"]
    found = {}
    for row in loaded("json", place, data_files=entry["file_name"]):
        text = "".join(message["content"] for message in row["messages"])
        assert text.count("<image>") == len(row["images"])
        images = [image_at(place, name) for name in row["images"]]
        found[row["id"]] = images, said(row["messages"])
    return found


def read_axolotl(place: Path) -> Found:
    found = {}
    for row in loaded("json", place, data_files="train.jsonl"):
        user = row["messages"][0]["content"]
        images = [colour_of(Path(part["path"]).read_bytes()) for part in user if part.get("path")]
        assert [part["type"] for part in user] == [*["image"] * len(images), "text"]
        texts = [message["content"][0]["text"] for message in row["messages"][1::2]]
        found[row["id"]] = images, texts
    return found


def read_llava(place: Path) -> Found:
    found = {}
    for row in json.loads((place / "train.json").read_text()):
        turns = row["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * 2
        assert turns[0]["value"].startswith("<image>\n")
        assert sum(turn["value"].count("<image>") for turn in turns) == 1
        found[row["id"]] = [image_at(place, row["image"])], [turn["value"] for turn in turns[1::2]]
    return found


def read_jsonl(place: Path) -> Found:
    found: Found = {}
    for row in loaded("json", place, data_files="train.jsonl"):
        images = [image_at(place, name) for name in row["images"]]
        texts = found.setdefault(row["id"], (images, []))[1]
        boxes = [
            box_text(b["label"], b["x1"], b["y1"], b["x2"], b["y2"]) for b in row["boxes"] or ()
        ]
        texts += boxes or [row["text"]]
    return found


def read_captions(place: Path) -> Found:
    """Wherever the images are."""
    found = {}
    for row in lines_of(place / "carried_train.jsonl"):
        texts = (place / row["file_name"]).with_suffix(".txt").read_text().splitlines()
        found[row["id"]] = [image_at(place, row["file_name"])], texts
    return found


def read_imagefolder(place: Path) -> Found:
    found = {}
    for row in loaded("imagefolder", place):
        images = row["images"] if "images" in row else [row["image"]]
        texts = [answer["text"] for answer in row["answers"]]
        assert row["text"] == texts[0]
        found[row["id"]] = [colour_of(image) for image in images], texts
    return found


def read_webdataset(place: Path) -> Found:
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(place.glob("train-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                samples.setdefault(key, {})[ending] = file.read()
    found = {}
    for files in samples.values():
        about = json.loads(files["json"])
        images = [colour_of(files[name]) for name in sorted(files) if name.endswith("png")]
        texts = [answer["text"] for answer in about["answers"]]
        assert files["txt"].decode() == texts[0]
        found[about["id"]] = images, texts
    return found


def by_colour(found: dict[str, list[str]]) -> Found:
    """Of formats that do not tell ids: those of the rows with images of these colours."""
    return {f"id-{COLOURS.index(colour)}": ([colour], said) for colour, said in found.items()}


def read_coco(place: Path) -> Found:
    captions, boxes = (
        json.loads((place / f"{name}_train.json").read_text()) for name in ("captions", "instances")
    )
    names = {each["id"]: each["name"] for each in boxes["categories"]}
    found: dict[str, list[str]] = {}
    for content in (captions, boxes):
        colours = {each["id"]: image_at(place, each["file_name"]) for each in content["images"]}
        assert len(set(colours.values())) == len(colours)
        for each in content["annotations"]:
            said = found.setdefault(colours[each["image_id"]], [])
            if "caption" in each:
                said.append(each["caption"])
            else:
                x, y, width, height = each["bbox"]
                said.append(box_text(names[each["category_id"]], x, y, x + width, y + height))
    return by_colour(found)


def read_yolo(place: Path) -> Found:
    names = yaml.safe_load((place / "data.yaml").read_text())["names"]
    found = {}
    for image in (place / "images/train").iterdir():
        label = place / f"labels/train/{image.stem}.txt"
        said = []
        for line in label.read_text().splitlines():
            category, *shares = line.split()
            x, y, w, h = map(float, shares)
            edges = (12 * (x - w / 2), 8 * (y - h / 2), 12 * (x + w / 2), 8 * (y + h / 2))
            said.append(box_text(names[int(category)], *map(abs, edges)))
        found[colour_of(image.read_bytes())] = said
    return by_colour(found)


def read_label_studio(place: Path) -> Found:
    found: Found = {}
    for task in json.loads((place / "tasks_train.json").read_text()):
        name = unquote(task["data"]["image"].removeprefix("/data/local-files/?d="))
        said = []
        for region in task["predictions"][0]["result"]:
            v = region["value"]
            edges = (v["x"], v["y"], v["x"] + v["width"], v["y"] + v["height"])
            sizes = (12, 8, 12, 8)
            places = [edge * size / 100 for edge, size in zip(edges, sizes, strict=True)]
            said.append(box_text(v["rectanglelabels"][0], *places))
        image = name if name.startswith("s3://") else f"/{name}"
        found[task["data"]["id"]] = [image_at(place, image)], said
    return found


def read_fiftyone(place: Path) -> Found:
    labels = json.loads((place / "train/labels.json").read_text())["labels"]
    data = place / "train/data"
    copies = {str(path.relative_to(data).with_suffix("")): path for path in data.rglob("*.png")}
    assert set(copies) <= set(labels)
    found = {}
    for name, entries in labels.items():
        shares = [(each["label"], *each["bounding_box"]) for each in entries]
        said = [
            box_text(label, 12 * x, 8 * y, 12 * (x + w), 8 * (y + h))
            for label, x, y, w, h in shares
        ]
        found[colour_of(copies.get(name, Path(name)).read_bytes())] = said
    return by_colour(found)


def read_hf_objects(place: Path) -> Found:
    found = {}
    for row in loaded("imagefolder", place):
        boxes = zip(row["objects"]["categories"], row["objects"]["bbox"], strict=True)
        said = [box_text(label, x, y, x + w, y + h) for label, (x, y, w, h) in boxes]
        found[row["id"]] = [colour_of(row["image"])], said
    return found


def read_ms_swift(place: Path) -> Found:
    found = {}
    for row in lines_of(place / "train.jsonl"):
        contents = [message["content"] for message in row["messages"]]
        images = [image_at(place, name) for name in row["images"]]
        assert contents[0].startswith("<image>" * len(images))
        assert "".join(contents).count("<image>") == len(images)
        said = contents[1::2]
        if row["objects"]["bbox"]:
            assert said.pop().count("<bbox>") == 1
            (label,), (edges,) = row["objects"]["ref"], row["objects"]["bbox"]
            said.append(box_text(label, *edges))
        found[f"id-{COLOURS.index(images[0])}"] = images, said
    return found


def read_qwen_vl(place: Path) -> Found:
    found = {}
    for row in lines_of(place / "train.jsonl"):
        names = row["image"] if isinstance(row["image"], list) else [row["image"]]
        turns = [turn["value"] for turn in row["conversations"]]
        assert turns[0].startswith("<image>\n" * len(names))
        assert "".join(turns).count("<image>") == len(names)
        said = turns[1::2]
        if said[-1].startswith("```json"):
            (box,) = json.loads(said.pop().removeprefix("```json\n").removesuffix("\n```"))
            x1, y1, x2, y2 = box["bbox_2d"]  # in thousandths, as a Qwen3-VL says it
            edges = (x1 * 0.012, y1 * 0.008, x2 * 0.012, y2 * 0.008)
            said.append(box_text(box["label"], *edges))
        found[row["id"]] = [image_at(place, name) for name in names], said
    return found


@dataclass(frozen=True)
class Reader:
    """How a format is read; which tasks' answers it has, the others' are left out for ``others``.
    Formats without a place for a second image leave out rows that have one."""

    read: Callable[[Path], Found]
    tasks: tuple[str, ...] = ("caption", "vqa")
    others: str = "where"
    one_image: bool = False
    options: tuple[str, ...] = ("--where", "task <> 'detect'")


def of_boxes(read: Callable[[Path], Found], *more: str) -> Reader:
    """One image each, ``more`` tasks than detect."""
    return Reader(read, (*more, "detect"), "no_boxes", one_image=True, options=())


def of_all(read: Callable[[Path], Found]) -> Reader:
    return Reader(read, TASKS, options=())


BESIDE = ("--format-arg", "existing=overwrite", "--where", "task <> 'detect'")
READERS: dict[str, Reader] = {
    "trl": Reader(read_trl),
    "hub": Reader(read_hub),
    "sharegpt": Reader(read_sharegpt),
    "axolotl": Reader(read_axolotl),
    "llava": Reader(read_llava, one_image=True),
    "jsonl": of_all(read_jsonl),
    "captions": Reader(read_captions, one_image=True, options=BESIDE),
    "imagefolder": Reader(read_imagefolder),
    "webdataset": Reader(read_webdataset),
    "coco": of_boxes(read_coco, "caption"),
    "yolo": of_boxes(read_yolo),
    "label-studio": of_boxes(read_label_studio),
    "fiftyone": of_boxes(read_fiftyone),
    "hf-objects": of_boxes(read_hf_objects),
    "ms-swift": of_all(read_ms_swift),
    "qwen-vl": of_all(read_qwen_vl),
}
MODES = [(form, mode) for form in READERS for mode in format_named(form).images]


def test_every_format_is_read_here() -> None:
    assert set(READERS) == set(FORMATS)


def wanted(reader: Reader, output: Finished) -> tuple[Found, Counter[str]]:
    """What a format has of an output, and how many answers it has not, by reason."""
    found: Found = {}
    dropped: Counter[str] = Counter()
    for row in range(ROWS):
        answers, colours = output.answers(row), output.colours(row)
        dropped["failed"] += len(TASKS) - len(answers)
        held = [text for task, text in answers.items() if task in reader.tasks]
        dropped[reader.others] += len(answers) - len(held)
        if len(colours) > 1 and reader.one_image:
            dropped["several_images"] += len(held)
        elif held:
            found[f"id-{row}"] = colours, held
    return found, +dropped


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("form", "mode"), MODES)
def test_what_is_exported_is_what_was_answered(
    form: str, mode: ImageMode, kind: str, finished: dict[str, Finished], tmp_path: Path
) -> None:
    """However the manifest has its images, and the export; what has no place there is counted."""
    output, reader, place = finished[kind], READERS[form], tmp_path / "export"
    summary = exported(output, place, form, "--images", mode, *reader.options)
    found, dropped = wanted(reader, output)
    assert reader.read(place) == found
    assert summary["dropped"] == dropped
    images = sum(len(colours) for colours, _ in found.values())
    assert sum(summary["images"].values()) == images
    if mode is ImageMode.REFERENCE:
        opens = kind in ("paths", "pairs") or (kind == "s3" and format_named(form).opens_addresses)
        assert summary["images"] == {"referenced" if opens else "copied": images}
    else:
        assert summary["images"] == {"copied" if mode is ImageMode.COPY else "embedded": images}


KINDS_OF_COLUMNS = [
    *(pa.string(), pa.large_string(), pa.binary(), pa.bool_(), pa.int8(), pa.uint64()),
    *(pa.float16(), pa.float32(), pa.float64(), pa.date32(), pa.timestamp("us", tz="UTC")),
    *(pa.time64("us"), pa.duration("s"), pa.decimal128(10, 2), pa.null()),
    *(pa.list_(pa.int32()), pa.list_(pa.float32(), 3), pa.large_list(pa.string())),
    *(pa.dictionary(pa.int32(), pa.string()), pa.map_(pa.string(), pa.int64())),
    pa.struct([("a", pa.string()), ("b", pa.list_(pa.struct([("c", pa.int64())])))]),
]


@pytest.mark.parametrize("kind", KINDS_OF_COLUMNS, ids=str)
def test_datasets_knows_every_column_as_it_is(kind: pa.DataType) -> None:
    import datasets

    plain = pa.schema([("a", plain_type(kind)), ("images", pa.list_(IMAGE)), ("image", IMAGE)])
    known = datasets.Features.from_arrow_schema(with_features(plain, ["images", "image"]))
    assert known["a"] == datasets.Features.from_arrow_schema(plain)["a"]
    assert known["images"] == datasets.List(datasets.Image())
    assert known["image"] == datasets.Image()
