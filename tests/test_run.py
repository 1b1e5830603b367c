"""``vlmbatch run`` and ``status``: what a user sees, in real runs with the echo engine."""

from __future__ import annotations

import json
import shlex
import signal
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.harness import (
    OURS,
    Command,
    EchoLog,
    Finished,
    Quiz,
    assert_adds_up,
    assert_whole,
    echo,
    leftovers,
    parts,
    picture,
    quiz,
    read_results,
    run_command,
    run_json,
    shards,
    until,
    vlmbatch,
    write_manifest,
)

FIELDS = {
    *("rows", "requests", "ok", "failed", "skipped", "failures", "seconds", "rows_per_second"),
    *("prompt_tokens", "completion_tokens", "model", "engine", "executor", "workers", "output"),
    *("resumed", "warnings"),
}


@pytest.fixture
def made(tmp_path: Path) -> Quiz:
    return quiz(tmp_path, 40)


def ask(made: Quiz, *options: str | Path) -> Finished:
    """The quiz, asked into out/ beside it, with a JSON summary."""
    return vlmbatch("run", *made.options, "-o", made.path.parent / "out", "--json", *options)


def captions(path: Path, rows: int) -> Path:
    return write_manifest(path, {"answer": [f"caption {i}" for i in range(rows)]})


# the summary, stdout and the default output


def test_a_run_prints_its_summary_and_nothing_else_to_stdout(made: Quiz) -> None:
    log = EchoLog(made.path.with_name("log"))
    options = [*made.options, *echo(log=log.path), "--part-rows=16", "--workers=1"]
    ended = run_command("run", *options, "--json", folder=made.path.parent)
    assert ended.exit_code == 0, ended
    summary = ended.json
    assert summary.keys() >= FIELDS
    assert_adds_up(summary)
    assert (summary["rows"], summary["ok"], summary["requests"]) == (40, 40, 54)
    assert (summary["failed"], summary["failures"], summary["warnings"]) == (0, {}, [])
    assert summary["completion_tokens"] == 2 * 54  # "answer 3.0" is two words
    assert summary["prompt_tokens"] == 2 * 54
    assert 0 < summary["seconds"] < 60
    assert summary["rows_per_second"] == pytest.approx(40 / summary["seconds"], rel=0.01)
    assert (summary["model"], summary["engine"], summary["executor"]) == ("echo", "echo", "local")
    assert (summary["workers"], summary["resumed"], summary["output"]) == (1, False, "quiz-vqa")
    assert "Traceback" not in ended.stderr
    table = assert_whole(made.path.parent / "quiz-vqa", made.answers, ids=made.ids)
    assert table["question"].to_pylist()[:2] == ["question 0.0?", "question 0.1?"]
    assert set(table["image_width"].to_pylist()) == {8}
    assert set(table["attempts"].to_pylist()) == {1}
    assert len(log) == 54


def test_a_finished_run_runs_again_without_asking_anything(made: Quiz) -> None:
    log = EchoLog(made.path.with_name("log"))
    assert ask(made, *echo(log=log.path)).exit_code == 0
    again = ask(made, *echo(log=log.path))
    assert again.exit_code == 0, again
    assert_adds_up(again.json)
    assert (again.json["skipped"], again.json["ok"], again.json["resumed"]) == (40, 0, True)
    assert len(log) == 54
    text = vlmbatch("run", *made.options, "-o", made.path.parent / "out")
    assert "done: 40 rows = 0 ok + 0 failed + 40 answered earlier" in text.stdout, text


def test_the_default_output_is_named_after_manifest_and_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions(tmp_path / "photos" / "a.parquet", 3)
    captions(tmp_path / "photos" / "b.parquet", 2)
    monkeypatch.chdir(tmp_path)
    ended = vlmbatch("run", "photos/*.parquet", "-t", "caption", "-t", "ocr", *echo(), "--json")
    assert ended.exit_code == 0, ended
    assert (ended.json["output"], ended.json["rows"]) == ("photos-caption+ocr", 5)
    assert_whole(tmp_path / "photos-caption+ocr", [["an image", "an image"]] * 5)


# exit codes


