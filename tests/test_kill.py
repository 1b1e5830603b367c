"""SIGKILL at any moment: nothing is lost, nothing is doubled, and little is computed twice.

The moments are seeded; the short form has a few of each kind, the long form (``make kill-all``)
25 of each kind with each executor.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow.compute as pc
import pytest

from tests.harness import (
    OURS,
    KillPoint,
    KillReport,
    KillRun,
    Kind,
    assert_adds_up,
    assert_whole,
    committed_rows,
    echo,
    forge_shard,
    kill_points,
    meta_of,
    parts,
    quiz,
    run_json,
    shards,
    until,
    vlmbatch,
)

SHORT, LONG = 3, 25
REPORTS: list[KillReport] = []


@pytest.fixture(scope="module", autouse=True)
def table(request: pytest.FixtureRequest) -> Iterator[None]:
    """The counts of all kill runs, printed at the end."""
    yield
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    if REPORTS:
        with capture.global_and_fixture_disabled():
            print("", KillReport.HEADER, *REPORTS, sep="\n")


def kill_and_finish(
    folder: Path, kind: Kind, executor: str, *, count: int, seed: int, answers: int
) -> None:
    """Every moment, one after another, on one output; then the run ends by itself."""
    points = kill_points(kind, count, seed=seed, answers=answers)
    longest = max(point.hang_after for point in points)
    most = count * longest if kind == "worker" else sum(point.most for point in points)
    rows = 3 * most // 4 + 50  # three rows have four answers
    run = KillRun(folder, quiz(folder, rows), executor=executor)
    run.report.name = f"{kind}, {executor}"
    REPORTS.append(run.report)
    if kind == "worker":
        ended = run.kill_workers(points)
    else:
        for point in points:
            run.kill(point)
        ended = run.finish()
    assert ended.exit_code == 0, ended
    assert_adds_up(ended.json)
    if kind == "worker":
        assert ended.json["worker_deaths"] == count
    run.assert_kept()


@pytest.mark.parametrize("kind", ["driver", "group", "worker"])
def test_nothing_is_lost_or_doubled_when_killed(tmp_path: Path, kind: Kind) -> None:
    kill_and_finish(tmp_path, kind, "local", count=SHORT, seed=1, answers=60)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("executor", ["local", "ray"])
@pytest.mark.parametrize("kind", ["driver", "group", "worker"])
def test_nothing_is_lost_or_doubled_when_killed_25_times(
    tmp_path: Path, kind: Kind, executor: str
) -> None:
    kill_and_finish(tmp_path, kind, executor, count=LONG, seed=2, answers=80)


def kill_while_gathering(run: KillRun) -> bool:
    """SIGKILL when the next part appears. Whether it came before the part's shards were deleted."""
    there = len(parts(run.output))
    with run.start(checkpoint_rows=1, hang_after=60) as command:  # 32 rows have 43 answers
        while command.is_running and len(parts(run.output)) == there:
            pass  # no pause: the moment is short
        run.kill_driver(command)
    run.report.allowed += KillPoint("driver", 0, 1, 1).allowed
    meta = meta_of(parts(run.output)[-1])
    inside = [shard for shard in shards(run.output) if first_row(shard) < meta["stop"]]
    return bool(inside)


def first_row(shard: Path) -> int:
    return int(shard.stem.split("-")[2])


def test_killed_between_writing_a_part_and_deleting_its_shards(tmp_path: Path) -> None:
    """Parts of many shards: deleting them takes long enough to be hit, if not at once."""
    run = KillRun(tmp_path, quiz(tmp_path, 32 * 30), part_rows=32, delay=0.001)
    assert any(kill_while_gathering(run) for _ in range(20))
    assert run.finish().exit_code == 0
    run.assert_kept()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_25_times_between_writing_a_part_and_deleting_its_shards(tmp_path: Path) -> None:
    run = KillRun(tmp_path, quiz(tmp_path, 32 * 80), part_rows=32, delay=0.001)
    hits = [kill_while_gathering(run) for _ in range(LONG)]
    run.report.name = f"gathering ({sum(hits)})"
    REPORTS.append(run.report)
    assert any(hits)
    assert run.finish().exit_code == 0
    run.assert_kept()


