"""``vlmbatch reparse``: other parsers and box spaces over recorded answers; kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.harness import (
    OURS,
    Command,
    assert_whole,
    echo,
    leftovers,
    parts,
    picture,
    quiz,
    read_results,
    run_json,
    shards,
    until,
    vlmbatch,
    write_manifest,
)

EXAMPLE = Path(__file__).parents[1] / "examples" / "my_family.py"
WIDTH, HEIGHT = 400, 200
ANSWER = '[{"bbox_2d": [250, 500, 500, 750], "label": "cat"}]'
OTHER = "cat: 256 512 512 768"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 rows in parts of 40: two of three answers are generic's JSON, the third my_family's."""
    folder = tmp_path_factory.mktemp("boxes")
    answers = [OTHER if row % 3 == 0 else ANSWER for row in range(90)]
    columns = {"image": [picture(WIDTH, HEIGHT)] * 90, "answer": answers, "shelf": range(90)}
    manifest = write_manifest(folder / "boxes.parquet", {k: list(v) for k, v in columns.items()})
    words = [manifest, "-t", "detect", "--labels", "cat,dog", "--carry", "shelf"]
    done = vlmbatch(
        "run", *words, *echo(reply_from="answer"), "-o", folder / "out", *OPTIONS, "--json"
    )
    assert done.exit_code == 0, done
    assert done.json["failures"] == {"parse_failed": 30}
    return folder


OPTIONS = ["--part-rows=40", "--max-failure-rate=0.4"]


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "out", tmp_path / "out")
    return tmp_path / "out"


def boxes_of(output: Path, row: int) -> list[tuple[Any, ...]] | None:
    boxes = read_results(output)["boxes"][row].as_py()
    return boxes and [tuple(box.values())[:5] for box in boxes]


def test_another_box_space_moves_the_boxes_and_nothing_else(output: Path) -> None:
    before = read_results(output)
    assert boxes_of(output, 1) == [("cat", 100, 100, 200, 150)]
    done = vlmbatch("reparse", output, "--box-space", "0-1000-yxyx", "--json")
    assert done.exit_code == 0, done
    assert (done.json["results"], done.json["changed"], done.json["mended"]) == (90, 60, 0)
    assert boxes_of(output, 1) == [("cat", 200, 50, 300, 100)]
    after = read_results(output)
    same = [name for name in before.column_names if name != "boxes"]
    assert after.select(same).equals(before.select(same))
    assert after.schema.equals(before.schema)
    assert after["shelf"].to_pylist() == list(range(90))
    assert (len(parts(output)), shards(output), leftovers(output)) == (3, [], [])


def test_another_familys_parser_mends_and_breaks(output: Path) -> None:
    done = vlmbatch("reparse", output, "--family", EXAMPLE, "--json")
    assert done.exit_code == 3, done  # more failed than --max-failure-rate allows
    counts = {key: done.json[key] for key in ("ok", "failed", "changed", "mended", "broken")}
    assert counts == {"ok": 30, "failed": 60, "changed": 90, "mended": 30, "broken": 60}
    assert boxes_of(output, 0) == [("cat", 100, 100, 200, 150)]
    assert read_results(output)["error"][1].as_py()["code"] == "parse_failed"
    again = vlmbatch("reparse", output)
    assert again.exit_code == 2
    assert "is not executed unasked" in again.stderr
    assert vlmbatch("reparse", output, "--family", "generic").exit_code == 0
    assert boxes_of(output, 1) == [("cat", 100, 100, 200, 150)]


def test_the_next_run_goes_on_with_it(finished: Path, output: Path) -> None:
    words = ["run", finished / "boxes.parquet", "-t", "detect", "--labels", "cat,dog"]
    words += ["--carry", "shelf", *echo(reply_from="answer"), "-o", output, *OPTIONS, "--json"]
    assert vlmbatch("reparse", output, "--box-space", "0-1000-yxyx").exit_code == 0
    done = vlmbatch(*words)
    assert (done.exit_code, done.json["skipped"]) == (0, 90), done
    refused = vlmbatch(*words, "--box-space", "0-999")
    assert refused.exit_code == 2
    assert "box_space was '0-1000-yxyx', now '0-999'" in refused.stderr
    assert f"vlmbatch reparse {output}" in refused.stderr


