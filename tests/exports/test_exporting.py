"""What is exported, in which words and into which split; kills, refusals, what an export says."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.exports import outputs
from tests.exports.outputs import GONE, ROWS, answered, colour_of
from tests.harness import OURS, Command, echo, picture, until, vlmbatch, write_manifest


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions and answers about six pictures, one of which is gone."""
    place = tmp_path_factory.mktemp("output")
    return answered(outputs.paths(place / "data"), place / "out")


def export(output: Path, place: Path, form: str, *options: str | Path) -> dict[str, Any]:
    done = vlmbatch("export", output, place, "--to", form, "--json", *options)
    assert done.exit_code == 0, done
    summary: dict[str, Any] = done.json
    assert summary["results"] == summary["exported"] + sum(summary["dropped"].values())
    return summary


def refused(output: Path, place: Path | str, form: str, *options: str | Path) -> str:
    """What is said; the exit code is that of a wrong command."""
    done = vlmbatch("export", output, place, "--to", form, *options)
    assert done.exit_code == 2, done
    assert "Traceback" not in done.stderr
    return done.stderr


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# what is exported


def test_a_condition_on_the_columns_leaves_results_out(output: Path, tmp_path: Path) -> None:
    where = "task = 'vqa' and finish_reason = 'stop' and licence like 'cc%'"
    summary = export(output, tmp_path / "a", "jsonl", "--where", where)
    assert summary["dropped"] == {"where": ROWS - 1, "failed": 2}
    assert {line["task"] for line in lines(tmp_path / "a/train.jsonl")} == {"vqa"}


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("task =", "syntax error"),
        ("colour = 'red'", '"colour" not found'),
        ("id", "Could not convert string"),
        ("read_text('/etc/passwd') is null", "read_text"),
        ("count(*) > 1", "it is about several"),
    ],
)
def test_a_condition_that_is_none_is_refused(
    where: str, said: str, output: Path, tmp_path: Path
) -> None:
    message = refused(output, tmp_path / "a", "jsonl", "--where", where)
    assert f"--where {where!r}" in message
    assert said in message
    assert not (tmp_path / "a/train.jsonl").exists()


def test_texts_that_are_too_short_or_too_long_are_left_out(output: Path, tmp_path: Path) -> None:
    summary = export(output, tmp_path / "a", "jsonl", "--min-chars", "9")
    assert summary["dropped"] == {"too_short": ROWS - 1, "failed": 2}  # "answer 0"
    summary = export(output, tmp_path / "b", "jsonl", "--max-chars", "9")
    assert summary["dropped"] == {"too_long": ROWS - 1, "failed": 2}  # "caption 0."


def test_one_image_is_never_in_two_splits(tmp_path: Path) -> None:
    pictures = [picture(colour=f"#{i:06x}") for i in range(100)]
    images = [pictures[i % 100] for i in range(300)]
    manifest = write_manifest(
        tmp_path / "m.parquet", {"image": images, "reply": [f"text {i}" for i in range(300)]}
    )
    run = vlmbatch("run", manifest, *echo(reply_from="reply"), "-o", tmp_path / "out")
    assert run.exit_code == 0, run
    split = "train=0.8,val=0.15,test=0.05"
    summary = export(tmp_path / "out", tmp_path / "a", "jsonl", "--split", split)
    found = {
        name: {(tmp_path / "a" / line["images"][0]).read_bytes() for line in lines(path)}
        for name in ("train", "val", "test")
        if (path := tmp_path / f"a/{name}.jsonl").exists()
    }
    assert sum(map(len, found.values())) == 100
    assert not set.intersection(*found.values())
    assert sum(summary["records"].values()) == 300
    assert 0.7 < summary["records"]["train"] / 300 < 0.9
    again = export(tmp_path / "out", tmp_path / "b", "jsonl", "--split", split)
    assert again["records"] == summary["records"]


@pytest.mark.parametrize("split", ["train", "train=0.9,val=0.2", "a-b=1", "a=0.5,a=0.5", "x=nan"])
def test_shares_that_do_not_add_up_are_refused(split: str, output: Path, tmp_path: Path) -> None:
    assert f"--split {split!r}" in refused(output, tmp_path / "a", "jsonl", "--split", split)


