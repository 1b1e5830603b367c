"""Carried columns (a licence, a source) come with every format, of any type."""

from __future__ import annotations

import datetime
import decimal
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.exports.outputs import COLOURS, colour_of, square
from tests.harness import echo, vlmbatch
from vlmbatch.exports import FORMATS

IMAGES = [0, 1, 0, 2]
"""Of each row, by number: two are about one image."""
DAY = datetime.date(2026, 2, 28)
COLUMNS: dict[str, pa.Array] = {
    "licence": pa.array([f"cc-{row}" for row in range(4)]),
    "taken": pa.array([DAY] * 4),
    "price": pa.array([decimal.Decimal("1.50")] * 4),
    "tags": pa.array([["a", "ü"], [], None, ["b"]]),
    "parts": pa.array([[("k", 1)]] * 4, pa.map_(pa.string(), pa.int64())),
    "camera": pa.array([{"name": "c", "iso": 100}] * 4),
    "kind": pa.array(["x"] * 4).dictionary_encode(),
    "source_file_name": pa.array(["a.tif"] * 4),
    "file_name": pa.array(["b.tif"] * 4),
    "row": pa.array(range(4)),
}


def answered(place: Path, *carry: str) -> Path:
    (place / "photos").mkdir(parents=True)
    for n in set(IMAGES):
        (place / f"photos/{n}.png").write_bytes(square(COLOURS[n]))
    box = '[{"bbox_2d": [0, 0, 500, 500], "label": "cat"}]'
    table = {
        "image": [f"photos/{n}.png" for n in IMAGES],
        "id": [f"id-{row}" for row in range(4)],
        "reply": [[f"caption {row}.", box] for row in range(4)],
        **COLUMNS,
    }
    pq.write_table(pa.table(table), place / "m.parquet")
    run = vlmbatch(
        *("run", place / "m.parquet", "-t", "caption", "-t", "detect", "--labels", "cat"),
        *(*echo(reply_from="reply"), "--family", "qwen3_vl", "-o", place / "out"),
        *(f"--carry={name}" for name in carry),
    )
    assert run.exit_code == 0, run
    return place / "out"


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It carries every column but ``row``, a name that results have."""
    names = [name for name in COLUMNS if name != "row"]
    return answered(tmp_path_factory.mktemp("carried") / "in", *names)


def exported(output: Path, place: Path, form: str, *options: str) -> dict[str, Any]:
    done = vlmbatch("export", output, place, "--to", form, "--json", *options)
    assert done.exit_code == 0, done
    summary: dict[str, Any] = done.json
    return summary


Rows = list[dict[str, Any]]


def lines(name: str) -> Callable[[Path], Rows]:
    return lambda place: [json.loads(line) for line in (place / name).read_text().splitlines()]


def tables(place: Path) -> Rows:
    import datasets

    cache = str(place.parent / f"{place.name}-cache")
    folder = place / "data" if (place / "data").exists() else place
    rows = datasets.load_dataset("parquet", data_dir=str(folder), split="train", cache_dir=cache)
    return list(rows)


def folder(place: Path) -> Rows:
    import datasets

    cache = str(place.parent / f"{place.name}-cache")
    return list(
        datasets.load_dataset("imagefolder", data_dir=str(place), split="train", cache_dir=cache)
    )


def shards(place: Path) -> Rows:
    with tarfile.open(place / "train-000000.tar") as tar:
        names = [name for name in tar.getnames() if name.endswith(".json")]
        return [json.load(file) for name in names if (file := tar.extractfile(name))]


def beside(place: Path) -> Rows:
    """A line for each row, with the file that it is about."""
    found = lines("carried_train.jsonl")(place)
    assert [row["id"] for row in sorted(found, key=lambda row: row["row"])] == [
        f"id-{row}" for row in range(4)
    ]
    for row in found:
        image = (place / row["file_name"]).read_bytes()
        assert colour_of(image) == COLOURS[IMAGES[row["row"]]]
    return found


PLACES: dict[str, Callable[[Path], Rows]] = {
    "trl": tables,
    "hub": tables,
    "llava": lambda place: json.loads((place / "train.json").read_text()),
    "sharegpt": lines("train.jsonl"),
    "axolotl": lines("train.jsonl"),
    "jsonl": lines("train.jsonl"),
    "imagefolder": folder,
    "webdataset": shards,
    "coco": lambda place: json.loads((place / "instances_train.json").read_text())["images"],
    "label-studio": lambda place: [
        task["data"] for task in json.loads((place / "tasks_train.json").read_text())
    ],
    "hf-objects": folder,
    "ms-swift": lines("train.jsonl"),
    "qwen-vl": lines("train.jsonl"),
    **dict.fromkeys(("captions", "yolo", "fiftyone"), beside),
}
BY_IMAGE = ("coco", "label-studio", "hf-objects")
"""They have one place for all rows about an image: the first one's columns."""