def test_more_failed_rows_than_allowed_is_exit_code_3_each_time(made: Quiz) -> None:
    faults = echo(fail_rows="3,7,8,9,20")
    ended = ask(made, *faults)
    assert ended.exit_code == 3, ended
    assert_adds_up(ended.json)
    assert (ended.json["ok"], ended.json["failed"]) == (35, 5)
    assert ended.json["failures"] == {"engine_failed": 6 + 1}  # rows 3 and 9 have two questions
    codes = dict.fromkeys((3, 7, 8, 9, 20), "engine_failed")
    assert_whole(made.path.parent / "out", made.answers, ids=made.ids, failed=codes)
    again = ask(made, *faults)
    assert (again.exit_code, again.json["exit_code"]) == (3, 3), again
    assert any("vlmbatch retry" in warning for warning in again.json["warnings"])
    assert ask(made, *faults, "--max-failure-rate=0.125").exit_code == 0
    assert ask(made, *faults, "--max-failure-rate=0.12").exit_code == 3


def test_a_run_stops_early_when_far_too_many_rows_fail(tmp_path: Path) -> None:
    manifest = captions(tmp_path / "m.parquet", 3000)
    every = ",".join(map(str, range(0, 3000, 2)))
    options = ["-o", tmp_path / "out", "--checkpoint-rows=64", "--json"]
    faults = echo(fail_rows=every, delay=0.01, hang_after=1000)  # at row 2000 at the latest
    ended = vlmbatch("run", manifest, *faults, *options)
    assert ended.exit_code == 3, ended
    summary = ended.json
    assert summary["rows"] == 3000
    assert summary["rows"] == summary["ok"] + summary["failed"] + summary["left"]
    assert 500 <= summary["left"] < 2500
    assert vlmbatch("status", tmp_path / "out", "--json").json["state"] == "stopped"
    assert not leftovers(tmp_path / "out")


def test_what_was_asked_wrongly_is_exit_code_2_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    captions(tmp_path / "m.parquet", 2)
    quiz(tmp_path, 2)
    there = sorted(tmp_path.iterdir())
    for words, message in {
        "run nowhere.parquet --engine echo": "no manifest nowhere.parquet",
        "run m.parquet -t vqa --engine echo": "needs a column 'question'",
        "run m.parquet -t poem --engine echo": "unknown task 'poem'",
        "run m.parquet --engine echo --engine-arg dely=1": "did you mean 'delay'",
        "run m.parquet --engine echo --engine-arg delay=x": "--engine-arg delay=x",
        "run m.parquet --engine echo --carry nothing": "no column 'nothing'",
        "run m.parquet --engine echo --column image=url": "no column 'url'",
        "run m.parquet --engine echo --workers 0": "workers",
        "run m.parquet --engine echo --limit 0": "limit",
        "run m.parquet --engine echo --prompt {{": "not a template",
        "run m.parquet --engine echo --prompt {{nope}}": "names 'nope'",
        "run m.parquet --engine echo --prompt @nofile": "cannot read nofile",
        "run m.parquet --engine echo -t caption --question x?": "--question is for -t vqa",
        "run m.parquet --engine echo -t caption -t caption": "given twice",
        "run m.parquet --engine echo --family kosmos9": "unknown family 'kosmos9'",
        "run m.parquet --engine echo --executor local --ray-address auto": "--ray-address",
        "run quiz.parquet --engine echo": "say what to ask",
        "run m.parquet --engine warp": "warp",
        "run": "MANIFEST",
        "status nowhere": "no output of vlmbatch",
        "retry nowhere": "no output of vlmbatch",
    }.items():
        ended = vlmbatch(*shlex.split(words))
        assert (ended.exit_code, ended.stdout) == (2, ""), (words, str(ended))
        assert message in ended.stderr, words
    assert sorted(tmp_path.iterdir()) == there


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_is_finished_and_ends_with_130(
    tmp_path: Path, number: signal.Signals
) -> None:
    """Requests that hang must not hold it up: they are given five seconds."""
    made = quiz(tmp_path, 200)
    log, out = EchoLog(tmp_path / "log"), tmp_path / "out"
    options = [*made.options, "-o", out, "--part-rows=32", "--checkpoint-rows=8", "--json"]
    faults = echo(log=log.path, delay=0.01, capacity=8, hang_after=80, hang_until=tmp_path / "go")
    hang = number == signal.SIGINT
    with Command("run", *options, *faults) as command:
        until(lambda: len(log) == 80, "80 answers")
        command.signal(number)
        if not hang:
            command.read_until("stopping")
            (tmp_path / "go").touch()
        ended = command.wait()
    assert ended.exit_code == 130, ended
    summary = ended.json
    assert summary["left"] > 0
    assert summary["rows"] == summary["ok"] + summary["left"] == 200
    answered = {line.row for line in log.lines()}
    assert summary["ok"] <= len(answered)
    if not hang:  # each range's finished prefix is committed: here all that was answered
        assert summary["ok"] == len(answered)
    assert not leftovers(out)
    assert vlmbatch("status", out, "--json").json["state"] == "interrupted"
    resumed = vlmbatch("run", *options, *echo(log=log.path))
    assert resumed.exit_code == 0, resumed
    assert_adds_up(resumed.json)
    assert resumed.json["skipped"] == summary["ok"]
    assert_whole(out, made.answers, ids=made.ids)


