"""``vlmbatch eval`` on outputs of real runs, whose answers are columns of the manifest."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.harness import (
    Command,
    Finished,
    echo,
    parts,
    picture,
    shards,
    until,
    vlmbatch,
    write_manifest,
)

CAT, DOG = {"bbox_2d": [0, 0, 500, 500], "label": "cat"}, {"bbox_2d": [500, 0, 1000, 1000]}
ANSWERS = [  # requests 0 and 1: vqa; 2: ground; 3: detect
    ["yes", "two", json.dumps([CAT]), json.dumps([CAT, {**DOG, "label": "dog"}])],
    [" Yes. ", "red", json.dumps([CAT, CAT]), json.dumps([{**CAT, "label": "dog"}])],
    ["no", "", "none", "[]"],
]
ROWS = len(ANSWERS)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rows of four requests each; the second answer of the last row is empty, which fails."""
    folder = tmp_path_factory.mktemp("eval")
    columns = {
        "image": [picture(200, 100)] * ROWS,
        "id": [f"id-{row}" for row in range(ROWS)],
        "questions": [["Is it?", "How many?"]] * ROWS,
        "phrase": ["the cat"] * ROWS,
        "labels": [["cat", "dog"]] * ROWS,
        "answers": ANSWERS,
    }
    manifest = write_manifest(folder / "m.parquet", columns)
    run = ["run", manifest, "-t", "vqa", "-t", "ground", "-t", "detect", "-o", folder / "out"]
    done = vlmbatch(*run, *echo(reply_from="answers"), "--max-failure-rate=1")
    assert done.exit_code == 0, done
    assert done.stdout.count("parse_failed") == 1
    return folder / "out"


def box(label: str | None, *corners: float) -> dict[str, Any]:
    return {"label": label, **dict(zip(("x1", "y1", "x2", "y2"), corners, strict=True))}


def written(path: Path, references: list[dict[str, Any]]) -> Path:
    """As JSONL or Parquet, by the name."""
    if path.suffix == ".parquet":
        names = dict.fromkeys(name for each in references for name in each)
        columns = {name: [each.get(name) for each in references] for name in names}
        pq.write_table(pa.table(columns), path)
    else:
        path.write_text("".join(json.dumps(each) + "\n" for each in references))
    return path


def judged(output: Path, path: Path, *options: str) -> Any:
    done = vlmbatch("eval", output, "--references", path, *options, "--json")
    assert done.exit_code == 0, done
    return done.json


def refused(output: Path, path: Path) -> str:
    done = vlmbatch("eval", output, "--references", path)
    assert done.exit_code == 2, done
    return done.stderr


TEXTS = [
    {"id": "id-0", "request": 0, "text": "yes"},
    {"id": "id-0", "request": 1, "text": ["2", "two"]},
    {"id": "id-1", "request": 0, "text": "yes"},
    {"id": "id-1", "request": 1, "text": ["blue"]},
    {"id": "id-2", "request": 1, "text": "yes"},
    {"id": "id-9", "request": 0, "task": "vqa", "text": "yes"},
]


def as_list(text: str | list[str]) -> list[str]:
    return [text] if isinstance(text, str) else text


@pytest.mark.parametrize("name", ["refs.jsonl", "refs.parquet"])
def test_each_reference_is_judged_once_and_failed_or_missing_is_wrong(
    output: Path, tmp_path: Path, name: str
) -> None:
    texts: list[dict[str, Any]] = TEXTS
    if name.endswith(".parquet"):  # whose columns have one type
        texts = [{**each, "text": as_list(each["text"])} for each in TEXTS]
    found = judged(output, written(tmp_path / name, texts))
    assert found["tasks"] == {
        "vqa": {
            "metric": "exact match",
            "n": 6,
            "right": 2,
            "accuracy": 0.333333,
            "interval": [0.096771, 0.700007],
            "most_frequent": {"answer": "yes", "accuracy": 0.666667},
            "failed": 1,
            "missing": 1,
        }
    }
    assert (found["references"], found["unusable"], found["without_reference"]) == (6, 0, 7)
    assert found["normalize"] == "exact"
    assert [(each["id"], each["request"], each["got"]) for each in found["wrong"]] == [
        ("id-1", 0, "Yes."),
        ("id-1", 1, "red"),
        ("id-2", 1, None),
    ]
    assert found["wrong"][2]["error"].startswith("parse_failed: ")
    assert found["wrong"][1]["question"] == "How many?"


