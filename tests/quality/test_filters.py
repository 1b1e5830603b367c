"""What exports leave out: against a count by hand, and the same after a kill."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness import OURS, echo, picture, vlmbatch, write_manifest
from vlmbatch.job import TaskSpec
from vlmbatch.quality.filters import Doomed, duplicates, over_limit
from vlmbatch.quality.words import normalised
from vlmbatch.results.schema import RESULT_SCHEMA
from vlmbatch.tasks import make_task

TASKS = {
    "caption": make_task(TaskSpec(name="caption")),
    "vqa": make_task(TaskSpec(name="vqa")),
    "detect": make_task(TaskSpec(name="detect")),
    "kind": make_task(TaskSpec(name="kind", prompt="?", choices=["A", "b"])),
}
COLUMNS = ["row", "request", "sample", "task", "text", "json", "boxes"]


def batches(records: list[dict[str, Any]]) -> list[pa.RecordBatch]:
    schema = pa.schema([RESULT_SCHEMA.field(name) for name in COLUMNS])
    return pa.Table.from_pylist(records, schema=schema).to_batches(max_chunksize=3)


def box(label: str) -> dict[str, Any]:
    return {"label": label, "x1": 0, "y1": 0, "x2": 1, "y2": 1, "score": None}


@st.composite
def results(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Of some rows, with several requests and samples."""
    found = []
    for row in range(draw(st.integers(1, 8))):
        for request, task in enumerate(draw(st.lists(st.sampled_from([*TASKS]), max_size=3))):
            for sample in range(draw(st.integers(1, 2))):
                record = {"row": row, "request": request, "sample": sample, "task": task}
                text = draw(st.sampled_from(["a cat", "A cat.", "b", "", None, "  ", "c d"]))
                chosen = draw(st.sampled_from(["A", "b"]))
                labels = draw(st.lists(st.sampled_from(["cat", "Cat ", "dog"]), max_size=3))
                extra = {"detect": {"boxes": [box(label) for label in labels]}}
                extra["kind"] = {"text": chosen, "json": json.dumps(chosen)}
                found.append(record | extra.get(task, {"text": text}))
    return found


def doomed_of(doomed: Doomed, records: list[dict[str, Any]]) -> list[bool]:
    reasons = [reason for batch in batches(records) for reason in doomed(batch).to_pylist()]
    assert set(reasons) <= {doomed.reason, None}
    again = Doomed.from_table(doomed.table)
    assert reasons == [reason for batch in batches(records) for reason in again(batch).to_pylist()]
    return [reason is not None for reason in reasons]


@settings(max_examples=10)
@given(results())
def test_duplicates_are_all_but_the_first(records: list[dict[str, Any]]) -> None:
    seen, expected = set(), []
    for record in records:
        text = record.get("text") if record["task"] == "caption" else None
        key = normalised(text or "") if (text or "").strip() else None
        expected.append(key is not None and key in seen)
        seen.add(key)
    assert doomed_of(duplicates(batches(records), TASKS), records) == expected


@settings(max_examples=10)
@given(results(), st.integers(1, 3))
def test_no_label_comes_more_often_than_it_may(records: list[dict[str, Any]], limit: int) -> None:
    """Unless another label of the same answer is still wanted."""
    came: Counter[tuple[str, str]] = Counter()
    expected = []
    for record in records:
        task = record["task"]
        labels: set[str] = set()
        if task == "detect":
            labels = {each["label"].strip().lower() for each in record["boxes"]}
        elif task == "kind":
            labels = {record["text"].lower()}
        elif task == "vqa" and record["text"] is not None:
            labels = {record["text"].strip().rstrip(".").lower()}
        expected.append(bool(labels) and all(came[task, label] >= limit for label in labels))
        came.update((task, label) for label in labels)
    assert doomed_of(over_limit(batches(records), TASKS, limit), records) == expected