PATIENT = (
    "-c",
    "import vlmbatch.driver; vlmbatch.driver.DRAIN_SECONDS = 3600.0;"
    "from vlmbatch.cli import main; main()",
)
"""Waits for an hour, not for five seconds, for what is in flight."""


def test_a_second_signal_ends_the_run_at_once(tmp_path: Path) -> None:
    made = quiz(tmp_path, 100)
    log, out = EchoLog(tmp_path / "log"), tmp_path / "out"
    options = [*made.options, "-o", out, "--checkpoint-rows=8"]
    hanging = echo(log=log.path, hang_rows=range(20, 100))
    with Command("run", *options, *hanging, program=PATIENT) as command:
        until(lambda: {line.row for line in log.lines()} >= set(range(20)), "20 rows")
        command.signal(signal.SIGINT)
        command.read_until("stopping")
        command.signal(signal.SIGINT)
        ended = command.wait()
    assert ended.exit_code == 130, ended
    assert "Traceback" not in ended.stderr
    assert vlmbatch("run", *options).exit_code == 0
    assert_whole(out, made.answers, ids=made.ids)


# one output, one run


def test_a_second_run_on_the_same_output_stops_and_names_the_first(tmp_path: Path) -> None:
    made = quiz(tmp_path, 100)
    out = tmp_path / "out"
    options = [*made.options, "-o", out]
    with Command("run", *options, *echo(hang_rows="99", hang_until=tmp_path / "go")) as first:
        until((out / OURS / "nonce").exists, "the run")
        for words in (["run", *options], ["run", *options, "--overwrite"], ["retry", out]):
            second = vlmbatch(*words)
            assert (second.exit_code, second.stdout) == (1, ""), second
            assert f"another run holds {out} (pid {first.pid} on " in second.stderr
        assert first.is_running
        (tmp_path / "go").touch()
        ended = first.wait()
    assert ended.exit_code == 0, ended
    assert_whole(out, made.answers, ids=made.ids)


def test_another_question_is_refused_with_a_command_that_works(tmp_path: Path) -> None:
    made = quiz(tmp_path, 10)
    options = [*made.options, "--output", "out"]
    assert run_command("run", *options, folder=tmp_path).exit_code == 0
    before = [part.read_bytes() for part in parts(tmp_path / "out")]
    refused = run_command(
        *["run", *options, "--system", "Be brief.", "--temperature=0.5", "--json"], folder=tmp_path
    )
    assert (refused.exit_code, refused.stdout) == (2, ""), refused
    assert "system: was None, now 'Be brief.'" in refused.stderr
    assert "sampling.temperature: was 0.0, now 0.5" in refused.stderr
    assert "--overwrite" in refused.stderr
    assert [part.read_bytes() for part in parts(tmp_path / "out")] == before
    line = next(line for line in refused.stderr.splitlines() if "keep both: vlmbatch " in line)
    ready = shlex.split(line.partition("keep both: vlmbatch ")[2])
    ended = run_command(*ready, folder=tmp_path)
    assert ended.exit_code == 0, ended
    assert ended.json["output"] == "out-2"
    assert run_json(tmp_path / "out-2")["ask"]["system"] == "Be brief."
    assert_whole(tmp_path / "out-2", made.answers, ids=made.ids)