def test_shards_whose_part_is_written_already_do_no_harm(tmp_path: Path) -> None:
    """The same moment, made by putting deleted shards back."""
    run = KillRun(tmp_path, quiz(tmp_path, 120), part_rows=40, delay=0.001)
    aside = tmp_path / "aside"
    aside.mkdir()
    hang = echo(hang_rows="39", hang_until=run.go_on)  # the last one of the first part
    with run.start(4, 1, "--limit=40", *hang) as command:
        until(lambda: len(shards(run.output)) == 9, "all others of the part are committed")
        for shard in shards(run.output):
            os.link(shard, aside / shard.name)
        run.go_on.touch()
        assert command.wait().exit_code == 0
    assert len(parts(run.output)) == 1
    for shard in aside.iterdir():
        shard.replace(run.output / OURS / "shards" / shard.name)
    assert vlmbatch("status", run.output, "--json").json["done"] == len(committed_rows(run.output))
    ended = run.finish()
    assert ended.exit_code == 0, ended
    assert_adds_up(ended.json)
    run.assert_kept()


def test_late_and_overlapping_shards_lose_to_what_is_in_the_parts(tmp_path: Path) -> None:
    """Rule 3 of the output: the highest epoch wins, whatever turns up afterwards."""
    run = KillRun(tmp_path, quiz(tmp_path, 100), part_rows=40, delay=0.001)
    run.kill(KillPoint("driver", 20, 4, 1))
    assert run.finish().exit_code == 0
    epoch = run_json(run.output)["epoch"]
    forge_shard(run.output, range(8), epoch=epoch - 1, text="late")
    forge_shard(run.output, range(60, 72), epoch=epoch, text="late, and of the same start")
    forge_shard(run.output, range(90, 100), epoch=epoch + 7, run="0badc0de", text="another run's")
    tmp = run.output / OURS / "tmp" / "part-00001.parquet.cafe"
    tmp.write_bytes(b"half a part")
    before = [part.read_bytes() for part in parts(run.output)]
    ended = run.finish()
    assert ended.exit_code == 0, ended
    assert ended.json["skipped"] == 100
    assert [part.read_bytes() for part in parts(run.output)] == before
    run.assert_kept()


def test_of_overlapping_shards_the_newest_then_the_first_then_the_longest_wins(
    tmp_path: Path,
) -> None:
    made = quiz(tmp_path, 60)
    out = tmp_path / "out"
    command = ["run", *made.options, "-o", out, "--part-rows=40", "--json"]
    assert vlmbatch(*command).exit_code == 0
    forge_shard(out, range(20), epoch=5, text="longest")
    forge_shard(out, range(10), epoch=5, text="short")
    forge_shard(out, range(10, 30), epoch=5, text="first")
    forge_shard(out, range(15, 40), epoch=5, text="second")
    forge_shard(out, range(35, 36), epoch=6, text="newest")
    forge_shard(out, range(44, 50), epoch=4, text="other part")
    ended = vlmbatch(*command)
    assert ended.exit_code == 0, ended
    answers = made.answers
    for rows, text in [
        (range(20), "longest"),
        (range(20, 30), "first"),
        (range(30, 40), "second"),
        (range(35, 36), "newest"),
        (range(44, 50), "other part"),
    ]:
        for row in rows:
            answers[row] = [text for _ in answers[row]]
    assert_whole(out, answers, ids=made.ids)


def test_a_row_that_kills_its_worker_becomes_engine_crash(tmp_path: Path) -> None:
    made = quiz(tmp_path, 320)
    out = tmp_path / "out"
    ended = vlmbatch(
        *["run", *made.options, *echo(crash_rows="5,300"), "-o", out, "--part-rows=128", "--json"]
    )
    assert ended.exit_code == 0, ended
    assert_adds_up(ended.json)
    assert ended.json["failures"] == {"engine_crash": 3}  # row 300 has two questions
    assert (ended.json["failed"], ended.json["worker_deaths"]) == (2, 8)
    table = assert_whole(
        out, made.answers, ids=made.ids, failed={5: "engine_crash", 300: "engine_crash"}
    )
    crashed = table.filter(pc.equal(table["status"], "failed"))
    assert crashed["attempts"].to_pylist() == [2, 2, 2]
    assert {error["stage"] for error in crashed["error"].to_pylist()} == {"generate"}


@pytest.mark.slow
def test_a_run_whose_workers_all_die_stops_with_the_reason(tmp_path: Path) -> None:
    """The last wait between two workers is half a minute."""
    made = quiz(tmp_path, 40)
    every = ",".join(map(str, range(40)))
    ended = vlmbatch("run", *made.options, *echo(crash_rows=every), "-o", tmp_path / "out")
    assert ended.exit_code == 1, ended
    assert "workers died in a row" in ended.stderr
    assert "SIGKILL" in ended.stderr