CAPTIONS = [
    "A cat on a sofa.",
    "I'm sorry, but I can't help with that.",
    "a cat on a sofa",
    "The image shows two boats.",
    "a red car " * 9,
    "A bridge at night.",
    "A lighthouse.",
    "A CAT ON A SOFA!",
]
COLOURS = ["red", "red", "green", "blue", "white", "black", "blue", "yellow"]
LABELS = ["yes", "no", "yes", "yes", "yes", "no", "no", "perhaps"]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight rows in parts of two; rows 1 and 6 have the picture of another."""
    folder = tmp_path_factory.mktemp("drops")
    names = [f"{row}.jpg" for row in range(8)]
    for row, (name, colour) in enumerate(zip(names, COLOURS, strict=True)):
        (folder / name).write_bytes(picture(80 + row, 60, colour, format="JPEG"))
    replies = [list(pair) for pair in zip(CAPTIONS, LABELS, strict=True)]
    columns = {"image": names, "id": names, "reply": replies, "question": ["is it?"] * 8}
    manifest = write_manifest(folder / "m.parquet", columns)
    words = ["run", manifest, "-t", "caption", "-t", "vqa", *echo(reply_from="reply")]
    done = vlmbatch(*words, "-o", folder / "out", "--part-rows", "2")
    assert done.exit_code == 0, done
    return folder / "out"


def exported(
    output: Path, place: Path, *options: str
) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """(the summary, the rows of each task that were exported)"""
    done = vlmbatch("export", output, place, "--to", "jsonl", *options, "--json")
    assert done.exit_code == 0, done
    rows = defaultdict(list)
    for line in (place / "train.jsonl").read_text().splitlines():
        record = json.loads(line)
        rows[record["task"]].append(record["row"])
    summary = done.json
    assert summary["results"] == summary["exported"] + sum(summary["dropped"].values())
    return summary, dict(rows)


ALL = [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("options", "captions", "answers", "dropped"),
    [
        ("--drop refusals", [0, 2, 3, 4, 5, 6, 7], ALL, {"refusal": 1}),
        (
            "--drop refusals,preambles,loops,truncated",
            [0, 2, 5, 6, 7],
            ALL,
            {"refusal": 1, "preamble": 1, "loop": 1},
        ),
        ("--drop duplicate-captions", [0, 1, 3, 4, 5, 6], ALL, {"duplicate_caption": 2}),
        (
            "--drop near-duplicate-images",
            [0, 2, 3, 4, 5, 7],
            [0, 2, 3, 4, 5, 7],
            {"near_duplicate_image": 4},
        ),
        ("--max-per-label 2", ALL, [0, 1, 2, 5, 7], {"label_is_full": 3}),
        # what is left out for another reason is not the first of its kind
        (
            "--drop duplicate-captions --where row>0",
            [1, 2, 3, 4, 5, 6],
            [1, 2, 3, 4, 5, 6, 7],
            {"where": 2, "duplicate_caption": 1},
        ),
        (
            "--drop duplicate-captions,near-duplicate-images,refusals --max-per-label 1",
            [0, 3, 4, 5],
            [0, 5, 7],
            {"refusal": 1, "duplicate_caption": 2, "near_duplicate_image": 3, "label_is_full": 3},
        ),
    ],
)
def test_what_is_left_out_is_counted(
    output: Path,
    tmp_path: Path,
    options: str,
    captions: list[int],
    answers: list[int],
    dropped: dict[str, int],
) -> None:
    summary, rows = exported(output, tmp_path / "export", *options.split())
    assert rows == {"caption": captions, "vqa": answers}
    assert summary["dropped"] == dropped


def test_preambles_are_taken_off_before_anything_is_judged(output: Path, tmp_path: Path) -> None:
    options = ["--strip-preambles", "--drop", "preambles,duplicate-captions"]
    summary, _ = exported(output, tmp_path / "export", *options)
    assert summary["dropped"] == {"duplicate_caption": 2}
    assert '"text": "Two boats."' in (tmp_path / "export" / "train.jsonl").read_text()


def test_an_export_that_was_killed_goes_on_with_the_same_choice(
    output: Path, tmp_path: Path
) -> None:
    """The state that a kill between two pieces leaves: some marks, and what was found for them."""
    options = ["--drop", "duplicate-captions,near-duplicate-images", "--max-per-label", "2"]
    whole, rows = exported(output, tmp_path / "whole", *options)
    place = tmp_path / "killed"
    killed(output, place, options, pieces=2)
    assert len(list((place / OURS / "kept").glob("doomed-*"))) == 3
    resumed, again = exported(output, place, *options)
    assert resumed["pieces_resumed"] == 2
    assert (again, resumed["dropped"]) == (rows, whole["dropped"])
    assert not list((place / OURS).rglob("doomed-*"))


def killed(output: Path, place: Path, options: list[str], *, pieces: int) -> None:
    """An export in a process of its own that dies right after so many pieces."""
    import subprocess
    import sys

    program = f"""
import os, sys
from vlmbatch.exports.pieces import Destination
from vlmbatch.cli import main
commit = Destination.commit
def dying(self, piece, tally):
    commit(self, piece, tally)
    if piece.number == {pieces - 1}:
        os._exit(9)
Destination.commit = dying
main()
"""
    words = ["export", str(output), str(place), "--to", "jsonl", *options]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True)
    assert done.returncode == 9, done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--drop refusal", "it has: refusals, preambles"),
        ("--max-per-label 0", "--max-per-label"),
    ],
)
def test_what_cannot_be_left_out_is_refused(
    output: Path, tmp_path: Path, options: str, said: str
) -> None:
    done = vlmbatch("export", output, tmp_path / "x", "--to", "jsonl", *options.split())
    assert done.exit_code == 2, done
    assert said in done.stderr
    assert not (tmp_path / "x").exists()