def test_every_format_is_in_the_table() -> None:
    assert set(PLACES) == set(FORMATS)


@pytest.mark.parametrize("form", PLACES)
def test_carried_columns_are_kept(form: str, output: Path, tmp_path: Path) -> None:
    exported(output, tmp_path / "out", form)
    rows = PLACES[form](tmp_path / "out")
    found = {row["licence"]: row for row in rows}
    assert set(found) == {"cc-0", "cc-1", "cc-3"} | (set() if form in BY_IMAGE else {"cc-2"})
    first = found["cc-0"]
    assert first["tags"] == ["a", "ü"]
    assert first["camera"] == {"name": "c", "iso": 100}
    assert first["kind"] == "x"
    assert first["parts"] == [{"key": "k", "value": 1}]
    if form in ("trl", "hub"):  # whose tables have every type
        assert (first["taken"], first["price"]) == (DAY, decimal.Decimal("1.50"))
    else:
        assert (str(first["taken"])[:10], first["price"]) == ("2026-02-28", "1.50")
    if form in ("imagefolder", "hf-objects"):  # of which `datasets` opens every ..._file_name
        names = ("source_filename", "carried_filename")
    elif form in ("coco", "captions", "yolo", "fiftyone"):
        names = ("source_file_name", "carried_file_name")
    else:
        names = ("source_file_name", "file_name")
    assert [first[name] for name in names] == ["a.tif", "b.tif"]


def test_names_that_become_alike_stay_apart(tmp_path: Path) -> None:
    names = ["a_file_name", "a_filename", "file_name", "carried_filename"]
    columns = {"image": [square(COLOURS[0])], "reply": ["x"], **{name: [name] for name in names}}
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    run = vlmbatch(
        *("run", tmp_path / "m.parquet", *echo(reply_from="reply"), "-o", tmp_path / "out"),
        *(f"--carry={name}" for name in names),
    )
    assert run.exit_code == 0, run
    exported(tmp_path / "out", tmp_path / "a", "imagefolder")
    (row,) = lines("train/metadata.jsonl")(tmp_path / "a")
    assert {key: row[key] for key in row if key.startswith(("a_", "carried_"))} == {
        "carried_a_filename": "a_file_name",
        "a_filename": "a_filename",
        "carried_carried_filename": "file_name",
        "carried_filename": "carried_filename",
    }


@pytest.mark.parametrize("form", ["captions", "fiftyone"])
def test_images_that_are_not_copied_are_named_where_they_are(
    form: str, output: Path, tmp_path: Path
) -> None:
    exported(output, tmp_path / "out", form, "--images", "reference")
    rows = beside(tmp_path / "out")
    assert {Path(row["file_name"]).parent for row in rows} == {output.parent / "photos"}
    for text in (output.parent / "photos").glob("*.txt"):
        text.unlink()


def test_the_columns_are_divided_as_the_images_and_go_when_another_export_comes(
    output: Path, tmp_path: Path
) -> None:
    place = tmp_path / "out"
    exported(output, place, "yolo", "--split", "val=0.5,train=0.5")
    found = {name: lines(f"carried_{name}.jsonl")(place) for name in ("val", "train")}
    assert sorted(row["row"] for rows in found.values() for row in rows) == [0, 1, 2, 3]
    for name, rows in found.items():
        assert {row["file_name"] for row in rows} == {
            str(path.relative_to(place)) for path in (place / "images" / name).iterdir()
        }
    exported(output, place, "jsonl", "--overwrite")
    assert not list(place.glob("carried_*"))


def test_nothing_lies_beside_where_nothing_is_carried(tmp_path: Path) -> None:
    output = answered(tmp_path / "in")
    for form in ("captions", "yolo", "fiftyone"):
        exported(output, tmp_path / form, form)
        assert not list((tmp_path / form).glob("carried_*"))