@pytest.mark.parametrize("written", ["-oout", "--output=out"])
def test_the_ready_command_knows_every_way_to_write_the_output(
    tmp_path: Path, written: str
) -> None:
    from vlmbatch.run import _elsewhere

    ready = _elsewhere(["run", "m.parquet", written, "-t", "vqa"], "out")
    assert ready == "vlmbatch run m.parquet -t vqa -o out-2"


def test_overwrite_starts_anew_and_never_in_a_folder_of_others(made: Quiz) -> None:
    out = made.path.parent / "out"
    assert ask(made, "--part-rows=16").exit_code == 0
    old = run_json(out)["run"]
    (out / "part-00009.parquet").write_bytes((out / "part-00000.parquet").read_bytes())
    ended = ask(made, "--part-rows=10", "--system=Be brief.", "--limit=25", "--overwrite")
    assert ended.exit_code == 0, ended
    assert (ended.json["rows"], ended.json["resumed"]) == (25, False)
    assert run_json(out)["run"] != old
    assert_whole(out, made.answers[:25], ids=made.ids)
    theirs = made.path.parent / "theirs"
    theirs.mkdir()
    (theirs / "part-00000.parquet").write_bytes(b"precious")
    for options in ([], ["--overwrite"]):
        refused = vlmbatch("run", *made.options, "-o", theirs, *options)
        assert refused.exit_code == 2, refused
        assert "holds something else (part-00000.parquet)" in refused.stderr
    assert (theirs / "part-00000.parquet").read_bytes() == b"precious"
    assert len(list(theirs.iterdir())) == 1


# limits and columns


def test_a_limit_can_be_raised_and_dropped_later(made: Quiz) -> None:
    log = EchoLog(made.path.with_name("log"))
    out = made.path.parent / "out"
    for limit, new in [(10, 10), (25, 15), (5, 0), (None, 15)]:
        rows = limit or 40
        options = [f"--limit={limit}"] if limit else []
        ended = ask(made, *echo(log=log.path), "--part-rows=16", *options)
        assert ended.exit_code == 0, ended
        assert_adds_up(ended.json)
        assert (ended.json["rows"], ended.json["ok"]) == (rows, new)
        assert_whole(out, made.answers[: max(rows, 25 if rows == 5 else 0)], ids=made.ids)
    assert len(log) == 54


def test_rows_add_up_when_a_lower_limit_meets_a_gap(made: Quiz) -> None:
    """What is done is read from the files: a part that is gone is computed again."""
    assert ask(made, "--part-rows=10").exit_code == 0
    parts(made.path.parent / "out")[0].unlink()
    ended = ask(made, "--limit=20")
    assert ended.exit_code == 0, ended
    assert_adds_up(ended.json)
    assert (ended.json["ok"], ended.json["skipped"]) == (10, 10)
    assert_whole(made.path.parent / "out", made.answers, ids=made.ids)


def test_columns_are_carried_and_renamed(tmp_path: Path) -> None:
    Image.new("RGB", (5, 4), "blue").save(tmp_path / "a.png")
    columns = {
        "image": ["a.png", "b.png"],
        "url": [str(tmp_path / "a.png"), f"file://{tmp_path}/a.png"],
        "query": ["what?", "where?"],
        "sha": [b"\x00\x01", None],
        "score": pa.array([0.5, None], pa.float32()),
        "tags": [["x", "y"], []],
    }
    manifest = write_manifest(tmp_path / "m.parquet", columns)
    renamed = ["--column", "image=url", "--column", "question=query", "-t", "vqa"]
    options = [str(manifest), *renamed, *echo(reply_from="query")]
    one = vlmbatch("run", *options, "-o", tmp_path / "one", "--carry=tags", "--carry=image")
    # `image` is what the results call theirs
    assert one.exit_code == 2, one
    assert "--carry image" in one.stderr
    one = vlmbatch("run", *options, "-o", tmp_path / "one", "--carry=tags", "--carry=score")
    assert one.exit_code == 0, one
    table = assert_whole(tmp_path / "one", [["what?"], ["where?"]])
    assert table.schema.names[-2:] == ["tags", "score"]
    assert table["tags"].to_pylist() == [["x", "y"], []]
    assert table["image"].to_pylist() == columns["url"]
    every = vlmbatch("run", *options, "-o", tmp_path / "every", "--carry=*")
    assert every.exit_code == 0, every
    table = read_results(tmp_path / "every")
    assert table.schema.names[-4:] == ["query", "sha", "score", "tags"]
    assert table["sha"].to_pylist() == [b"\x00\x01", None]
    assert table.schema.field("score").type == pa.float32()
    assert len(set(table["id"].to_pylist())) == 2


