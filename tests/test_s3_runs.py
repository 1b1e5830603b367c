"""Whole runs on an object store: the images, the manifest and the output are objects. Killed at
seeded moments, with a store that fails now and then, with credentials that expire: nothing is lost,
nothing is doubled.

The short form has 200 images, the long one (``make test-slow``) 2,000.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.harness import (
    OURS,
    Command,
    Finished,
    KillRun,
    Kind,
    Quiz,
    assert_adds_up,
    assert_whole,
    echo,
    kill_points,
    picture,
    until,
    vlmbatch,
)
from tests.s3 import S3Server
from tests.s3_faults import (
    EXPIRED,
    PASSING,
    Error,
    FaultProxy,
    Rule,
    Stall,
    by_chance,
    never,
    one_of,
    where,
)

SHORT, LONG = 200, 2_000


@dataclass(frozen=True)
class Pictures:
    """Images on a server, row by row; the runs of this module share them."""

    server: S3Server
    bucket: str
    count: int

    def write_manifest(self, made: Quiz) -> str:
        """The address of a quiz in row groups of 50; each row names an image of its own, relative
        to the manifest or by its whole address."""
        names = [f"images/{row:05d}.png" for row in range(made.rows)]
        rows = range(made.rows)
        columns = {
            "image": [f"s3://{self.bucket}/{names[i]}" if i % 2 else names[i] for i in rows],
            "id": made.ids,
            "questions": [[f"{i}.{j}?" for j in range(len(made.answers[i]))] for i in rows],
            "answers": made.answers,
        }
        pq.write_table(pa.table(columns), made.path, row_group_size=50)
        name = f"{self.bucket}/quiz-{made.rows}.parquet"
        self.server.fs().put_file(str(made.path), name)
        return f"s3://{name}"


@pytest.fixture(scope="module")
def pictures(s3_server: S3Server, request: pytest.FixtureRequest) -> Pictures:
    """As many as the largest of the chosen tests needs."""
    slow = any(item.get_closest_marker("slow") for item in request.session.items)
    made = Pictures(s3_server, s3_server.new_bucket(), LONG if slow else SHORT)
    small = picture()
    s3_server.fs().pipe({f"{made.bucket}/images/{row:05d}.png": small for row in range(made.count)})
    return made


class S3Run(KillRun):
    """A quiz whose images, manifest and output are on the server; ``output`` is a copy of it."""

    _numbers = itertools.count(1)

    def __init__(self, folder: Path, pictures: Pictures, rows: int = SHORT) -> None:
        self.server = pictures.server
        self.prefix = f"{pictures.bucket}/out-{next(self._numbers)}"
        self.place = f"s3://{self.prefix}"
        super().__init__(folder, Quiz(folder / "quiz.parquet", rows))
        self._options = [
            *(pictures.write_manifest(self.quiz), "-t", "vqa", f"--output={self.place}"),
            *echo(reply_from="answers", log=self.log.path, delay=0.01, capacity=4),
            *("--part-rows=64", "--executor=local", "--json"),
        ]

    def shards(self) -> list[str]:
        found: list[str] = self.server.fs().find(f"{self.prefix}/{OURS}/shards")
        return found

    def fetch_output(self) -> Path:
        """The output as it is now, beside the proxy; shards before the parts that they may go into
        meanwhile."""
        shutil.rmtree(self.output, ignore_errors=True)
        self.output.mkdir()
        fs = self.server.fs()
        for place in (f"{self.prefix}/{OURS}", self.prefix):
            for path in fs.find(place):
                local = self.output / path.removeprefix(f"{self.prefix}/")
                if local.exists():
                    continue
                with contextlib.suppress(FileNotFoundError):
                    data = fs.cat_file(path)
                    local.parent.mkdir(parents=True, exist_ok=True)
                    local.write_bytes(data)
        return self.output

    def _committed(self) -> set[int]:
        self.fetch_output()
        return super()._committed()

    def assert_kept(self) -> None:
        self.fetch_output()
        super().assert_kept()
        assert not (self.output / OURS / "lock").exists()

    def assert_done(self, ended: Finished) -> None:
        assert ended.exit_code == 0, ended
        assert_adds_up(ended.json)
        assert ended.json["failed"] == 0
        self.assert_kept()


def kill_and_finish(run: S3Run, kind: Kind, *, count: int, seed: int) -> None:
    answers = sum(map(len, run.quiz.answers)) // 2 // count - 30  # 2 workers; see KillPoint.most
    points = kill_points(kind, count, seed=seed, answers=answers)
    if kind == "worker":
        longest = max(point.hang_after for point in points)
        sizes = (points[0].checkpoint_rows, points[0].workers)
        with run.start(*sizes, hang_after=longest) as command:
            for point in points:
                run.kill_worker(command, point)
            run.go_on.touch()
            ended = command.wait(seconds=500)
        assert ended.json["worker_deaths"] == count
    else:
        for point in points:
            run.kill(point)
        ended = run.finish()
    run.assert_done(ended)


@pytest.mark.parametrize(
    "kind", [pytest.param("driver", marks=pytest.mark.slow), "group", "worker"]
)
def test_nothing_is_lost_or_doubled_when_killed(
    tmp_path: Path, pictures: Pictures, kind: Kind
) -> None:
    with pictures.server.in_environment():
        kill_and_finish(S3Run(tmp_path, pictures), kind, count=1 + (kind != "group"), seed=3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["driver", "group", "worker"])
def test_nothing_is_lost_or_doubled_of_many_images_when_killed_12_times(
    tmp_path: Path, pictures: Pictures, kind: Kind
) -> None:
    with pictures.server.in_environment():
        kill_and_finish(S3Run(tmp_path, pictures, LONG), kind, count=12, seed=4)


def run_with_faults(run: S3Run, rule: Rule, *, read_timeout: float | None = None) -> FaultProxy:
    with FaultProxy(run.server, rule, read_timeout=read_timeout) as proxy, proxy.in_environment():
        ended = run.finish()
    run.assert_done(ended)
    return proxy


def test_what_passes_costs_no_row(tmp_path: Path, pictures: Pictures) -> None:
    """One request in twenty is refused, broken off, cut short or done without an answer."""
    run = S3Run(tmp_path, pictures)
    proxy = run_with_faults(run, by_chance(0.05, *PASSING, seed=5))
    assert set(proxy.injected) == set(PASSING)
    assert not run.log.rows_twice()


def test_a_store_that_stalls_costs_time_and_no_row(tmp_path: Path, pictures: Pictures) -> None:
    run = S3Run(tmp_path, pictures)
    rule = by_chance(0.02, Stall(), seed=6)
    proxy = run_with_faults(run, rule, read_timeout=1.0)
    assert set(proxy.injected) == {Stall()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_passes_costs_no_row_of_many_while_runs_are_killed(
    tmp_path: Path, pictures: Pictures
) -> None:
    run = S3Run(tmp_path, pictures, LONG)
    rule = one_of(by_chance(0.05, *PASSING, seed=7), by_chance(0.005, Stall(), seed=8))
    with FaultProxy(pictures.server, rule, read_timeout=2.0) as proxy, proxy.in_environment():
        kill_and_finish(run, "group", count=6, seed=9)
    assert set(proxy.injected) == {*PASSING, Stall()}


@pytest.mark.parametrize(
    "expired", [EXPIRED, Error(400, "ExpiredToken")], ids=["status 403", "status 400"]
)
def test_expired_credentials_stop_the_run_and_renewed_ones_go_on(
    tmp_path: Path, pictures: Pictures, expired: Error
) -> None:
    run = S3Run(tmp_path, pictures)
    with FaultProxy(pictures.server) as proxy, proxy.in_environment():
        with run.start(checkpoint_rows=8, hang_after=60) as command:
            until(lambda: run.shards(), "a commit")
            until(lambda: len(run.log) >= 60, "60 answers")
            proxy.rule = lambda _request: expired
            run.go_on.touch()
            stopped = command.wait()
        assert stopped.exit_code == 1, stopped
        assert "expired" in stopped.stderr, stopped
        assert "same command" in stopped.stderr, stopped
        assert "Traceback" not in stopped.stderr, stopped
        committed = run._committed()
        assert committed
        assert len(committed) < SHORT
        proxy.rule = never
        ended = run.finish()
    assert ended.json["skipped"] == len(committed)
    lines = {line.row for line in run.log.lines()}
    assert lines == set(range(SHORT))
    assert ended.exit_code == 0, ended
    assert_adds_up(ended.json)
    assert_whole(run.fetch_output(), run.quiz.answers, ids=run.quiz.ids)


def test_an_image_that_is_refused_is_a_failed_row_and_no_reason_to_stop(
    tmp_path: Path, pictures: Pictures
) -> None:
    """One object alone is forbidden, one is gone: that says nothing about the others."""
    run = S3Run(tmp_path, pictures, 40)
    rule = one_of(
        where(lambda _request: Error(403, "AccessDenied"), key="images/00010.png"),
        where(lambda _request: Error(404, "NoSuchKey"), key="images/00011.png"),
    )
    with FaultProxy(pictures.server, rule) as proxy, proxy.in_environment():
        ended = run.finish()
    assert ended.exit_code == 0, ended
    assert_adds_up(ended.json)
    assert ended.json["failed"] == 2
    failed = {10: "image_forbidden", 11: "image_missing"}
    assert_whole(run.fetch_output(), run.quiz.answers, ids=run.quiz.ids, failed=failed)


@pytest.mark.slow  # tests/test_object_outputs.py has the short form
def test_the_second_of_two_runs_stops(tmp_path: Path, pictures: Pictures) -> None:
    run = S3Run(tmp_path, pictures)
    with pictures.server.in_environment():
        with run.start(hang_after=8) as first:
            until(lambda: len(run.log) == 8, "8 answers")
            second = vlmbatch("run", *run._options)
            first.signal(signal.SIGINT)
            first.read_until("stopping")
            run.go_on.touch()
            assert first.wait().exit_code == 130
        assert second.exit_code == 1, second
        assert f"another run holds {run.place}" in second.stderr
        ended = run.finish()
    assert ended.exit_code == 0, ended
    assert_adds_up(ended.json)
    assert_whole(run.fetch_output(), run.quiz.answers, ids=run.quiz.ids)


def test_of_two_runs_that_start_together_one_works(tmp_path: Path, pictures: Pictures) -> None:
    run = S3Run(tmp_path, pictures)
    with pictures.server.in_environment():
        run._starts.append((0, set()))
        with Command("run", *run._options) as one, Command("run", *run._options) as other:
            ended = [one.wait(), other.wait()]
    assert sorted(each.exit_code for each in ended) == [0, 1], list(map(str, ended))
    assert not run.log.rows_twice()
    run.assert_done(next(each for each in ended if each.exit_code == 0))


@pytest.mark.slow  # tests/test_object_outputs.py has the short form
def test_status_and_a_finished_run_again(tmp_path: Path, pictures: Pictures) -> None:
    run = S3Run(tmp_path, pictures, 40)
    with pictures.server.in_environment():
        assert run.finish().exit_code == 0
        status = vlmbatch("status", run.place, "--json")
        assert status.json["done"] == 40, status
        again = vlmbatch("run", *run._options)
    assert (again.exit_code, again.json["skipped"]) == (0, 40), again
    run._starts.append((len(run.log), set(range(40))))
    run.assert_kept()