def test_the_vqa_rule_is_for_both_sides(output: Path, tmp_path: Path) -> None:
    references = [*TEXTS[:1], {"id": "id-0", "request": 1, "text": "2"}, *TEXTS[2:]]
    found = judged(output, written(tmp_path / "refs.jsonl", references), "--normalize", "vqa")
    assert (found["tasks"]["vqa"]["right"], found["normalize"]) == (3, "vqa")


def test_a_csv_may_hold_lists_as_json_and_leave_the_request_out(
    output: Path, tmp_path: Path
) -> None:
    lines = [
        "id,task,text,boxes",
        'id-0,vqa,"[""no"", ""yes""]",',
        'id-0,ground,,"[{""x1"": 0, ""y1"": 0, ""x2"": 100, ""y2"": 50}]"',
        "id-1,ground,,[]",
        "id-2,ground,,[]",
    ]
    path = tmp_path / "refs.csv"
    path.write_text("\n".join(lines))
    tasks = judged(output, path)["tasks"]
    assert (tasks["vqa"]["right"], tasks["vqa"]["n"]) == (1, 1)
    assert (tasks["ground"]["right"], tasks["ground"]["n"]) == (2, 3)


def test_grounding_wants_every_box_and_no_other(output: Path, tmp_path: Path) -> None:
    """Row 1 says the right box twice, row 2 none."""
    wanted = [box("whatever", 0, 0, 100, 50)]
    references = [{"id": f"id-{row}", "request": 2, "boxes": wanted} for row in range(ROWS)]
    found = judged(output, written(tmp_path / "refs.jsonl", references), "--show", "9")
    ground = found["tasks"]["ground"]
    assert (ground["metric"], ground["n"], ground["right"]) == ("boxes at IoU 0.5", 3, 1)
    assert "most_frequent" not in ground
    assert [each["row"] for each in found["wrong"]] == [1, 2]
    assert found["wrong"][0]["got"] == [["cat", 0, 0, 100, 50]] * 2


def test_detection_counts_boxes_of_the_same_label(output: Path, tmp_path: Path) -> None:
    wanted = [box("Cat", 0, 0, 100, 50), box("dog", 100, 0, 200, 100)]
    references = [
        {"id": f"id-{row}", "task": "detect", "boxes": wanted if row < 2 else []}
        for row in range(ROWS)
    ]
    references.append({"id": "lost", "task": "detect", "boxes": wanted[:1]})
    found = judged(output, written(tmp_path / "refs.jsonl", references))
    assert found["tasks"]["detect"] == {
        "metric": "detection at IoU 0.5",
        "n": 4,
        "boxes_wanted": 5,
        "boxes_found": 3,
        "boxes_paired": 2,
        "precision": 0.666667,
        "recall": 0.4,
        "f1": 0.5,
        "failed": 0,
        "missing": 1,
    }


def test_rows_can_be_named_by_their_number(output: Path, tmp_path: Path) -> None:
    references = [{"row": row, "text": "yes"} for row in range(ROWS)]
    found = judged(output, written(tmp_path / "refs.parquet", references))
    assert (found["tasks"]["vqa"]["right"], found["tasks"]["vqa"]["n"]) == (1, 3)


def test_what_it_says_to_a_person(output: Path, tmp_path: Path) -> None:
    references = [*TEXTS, {"id": "id-0", "task": "ground", "boxes": [box(None, 0, 50, 100, 100)]}]
    path = written(tmp_path / "refs.jsonl", references)
    kept = tmp_path / "kept.json"
    done = vlmbatch("eval", output, "--references", path, "--show=1", "--output", kept)
    assert done.exit_code == 0, done
    assert done.stdout.splitlines() == [
        f"{output} by echo: 7 references, 1 of them without a result; "
        "6 results without a reference",
        "vqa: 2 of 6 right (exact match): 33.33 % (95 % interval 9.68 % to 70.00 %)",
        "  always 'yes' would be 66.67 %",
        "  among the wrong: 1 failed, 1 without a result",
        "ground: 0 of 1 right (boxes at IoU 0.5): 0.00 % (95 % interval 0.00 % to 79.35 %)",
        "wrong, for example:",
        "  ground request 2 of id id-0: 'the cat'",
        "    wanted [0.0, 50.0, 100.0, 100.0]; got cat [0.0, 0.0, 100.0, 50.0]",
        "  vqa request 0 of id id-1: 'Is it?'",
        "    wanted 'yes'; got 'Yes.'",
    ]
    assert json.loads(kept.read_text()) == judged(output, path, "--show=1")