def test_carrying_a_column_that_the_results_have_is_refused(made: Quiz) -> None:
    refused = ask(made, "--carry=id")
    assert refused.exit_code == 2, refused
    assert "the results have a column 'id' of their own" in refused.stderr
    assert not (made.path.parent / "out").exists()


# tasks


def test_several_tasks_and_prompts_over_the_rows_fields(tmp_path: Path) -> None:
    columns = {
        "id": ["a", "b", "c"],
        "country": ["Chad", "{{ 7 * 6 }}", None],
        "year": [1999, 2001, 2020],
        "question": ["how many?", "which colour?", ""],
        "phrase": ["the dog", "the cat", "the cow"],
        "reply": ["one", "two", "three"],
    }
    manifest = write_manifest(tmp_path / "m.parquet", columns)
    (tmp_path / "where.txt").write_text(
        "Is this {{ country }} in {{ year }}? Row {{ row }}, {{ id }}."
    )
    ended = vlmbatch(
        *["run", manifest, "-t", "caption", "-t", "vqa", "-t", "where", "-o", tmp_path / "out"],
        *["--prompt", f"where=@{tmp_path}/where.txt", "--prompt", "vqa=Briefly: {{ question }}"],
        *["--json", "--max-failure-rate=0.5", "--style=detailed", *echo(reply_from="reply")],
    )
    assert ended.exit_code == 0, ended
    assert_adds_up(ended.json)
    assert ended.json["requests"] == 9
    found = read_results(tmp_path / "out").to_pylist()
    assert [(r["row"], r["request"], r["task"]) for r in found] == [
        (row, i, task) for row in range(3) for i, task in enumerate(["caption", "vqa", "where"])
    ]
    assert [r["question"] for r in found] == [
        *[None, "Briefly: how many?", "Is this Chad in 1999? Row 0, a."],
        *[None, "Briefly: which colour?", "Is this {{ 7 * 6 }} in 2001? Row 1, b."],
        *[None, "", "Is this None in 2020? Row 2, c."],
    ]
    assert [r["status"] for r in found] == ["ok"] * 7 + ["failed", "ok"]
    assert found[7]["error"]["code"] == "bad_row"
    assert [r["text"] for r in found if r["row"] == 2] == ["three", None, "three"]
    ask = run_json(tmp_path / "out")["ask"]
    assert ask["tasks.where.prompt"] == (tmp_path / "where.txt").read_text()
    assert ask["tasks.caption.style"] == "detailed"


ATTACKS = {
    "classes": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ question.__init__.__globals__ }}",
    "system": "{{ cycler.__init__.__globals__.os.system('touch pwned') }}",
    "forever": "{% for x in range(999999999) %}{% endfor %}",
    "fine": "{{ question | upper }}",
}


def test_a_prompt_cannot_leave_its_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = write_manifest(tmp_path / "m.parquet", {"question": ["what?"]})
    words = ["run", manifest, "-o", "out", "--max-failure-rate=1", *echo()]
    for name, prompt in ATTACKS.items():
        words += ["-t", name, f"--prompt={name}={prompt}"]
    ended = vlmbatch(*words)
    assert ended.exit_code == 0, ended
    *attacks, fine = read_results(tmp_path / "out").to_pylist()
    assert [r["error"]["code"] for r in attacks] == ["bad_row"] * 4
    assert [r["raw"] for r in attacks] == [None] * 4
    assert (fine["question"], fine["text"]) == ("WHAT?", "an image")
    assert not (tmp_path / "pwned").exists()


