"""``vlmbatch status``: of a run that is over, of a folder of many, and while it watches."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.harness import (
    OURS,
    PATIENCE,
    Command,
    echo,
    picture,
    quiz,
    run_command,
    run_json,
    until,
    vlmbatch,
    write_manifest,
)
from vlmbatch.run_file import now

PYTHON = [sys.executable, "-m", "vlmbatch"]


def night(folder: Path, name: str, rows: int, missing: int = 0) -> Path:
    """An output ``name`` of so many rows."""
    (folder / "there.png").write_bytes(picture())
    images = ["gone.png" if i < missing else "there.png" for i in range(rows)]
    manifest = write_manifest(folder / f"{name}.parquet", {"image": images})
    out = folder / "nights" / name
    ended = vlmbatch("run", manifest, "-t", "caption", "-o", out, *echo(), "--max-failure-rate=1")
    assert ended.exit_code == 0, ended
    return out


def status(output: Path, *more: str) -> dict[str, object]:
    ended = vlmbatch("status", output, "--json", *more)
    assert ended.exit_code == 0, ended
    found: dict[str, object] = ended.json
    return found


def held(folder: Path) -> list[str]:
    """A run of 60 rows that stops in the middle and goes on when the file ``go-on`` is there."""
    made = quiz(folder, 60)
    hang = echo(hang_after=40, hang_until=folder / "go-on", delay=0.01, capacity=1)
    return ["run", *made.options, *hang, "--checkpoint-rows=2", "-o", str(folder / "out")]


# one run


def test_a_finished_run_says_how_long_it_took(tmp_path: Path) -> None:
    out = night(tmp_path, "one", 12, missing=2)
    first = status(out)
    assert first["seconds"] > 0
    assert first["rows_per_second"] == pytest.approx(12 / first["seconds"], rel=0.01)
    assert first["created"] <= first["began"] <= first["ended"] <= now()
    text = vlmbatch("status", out).stdout
    assert f"{first['seconds']:,.1f} s of computing" in text
    assert f"ended {first['ended']}" in text

    words = ["run", tmp_path / "one.parquet", "-t", "caption", "-o", out, *echo()]
    again = vlmbatch(*words, "--max-failure-rate=1")
    assert again.exit_code == 0, again  # nothing to do takes no time, and forgets none
    kept = ("seconds", "rows_per_second", "began", "ended", "engine_starved")
    assert {key: status(out)[key] for key in kept} == {key: first[key] for key in kept}

    (tmp_path / "gone.png").write_bytes(picture())
    assert vlmbatch("retry", out).exit_code == 0
    retried = status(out)
    assert (retried["ok"], retried["began"]) == (12, first["began"])
    assert retried["seconds"] > first["seconds"]
    assert retried["rows_per_second"] == pytest.approx(14 / retried["seconds"], rel=0.01)


def test_time_before_a_kill_counts_and_later_rows_count_anew(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = held(tmp_path)
    file = out / OURS / "status.json"

    def seconds() -> float:
        return json.loads(file.read_text()).get("seconds", 0.0) if file.exists() else 0.0

    with Command(*words, "--limit=50") as command:
        until(seconds, "seconds in status.json")
        command.signal(signal.SIGKILL, group=True)
        command.wait()
    (tmp_path / "go-on").touch()
    killed = status(out)
    assert (killed["state"], killed["ended"]) == ("killed", None)
    assert run_command(*words, "--limit=50").exit_code == 0
    finished = status(out)
    assert finished["began"] == killed["began"]
    assert finished["seconds"] > killed["seconds"] > 0
    assert vlmbatch(*words, "--limit=52").exit_code == 0
    more = status(out)
    assert more["done"] == 52
    assert more["seconds"] < finished["seconds"]


def test_a_status_of_an_earlier_version_can_be_read(tmp_path: Path) -> None:
    out = night(tmp_path, "one", 4)
    file = out / OURS / "status.json"
    new = ("began", "ended", "seconds", "rows_answered")
    old = {k: v for k, v in json.loads(file.read_text()).items() if k not in new}
    file.write_text(json.dumps(old))
    found = status(out)
    assert (found["seconds"], found["ended"], found["began"]) == (None, None, found["created"])
    assert found["rows_per_second"] == old["rows_per_second"]
    assert "4 of 4 rows" in vlmbatch("status", out).stdout
    assert "4 rows = 4 ok" in vlmbatch("status", out.parent).stdout


# many


def test_a_folder_of_outputs_is_a_line_each_by_time_with_its_trend(tmp_path: Path) -> None:
    for name, rows, missing in (("z-first", 40, 0), ("m-second", 50, 1), ("a-third", 50, 2)):
        created = run_json(night(tmp_path, name, rows, missing))["created"]
        until(lambda before=created: now() != before, "the next second")
    nights = tmp_path / "nights"
    (nights / "no run").mkdir()
    (nights / "a file").write_text("x")
    found = status(nights)
    assert found["folder"] == str(nights)
    assert [run["name"] for run in found["runs"]] == ["z-first", "m-second", "a-third"]
    assert [run["trend"] for run in found["runs"]] == [
        None,
        {"rows": 0.25, "failed": 0.02},
        {"rows": 0.0, "failed": 0.02},
    ]
    totals = found["totals"]
    assert totals.pop("seconds") == pytest.approx(sum(run["seconds"] for run in found["runs"]))
    assert totals == {
        "runs": 3,
        "states": {"finished": 3},
        "rows": 140,
        "done": 140,
        "ok": 137,
        "failed": 3,
        "failures": {"image_missing": 3},
    }
    single = status(nights / "a-third")
    same = {key: found["runs"][2][key] for key in single}
    assert same == single

    shown = vlmbatch("status", nights)
    header, first, second, third, total = shown.stdout.splitlines()
    assert header.split()[:5] == ["run", "state", "rows", "ok", "failed"]
    assert first.split()[:5] == ["z-first", "finished", "40", "40", "0"]
    assert re.search(r"  49  +1  image_missing 1 .* rows \+25\.0 %, failed \+2\.00 %$", second)
    assert third.endswith("  failed +2.00 %")
    assert total.startswith("3 runs (3 finished): 140 rows = 137 ok + 3 failed + 0 left, ")

    last = status(nights, "--last=1")
    assert [run["name"] for run in last["runs"]] == ["a-third"]
    assert last["runs"][0]["trend"] == {"rows": 0.0, "failed": 0.02}  # against one not shown
    assert last["older"] == 2
    assert "--last 3 shows all" in vlmbatch("status", nights, "--last", "1").stdout


def test_an_output_that_cannot_be_read_hides_no_other(tmp_path: Path) -> None:
    out = night(tmp_path, "good", 3)
    broken, ours = out.parent / "bro\nken", out.parent / "other-version" / OURS
    (broken / OURS).mkdir(parents=True)
    (broken / OURS / "run.json").write_text("{")
    ours.mkdir(parents=True)
    (ours / "run.json").write_text(json.dumps({"run": "x", "created": "2020-01-01T00:00:00Z"}))
    found = {run["name"]: run for run in status(out.parent)["runs"]}
    assert {name: run["state"] for name, run in found.items()} == {
        "good": "finished",
        "bro\nken": "unreadable",
        "other-version": "unreadable",
    }
    assert "cannot read" in found["bro\nken"]["reason"]
    assert found["good"]["trend"] is None
    text = vlmbatch("status", out.parent).stdout
    assert text.count("\n") == 5
    assert "bro\\nken" in text
    assert "3 runs (2 unreadable, 1 finished): 3 rows" in text


def test_a_folder_without_outputs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path, tmp_path / "empty", tmp_path / "none"):
        ended = vlmbatch("status", folder, "--watch")
        assert ended.exit_code == 2, ended
        assert f"{folder} is no output of vlmbatch" in ended.stderr


def test_outputs_in_a_store_are_found_likewise(s3_server, tmp_path: Path) -> None:
    bucket = s3_server.new_bucket()
    place = f"s3://{bucket}/nights"
    manifest = write_manifest(tmp_path / "m.parquet", {"id": ["a", "b"]})
    with s3_server.in_environment():
        for name in ("first", "second"):
            words = ["-t", "caption", "-o", f"{place}/{name}", *echo()]
            assert run_command("run", manifest, *words).exit_code == 0
        s3_server.fs().pipe_file(f"{bucket}/nights/notes.txt", b"no run")
        found = status(place)
        assert [(run["name"], run["ok"]) for run in found["runs"]] == [("first", 2), ("second", 2)]
        assert found["runs"][1]["output"] == f"{place}/second"
        assert status(f"{place}/second")["seconds"] == found["runs"][1]["seconds"]
        nothing = vlmbatch("status", f"s3://{bucket}")
    assert nothing.exit_code == 2, nothing
    assert "no output of vlmbatch" in nothing.stderr


# --watch


def test_watching_ends_with_the_run_one_json_line_a_look(tmp_path: Path) -> None:
    words = ["status", "--watch", "0.1", tmp_path / "out", "--json"]
    with Command(*held(tmp_path)) as command:
        until((tmp_path / "out" / OURS / "nonce").exists, "the run")
        with Command(*words) as watching:
            for _ in range(3):
                watching.read_until("running", stream="stdout")
            (tmp_path / "go-on").touch()
            watched = watching.wait()
        ended = command.wait()
    assert ended.exit_code == 0, ended
    assert watched.exit_code == 0, watched
    looks = [json.loads(line) for line in watched.stdout.splitlines()]
    states = [look["state"] for look in looks]
    assert len(states) > 3
    assert set(states[:-1]) == {"running"}
    assert states[-1] == "finished"
    done = [look["done"] for look in looks]
    assert done == sorted(done)
    assert done[-1] == 60


def test_without_a_terminal_watching_prints_what_changes(tmp_path: Path) -> None:
    night(tmp_path, "out2", 3).rename(tmp_path / "out2")
    with Command(*held(tmp_path)) as command:
        until((tmp_path / "out" / OURS / "nonce").exists, "the run")
        with Command("status", "--watch=0.1s", tmp_path) as watching:
            watching.read_until("running", stream="stdout")
            (tmp_path / "go-on").touch()
            watched = watching.wait()
        command.wait()
    assert watched.exit_code == 0, watched
    lines = watched.stdout.splitlines()
    other = [line for line in lines if line.startswith(f"{tmp_path}/out2: ")]
    assert len(other) == 1
    assert "finished, 3 of 3 rows, 0 failed" in other[0]
    mine = [line for line in lines if line.startswith(f"{tmp_path}/out: ")]
    assert sorted({*other, *mine}) == sorted(lines)
    assert "running, " in mine[0]
    assert "finished, 60 of 60 rows, 0 failed" in mine[-1]
    counts = [re.search(r"(\w+), (\d+) of", line).groups() for line in mine]
    assert len(counts) == len(set(counts)) >= 2


class Screen:
    """As much of a terminal as is used: lines, cursor up, clearing, no wrapping."""

    def __init__(self, columns: int) -> None:
        self.lines = [""]
        self.row = self.at = 0
        self.columns = columns
        self.wraps = True

    def feed(self, text: str) -> None:
        for found in re.finditer(r"\x1b\[(\??\d*)([A-Za-z])|\r|\n|[^\x1b\r\n]+", text):
            number, letter = found[1], found[2]
            if letter in ("h", "l"):
                assert number == "?7"
                self.wraps = letter == "h"
            elif letter == "F":
                self.row -= int(number)
                assert self.row >= 0
                self.at = 0
            elif letter == "K":
                self.lines[self.row] = self.lines[self.row][: self.at]
            elif letter == "J":
                self.lines[self.row :] = [""]
            elif found[0] == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif found[0] == "\r":
                self.at = 0
            else:
                assert not self.wraps
                line = self.lines[self.row]
                self.lines[self.row] = line[: self.at] + found[0] + line[self.at + len(found[0]) :]
                self.lines[self.row] = self.lines[self.row][: self.columns]
                self.at += len(found[0])


def test_on_a_terminal_it_is_redrawn_in_place(tmp_path: Path) -> None:
    columns = 60
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    screen, raw = Screen(columns), b""
    with Command(*held(tmp_path)) as command:
        until((tmp_path / "out" / OURS / "nonce").exists, "the run")
        words = [*PYTHON, "status", "--watch", "0.1", str(tmp_path / "out")]
        environment = {**os.environ, "TERM": "xterm"}
        watching = subprocess.Popen(words, stdout=follower, env=environment)
        os.close(follower)
        while True:
            try:
                raw += os.read(leader, 65536)
            except OSError:  # EIO: the other end is closed
                break
            if raw.count(b"running") == 2:  # it has looked twice
                (tmp_path / "go-on").touch()
        assert watching.wait(PATIENCE) == 0
        command.wait()
    os.close(leader)
    text = raw.decode()
    assert text.count("running") > 1
    screen.feed(text)
    assert screen.wraps
    wanted = vlmbatch("status", tmp_path / "out").stdout.splitlines()
    assert screen.lines == [*(line[:columns] for line in wanted), ""]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_watch_that_is_interrupted_says_so(tmp_path: Path, number: signal.Signals) -> None:
    with Command(*held(tmp_path)) as command:
        until((tmp_path / "out" / OURS / "nonce").exists, "the run")
        words = [*PYTHON, "status", "--watch", str(tmp_path / "out")]
        pipe = subprocess.PIPE
        with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True) as watching:
            assert "running" in watching.stdout.readline()
            watching.send_signal(number)
            _, stderr = watching.communicate(timeout=PATIENCE)
        assert command.is_running
    assert watching.returncode == 130
    assert stderr == "interrupted\n"


@pytest.mark.parametrize("words", [["--watch"], ["--watch", "5"], ["--watch=2min"]])
def test_watch_has_seconds_or_not(tmp_path: Path, words: list[str]) -> None:
    out = night(tmp_path, "n1", 1)
    for order in ([*words, str(out)], [str(out), *words]):
        ended = vlmbatch("status", *order)
        assert ended.exit_code == 0, ended
        assert "finished, 1 of 1 rows" in ended.stdout


@pytest.mark.parametrize("value", ["nan", "-1", "often", "1e3", ""])
def test_seconds_that_are_none_are_refused(tmp_path: Path, value: str) -> None:
    ended = vlmbatch("status", f"--watch={value}", tmp_path)
    assert ended.exit_code == 2, ended
    assert "expected a time" in ended.stderr