# in which words


def conversations(output: Path, place: Path, *options: str | Path) -> list[dict[str, Any]]:
    export(output, place, "sharegpt", *options)
    return lines(place / "train.jsonl")


def test_a_row_is_one_conversation_or_one_for_each_answer(output: Path, tmp_path: Path) -> None:
    whole = conversations(output, tmp_path / "a", "--system", "Be brief.")
    assert [line["id"] for line in whole] == [f"id-{i}" for i in range(ROWS) if i != GONE]
    assert [(m["role"], m["content"]) for m in whole[1]["messages"]] == [
        ("system", "Be brief."),
        ("user", "<image>\nDescribe this image in one short sentence."),
        ("assistant", "caption 1."),
        ("user", "question 1?"),
        ("assistant", "answer 1"),
    ]
    single = conversations(output, tmp_path / "b", "--conversation", "per-request")
    assert [line["id"] for line in single[:2]] == ["id-0-0", "id-0-1"]
    assert all(len(line["messages"]) == 2 for line in single)
    assert all(line["messages"][0]["content"].startswith("<image>\n") for line in single)


def test_several_samples_are_conversations_of_their_own(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.parquet", {"id": ["a"], "reply": ["A thing."]})
    run = vlmbatch(
        *("run", manifest, *echo(reply_from="reply"), "--num-samples", "2", "--temperature", "1"),
        *("-o", tmp_path / "out"),
    )
    assert run.exit_code == 0, run
    found = conversations(tmp_path / "out", tmp_path / "a")
    assert [(line["id"], len(line["messages"])) for line in found] == [("a-0", 2), ("a-1", 2)]


def test_the_user_asks_in_words_of_ones_own(output: Path, tmp_path: Path) -> None:
    found = conversations(
        *(output, tmp_path / "a", "--user-template", "caption=Picture {{ id }}, {{ licence }}?"),
        *("--user-template", "vqa={{ question }} In a word."),
    )
    asked = [message["content"] for message in found[0]["messages"][::2]]
    assert asked == ["<image>\nPicture id-0, cc-by-4.0?", "question 0? In a word."]


def test_paraphrases_are_chosen_by_the_id(output: Path, tmp_path: Path) -> None:
    (tmp_path / "ways.json").write_text(json.dumps({"caption": [f"way {i}" for i in range(9)]}))
    ways = ("--paraphrases", tmp_path / "ways.json", "--conversation", "per-request")
    found = conversations(output, tmp_path / "a", *ways)
    asked = {line["id"]: line["messages"][0]["content"] for line in found}
    assert len({asked[f"id-{i}-0"] for i in range(4)}) > 1
    assert asked["id-0-1"] == "<image>\nquestion 0?"
    again = conversations(output, tmp_path / "b", *ways, "--where", "row > 1")
    assert {line["id"]: line["messages"][0]["content"] for line in again}.items() < asked.items()


@pytest.mark.parametrize("form", ["sharegpt", "llava", "axolotl", "trl"])
def test_words_that_mean_an_image_to_a_trainer_mean_none(
    form: str, output: Path, tmp_path: Path
) -> None:
    place = tmp_path / "a"
    export(output, place, form, "--user-template", "What does <image> in {{ id }} mean?")
    if form == "trl":
        texts = [json.dumps(row) for row in pq.read_table(place)["messages"].to_pylist()]
    else:
        (path,) = (path for path in place.glob("train.json*"))
        texts = [line for line in path.read_text().splitlines() if "id-" in line]
    assert len(texts) == ROWS - 1
    for text in texts:
        assert text.count("What does <image > in id-") == 2
        assert text.count("<image>") == (1 if form in ("sharegpt", "llava") else 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--user-template", "{{ question"], "is not a template"),
        (["--user-template", "{{ colour }}"], "'colour' is undefined"),
        (["--user-template", "ocr=Read."], "was not asked"),
        (["--paraphrases", "none.txt"], "cannot read the paraphrases none.txt"),
        (["--for-model", "none/none/none"], "no such model folder"),
    ],
)
def test_words_that_do_not_fit_are_refused(
    options: list[str], said: str, output: Path, tmp_path: Path
) -> None:
    assert said in refused(output, tmp_path / "a", "trl", *options)


BOX = [{"bbox_2d": [100, 200, 500, 600], "label": "cat"}]


@pytest.fixture(scope="module")
def grounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A box in a picture of 2000 x 1000, in Qwen3-VL's words; and one picture without any."""
    place = tmp_path_factory.mktemp("grounded")
    replies = [f"```json\n{json.dumps(found)}\n```" for found in (BOX, [])]
    columns = {"image": [picture(2000, 1000)] * 2, "id": ["a", "b"], "reply": replies}
    manifest = write_manifest(place / "m.parquet", {**columns, "phrase": ["cat", "dog"]})
    run = vlmbatch(
        *("run", manifest, "-t", "ground", *echo(reply_from="reply"), "--family", "qwen3_vl"),
        *("-o", place / "out"),
    )
    assert run.exit_code == 0, run
    return place / "out"


def test_boxes_are_said_as_the_model_to_be_trained_says_them(
    grounded: Path, tmp_path: Path
) -> None:
    def said(*options: str) -> list[tuple[str, str]]:
        found = conversations(grounded, tmp_path / "-".join(("a", *options)), *options)
        return [tuple(m["content"] for m in line["messages"]) for line in found]

    (asked, answer), (_, none) = said()
    assert asked == (
        "<image>\nLocate cat in this image and output the bbox coordinates in JSON format."
    )
    assert json.loads(answer.removeprefix("```json\n").removesuffix("\n```")) == BOX
    assert "[]" in none
    (_, in_pixels), _ = said("--for-model", "qwen2_5_vl")
    numbers = json.loads(in_pixels.removeprefix("```json\n").removesuffix("\n```"))
    assert numbers[0]["bbox_2d"] == [199, 202, 994, 605]  # of 1988 x 1008, the size it sees
    (asked, answer), (_, none) = said("--for-model", "paligemma")
    assert (asked, answer) == (
        "<image>\ndetect cat",
        "<loc0205><loc0102><loc0614><loc0511> cat",
    )
    assert none == "none"
    (_, answer), (_, none) = said("--for-model", "qwen2_vl")
    assert answer.endswith("<|box_start|>(100,200),(500,600)<|box_end|>")
    assert none == "There are none."
    message = refused(grounded, tmp_path / "x", "trl", "--for-model", "idefics3")
    assert "no syntax for boxes" in message
    assert "--for-model" in message
    export(grounded, tmp_path / "y", "jsonl", "--for-model", "idefics3")  # which says no boxes


def test_structured_answers_are_their_objects(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.parquet", {"id": ["a"], "reply": ['{"n":  3}']})
    schema = '{"type": "object", "properties": {"n": {"type": "integer"}}}'
    (tmp_path / "s.json").write_text(schema)
    run = vlmbatch(
        *("run", manifest, *echo(reply_from="reply"), "-t", "count", "--prompt", "Count {{ id }}."),
        *("--json-schema", tmp_path / "s.json", "-o", tmp_path / "out"),
    )
    assert run.exit_code == 0, run
    (line,) = conversations(tmp_path / "out", tmp_path / "a")
    asked, answer = (message["content"] for message in line["messages"])
    assert asked == "<image>\nCount a."
    assert json.loads(answer) == {"n": 3}


# images


def test_turned_and_unusual_images_are_made_upright_and_usual(tmp_path: Path) -> None:
    turned = Image.new("RGB", (12, 8), "#ff0000")
    turned.paste("#0000ff", (0, 0, 6, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # its left side is up
    file = io.BytesIO()
    turned.save(file, "PNG", exif=exif)
    tiff = picture(5, 3, "#00ff00", format="TIFF")
    manifest = write_manifest(tmp_path / "m.parquet", {"image": [file.getvalue(), tiff]})
    run = vlmbatch("run", manifest, *echo(reply="Something."), "-o", tmp_path / "out")
    assert run.exit_code == 0, run
    summary = export(tmp_path / "out", tmp_path / "a", "jsonl", "--images", "copy")
    assert summary["images"] == {"copied": 2, "made_anew": 2}
    first, second = lines(tmp_path / "a/train.jsonl")
    assert (first["width"], first["height"]) == (8, 12)
    image = Image.open(tmp_path / "a" / first["images"][0])
    assert image.size == (8, 12)
    assert image.getpixel((4, 1)) == (0, 0, 255)
    assert image.getexif().get(0x0112) is None
    assert second["images"][0].endswith(".png")


def test_an_image_that_is_gone_by_now_is_left_out_and_counted(output: Path, tmp_path: Path) -> None:
    shutil.copytree(output.parent / "data", tmp_path / "data")
    (tmp_path / "data/photos/0.png").unlink()
    (tmp_path / "data/photos/1.png").write_bytes(b"no image")
    moved = tmp_path / "data/manifest.parquet"
    summary = export(output, tmp_path / "a", "trl", "--manifest", moved)
    assert summary["dropped"] == {"image_missing": 2, "image_unreadable": 2, "failed": 2}
    assert summary["rows"] == ROWS - 3


def test_an_image_that_is_broken_by_now_looks_like_no_other(output: Path, tmp_path: Path) -> None:
    """Its header is whole, and only looks need more than that."""
    shutil.copytree(output.parent / "data", tmp_path / "data")
    broken = tmp_path / "data/photos/0.png"
    broken.write_bytes(broken.read_bytes()[:45])
    options = ("--manifest", tmp_path / "data/manifest.parquet", "--drop", "near-duplicate-images")
    summary = export(output, tmp_path / "a", "jsonl", *options)
    assert summary["rows"] == ROWS - 1


def test_the_manifest_may_have_moved(tmp_path: Path) -> None:
    output = answered(outputs.paths(tmp_path / "data"), tmp_path / "out")
    assert export(output, tmp_path / "here", "jsonl")["warnings"] == []
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    summary = export(output, tmp_path / "names", "jsonl")  # which needs no more than the results
    assert summary["images"] == {"referenced": ROWS - 1, "not_there": ROWS - 1}
    assert "5 of the images that are named are not there" in summary["warnings"][0]
    message = refused(output, tmp_path / "a", "trl")
    assert "No such file" in message
    assert "--manifest" in message
    moved = tmp_path / "elsewhere/manifest.parquet"
    assert export(output, tmp_path / "a", "trl", "--manifest", moved)["rows"] == ROWS - 1
    export(output, tmp_path / "c", "jsonl", "--manifest", moved)
    assert export(output, tmp_path / "c", "jsonl", "--manifest", moved)["warnings"] == []
    named = [line["images"][0] for line in lines(tmp_path / "c/train.jsonl")]
    assert colour_of((tmp_path / "c" / named[0]).read_bytes()) == outputs.COLOURS[0]
    pq.write_table(outputs.manifest_of(["photos/1.png"] * ROWS), moved)
    message = refused(output, tmp_path / "d", "trl", "--manifest", moved)
    assert "is not the manifest of" in message


def test_captions_go_beside_images_where_these_are(output: Path, tmp_path: Path) -> None:
    shutil.copytree(output.parent / "data", tmp_path / "data")
    photos = tmp_path / "data/photos"
    (photos / "1.txt").write_text("mine")
    words = ("--format-arg", "prefix=sks, ", "--where", "task = 'caption'", "--images", "reference")
    words = (*words, "--manifest", str(tmp_path / "data/manifest.parquet"))
    summary = export(output, tmp_path / "a", "captions", *words)
    assert summary["dropped"] == {"where": ROWS - 1, "failed": 2, "caption_exists": 1}
    texts = {path.name: path.read_text() for path in photos.glob("*.txt")}
    assert texts.pop("1.txt") == "mine"
    assert texts == {f"{i}.txt": f"sks, caption {i}.\n" for i in (0, 2, 3, 5)}
    again = (*words, "--format-arg", "existing=overwrite", "--overwrite")
    export(output, tmp_path / "a", "captions", *again)
    assert (photos / "1.txt").read_text() == "sks, caption 1.\n"


def test_captions_of_rows_about_one_image_are_lines_of_its_text(tmp_path: Path) -> None:
    outputs.write_pictures(tmp_path / "photos")
    columns = {"image": ["photos/0.png", "photos/1.png", "photos/0.png"], "reply": ["a", "b", "c"]}
    manifest = write_manifest(tmp_path / "m.parquet", columns)
    run = vlmbatch("run", manifest, *echo(reply_from="reply"), "-o", tmp_path / "out")
    assert run.exit_code == 0, run
    summary = export(tmp_path / "out", tmp_path / "a", "captions", "--images", "reference")
    assert (summary["exported"], summary["dropped"]) == (3, {})
    assert (tmp_path / "photos/0.txt").read_text() == "a\nc\n"
    assert (tmp_path / "photos/1.txt").read_text() == "b\n"


def test_a_text_is_about_one_image_alone(tmp_path: Path) -> None:
    """Trainers find it by the image's name without the ending, whatever that is."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "a.jpg"):
        (photos / name).write_bytes(picture())
    columns = {"image": ["photos/a.png", "photos/a.jpg"], "reply": ["one", "other"]}
    manifest = write_manifest(tmp_path / "m.parquet", columns)
    assert (
        vlmbatch("run", manifest, *echo(reply_from="reply"), "-o", tmp_path / "out").exit_code == 0
    )
    message = refused(tmp_path / "out", tmp_path / "a", "captions", "--images", "reference")
    assert "a.txt would be the text of" in message
    assert "--images copy" in message
    assert not (photos / "a.txt").exists()
    export(tmp_path / "out", tmp_path / "b", "captions")
    texts = sorted(path.read_text() for path in (tmp_path / "b/train").glob("*.txt"))
    assert texts == ["one\n", "other\n"]


def test_an_image_called_as_a_text_is_not_replaced_by_it(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(picture())
    manifest = write_manifest(tmp_path / "m.parquet", {"image": ["b.txt"], "reply": ["one"]})
    assert (
        vlmbatch("run", manifest, *echo(reply_from="reply"), "-o", tmp_path / "out").exit_code == 0
    )
    beside = ("--images", "reference", "--format-arg", "existing=overwrite")
    summary = export(tmp_path / "out", tmp_path / "a", "captions", *beside)
    assert summary["dropped"] == {"caption_exists": 1}
    assert (tmp_path / "b.txt").read_bytes() == picture()


@pytest.mark.parametrize(
    ("form", "kind", "options"),
    [("trl", "parquet", ["--images", "copy"]), ("imagefolder", "imagefolder", [])],
)
def test_images_called_as_a_split_are_no_split(
    form: str, kind: str, options: list[str], tmp_path: Path
) -> None:
    import datasets

    names = ["p/my-test.png", "p/val_1.png", "p/1.png", "p/test/dev.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture())
    manifest = write_manifest(tmp_path / "m.parquet", {"image": names, "reply": list("abcd")})
    run = vlmbatch("run", manifest, *echo(reply_from="reply"), "-o", tmp_path / "out")
    assert run.exit_code == 0, run
    export(tmp_path / "out", tmp_path / "a", form, *options)
    found = datasets.load_dataset(
        kind, data_dir=str(tmp_path / "a"), cache_dir=str(tmp_path / "cache")
    )
    assert {split: len(rows) for split, rows in found.items()} == {"train": 4}


def test_splits_of_a_folder_have_the_same_types_also_where_all_of_a_column_is_null(
    tmp_path: Path,
) -> None:
    import datasets

    (tmp_path / "p").mkdir()
    for i in range(12):
        (tmp_path / f"p/{i}.png").write_bytes(picture(colour=f"#0000{i:02x}"))
    columns = {
        "image": [f"p/{i}.png" for i in range(12)],
        "question": ["q?"] * 12,
        "reply": [["a caption", "an answer" if i == 3 else ""] for i in range(12)],
        "source": ["here" if i == 3 else None for i in range(12)],
    }
    manifest = write_manifest(tmp_path / "m.parquet", columns)
    run = vlmbatch(
        *("run", manifest, "-t", "caption", "-t", "vqa", *echo(reply_from="reply")),
        *("--carry=source", "--max-failure-rate=1", "-o", tmp_path / "out"),
    )
    assert run.exit_code == 0, run
    export(tmp_path / "out", tmp_path / "a", "imagefolder", "--split", "train=0.5,test=0.5")
    found = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "a"), cache_dir=str(tmp_path / "cache")
    )
    assert {len(rows) > 0 for rows in found.values()} == {True}
    answers = [a for rows in found.values() for row in rows for a in row["answers"]]
    assert sorted({a["question"] or "" for a in answers}) == ["", "q?"]
    assert len(list((tmp_path / "a").glob("*/metadata.parquet"))) == 2
    export(tmp_path / "out", tmp_path / "b", "imagefolder")
    assert (tmp_path / "b/train/metadata.jsonl").exists()


# once more, and after a kill


def files_of(place: Path) -> dict[str, str]:
    """The content of what an export made."""
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(place.rglob("*"))
        if path.is_file() and OURS not in path.parts
    }


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of many parts."""
    place = tmp_path_factory.mktemp("long")
    texts = [f"text {i}" for i in range(120)]
    pictures = [picture(colour=f"#{i:06x}") for i in range(120)]
    columns = {"reply": texts, "id": texts, "image": pictures}
    manifest = write_manifest(place / "m.parquet", columns)
    run = vlmbatch(
        *("run", manifest, *echo(reply_from="reply"), "-o", place / "out", "--part-rows", "4"),
    )
    assert run.exit_code == 0, run
    return place / "out"


@pytest.mark.parametrize("form", ["trl", "llava", "webdataset", "imagefolder"])
def test_a_killed_export_goes_on_where_it_was(form: str, long: Path, tmp_path: Path) -> None:
    place = tmp_path / "killed"
    options = ("--to", form, "--split", "train=0.7,val=0.3", "--json")
    marks = place / OURS / "pieces"
    with Command("export", long, place, *options) as command:
        until(lambda: len(list(marks.glob("*.json"))) >= 3, "three pieces", seconds=120)
        command.signal(signal.SIGKILL)
        command.wait()
    made = len(list(marks.glob("*.json")))
    state = json.loads((place / OURS / "export.json").read_text())["state"]
    assert state == "unfinished"
    summary = export(long, place, form, "--split", "train=0.7,val=0.3")
    assert summary["pieces"] == 30
    assert summary["pieces_resumed"] == made
    assert summary["exported"] == 120
    whole = export(long, tmp_path / "whole", form, "--split", "train=0.7,val=0.3")
    assert files_of(place) == files_of(tmp_path / "whole")
    for key in ("rows", "results", "exported", "records", "dropped", "images", "files"):
        assert summary[key] == whole[key], key
    assert not (place / OURS / "kept").exists()
    assert export(long, place, form, "--split", "train=0.7,val=0.3")["pieces_resumed"] == 30


@pytest.mark.parametrize("form", ["captions", "imagefolder"])
def test_a_full_disk_is_named_and_space_lets_the_export_go_on(
    form: str, long: Path, tmp_path: Path
) -> None:
    """On a disk of its own, which only the export sees."""
    place = tmp_path / "full"
    place.mkdir()
    code = (
        f"mount -t tmpfs -o size=200k none {place} || exit 99; "
        f'"$@"; echo CODE $? >&2; mount -o remount,size=64m {place} || exit 99; "$@"'
    )
    export = [sys.executable, "-m", "vlmbatch", "export", long, place / "a", "--to", form, "--json"]
    words = ["unshare", "-m", "sh", "-c", code, "sh", *map(str, export)]
    done = subprocess.run(words, capture_output=True, text=True)
    if "unshare:" in done.stderr or done.returncode == 99:
        pytest.skip(f"no disk can be mounted here: {done.stderr[-200:]}")
    assert done.returncode == 0, done
    said, _, after = done.stderr.partition("CODE ")
    assert after.startswith("1\n")
    assert f"Error: cannot write {place / 'a'}" in said
    assert "No space left on device\n  -> free some space and run the same command" in said
    summary = json.loads(done.stdout)
    assert (summary["exported"], summary["pieces"]) == (120, 30)


def test_another_export_is_refused_and_replaced_when_asked(output: Path, tmp_path: Path) -> None:
    place = tmp_path / "a"
    export(output, place, "jsonl", "--images", "copy")
    (place / "notes.md").write_text("mine")
    message = refused(output, place, "llava", "--min-chars", "3")
    assert "holds another export" in message
    assert 'format: was "jsonl", now "llava"' in message
    assert "min_chars: was null, now 3" in message
    export(output, place, "jsonl", "--overwrite")
    assert not (place / "images").exists()
    settings = json.loads((place / OURS / "export.json").read_text())
    settings["state"] = "clearing"  # as a kill in the middle of --overwrite leaves it
    (place / OURS / "export.json").write_text(json.dumps(settings))
    export(output, place, "llava")
    assert sorted(path.name for path in place.iterdir()) == [OURS, "notes.md", "train.json"]


def test_results_that_changed_are_another_export(tmp_path: Path) -> None:
    output = answered(outputs.paths(tmp_path / "data"), tmp_path / "out")
    export(output, tmp_path / "a", "jsonl")
    (tmp_path / "data/photos" / f"{GONE}.png").write_bytes(picture())
    assert vlmbatch("retry", output, "--max-failure-rate", "1").exit_code == 0
    assert "results: was" in refused(output, tmp_path / "a", "jsonl")
    assert export(output, tmp_path / "a", "jsonl", "--overwrite")["rows"] == ROWS


def test_places_that_cannot_be_are_refused(output: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    assert "holds something else" in refused(output, tmp_path / "full", "jsonl")
    assert "holds something else" in refused(output, tmp_path / "full", "jsonl", "--overwrite")
    assert "is a file" in refused(output, tmp_path / "full/mine.txt", "jsonl")
    assert "is inside the output" in refused(output, output / "export", "jsonl")
    assert "local folder" in refused(output, "s3://bucket/a", "jsonl")
    assert "is no output of vlmbatch" in refused(tmp_path / "full", tmp_path / "b", "jsonl")
    assert "did you mean 'jsonl'" in refused(output, tmp_path / "b", "json")
    assert "does not embed images" in refused(output, tmp_path / "b", "jsonl", "--images", "embed")
    assert "no setting 'x'" in refused(output, tmp_path / "b", "jsonl", "--format-arg", "x=1")
    assert "no conversations" in refused(output, tmp_path / "b", "captions", "--system", "x")
    assert not (tmp_path / "b").exists()


def test_what_is_answered_so_far_is_exported_with_a_warning(tmp_path: Path) -> None:
    manifest = outputs.paths(tmp_path / "data")
    output = answered(manifest, tmp_path / "out", "--limit", "3")
    run_json = output / OURS / "run.json"
    value = json.loads(run_json.read_text())
    value["job"]["limit"] = None  # as if it had been stopped there
    run_json.write_text(json.dumps(value))
    summary = export(output, tmp_path / "a", "jsonl")
    assert summary["rows"] == 3
    assert "3 of 6 rows are answered" in summary["warnings"][0]


def test_an_export_waits_for_no_run(output: Path, tmp_path: Path) -> None:
    import fcntl

    with open(output / OURS / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = vlmbatch("export", output, tmp_path / "a", "--to", "jsonl")
    assert done.exit_code == 1
    assert "a run works on" in done.stderr


# formats of others


PACKAGE = {
    "mine.py": """
        from vlmbatch.exports.base import Lines

        class Mine(Lines):
            name = "mine"
            about = "one of my own"

            def records(self, example):
                for result in example.results:
                    yield {"said": result.answer.text, "of": example.images[0].path}
        """,
    "mine-1.0.dist-info/METADATA": """
        Metadata-Version: 2.1
        Name: mine
        Version: 1.0
        """,
    "mine-1.0.dist-info/entry_points.txt": """
        [vlmbatch.exports]
        mine = mine:Mine
        broken = nowhere:Mine
        wrong = json:JSONDecoder
        """,
}


def test_a_format_of_ones_own_is_an_entry_point(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in PACKAGE.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip())
    monkeypatch.syspath_prepend(tmp_path / "site")
    try:
        export(output, tmp_path / "a", "mine")
        assert lines(tmp_path / "a/train.jsonl")[1]["said"] == "answer 0"
        assert "cannot be loaded" in refused(output, tmp_path / "b", "broken")
        assert "is no Format" in refused(output, tmp_path / "b", "wrong")
        assert "mine" in refused(output, tmp_path / "b", "min")
    finally:
        sys.modules.pop("mine", None)
