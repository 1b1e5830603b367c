"""``vlmbatch retry``: failed results again, the others untouched. Images that were missing, and a
row that killed its worker, are what it is for."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.harness import (
    Command,
    EchoLog,
    Finished,
    assert_adds_up,
    assert_whole,
    echo,
    is_alive,
    leftovers,
    parts,
    picture,
    read_results,
    shards,
    until,
    vlmbatch,
    write_manifest,
)


class Album:
    """A manifest of pictures in files, of which some are missing; each row has two questions, and
    the second one of the rows in ``unasked`` is null."""

    def __init__(
        self, folder: Path, rows: int, *, missing: set[int], unasked: set[int] | None = None
    ) -> None:
        self.folder, self.rows, self.missing = folder, rows, missing
        self.output = folder / "out"
        self.log = EchoLog(folder / "run.log")
        self.unasked = unasked or set()
        self.answers = [[f"answer {i}.0", f"answer {i}.1"] for i in range(rows)]
        columns = {
            "image": [f"{i}.png" for i in range(rows)],
            "questions": [
                [f"question {i}.0?", None if i in self.unasked else f"question {i}.1?"]
                for i in range(rows)
            ],
            "answers": self.answers,
        }
        self.manifest = write_manifest(folder / "album.parquet", columns)
        self.add(set(range(rows)) - missing)

    def add(self, rows: set[int]) -> None:
        for row in rows:
            (self.folder / f"{row}.png").write_bytes(picture())

    def words(self, *options: str | Path) -> list[str | Path]:
        args = echo(reply_from="answers", log=self.log.path)
        sizes = ["--part-rows=16", "--max-failure-rate=1", "--json"]
        return ["run", self.manifest, "-t", "vqa", "-o", self.output, *args, *sizes, *options]

    def run(self, *options: str | Path) -> Finished:
        return vlmbatch(*self.words(*options))

    def retry(self, *options: str | Path) -> tuple[Finished, set[tuple[int, int]]]:
        """How the retry ended, and the (row, request) that it asked."""
        before = len(self.log)
        ended = vlmbatch("retry", self.output, "--json", *options)
        return ended, {(line.row, line.request) for line in self.log.lines()[before:]}

    def records(self) -> dict[tuple[int, int], dict[str, Any]]:
        found = read_results(self.output).to_pylist()
        assert [(r["row"], r["request"]) for r in found] == [
            (row, i) for row in range(self.rows) for i in range(2)
        ]
        return {(r["row"], r["request"]): r for r in found}

    def failures(self) -> dict[tuple[int, int], str]:
        return {
            key: record["error"]["code"]
            for key, record in self.records().items()
            if record["status"] == "failed"
        }


def test_only_failed_results_are_asked_again_and_the_others_stay(tmp_path: Path) -> None:
    album = Album(tmp_path, 60, missing={3, 20, 21, 50}, unasked={20, 40})
    ended = album.run()
    assert ended.exit_code == 0, ended
    assert ended.json["failures"] == {"image_missing": 7, "bad_row": 2}
    assert ended.json["failed"] == 5
    before = album.records()
    old_bytes = [part.read_bytes() for part in parts(album.output)]
    os.link(parts(album.output)[0], tmp_path / "held")
    album.add({3, 20, 21})

    ended, asked = album.retry("--codes=image_missing")
    assert ended.exit_code == 0, ended
    assert asked == {(3, 0), (3, 1), (20, 0), (21, 0), (21, 1)}
    summary = ended.json
    assert_adds_up(summary)
    assert (summary["rows"], summary["ok"], summary["failed"]) == (4, 3, 1)
    assert (summary["requests"], summary["failures"]) == (7, {"image_missing": 2})
    after = album.records()
    for key, record in after.items():
        if key in asked:
            assert (record["status"], record["text"]) == ("ok", "answer {}.{}".format(*key))
            assert record["image_width"] == 8
        elif key not in {(50, 0), (50, 1)}:
            assert record == before[key]
    assert album.failures() == {
        (20, 1): "bad_row",
        (40, 1): "bad_row",
        (50, 0): "image_missing",
        (50, 1): "image_missing",
    }
    new_bytes = [part.read_bytes() for part in parts(album.output)]
    same = [new == old for new, old in zip(new_bytes, old_bytes, strict=True)]
    assert same == [False, False, True, False]  # nothing of rows 32 to 47 was retried
    held = (tmp_path / "held").read_bytes()
    assert held == old_bytes[0]  # replaced, not written over: who reads it reads on
    assert not shards(album.output)
    assert not leftovers(album.output)

    again = album.run()  # the run goes on from there: nothing is left to do
    assert again.exit_code == 0, again
    assert again.json["skipped"] == 60
    status = vlmbatch("status", album.output, "--json").json
    assert (status["failed"], status["failures"]) == (3, {"bad_row": 2, "image_missing": 2})

    # all codes: a null question fails again without a question to the engine
    album.add({50})
    ended, asked = album.retry()
    assert ended.exit_code == 0, ended
    assert asked == {(50, 0), (50, 1)}
    assert ended.json["failures"] == {"bad_row": 2}
    ended, asked = album.retry("--codes=image_missing,engine_crash")
    assert (ended.exit_code, ended.json["rows"], asked) == (0, 0, set()), ended


def test_rows_that_killed_their_worker_get_another_chance(tmp_path: Path) -> None:
    album = Album(tmp_path, 40, missing=set())
    ended = album.run("--engine-arg=crash_rows=11", "--max-failure-rate=0")
    assert ended.exit_code == 3, ended
    assert ended.json["failures"] == {"engine_crash": 2}
    ended, asked = album.retry("--engine-arg=crash_rows=")
    assert ended.exit_code == 0, ended
    assert asked == {(11, 0), (11, 1)}
    assert_whole(album.output, album.answers)


def test_the_exit_code_says_whether_enough_rows_are_fine_now(tmp_path: Path) -> None:
    album = Album(tmp_path, 20, missing={1, 2, 3})
    assert album.run("--max-failure-rate=0.1").exit_code == 3
    album.add({1})
    ended, asked = album.retry("--max-failure-rate=0.05")
    assert (ended.exit_code, asked) == (3, {(1, 0), (1, 1)}), ended
    ended, _ = album.retry("--max-failure-rate=0.1")
    assert ended.exit_code == 0, ended
    for options, message in [
        (["--codes=image_lost"], "unknown code 'image_lost'"),
        (["--engine-arg=reply=no"], "changes the answers"),
        (["--engine-arg=nonsense=1"], "no argument 'nonsense'"),
    ]:
        ended, _ = album.retry(*options)
        assert (ended.exit_code, ended.stdout) == (2, ""), ended
        assert message in ended.stderr
    write_manifest(album.manifest, {"image": ["1.png"], "questions": [["?"]], "answers": [["!"]]})
    ended, _ = album.retry()
    assert ended.exit_code == 2, ended
    assert "manifest" in ended.stderr


@pytest.mark.parametrize("then", ["retry", "run"])
def test_a_killed_retry_keeps_what_it_committed(tmp_path: Path, then: str) -> None:
    """Its results count at once, and are in the parts after the next retry or run."""
    missing = set(range(0, 90, 2))
    album = Album(tmp_path, 90, missing=missing)
    assert album.run().exit_code == 0
    before = album.records()
    album.add(missing)
    first = len(album.log)
    slow = ["--engine-arg=delay=0.01", "--engine-arg=capacity=4", "--checkpoint-rows=6"]
    with Command("retry", album.output, *slow, "--engine-arg=hang_after=60") as command:
        until(lambda: shards(album.output), "a commit")
        until(lambda: len(album.log) >= first + 30, "30 answers")
        command.signal(signal.SIGKILL)
        command.wait()
    pids = {line.pid for line in album.log.lines()}
    until(lambda: not any(map(is_alive, pids)), "its worker is gone")
    status = vlmbatch("status", album.output, "--json").json
    assert 0 < status["failed"] < 45
    assert (status["state"], status["done"], status["requests"]) == ("killed", 90, 180)
    assert album.records() == before  # the parts are still the old ones
    committed = 45 - status["failed"]
    asked_before = {line.row for line in album.log.lines()[first:]}
    if then == "run":
        again = album.run()
        assert (again.exit_code, again.json["skipped"]) == (0, 90), again
        assert len(album.failures()) == 2 * status["failed"]
    ended, asked = album.retry("--checkpoint-rows=10")
    assert ended.exit_code == 0, ended
    assert_adds_up(ended.json)
    assert ended.json["rows"] == 45 - committed
    assert len(asked_before & {row for row, _ in asked}) == len(asked_before) - committed
    assert_whole(album.output, album.answers)
    after = album.records()
    assert all(after[key] == before[key] for key in before if key[0] not in missing)


def test_a_retry_outlives_its_worker(tmp_path: Path) -> None:
    album = Album(tmp_path, 60, missing=set(range(30, 60)))
    assert album.run().exit_code == 0
    album.add(album.missing)
    first = len(album.log)
    slow = ["--engine-arg=delay=0.01", "--engine-arg=capacity=4", "--checkpoint-rows=5"]
    hang = ["--engine-arg=hang_after=30", f"--engine-arg=hang_until={tmp_path}/go-on"]
    with Command("retry", album.output, *slow, *hang, "--json") as command:
        until(lambda: len(album.log) >= first + 16, "16 answers")
        os.kill(album.log.lines()[-1].pid, signal.SIGKILL)
        (tmp_path / "go-on").touch()
        ended = command.wait()
    assert ended.exit_code == 0, ended
    assert_adds_up(ended.json)
    assert (ended.json["ok"], ended.json["worker_deaths"]) == (30, 1)
    assert_whole(album.output, album.answers)


def test_an_unfinished_output_is_retried_and_then_finished(tmp_path: Path) -> None:
    album = Album(tmp_path, 160, missing={1, 2, 19})
    slow = ["--engine-arg=delay=0.01", "--engine-arg=capacity=1", "--checkpoint-rows=6"]
    hang = ["--engine-arg=hang_after=80", f"--engine-arg=hang_until={tmp_path}/go-on"]
    with Command(*album.words(*slow, *hang)) as command:
        until(lambda: len(album.log) == 80, "80 answers")
        command.signal(signal.SIGTERM)
        command.read_until("stopping")
        (tmp_path / "go-on").touch()
        interrupted = command.wait()
    assert interrupted.exit_code == 130, interrupted
    done = interrupted.json["ok"] + interrupted.json["failed"]
    assert done < 160
    assert interrupted.json["failed"] == 3
    album.add({1, 19})
    ended, asked = album.retry()
    assert ended.exit_code == 0, ended
    assert asked == {(1, 0), (1, 1), (19, 0), (19, 1)}
    assert (ended.json["rows"], ended.json["ok"], ended.json["failed"]) == (3, 2, 1)
    status = vlmbatch("status", album.output, "--json").json
    assert (status["done"], status["failed"]) == (done, 1)
    finished = album.run()
    assert finished.exit_code == 0, finished
    assert_adds_up(finished.json)
    assert finished.json["skipped"] == done
    assert_whole(album.output, album.answers, failed={2: "image_missing"})


def test_attempts_count_on_over_a_retry(tmp_path: Path) -> None:
    columns = {"image": [picture()] * 2, "phrase": ["it"] * 2, "said": ["nonsense", "none"]}
    manifest = write_manifest(tmp_path / "m.parquet", columns)
    output = tmp_path / "out"
    ended = vlmbatch("run", manifest, "-t", "ground", *echo(reply_from="said"), "-o", output)
    assert ended.exit_code == 3, ended
    for attempts in (2, 3):
        ended = vlmbatch("retry", output, "--json")
        assert (ended.exit_code, ended.json["failed"]) == (3, 1), ended
        assert read_results(output)["attempts"].to_pylist() == [attempts, 1]