def test_several_images_make_one_row_but_no_boxes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    columns = {"image": [["a.png", "b.png"], ["b.png"], []], "phrase": ["x", "x", "x"]}
    manifest = write_manifest(tmp_path / "m.parquet", columns)
    options = ["-t", "caption", "-t", "ground", "-o", tmp_path / "out", "--max-failure-rate=1"]
    ended = vlmbatch("run", manifest, *options, *echo(reply='[{"bbox_2d": [0, 0, 500, 500]}]'))
    assert ended.exit_code == 0, ended
    found = read_results(tmp_path / "out").to_pylist()
    assert [r["status"] for r in found] == ["ok", "failed", "ok", "ok", "failed", "failed"]
    assert [r["error"]["code"] for r in found if r["error"]] == ["bad_row"] * 3
    assert [r["image"] for r in found] == ["a.png", "a.png", "b.png", "b.png", None, None]
    assert found[0]["images"] == ["a.png", "b.png"]
    assert found[2]["images"] is None
    assert found[3]["boxes"] == [
        {"label": "x", "x1": 0.0, "y1": 0.0, "x2": 2.0, "y2": 2.0, "score": None}
    ]


def test_boxes_are_pixels_of_the_upright_image(tmp_path: Path) -> None:
    """A JPEG that is stored lying (100 x 50) and shown standing (50 x 100)."""
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: rotate by 90 degrees to show
    lying = picture(100, 50, format="JPEG", exif=exif)
    boxes = '[{"bbox_2d": [100, 100, 500, 900], "label": "a dog"}, {"bbox_2d": [0, 0, 1000, 1000]}]'
    columns = {
        "image": [picture(200, 100), lying, picture()],
        "labels": [["a dog", "a cat"], ["a dog"], ["a dog"]],
        "phrase": ["a dog", "a dog", "a dog"],
        "reply": [
            [boxes, boxes, "Sign"],
            [boxes, boxes, " Sign \n"],
            ["[]", "what?", "<|im_end|>"],
        ],
    }
    manifest = write_manifest(tmp_path / "m.parquet", columns)
    tasks = ["-t", "detect", "-t", "ground", "-t", "ocr"]
    options = ["-o", tmp_path / "out", "--max-failure-rate=1", "--json"]
    ended = vlmbatch("run", manifest, *tasks, *options, *echo(reply_from="reply"))
    assert ended.exit_code == 0, ended
    assert ended.json["failures"] == {"parse_failed": 2}
    found = read_results(tmp_path / "out").to_pylist()
    sizes = {r["row"]: (r["image_width"], r["image_height"]) for r in found}
    assert sizes == {0: (200, 100), 1: (50, 100), 2: (8, 6)}
    for detect, ground, ocr in (found[:3], found[3:6]):
        width, height = sizes[detect["row"]]
        only = "" if detect["row"] == 0 else "a dog"  # which of two labels it is cannot be told
        for result, other in ((detect, only), (ground, "a dog")):
            assert [edges(box) for box in result["boxes"]] == [
                ("a dog", 0.1 * width, 0.1 * height, 0.5 * width, 0.9 * height),
                (other, 0, 0, width, height),
            ]
        assert (ocr["text"], ocr["boxes"]) == ("Sign", None)
    assert found[5]["raw"] == " Sign \n"
    assert [r["question"] for r in found[:3]] == ['["a dog", "a cat"]', "a dog", None]
    nothing, unreadable, empty = found[6:]
    assert (nothing["boxes"], nothing["status"]) == ([], "ok")
    assert unreadable["error"]["code"] == empty["error"]["code"] == "parse_failed"
    assert unreadable["raw"] == "what?"


def edges(box: dict[str, object]) -> tuple[object, ...]:
    return tuple(
        value if isinstance(value, str) else round(float(str(value)), 3)
        for value in (box[key] for key in ("label", "x1", "y1", "x2", "y2"))
    )


def test_recorded_answers_are_read_by_the_family_that_is_named(tmp_path: Path) -> None:
    reply = "<loc_0><loc_16><loc_32><loc_64>;<loc_64><loc_0><loc_32><loc_8>"
    columns = {"image": [picture(640, 320)], "reply": [reply]}
    manifest = write_manifest(tmp_path / "m.parquet", columns)
    options = ["--phrase", "the sign", "--family", "demo", "-o", tmp_path / "out"]
    ended = vlmbatch("run", manifest, "-t", "ground", *options, *echo(reply_from="reply"))
    assert ended.exit_code == 0, ended
    (result,) = read_results(tmp_path / "out").to_pylist()
    assert [edges(box) for box in result["boxes"]] == [
        ("the sign", 0, 80, 320, 320),
        ("the sign", 320, 0, 640, 40),
    ]
    assert (result["question"], result["raw"], result["text"]) == ("the sign", reply, None)
    assert (result["model_image_width"], result["model_image_height"]) == (64, 64)


