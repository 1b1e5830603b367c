"""Whole runs on an object store: the images, the manifest and the output are objects. Killed at
seeded moments, with a store that fails now and then, with credentials that expire: nothing is lost,
nothing is doubled.

The short form has 200 images, the long one (``make test-slow``) 2,000.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.harness import Command, Kind, assert_adds_up, assert_whole, until, vlmbatch
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
from tests.store_runs import Pictures, StoreRun, kill_and_finish

SHORT, LONG = 200, 2_000


@pytest.fixture(scope="module")
def pictures(s3_server: S3Server, request: pytest.FixtureRequest) -> Pictures:
    """As many as the largest of the chosen tests needs."""
    slow = any(item.get_closest_marker("slow") for item in request.session.items)
    return Pictures.made(s3_server, LONG if slow else SHORT)


@pytest.mark.parametrize(
    "kind", [pytest.param("driver", marks=pytest.mark.slow), "group", "worker"]
)
def test_nothing_is_lost_or_doubled_when_killed(
    tmp_path: Path, pictures: Pictures, kind: Kind
) -> None:
    with pictures.server.in_environment():
        kill_and_finish(
            StoreRun(tmp_path, pictures, SHORT), kind, count=1 + (kind != "group"), seed=3
        )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["driver", "group", "worker"])
def test_nothing_is_lost_or_doubled_of_many_images_when_killed_12_times(
    tmp_path: Path, pictures: Pictures, kind: Kind
) -> None:
    with pictures.server.in_environment():
        kill_and_finish(StoreRun(tmp_path, pictures, LONG), kind, count=12, seed=4)


def run_with_faults(run: StoreRun, rule: Rule, *, read_timeout: float | None = None) -> FaultProxy:
    with FaultProxy(run.server, rule, read_timeout=read_timeout) as proxy, proxy.in_environment():
        ended = run.finish()
    run.assert_done(ended)
    return proxy


def test_what_passes_costs_no_row(tmp_path: Path, pictures: Pictures) -> None:
    """One request in twenty is refused, broken off, cut short or done without an answer."""
    run = StoreRun(tmp_path, pictures, SHORT)
    proxy = run_with_faults(run, by_chance(0.05, *PASSING, seed=5))
    assert set(proxy.injected) == set(PASSING)
    assert not run.log.rows_twice()


def test_a_store_that_stalls_costs_time_and_no_row(tmp_path: Path, pictures: Pictures) -> None:
    run = StoreRun(tmp_path, pictures, SHORT)
    rule = by_chance(0.02, Stall(), seed=6)
    proxy = run_with_faults(run, rule, read_timeout=1.0)
    assert set(proxy.injected) == {Stall()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_passes_costs_no_row_of_many_while_runs_are_killed(
    tmp_path: Path, pictures: Pictures
) -> None:
    run = StoreRun(tmp_path, pictures, LONG)
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
    run = StoreRun(tmp_path, pictures, SHORT)
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
    run = StoreRun(tmp_path, pictures, 40)
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
    run = StoreRun(tmp_path, pictures, SHORT)
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
    run = StoreRun(tmp_path, pictures, SHORT)
    with pictures.server.in_environment():
        run._starts.append((0, set()))
        with Command("run", *run._options) as one, Command("run", *run._options) as other:
            ended = [one.wait(), other.wait()]
    assert sorted(each.exit_code for each in ended) == [0, 1], list(map(str, ended))
    assert not run.log.rows_twice()
    run.assert_done(next(each for each in ended if each.exit_code == 0))


@pytest.mark.slow  # tests/test_object_outputs.py has the short form
def test_status_and_a_finished_run_again(tmp_path: Path, pictures: Pictures) -> None:
    run = StoreRun(tmp_path, pictures, 40)
    with pictures.server.in_environment():
        assert run.finish().exit_code == 0
        status = vlmbatch("status", run.place, "--json")
        assert status.json["done"] == 40, status
        again = vlmbatch("run", *run._options)
    assert (again.exit_code, again.json["skipped"]) == (0, 40), again
    run._starts.append((len(run.log), set(range(40))))
    run.assert_kept()
