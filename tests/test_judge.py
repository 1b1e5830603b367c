"""``-t judge``: another model's answers, judged beside the images that they are about."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.endpoint_faults import FakeEndpoint, Fault, Status, completion, prompt_of
from tests.harness import (
    EchoLog,
    Finished,
    assert_adds_up,
    echo,
    picture,
    read_results,
    run_json,
    vlmbatch,
    write_manifest,
)
from tests.s3 import S3Server
from vlmbatch.errors import ManifestError
from vlmbatch.job import JobSpec
from vlmbatch.judged_output import open_rows
from vlmbatch.judging import SCHEMA, given_of
from vlmbatch.manifest import Manifest, RowStream
from vlmbatch.manifest.columns import choose_columns
from vlmbatch.records import Range

GOOD = '{"score": 4, "reason": "so it is"}'
ROWS = 10
LOST = 7
"""The image of this row is not there."""


def judgement(row: int, request: int) -> str:
    """What the echo engine says as the judge; most of it is good."""
    return {
        (1, 0): f"```json\n{GOOD}\n```",
        (2, 0): '{"score": 4, "reason": ',
        (3, 0): '{"score": 7, "reason": "great"}',
        (3, 1): '{"score": "4", "reason": "fine"}',
        (4, 0): '{"score": 4}',
        (6, 1): "It is right.",
    }.get((row, request), GOOD)


BAD = {(2, 0), (3, 0), (3, 1), (4, 0), (6, 1)}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished output of a run: relative image paths, an image column of another name, one or
    two questions a row, parts of four rows."""
    folder = tmp_path_factory.mktemp("judged")
    pictures = folder / "data" / "pics"
    pictures.mkdir(parents=True)
    for row in range(ROWS):
        if row != LOST:
            (pictures / f"{row}.png").write_bytes(picture(10 + row, 6))
    questions = [[f"q {row}.{i}?" for i in range(1 + (row % 3 == 0))] for row in range(ROWS)]
    columns = {
        "image": [b"not this one"] * ROWS,
        "file": [f"pics/{row}.png" for row in range(ROWS)],
        "questions": questions,
        "said": [[f"a {row}.{i}" for i in range(len(q))] for row, q in enumerate(questions)],
        "judged": [[judgement(row, i) for i in range(len(q))] for row, q in enumerate(questions)],
        "truth": [f"truth {row}" for row in range(ROWS)],
    }
    manifest = write_manifest(folder / "data" / "m.parquet", columns)
    run = ["run", manifest, "-t", "vqa", "--column", "image=file", "--part-rows", "4"]
    done = vlmbatch(*run, *echo(reply_from="said"), "-o", folder / "answers")
    assert done.exit_code == 0, done
    return folder / "answers"


def judge(answers: Path, output: Path, *options: str | Path) -> Finished:
    words = ["run", answers, "-t", "judge", *echo(reply_from="judged"), "-o", output]
    return vlmbatch(*words, "--max-failure-rate=1", "--json", *options)


@pytest.fixture(scope="module")
def judged(answers: Path) -> Path:
    """The answers, judged."""
    done = judge(answers, answers.parent / "judged")
    assert done.exit_code == 0, done
    assert_adds_up(done.json)
    assert done.json["failures"] == {"schema_mismatch": 5, "bad_row": 1}
    return answers.parent / "judged"


def by_request(output: Path) -> dict[tuple[int, int], dict[str, Any]]:
    return {(each["row"], each["request"]): each for each in read_results(output).to_pylist()}


def test_every_answer_gets_one_judgement_beside_its_image(answers: Path, judged: Path) -> None:
    found, given = by_request(judged), by_request(answers)
    assert found.keys() == given.keys()
    for key, each in found.items():
        assert (each["id"], each["image"]) == (given[key]["id"], given[key]["image"])
        if key[0] == LOST:
            assert each["error"]["code"] == "bad_row"
            assert each["error"]["message"].startswith("no answer: image_missing: no such file")
            continue
        assert each["image_width"] == 10 + key[0]  # of the run's own image, found where that was
        assert f"asked:\n{given[key]['question']}\n" in each["question"]
        assert f"answered:\n{given[key]['text']}\n" in each["question"]
        if key in BAD:
            assert each["error"]["code"] == "schema_mismatch"
            assert each["raw"] == judgement(*key)
        else:
            assert json.loads(each["json"]) == {"score": 4, "reason": "so it is"}
    says = {key: found[key]["error"]["message"] for key in BAD}
    assert says[3, 0] == "$.score: 7 is not one of [1, 2, 3, 4, 5]"
    assert "'4' is not of type 'integer'" in says[3, 1] or "is not one of" in says[3, 1]
    assert says[4, 0] == "$: 'reason' is a required property"
    assert says[2, 0].startswith("not JSON: ")