def test_a_request_that_fails_once_is_asked_again(made: Quiz) -> None:
    ended = ask(made, *echo(flaky_rows="2,6"))
    assert ended.exit_code == 0, ended
    table = assert_whole(made.path.parent / "out", made.answers, ids=made.ids)
    attempts = {r["row"]: r["attempts"] for r in table.select(["row", "attempts"]).to_pylist()}
    assert (attempts[2], attempts[6], attempts[7]) == (2, 2, 1)


# status


def test_status_of_a_run_that_goes_on_is_killed_and_finishes(tmp_path: Path) -> None:
    made = quiz(tmp_path, 120)
    out = tmp_path / "out"
    options = [*made.options, "-o", out, "--part-rows=4", "--checkpoint-rows=2"]

    def status() -> dict[str, object]:
        ended = vlmbatch("status", out, "--json")
        assert ended.exit_code == 0, ended
        found: dict[str, object] = ended.json
        return found

    with Command("run", *options, *echo(delay=0.02, capacity=2, hang_rows="110")) as command:
        until((out / OURS / "nonce").exists, "the run")
        seen = [status()]
        while len(parts(out)) < 20:
            seen.append(status())
        running = vlmbatch("status", out)
        command.signal(signal.SIGKILL)
        command.wait()
    done = [s["done"] for s in seen]
    assert done == sorted(done)  # asked all the time, while shards turn into parts
    assert {s["state"] for s in seen} == {"running"}
    assert seen[-1]["rows"] == 120
    assert running.exit_code == 0, running
    assert f"{out}: running" in running.stdout
    killed = status()
    assert (killed["state"], killed["workers"], killed["seconds_left"]) == ("killed", {}, None)
    assert "run the same command again" in vlmbatch("status", out).stdout
    assert vlmbatch("run", *options, *echo(fail_rows="")).exit_code == 2  # it was not asked before
    assert vlmbatch("run", *options).exit_code == 0
    finished = status()
    assert (finished["state"], finished["done"], finished["ok"]) == ("finished", 120, 120)
    assert finished["requests"] == 160
    assert json.loads((out / OURS / "run.json").read_text())["epoch"] == 2
    assert not shards(out)


def test_parts_have_the_declared_schema(made: Quiz) -> None:
    from vlmbatch.results.schema import RESULT_SCHEMA

    assert ask(made, "--part-rows=16").exit_code == 0
    for part in parts(made.path.parent / "out"):
        assert pq.read_schema(part).remove_metadata().equals(RESULT_SCHEMA)


def test_a_small_job_is_shared_by_its_workers(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.parquet", {"image": [picture()] * 40})
    log = EchoLog(tmp_path / "log")
    words = ["run", manifest, "-o", tmp_path / "out", "--workers=2", "--executor=local"]

    def by_worker() -> Counter[int]:
        return Counter(line.pid for line in log.lines())

    hang = echo(log=log.path, capacity=2, hang_after=8, hang_until=tmp_path / "go")
    with Command(*words, *hang, "--json") as command:
        until(lambda: sorted(by_worker().values()) == [8, 8], "both have more than a lease")
        (tmp_path / "go").touch()
        ended = command.wait()
    assert ended.exit_code == 0, ended
    assert (len(log), len(by_worker())) == (40, 2)


def test_an_engine_that_cannot_start_for_a_reason_that_nobody_foresaw_is_started_once(
    tmp_path: Path,
) -> None:
    manifest = write_manifest(tmp_path / "m.parquet", {"id": ["a"]})
    job = tmp_path / "job.yaml"
    job.write_text(
        f"manifest: {manifest}\noutput: {tmp_path}/out\nmodel: demo\ntasks: [caption]\n"
        'engine: {name: echo, args: {log: "a\\0b"}}\n'
    )
    ended = vlmbatch("run", "--job", job)
    assert ended.exit_code == 1, ended
    assert "the engine cannot start: ValueError: embedded null byte" in ended.stderr
    assert len(list((tmp_path / "out" / OURS / "logs").glob("worker-*"))) == 1
