"""Running again: what was decided at the start holds, what changed is refused, and whatever a crash
left behind is cleared away."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.harness import (
    OURS,
    EchoLog,
    Finished,
    KillPoint,
    KillRun,
    Quiz,
    assert_adds_up,
    assert_whole,
    echo,
    parts,
    picture,
    quiz,
    read_results,
    run_json,
    shards,
    vlmbatch,
    write_manifest,
)


@pytest.fixture
def made(tmp_path: Path) -> Quiz:
    return quiz(tmp_path, 50)


def ask(made: Quiz, *options: str | Path) -> Finished:
    return vlmbatch("run", *made.options, "-o", made.path.parent / "out", "--json", *options)


def test_ranges_of_another_size_continue_the_same_output(tmp_path: Path) -> None:
    run = KillRun(tmp_path, quiz(tmp_path, 150), part_rows=50)
    run.kill(KillPoint("driver", 50, 7, 1))
    ended = run.finish(checkpoint_rows=1000)
    assert ended.exit_code == 0, ended
    assert_adds_up(ended.json)
    assert ended.json["resumed"]
    assert run_json(run.output)["epoch"] == 2
    run.assert_kept()


def test_the_part_grid_stays_as_it_was_at_the_start(made: Quiz) -> None:
    assert ask(made, "--part-rows=20", "--limit=30").exit_code == 0
    refused = ask(made, "--part-rows=10")
    assert (refused.exit_code, refused.stdout) == (2, ""), refused
    assert "20 rows per part; that is fixed at its start" in refused.stderr
    assert ask(made).exit_code == 0
    assert [len(part.read_bytes()) > 0 for part in parts(made.path.parent / "out")] == [True] * 3
    assert_whole(made.path.parent / "out", made.answers, ids=made.ids)


def test_a_changed_manifest_is_refused_and_a_touched_or_moved_one_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    made = quiz(folder, 20)
    answers = made.answers
    log = EchoLog(tmp_path / "log")
    out = ["-o", tmp_path / "out", "--json"]
    assert vlmbatch("run", *made.options, *echo(log=log.path), *out, "--limit=10").exit_code == 0
    os.utime(made.path, (1, 1))
    there = Quiz((tmp_path / "there" / made.path.name), 20)
    folder.rename(tmp_path / "there")
    ended = vlmbatch("run", *there.options, *echo(log=log.path), *out)
    assert ended.exit_code == 0, ended
    assert (ended.json["ok"], ended.json["skipped"]) == (10, 10)
    assert_whole(tmp_path / "out", answers, ids=made.ids)
    quiz(tmp_path / "there", 21)
    for words in (["run", *there.options, *out], ["run", *there.options, *out, "--limit=5"]):
        refused = vlmbatch(*words)
        assert (refused.exit_code, refused.stdout) == (2, ""), refused
        assert f"manifest: {made.path.name} had " in refused.stderr
    refused = vlmbatch("retry", tmp_path / "out")
    assert f"changed since the run: {made.path.name} had " in refused.stderr
    assert len(log) == sum(map(len, answers))


def test_a_folder_is_what_it_was_at_the_start(tmp_path: Path) -> None:
    """Files that come later are not part of the run; one that is gone is an error."""
    columns = {"answer": [f"caption {i}" for i in range(8)]}
    for name in ("b", "a"):
        write_manifest(tmp_path / "in" / f"{name}.parquet", columns)
    words = ["run", tmp_path / "in", *echo(reply_from="answer"), "-o", tmp_path / "out", "--json"]
    assert vlmbatch(*words, "--limit=10").exit_code == 0
    write_manifest(tmp_path / "in" / "aa.parquet", columns)
    ended = vlmbatch(*words)
    assert (ended.exit_code, ended.json["rows"]) == (0, 16), ended
    assert_whole(tmp_path / "out", [[f"caption {i % 8}"] for i in range(16)])
    (tmp_path / "in" / "b.parquet").unlink()
    gone = vlmbatch(*words)
    assert gone.exit_code == 2, gone
    assert "b.parquet: No such file" in gone.stderr
    assert "bring it back" in gone.stderr


def test_what_was_chosen_at_the_start_is_used_again(tmp_path: Path) -> None:
    """Engine and family need not be given twice; what is given must be the same."""
    columns = {"image": [picture(640, 320)] * 4, "phrase": ["it"] * 4}
    manifest = write_manifest(tmp_path / "m.parquet", columns)
    words = ["run", manifest, "-t", "ground", "-o", tmp_path / "out"]
    words += ["--json", "--max-failure-rate=1"]
    first = vlmbatch(*words, "--engine=echo", "--family=demo", "--limit=2")
    assert first.exit_code == 0, first
    assert first.json["failures"] == {}
    again = vlmbatch(*words)
    assert again.exit_code == 0, again
    assert (again.json["engine"], again.json["failures"]) == ("echo", {})
    assert run_json(tmp_path / "out")["read"]["family"] == "demo"
    assert set(read_results(tmp_path / "out")["model"].to_pylist()) == {"echo"}
    other = vlmbatch(*words, "--family=generic")
    assert other.exit_code == 2, other
    assert "family: was 'demo', now 'generic'" in other.stderr


def test_leftovers_of_every_kind_are_cleared_away(made: Quiz, tmp_path: Path) -> None:
    out = tmp_path / "out"
    other = quiz(tmp_path / "other", 50)
    assert ask(made, "--part-rows=20").exit_code == 0
    foreign = vlmbatch("run", *other.options, "-o", tmp_path / "foreign", "--part-rows=20")
    assert foreign.exit_code == 0, foreign
    parts(out)[1].unlink()
    shutil.copy(tmp_path / "foreign" / "part-00001.parquet", out)
    shutil.copy(tmp_path / "foreign" / "part-00002.parquet", out / "part-00007.parquet")
    for name in ("part-00001.parquet.1234", "0badc0de-0001-000000000000-000000000007.arrow.5678"):
        (out / OURS / "tmp" / name).write_bytes(b"half")
    ended = ask(made)
    assert ended.exit_code == 0, ended
    assert (ended.json["ok"], ended.json["skipped"]) == (20, 30)
    assert_whole(out, made.answers, ids=made.ids)


def test_an_output_that_was_killed_before_it_began_is_begun(made: Quiz) -> None:
    out = made.path.parent / "out"
    (out / OURS / "tmp").mkdir(parents=True)
    (out / OURS / "tmp" / "run.json.12345678").write_text('{"run": ')
    assert vlmbatch("status", out).exit_code == 2
    ended = ask(made)
    assert ended.exit_code == 0, ended
    assert not ended.json["resumed"]
    assert_whole(out, made.answers, ids=made.ids)


def test_files_that_are_no_results_stop_the_run_with_their_name(made: Quiz) -> None:
    out = made.path.parent / "out"
    assert ask(made, "--part-rows=20").exit_code == 0
    stranger = out / "part-00009.parquet"
    shutil.copy(made.path, stranger)
    for words in (["run", *made.options, "-o", out], ["status", out], ["retry", out]):
        ended = vlmbatch(*words)
        assert ended.exit_code == 1, ended
        assert f"{stranger} is not a result file of vlmbatch" in ended.stderr
    stranger.unlink()
    whole = (out / OURS / "run.json").read_text()
    (out / OURS / "run.json").write_text(whole[:100])
    ended = ask(made)
    assert (ended.exit_code, "run.json" in ended.stderr) == (1, True), ended
    (out / OURS / "run.json").write_text(whole)
    assert ask(made).exit_code == 0
    assert json.loads(whole)["run"] == run_json(out)["run"]
    assert not shards(out)
