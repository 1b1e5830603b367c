"""Runs whose output is on a real S3 server keep the promises of those in a folder: killed,
cut off, refused, with lost acknowledgements and expired credentials."""

import signal
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from tests.harness import (
    OURS,
    Command,
    EchoLog,
    assert_adds_up,
    assert_whole,
    echo,
    picture,
    quiz,
    run_command,
    until,
    vlmbatch,
    write_manifest,
)
from tests.s3_faults import EXPIRED, FaultProxy, LostAnswer, by_chance, from_request, where

ROWS = 300


class Remote:
    """A quiz and an output on the server."""

    def __init__(self, server, folder: Path) -> None:
        self.server = server
        self.bucket = server.new_bucket()
        self.output = f"s3://{self.bucket}/runs/out"
        self.quiz = quiz(folder, ROWS)
        self.log = EchoLog(folder / "echo.log")
        self.go_on = folder / "go-on"
        self._copy = folder / "copy"

    def words(self, *more: str, **engine) -> list[str]:
        return [
            *("run", *self.quiz.options),
            *echo(log=self.log.path, capacity=4, **{"delay": 0.01, **engine}),
            *("--part-rows=64", "--checkpoint-rows=16", f"--output={self.output}", "--json"),
            *more,
        ]

    def names(self, folder: str = "") -> list[str]:
        """Of the objects right in it: SeaweedFS has empty ones for folders, too."""
        fs, path = self.server.fs(), f"{self.bucket}/runs/out{folder}"
        found = fs.ls(path, detail=True) if fs.exists(path) else []
        return sorted(each["name"].rpartition("/")[2] for each in found if each["size"])

    def shards(self) -> list[str]:
        return self.names(f"/{OURS}/shards")

    def committed(self) -> set[int]:
        """The rows in shards and parts."""
        found: set[int] = set()
        for name in self.shards():  # before the parts, which they may go into meanwhile
            first, last = name.removesuffix(".arrow").split("-")[2:4]
            found.update(range(int(first), int(last) + 1))
        for name in self.names():
            if name.startswith("part-"):
                with self.server.fs().open(f"{self.bucket}/runs/out/{name}") as file:
                    found.update(pq.read_table(file)["row"].to_pylist())
        return found

    def download(self) -> Path:
        self.server.fs().get(f"{self.bucket}/runs/out/", f"{self._copy}/", recursive=True)
        return self._copy

    def assert_whole(self, **known) -> None:
        assert_whole(self.download(), self.quiz.answers, ids=self.quiz.ids, **known)


@pytest.fixture
def remote(s3_server, tmp_path):
    with s3_server.in_environment():
        yield Remote(s3_server, tmp_path)


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_a_run_goes_to_the_store_and_others_read_it(remote, executor):
    done = run_command(*remote.words(f"--executor={executor}", "--workers=2"))
    assert done.exit_code == 0, done
    assert_adds_up(done.json)
    assert done.json["output"] == remote.output
    remote.assert_whole()
    assert remote.names(f"/{OURS}") == ["nonce", "run.json", "status.json"], "the lock is free"
    again = vlmbatch(*remote.words())
    assert again.exit_code == 0, again
    assert again.json["skipped"] == ROWS
    status = vlmbatch("status", remote.output, "--json").json
    assert (status["state"], status["done"], status["output"]) == ("finished", ROWS, remote.output)
    parts = f"{remote.bucket}/runs/out/part-*.parquet"
    with duckdb.connect() as database:
        database.register_filesystem(remote.server.fs())
        rows = database.sql(f"select count(distinct row) from 's3://{parts}'").fetchall()
    assert rows == [(ROWS,)]


def test_failed_results_are_retried_and_answers_read_again(remote, tmp_path):
    bad = {3, 70, 71, 299}
    late = tmp_path / "late.png"
    (tmp_path / "there.png").write_bytes(picture())
    table = pq.read_table(remote.quiz.path)
    images = ["late.png" if row in bad else "there.png" for row in range(ROWS)]
    write_manifest(remote.quiz.path, {**table.to_pydict(), "image": images})
    done = vlmbatch(*remote.words())
    assert done.exit_code == 0, done
    assert done.json["failures"].keys() == {"image_missing"}
    late.write_bytes(picture())
    retried = vlmbatch("retry", remote.output, "--json")
    assert retried.exit_code == 0, retried
    assert retried.json["ok"] == len(bad)
    reparsed = vlmbatch("reparse", remote.output, "--json")
    assert reparsed.exit_code == 0, reparsed
    assert reparsed.json["ok"] == reparsed.json["results"]
    remote.assert_whole()