def test_the_same_command_goes_on_and_asks_nothing_twice(
    answers: Path, judged: Path, tmp_path: Path
) -> None:
    """It goes on at row 6, in the middle of the second part of the answers."""
    log = EchoLog(tmp_path / "echo.log")
    for limit in (["--limit=6", "--checkpoint-rows=1"], []):
        done = judge(answers, tmp_path / "out", f"--engine-arg=log={log.path}", *limit)
        assert done.exit_code == 0, done
    assert log.rows_twice() == 0
    assert read_results(tmp_path / "out").equals(read_results(judged))


def test_retry_asks_only_failed_judgements_of_answers(judged: Path, tmp_path: Path) -> None:
    log = EchoLog(tmp_path / "echo.log")
    shutil.copytree(judged, tmp_path / "out")
    before = by_request(judged)
    done = vlmbatch("retry", tmp_path / "out", f"--engine-arg=log={log.path}", "--json")
    assert done.json["failures"] == {"schema_mismatch": 5, "bad_row": 1}
    assert {(line.row, line.request) for line in log.lines()} == BAD
    after = by_request(tmp_path / "out")
    assert {key for key in after if after[key] != before[key]} == BAD  # their attempts
    assert all(after[key]["attempts"] == 2 for key in BAD)


def test_an_endpoint_is_held_to_the_form_and_may_do_better_at_a_retry(
    answers: Path, tmp_path: Path
) -> None:
    better = threading.Event()

    def script(number: int, body: dict[str, Any]) -> Fault:
        good = better.is_set() or "a 2.0" not in prompt_of(body)
        return Status(200, completion(GOOD if good else "no idea"))

    output = tmp_path / "out"
    with FakeEndpoint(script, owner="someone") as endpoint:
        words = ["run", answers, "-t", "judge", "--base-url", endpoint.url, "-o", output]
        done = vlmbatch(*words, "--limit=3", "--json")
        assert done.json["failures"] == {"schema_mismatch": 1}, done
        better.set()
        again = vlmbatch("retry", output, "--json")
        assert (again.json["ok"], again.json["failed"]) == (1, 0), again
        assert len(endpoint.bodies) == 4 + 1
        forms = [body["response_format"]["json_schema"] for body in endpoint.bodies]
    assert all((form["schema"], form["strict"]) == (SCHEMA, True) for form in forms)
    assert json.loads(by_request(output)[2, 0]["json"])["score"] == 4


def test_other_answers_are_not_judged_unnoticed(answers: Path, tmp_path: Path) -> None:
    shutil.copytree(answers, tmp_path / "answers")
    assert judge(tmp_path / "answers", tmp_path / "out", "--limit=4").exit_code == 0
    spec = JobSpec(manifest=str(tmp_path / "answers"), tasks="judge")
    seen = Manifest.from_json(open_rows(spec).to_json())  # as a worker has it
    columns = choose_columns(seen.schema, {"image": "file"}, [], where="there")
    (row,) = RowStream(seen, columns).rows(Range(5, 6))
    assert [(given.question, given.answer) for given in row.answers] == [("q 5.0?", "a 5.0")]
    assert vlmbatch("retry", tmp_path / "answers").exit_code == 0  # the lost image is lost still
    with pytest.raises(ManifestError, match=r"the answers in .* changed"):
        list(RowStream(seen, columns).rows(Range(5, 6)))
    done = judge(tmp_path / "answers", tmp_path / "out")
    assert done.exit_code == 2
    assert "another question; these changed:\n  manifest: was" in done.stderr
    assert vlmbatch("retry", tmp_path / "out").exit_code == 2


def test_a_rubric_of_ones_own_may_name_columns_of_the_manifest(
    answers: Path, tmp_path: Path
) -> None:
    rubric = "{{ task }}: {{ question }} {{ answer }}, rightly {{ truth }}: yes or no?"
    output = tmp_path / "out"
    words = ["run", answers, "-t", "judge", "--prompt", rubric, "--choices", "yes,no"]
    done = vlmbatch(*words, *echo(reply="yes"), "-o", output, "--limit=2", "--carry", "truth")
    assert done.exit_code == 0, done
    first = by_request(output)[0, 1]
    assert first["question"] == "vqa: q 0.1? a 0.1, rightly truth 0: yes or no?"
    assert (first["json"], first["truth"]) == ('"yes"', "truth 0")
    assert run_json(output)["job"]["tasks"][0]["json_schema"] is None