def test_rows_that_come_later_are_read_as_the_others_are(finished: Path, tmp_path: Path) -> None:
    words = ["run", finished / "boxes.parquet", "-t", "detect", "--labels", "cat,dog"]
    words += [*echo(reply_from="answer"), "-o", tmp_path / "out", *OPTIONS]
    assert vlmbatch(*words, "--limit=50").exit_code == 0
    assert vlmbatch("reparse", tmp_path / "out", "--box-space", "0-1000-yxyx").exit_code == 0
    assert vlmbatch(*words).exit_code == 0
    boxes = {str(boxes_of(tmp_path / "out", row)) for row in range(90) if row % 3}
    assert boxes == {str([("cat", 200.0, 50.0, 300.0, 100.0)])}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--family", "quen"], "unknown family 'quen'"),
        (["--box-space", "metres"], "family 'generic' has no reading 'metres' of its boxes"),
        (["--family", "no/such.py"], "cannot read the family file no/such.py"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(
    output: Path, options: list[str], message: str
) -> None:
    before = {path: path.read_bytes() for path in [*parts(output), output / OURS / "run.json"]}
    done = vlmbatch("reparse", output, *options)
    assert done.exit_code == 2
    assert message in done.stderr
    assert {path: path.read_bytes() for path in before} == before
    assert vlmbatch("reparse", output.parent).exit_code == 2


def test_failures_without_an_answer_stay_as_they_are(tmp_path: Path) -> None:
    images = [picture(WIDTH, HEIGHT), b"no picture", None, picture(WIDTH, HEIGHT)]
    manifest = write_manifest(tmp_path / "m.parquet", {"image": images})
    words = ["run", manifest, "-t", "detect", "--labels=cat", "--max-failure-rate=1"]
    assert vlmbatch(*words, *echo(reply="a cat"), "-o", tmp_path / "out").exit_code == 0
    before = read_results(tmp_path / "out")
    done = vlmbatch("reparse", tmp_path / "out", "--json")
    assert done.exit_code == 0
    assert done.json["failures"] == {"parse_failed": 2, "image_unreadable": 1, "bad_row": 1}
    assert (done.json["failed"], done.json["not_read"], done.json["changed"]) == (2, 2, 0)
    assert read_results(tmp_path / "out").equals(before)


def test_every_request_and_sample_is_read(tmp_path: Path) -> None:
    made = quiz(tmp_path, 50)
    words = ["--num-samples=3", "--temperature=1", "--seed=5", "--choices", "yes,no"]
    answers = [[["yes", " no", "maybe"]] * len(each) for each in made.answers]
    write_manifest(
        tmp_path / "quiz.parquet",
        {"questions": [[f"{i}?"] * len(a) for i, a in enumerate(answers)], "answers": answers},
    )
    run = ["run", made.path, "-t", "vqa", *echo(reply_from="answers"), *words, "--part-rows=20"]
    assert vlmbatch(*run, "-o", tmp_path / "out", "--max-failure-rate=1").exit_code == 0
    before = read_results(tmp_path / "out")
    assert before["json"].to_pylist()[:3] == ['"yes"', '"no"', None]
    _forget(tmp_path / "out")
    done = vlmbatch("reparse", tmp_path / "out", "--json")
    assert done.json["changed"] == before.num_rows
    assert read_results(tmp_path / "out").equals(before)


def _forget(output: Path) -> None:
    """As an older parser may have left it: every answer failed to parse."""
    for part in parts(output):
        table = pq.read_table(part)
        error = {"code": "parse_failed", "stage": "parse", "message": "?"}
        changes = {"text": None, "json": None, "status": "failed", "error": error}
        for name, value in changes.items():
            field = table.schema.field(name)
            column = pa.array([value] * table.num_rows, field.type)
            table = table.set_column(table.schema.get_field_index(name), field, column)
        meta = {b"vlmbatch": pq.read_metadata(part).metadata[b"vlmbatch"]}
        pq.write_table(table.replace_schema_metadata(meta), part)


HANGS = """
import signal
from dataclasses import replace
from vlmbatch.families import entry_named

GENERIC = entry_named("generic")

class Hangs(type(GENERIC.make({}))):
    def read_boxes(self, kind, text, labels, image):
        if "hang here" in text:
            signal.pause()
        return super().read_boxes(kind, text, labels, image)

ENTRY = replace(GENERIC, name="hangs", make=lambda config: Hangs())
"""
"""Reads as generic does, but for one answer, at which it waits to be killed."""


def test_a_reparse_that_was_killed_is_ended_by_another_one(tmp_path: Path) -> None:
    rows = 300
    answers = [ANSWER] * rows
    answers[190] = f"{ANSWER} hang here"
    columns = {"image": [picture(WIDTH, HEIGHT)] * rows, "answer": answers}
    manifest = write_manifest(tmp_path / "m.parquet", columns)
    words = ["run", manifest, "-t", "detect", "--labels=cat", *echo(reply_from="answer")]
    words += ["-o", tmp_path / "out", "--part-rows=30"]
    output = tmp_path / "out"
    assert vlmbatch(*words).exit_code == 0
    (tmp_path / "hangs.py").write_text(HANGS)
    first = os.stat(parts(output)[2]).st_mtime_ns
    how = ["--box-space", "0-1000-yxyx", "--family"]
    with Command("reparse", output, *how, tmp_path / "hangs.py") as command:
        until(lambda: os.stat(parts(output)[2]).st_mtime_ns != first, "the third part is new")
        command.signal(signal.SIGKILL)
        assert command.wait().exit_code == -signal.SIGKILL
    assert run_json(output)["rereading"] is True
    spaces = {row["boxes"][0]["x1"] for row in read_results(output).to_pylist()}
    assert spaces == {100.0, 200.0}  # of each some
    for refused in (vlmbatch(*words), vlmbatch("retry", output)):
        assert refused.exit_code == 2
        assert f"vlmbatch reparse {output}" in refused.stderr
    assert vlmbatch("reparse", output, *how, "generic").exit_code == 0
    assert {row["boxes"][0]["x1"] for row in read_results(output).to_pylist()} == {200.0}
    assert run_json(output)["rereading"] is False
    assert vlmbatch(*words).exit_code == 0
    table = read_results(output)
    assert table["row"].to_pylist() == list(range(rows))


def test_answers_not_yet_gathered_are_read_too(tmp_path: Path) -> None:
    made = quiz(tmp_path, 30)
    run = ["run", made.path, "-t", "vqa", *echo(reply_from="answers", hang_rows="25")]
    output = tmp_path / "out"
    with Command(*run, "-o", output, "--checkpoint-rows=5", "--part-rows=100") as command:
        until(lambda: len(shards(output)) >= 3, "some rows are committed")
        command.signal(signal.SIGKILL, group=True)
    assert not parts(output)
    assert vlmbatch("reparse", output).exit_code == 0
    done = vlmbatch("run", made.path, "-t", "vqa", *echo(reply_from="answers"), "-o", output)
    assert done.exit_code == 0, done
    assert_whole(output, made.answers, ids=made.ids)


def test_labels_that_are_not_in_the_results_are_told(tmp_path: Path) -> None:
    answer = json.dumps({"bbox_2d": [250, 500, 500, 750]})
    columns = {"image": [picture(WIDTH, HEIGHT)], "labels": [["cat"]]}
    manifest = write_manifest(tmp_path / "m.parquet", columns)
    words = ["run", manifest, "-t", "detect", "--prompt", "Where is the {{ labels[0] }}?"]
    assert vlmbatch(*words, *echo(reply=answer), "-o", tmp_path / "out").exit_code == 0
    assert boxes_of(tmp_path / "out", 0) == [("cat", 100, 100, 200, 150)]
    done = vlmbatch("reparse", tmp_path / "out", "--box-space", "0-1000")
    assert done.exit_code == 0
    assert "task 'detect' has a prompt of its own" in done.stderr
