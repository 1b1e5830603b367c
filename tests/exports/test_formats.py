"""Every format, from every kind of manifest, read again as its consumers read it."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.exports import outputs
from tests.exports.outputs import GONE, ROWS, Finished, answered, colour_of
from tests.harness import vlmbatch
from tests.s3 import S3Server
from vlmbatch.exports.base import plain_type, with_features
from vlmbatch.exports.trl import IMAGE

Found = dict[str, tuple[list[str], list[str]]]
"""By id: the colours of the images, and the texts."""
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
            "pairs": outputs.pairs(place / "pairs"),
            "s3": outputs.on_s3(place / "s3", s3_server.fs(), "exports"),
        }
        yield {
            kind: Finished(answered(manifest, place / f"{kind}-out"), kind)
            for kind, manifest in manifests.items()
        }


@pytest.fixture(params=KINDS)
def output(request: pytest.FixtureRequest, finished: dict[str, Finished]) -> Finished:
    return finished[request.param]


def exported(output: Finished, place: Path, form: str, *options: str) -> dict[str, Any]:
    """The summary, which adds up."""
    done = vlmbatch("export", output.folder, place, "--to", form, "--json", *options)
    assert done.exit_code == 0, done
    summary: dict[str, Any] = done.json
    assert summary["results"] == 2 * ROWS
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


def read_sharegpt(place: Path) -> Found:
    entry = json.loads((place / "dataset_info.json").read_text())["vlmbatch"]
    found = {}
    for row in loaded("json", place, data_files=entry["file_name"]):
        text = "".join(message["content"] for message in row["messages"])
        assert text.count("<image>") == len(row["images"])
        images = [colour_of((place / name).read_bytes()) for name in row["images"]]
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
        images = [colour_of((place / row["image"]).read_bytes())]
        found[row["id"]] = images, [turn["value"] for turn in turns[1::2]]
    return found


def read_jsonl(place: Path) -> Found:
    found: Found = {}
    for row in loaded("json", place, data_files="train.jsonl"):
        if any(name.startswith("s3://") for name in row["images"]):
            import fsspec

            files = [fsspec.open(name, "rb") for name in row["images"]]
            images = []
            for file in files:
                with file as opened:
                    images.append(colour_of(opened.read()))
        else:
            images = [colour_of((place / name).read_bytes()) for name in row["images"]]
        texts = found.setdefault(row["id"], (images, []))[1]
        texts.append(row["text"])
    return found


def read_captions(place: Path) -> Found:
    found = {}
    for image in (place / "train").glob("*.png"):
        row = int(image.name.split("-")[0])
        texts = image.with_suffix(".txt").read_text().splitlines()
        found[f"id-{row}"] = [colour_of(image.read_bytes())], texts
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


READERS: dict[str, Callable[[Path], Found]] = {
    "trl": read_trl,
    "hub": read_hub,
    "sharegpt": read_sharegpt,
    "axolotl": read_axolotl,
    "llava": read_llava,
    "jsonl": read_jsonl,
    "captions": read_captions,
    "imagefolder": read_imagefolder,
    "webdataset": read_webdataset,
}
ONE_IMAGE = ("llava", "captions")
"""Formats without a place for a second one."""


@pytest.mark.parametrize("form", READERS)
def test_what_is_exported_is_what_was_answered(form: str, output: Finished, tmp_path: Path) -> None:
    summary = exported(output, tmp_path / "export", form)
    assert summary["dropped"].get("failed") == 2  # those of the row whose image is gone
    if output.several and form in ONE_IMAGE:
        assert summary["dropped"] == {"failed": 2, "several_images": 2 * (ROWS - 1)}
        return
    assert summary["dropped"] == {"failed": 2}
    found = READERS[form](tmp_path / "export")
    assert found == {f"id-{row}": (output.colours(row), output.texts(row)) for row in output.rows}
    assert f"id-{GONE}" not in found


@pytest.mark.parametrize("form", ["trl", "sharegpt", "llava", "jsonl", "axolotl"])
def test_images_can_be_copied(form: str, output: Finished, tmp_path: Path) -> None:
    place = tmp_path / "export"
    summary = exported(output, place, form, "--images", "copy")
    if output.several and form in ONE_IMAGE:
        assert not summary["images"]
        return
    images = sum(len(output.colours(row)) for row in output.rows)
    assert summary["images"] == {"copied": images}
    assert len(list((place / "images").rglob("*.png"))) == images
    assert READERS[form](place) == {
        f"id-{row}": (output.colours(row), output.texts(row)) for row in output.rows
    }


def test_carried_columns_are_kept(finished: dict[str, Finished], tmp_path: Path) -> None:
    for form in ("trl", "jsonl", "sharegpt", "axolotl"):
        exported(finished["paths"], tmp_path / form, form)
    assert set(loaded("parquet", tmp_path / "trl")["licence"]) == {"cc-by-4.0"}
    for form in ("jsonl", "sharegpt", "axolotl"):
        rows = map(json.loads, (tmp_path / form / "train.jsonl").read_text().splitlines())
        assert {row["licence"] for row in rows} == {"cc-by-4.0"}
    (table,) = (row for row in loaded("parquet", tmp_path / "trl") if row["id"] == "id-2")
    assert table["carried_messages"] == {"n": 2, "words": ["mine"]}
    line = json.loads((tmp_path / "jsonl/train.jsonl").read_text().splitlines()[0])
    assert line["messages"] == {"n": 0, "words": ["mine"]}


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