def test_samples_are_answers_of_their_own(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.parquet", {"said": [[["a", "b"], ["c", "d"]]] * 2})
    words = ["run", manifest, "-t", "caption", "-t", "ocr", *echo(reply_from="said")]
    words += ["--num-samples=2", "--temperature=1", "-o", tmp_path / "answers"]
    assert vlmbatch(*words).exit_code == 0
    words = ["run", tmp_path / "answers", "-t", "judge", *echo(reply=GOOD), "-o", tmp_path / "out"]
    assert vlmbatch(*words).exit_code == 0
    found = by_request(tmp_path / "out")
    assert list(found) == [(row, request) for row in range(2) for request in range(4)]
    said = [found[1, request]["question"] for request in range(4)]
    asked = ["Describe the image."] * 2 + ["Read all the text in the image."] * 2
    for text, question, answer in zip(said, asked, "abcd", strict=True):
        assert f"asked:\n{question}\n" in text
        assert f"answered:\n{answer}\n" in text


def test_judgements_can_be_judged(judged: Path, tmp_path: Path) -> None:
    assert judge(judged, tmp_path / "second", "--limit=2").exit_code == 0
    second = by_request(tmp_path / "second")[0, 0]
    assert GOOD in second["question"]
    assert "a 0.0" in second["question"]
    assert (second["status"], second["image_width"]) == ("ok", 10)
    assert judge(tmp_path / "second", tmp_path / "third").exit_code == 0
    found = vlmbatch("status", tmp_path / "third", "--json").json
    assert (found["state"], found["rows"], found["done"]) == ("finished", 2, 2)


def test_a_plan_counts_the_judgements_and_any_engine_may_judge(answers: Path) -> None:
    words = ["plan", answers, "-t", "judge", "-m", "demo", "--engine", "transformers", "--json"]
    done = vlmbatch(*words)
    assert done.exit_code == 0, done
    assert done.json["requests"] == {"count": 14, "counted": "counted"}
    assert done.json["sample"]["failure_rate"] == 0.1
    assert "a 0.0" in done.json["prompts"][0]["prompt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-t", "judge", "-t", "caption"], "-t judge stands alone"),
        (["-t", "judge", "--include", "*.png"], "-t judge takes one output, and all of it"),
        (["-t", "judge", "--incremental"], "-t judge takes one output, and all of it"),
    ],
)
def test_what_a_judge_cannot_do_is_refused(
    answers: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    done = vlmbatch("run", answers, *options, *echo(), "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert message in done.stderr


def test_answers_about_other_rows_are_not_judged(answers: Path) -> None:
    manifest = open_rows(JobSpec(manifest=str(answers), tasks="judge"))
    columns = choose_columns(manifest.schema, {"image": "file", "id": "truth"}, [], where="there")
    with pytest.raises(ManifestError, match=r"row 3 with the id 'truth 3', and .* answers about"):
        list(RowStream(manifest, columns).rows(Range(3, 4)))


def test_an_output_that_grows_is_not_judged(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.parquet", {"id": ["a"], "judged": [GOOD]})
    run = ["run", manifest, "-t", "caption", "--incremental", *echo(), "-o", tmp_path / "grows"]
    assert vlmbatch(*run).exit_code == 0
    done = judge(tmp_path / "grows", tmp_path / "out")
    assert done.exit_code == 2
    assert "grows by --incremental" in done.stderr


def test_only_a_finished_output_is_judged(answers: Path, tmp_path: Path) -> None:
    manifest = answers.parent / "data" / "m.parquet"
    done = judge(manifest, tmp_path / "out")
    assert done.exit_code == 2
    assert "is no output of vlmbatch" in done.stderr
    assert "vlmbatch run OUTPUT -t judge" in done.stderr
    done = judge(answers, answers, "--overwrite")
    assert done.exit_code == 2
    assert "which holds the answers" in done.stderr
    half = ["run", manifest, "-t", "vqa", "--column", "image=file", *echo(reply_from="said")]
    half += ["-o", tmp_path / "half"]
    assert vlmbatch(*half, "--prepare").exit_code == 0
    assert "0 of 10 rows are answered" in judge(tmp_path / "half", tmp_path / "out").stderr
    assert vlmbatch(*half, "--limit=5").exit_code == 0
    assert judge(tmp_path / "half", tmp_path / "five").json["rows"] == 5
    assert vlmbatch(*half, "--prepare").exit_code == 0
    done = judge(tmp_path / "half", tmp_path / "out")
    assert done.exit_code == 2
    assert "is not finished: 5 of 10 rows are answered" in done.stderr


def test_an_output_that_is_written_to_is_not_judged(answers: Path, tmp_path: Path) -> None:
    from vlmbatch.results.store import open_store

    with open_store(answers).lock():
        done = judge(answers, tmp_path / "out")
    assert done.exit_code == 1
    assert "a run is going on in" in done.stderr


def test_everything_may_be_in_a_store(s3_server: S3Server, tmp_path: Path) -> None:
    """Manifest, images beside it, answers, judgements and references."""
    bucket, fs = s3_server.new_bucket(), s3_server.fs()
    columns = {"image": ["pics/a.png", "pics/b.png"], "id": ["a", "b"], "said": ["yes", "no"]}
    manifest = write_manifest(tmp_path / "m.parquet", columns)
    references = tmp_path / "truth.csv"
    references.write_text("id,text\na,yes\nb,yes\n")
    for path in (manifest, references):
        fs.put_file(str(path), f"{bucket}/in/{path.name}")
    fs.pipe({f"{bucket}/in/pics/{name}.png": picture(20, 10) for name in "ab"})
    place = f"s3://{bucket}"
    with s3_server.in_environment():
        run = ["run", f"{place}/in/m.parquet", "-t", "vqa", "--question=Is it?", "-o"]
        assert vlmbatch(*run, f"{place}/answers", *echo(reply_from="said")).exit_code == 0
        run = ["run", f"{place}/answers", "-t", "judge", "--json", "-o", f"{place}/judged"]
        done = vlmbatch(*run, *echo(reply=GOOD))
        assert done.exit_code == 0, done
        assert (done.json["ok"], done.json["failed"]) == (2, 0)
        found = vlmbatch(
            "eval", f"{place}/answers", "--references", f"{place}/in/truth.csv", "--json"
        )
        assert found.exit_code == 0, found
    assert found.json["tasks"]["vqa"]["right"] == 1
    with fs.open(f"{bucket}/judged/part-00000.parquet") as file:
        judgements = pq.read_table(file).to_pylist()
    assert [(each["status"], each["image_width"]) for each in judgements] == [("ok", 20)] * 2
    assert "answered:\nno\n" in judgements[1]["question"]


# answers in words


def result(task: str, question: str | None, **more: Any) -> dict[str, Any]:
    fixed = {"text": None, "boxes": None, "points": None, "error": None}
    fixed |= {"image_width": 200, "image_height": 100}
    return {"task": task, "question": question, "status": "ok", **fixed, **more}


@pytest.mark.parametrize(
    ("task", "question", "asked"),
    [
        ("vqa", "What is it?", "What is it?"),
        ("caption", None, "Describe the image."),
        ("title", "A title for this.", "A title for this."),
        ("ground", "the cat", "Where is this in the image: the cat"),
        ("detect", '["cat", "dog"]', "Where in the image are: cat, dog"),
        ("detect", "[Find] the cats.", "[Find] the cats."),
    ],
)
def test_what_was_asked_is_a_sentence(task: str, question: str | None, asked: str) -> None:
    assert given_of(result(task, question, text="x")).question == asked


def test_boxes_are_shares_of_the_image() -> None:
    boxes = [{"label": "cat", "x1": 20, "y1": 50, "x2": 100, "y2": 100}]
    said = given_of(result("detect", '["cat"]', boxes=boxes)).answer
    assert said == (
        "cat: from 10% to 50% of the width, counted from the left, and from 50% to 100% of the "
        "height, counted from the top"
    )
    assert given_of(result("ground", "a cat", boxes=[])).answer == "It is not in the image."


def test_points_are_answers_too() -> None:
    """A model that points has no boxes, and did find it."""
    points = [{"label": "cat", "x": 20, "y": 50}]
    said = given_of(result("detect", '["cat"]', boxes=[], points=points)).answer
    assert said == (
        "cat: at 10% of the width, counted from the left, and 50% of the height, counted from the "
        "top"
    )