@pytest.mark.slow  # tests/test_s3_runs.py has the short form
def test_a_killed_run_goes_on_where_it_was(remote):
    committed: list[tuple[int, set[int]]] = []
    for answers in (150, 60):
        before = len(remote.log)
        with Command(*remote.words(hang_after=answers + 20)) as command:
            until(lambda n=before + answers: len(remote.log) >= n, "more answers")
            command.signal(signal.SIGKILL, group=True)
            command.wait()
        status = vlmbatch("status", remote.output, "--json").json
        assert status["state"] == "killed"
        # What a dying worker sent may still arrive.
        committed.append((len(remote.log), remote.committed()))
    done = run_command(*remote.words())
    assert done.exit_code == 0, done
    remote.assert_whole()
    for start, rows in committed:
        assert not {line.row for line in remote.log.lines()[start:]} & rows
    assert remote.log.rows_twice() <= 2 * 2 * 16


def test_a_second_run_is_refused_while_status_says_how_it_goes(remote):
    with Command(*remote.words(hang_after=40, hang_until=remote.go_on)) as command:
        until(lambda: len(remote.log) == 40, "answers")
        status = vlmbatch("status", remote.output, "--json").json
        assert status["state"] == "running", status
        second = vlmbatch(*remote.words())
        assert second.exit_code == 1
        assert f"another run holds {remote.output} (pid {command.pid} on " in second.stderr
        command.signal(signal.SIGINT)
        command.read_until("stopping")
        remote.go_on.touch()
        assert command.wait().exit_code == 130
    assert vlmbatch("status", remote.output, "--json").json["state"] == "interrupted"
    assert vlmbatch(*remote.words()).exit_code == 0
    remote.assert_whole()


def test_lost_acknowledgements_double_nothing(s3_server, remote):
    lost = where(by_chance(0.3, LostAnswer(), seed=7), operation="PUT")
    with FaultProxy(s3_server, lost) as proxy, proxy.in_environment():
        done = run_command(*remote.words())
    assert done.exit_code == 0, done
    assert proxy.injected[LostAnswer()] > 5
    remote.assert_whole()
    assert remote.log.rows_twice() == 0


@pytest.mark.slow  # tests/test_s3_runs.py has the short form
def test_expired_credentials_stop_the_run_and_renewed_ones_go_on(s3_server, remote):
    with FaultProxy(s3_server) as proxy, proxy.in_environment():
        with Command(*remote.words(hang_after=60, hang_until=remote.go_on)) as command:
            until(lambda: len(remote.shards()) >= 2, "commits")
            proxy.rule = from_request(0, EXPIRED)
            remote.go_on.touch()
            stopped = command.wait()
        assert stopped.exit_code == 1, stopped
        assert f"credentials for s3://{remote.bucket} are missing, wrong or exp" in stopped.stderr
        assert "the same command again" in stopped.stderr
    before, start = remote.committed(), len(remote.log)
    assert before
    done = vlmbatch(*remote.words())  # its holder died on this machine: nobody waits for its lease
    assert done.exit_code == 0, done
    assert not {line.row for line in remote.log.lines()[start:]} & before
    remote.assert_whole()


def test_nothing_runs_without_the_bucket(remote):
    missing = vlmbatch(*remote.words("-o", "s3://nobody-has-this/out"))
    assert missing.exit_code == 2
    assert "there is no bucket s3://nobody-has-this" in missing.stderr
    assert len(remote.log) == 0


def test_overwrite_deletes_what_was_there(remote):
    assert vlmbatch(*remote.words()).exit_code == 0
    done = vlmbatch(*remote.words("--limit=70", "--overwrite"))
    assert done.exit_code == 0, done
    assert remote.names() == ["part-00000.parquet", "part-00001.parquet"]
    assert remote.committed() == set(range(70))