def test_references_of_the_wrong_kind_are_told_and_not_counted(
    output: Path, tmp_path: Path
) -> None:
    references = [*TEXTS, {"id": "id-0", "request": 2, "text": "yes"}]
    done = vlmbatch(
        "eval", output, "--references", written(tmp_path / "refs.jsonl", references), "--json"
    )
    assert done.json["unusable"] == 1
    assert sum(each["n"] for each in done.json["tasks"].values()) == 6
    assert "1 references have no text, or no boxes" in done.stderr


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ([{"image": "a", "text": "b"}], "no column 'id' in the references"),
        ([{"id": "a", "answer": "b"}], "no column 'text' or 'boxes' in the references"),
        ([{"id": "x", "text": "b"}], "none of the 1 references is about a result"),
        ([{"id": "id-0", "request": 2, "text": "b"}], "says what its task answers"),
        (
            [TEXTS[0], TEXTS[1], TEXTS[0]],
            "row 2 of {path}: id 'id-0' has a reference for request 0",
        ),
        (
            [TEXTS[0], {"id": "id-0", "task": "vqa", "text": "no"}],
            "2 references are about request 0",
        ),
        ([{"id": "a", "text": "b"}, {"id": None, "text": "b"}], "row 1 of {path}: id is null"),
        ([{"id": "a", "request": -1, "text": "b"}], "row 0 of {path}: request is -1"),
        ([{"row": 0.5, "text": "b"}], "row 0 of {path}: row is 0.5"),
        ([{"id": "a", "boxes": [{"x": 1, "y": 1}]}], "row 0 of {path}: a box has x1, y1, x2, y2"),
        ([{"id": "a", "boxes": [box("", 5, 0, 5, 9)]}], "has no area"),
        ([{"id": "a", "boxes": {"x1": 3}}], "row 0 of {path}: boxes is no list"),
    ],
)
def test_what_is_no_reference_is_refused_with_its_place(
    output: Path, tmp_path: Path, references: list[dict[str, Any]], message: str
) -> None:
    path = written(tmp_path / "refs.jsonl", references)
    assert message.format(path=path) in refused(output, path)


def test_other_things_that_are_no_references(output: Path, tmp_path: Path) -> None:
    assert "the references: no manifest" in refused(output, tmp_path / "none.csv")
    (tmp_path / "bad.jsonl").write_text('{"id": "a", "text": "b"}\n{"id": \n')
    assert "row 1 of" in (said := refused(output, tmp_path / "bad.jsonl"))
    assert "is no JSON" in said
    (tmp_path / "bad.csv").write_text("id,text\na,[1\n")
    assert "'[1' is no JSON" in refused(output, tmp_path / "bad.csv")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(picture())
    assert "references are Parquet, JSONL or CSV" in refused(output, pictures)
    assert "is no output of vlmbatch" in refused(tmp_path, written(tmp_path / "r.jsonl", TEXTS))


def test_an_id_of_several_rows_is_ambiguous(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.parquet", {"id": ["a", "a", "b"]})
    run = ["run", manifest, "-t", "caption", *echo(reply="x"), "-o", tmp_path / "out"]
    assert vlmbatch(*run, "--num-samples=2", "--temperature=1").exit_code == 0
    by_id = [{"id": "a", "text": "x"}, {"id": "b", "text": "x"}]
    said = refused(tmp_path / "out", written(tmp_path / "refs.jsonl", by_id))
    assert "several rows have the id 'a', one of them row 1" in said
    assert "'row' instead of 'id'" in said
    by_row = [{"row": row, "text": "x"} for row in range(3)]
    done = vlmbatch(
        "eval", tmp_path / "out", "--references", written(tmp_path / "rows.jsonl", by_row), "--json"
    )
    assert done.json["tasks"]["caption"]["right"] == 3
    assert "3 results of other samples" in done.stderr


def test_results_not_gathered_yet_and_a_run_that_goes_on(tmp_path: Path) -> None:
    rows = 30
    manifest = write_manifest(tmp_path / "m.parquet", {"id": [f"{row}" for row in range(rows)]})
    references = written(
        tmp_path / "refs.parquet", [{"id": f"{row}", "text": "x"} for row in range(rows)]
    )
    output = tmp_path / "out"
    run = ["run", manifest, "-t", "caption", *echo(reply="x", hang_rows="25"), "-o", output]
    with Command(*run, "--checkpoint-rows=5") as command:
        until(lambda: len(shards(output)) >= 3, "some rows are committed")
        assert not parts(output)
        done: Finished = vlmbatch("eval", output, "--references", references, "--json")
        command.signal(9, group=True)
    assert done.exit_code == 0, done
    score = done.json["tasks"]["caption"]
    assert (score["n"], score["right"]) == (rows, rows - score["missing"])
    assert 15 <= score["right"] < rows
    assert "a run is going on" in done.stderr
    assert not os.listdir(output / "__vlmbatch" / "tmp")
