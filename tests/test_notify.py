"""``--notify-url``: what a real server on loopback gets at the end of real runs, and that the
address is a secret."""

import base64
import json
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.harness import (
    OURS,
    Command,
    echo,
    quiz,
    run_command,
    until,
    vlmbatch,
    write_manifest,
)
from vlmbatch.job import JobSpec
from vlmbatch.notify import post

SECRET = "T0K3N-of-the-hook"


@pytest.fixture(autouse=True)
def directly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever proxy this machine has for the world."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


class Hook:
    """Answers with these statuses in turn, then with 200; ``hang``: never, ``drip``: a byte at a
    time and never whole."""

    def __init__(self, answers: list[int | str]) -> None:
        self.answers = list(answers)
        self.got: list[dict[str, object]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.over = threading.Event()
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.headers.append(dict(self.headers))
                hook.paths.append(self.path)
                hook.got.append(json.loads(body))
                answer = hook.answers.pop(0) if hook.answers else 200
                if answer == "hang":
                    hook.over.wait()
                    self.close_connection = True
                elif answer == "drip":
                    while not hook.over.wait(0.05):
                        self.wfile.write(b"HTTP/1.1 200 OK\r\n"[:1])
                else:
                    self.send_response(int(answer))
                    self.send_header("Content-Length", "0")
                    self.send_header("Location", f"{hook.url}-elsewhere")
                    self.end_headers()

            def do_GET(self) -> None:
                hook.paths.append(f"GET {self.path}")
                self.send_error(404)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:  # who posted has gone
                pass

        self.server = Server(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.server_address[1]}"

    @property
    def url(self) -> str:
        return f"http://{self.address}/services/{SECRET}?key={SECRET}"


@contextmanager
def hook_that(*answers: int | str) -> Iterator[Hook]:
    hook = Hook(list(answers))
    thread = threading.Thread(target=hook.server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hook
    finally:
        hook.over.set()
        hook.server.shutdown()
        hook.server.server_close()
        thread.join()


def small(folder: Path, rows: int = 6) -> list[str]:
    return ["run", *quiz(folder, rows).options, "-o", str(folder / "out")]


def holders(folder: Path) -> list[Path]:
    """Files with the secret in them, or in their names."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [p for p in files if SECRET.encode() in p.read_bytes() or SECRET in str(p)]


def test_the_summary_is_posted_and_the_address_is_kept_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "secrets"
    here = tmp_path / "here"
    (here / "tmp").mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.setenv("TMPDIR", str(here / "tmp"))
    words = small(here, 20)
    with hook_that() as hook:
        (elsewhere / "hook").write_text(f"{hook.url}\n")
        job = elsewhere / "job.yaml"
        job.write_text(
            f"manifest: {words[1]}\noutput: {here}/out\nmodel: demo\nnotify_url: '{hook.url}'\n"
            "tasks: [vqa]\nengine: {name: echo, args: {reply_from: answers}}\n"
        )
        ends = [
            run_command(*words, "--notify-url", hook.url, "--json"),
            vlmbatch(*words, f"--notify-url=@{elsewhere}/hook", "--json"),
            vlmbatch(*words, f"--set=notify_url={hook.url}", "--json"),
            vlmbatch("run", "--job", job, "--overwrite", "--json"),
            run_command(*words, "-m", "demo", "--prompt=other", f"--notify-url={hook.url}"),
            vlmbatch("retry", here / "out", f"--notify-url={hook.url}", "--json"),
        ]
    assert [end.exit_code for end in ends] == [0, 0, 0, 0, 2, 0], list(map(str, ends))
    assert "--notify-url=URL" in ends[4].stderr  # the command that would keep both
    assert not [end for end in ends if SECRET in end.stdout + end.stderr]
    assert not holders(here)
    assert len(hook.got) == len(ends)
    assert hook.paths == [f"/services/{SECRET}?key={SECRET}"] * len(ends)
    first = hook.got[0]
    assert first["summary"] == ends[0].json
    assert {key: first[key] for key in ("event", "output", "exit_code", "state", "reason")} == {
        "event": "run",
        "output": str(here / "out"),
        "exit_code": 0,
        "state": "finished",
        "reason": "",
    }
    text = f"vlmbatch run done: 20 rows = 20 ok + 0 failed + 0 answered earlier -> {here}/out"
    assert first["text"] == f"{text} ({socket.gethostname()})"
    assert [got["summary"]["skipped"] for got in hook.got[1:3]] == [20, 20]  # the same question
    refused = hook.got[4]
    assert (refused["state"], refused["exit_code"], refused["summary"]) == ("refused", 2, None)
    assert "another question" in refused["reason"]
    assert hook.got[5]["event"] == "retry"
    assert hook.headers[0]["Content-Type"] == "application/json"


def test_a_server_that_fails_twice_is_asked_a_third_time(tmp_path: Path) -> None:
    with hook_that(500, 503) as hook:
        ended = vlmbatch(*small(tmp_path), "--notify-url", hook.url)
    assert ended.exit_code == 0, ended
    assert len(hook.got) == 3
    assert hook.got[0] == hook.got[2]
    assert "Warning" not in ended.stderr


def test_a_server_that_is_away_changes_no_exit_code(tmp_path: Path) -> None:
    with hook_that() as hook:
        url = hook.url
    ended = vlmbatch(*small(tmp_path), "--notify-url", url, "--json")
    assert ended.exit_code == 0, ended
    warnings = [line for line in ended.stderr.splitlines() if line.startswith("Warning")]
    assert warnings == [
        "Warning: how this ended could not be posted to http://127.0.0.1 (--notify-url): "
        "Connection refused"
    ]
    assert ended.json["ok"] == 6


@pytest.mark.parametrize(
    ("answers", "seconds", "said", "times"),
    [
        (["hang"] * 3, 0.3, "no answer within 0.3 s", 3),
        (["drip"] * 3, 0.3, "", 3),
        ([302, 302, 302], 60.0, "it answered 302", 3),
        ([404, 404, 404], 60.0, "it answered 404", 3),
        ([500, "hang", 502], 1.5, "it answered 502", 3),
        (["hang", 204], 1.5, None, 2),
    ],
)
def test_tries_are_three_and_bounded(
    answers: list[int | str],
    seconds: float,
    said: str | None,
    times: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with hook_that(*answers) as hook:  # what hangs does so until its block ends
        post(hook.url, {"text": "x"}, seconds=seconds, waits=(0.0, 0.0))
        written = capsys.readouterr().err
        until(lambda: len(hook.got) >= times, "the server has read what was sent")
    assert len(hook.got) == times
    assert hook.paths == [f"/services/{SECRET}?key={SECRET}"] * times  # and no redirect's target
    if said is None:
        assert written == ""
    else:
        assert written.startswith("Warning: ")
        assert written.count("\n") == 1
        assert said in written
        assert SECRET not in written


def test_a_user_in_the_address_is_a_header() -> None:
    with hook_that() as hook:
        post(f"http://me:{SECRET}%21@{hook.address}/x", {})
    assert hook.paths == ["/x"]
    token = base64.b64encode(f"me:{SECRET}!".encode()).decode()
    assert hook.headers[0]["Authorization"] == f"Basic {token}"


@pytest.mark.parametrize(
    "url",
    [
        *("", SECRET, f"ftp://host/{SECRET}", f"http:///{SECRET}", f"http://host:{SECRET}/"),
        *(f"http://host/{SECRET} x", f"https://host/{SECRET}é", f"http://[{SECRET}/", 12, [SECRET]),
    ],
)
def test_what_is_no_address_is_refused_and_not_quoted(tmp_path: Path, url: object) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps({"manifest": "m", "model": "demo", "output": "o", "notify_url": url}))
    ends = [vlmbatch("run", "--job", job)]
    if isinstance(url, str):
        ends.append(vlmbatch("run", "m.parquet", "--notify-url", url))
        ends.append(vlmbatch("retry", tmp_path, "--notify-url", url))
    for ended in ends:
        assert ended.exit_code == 2, ended
        assert "expected" in ended.stderr
        assert SECRET not in ended.stderr + ended.stdout


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    ended = vlmbatch("run", "m.parquet", "--notify-url=@no-such-file")
    assert ended.exit_code == 2, ended
    assert "no-such-file" in ended.stderr


def test_the_address_is_no_part_of_the_job_that_is_stored() -> None:
    job = JobSpec(manifest=["m"], notify_url=f"https://host/{SECRET}")
    assert job.notify_url == f"https://host/{SECRET}"
    assert SECRET not in repr(job) + str(job) + job.model_dump_json() + str(job.model_dump())
    assert "notify_url" in JobSpec.model_json_schema()["properties"]


def test_however_a_run_ends_it_is_posted(tmp_path: Path) -> None:
    missing = write_manifest(tmp_path / "missing.parquet", {"image": ["no.png"] * 4})
    with hook_that() as hook:
        told = ["--notify-url", hook.url]
        failed = ["run", missing, "-t", "caption", *echo(), "-o", tmp_path / "failed", *told]
        no_engine = tmp_path / "no-engine.yaml"
        no_engine.write_text(
            f"manifest: {missing}\noutput: {tmp_path}/stopped\nmodel: demo\ntasks: [caption]\n"
            'engine: {name: echo, args: {log: "a\\0b"}}\n'
        )
        assert vlmbatch(*failed).exit_code == 3
        assert vlmbatch("run", "--job", no_engine, *told).exit_code == 1
        assert vlmbatch("run", tmp_path / "none.parquet", *told).exit_code == 2
        assert vlmbatch("run", "--job", tmp_path / "none.yaml", *told).exit_code == 2
        assert vlmbatch("retry", tmp_path / "nothing", *told).exit_code == 2
        prepared = ["--prepare", "-o", tmp_path / "prepared", *told]
        assert vlmbatch(*small(tmp_path)[:-2], *prepared).exit_code == 0
    found = [(got["exit_code"], got["state"], got["event"]) for got in hook.got]
    assert found == [
        (3, "finished", "run"),
        (1, "stopped", "run"),
        (2, "refused", "run"),
        (2, "refused", "run"),
        (2, "refused", "retry"),
        (0, "prepared", "run"),
    ]
    assert hook.got[0]["reason"] == "more rows failed than --max-failure-rate allows"
    assert hook.got[0]["summary"]["failures"] == {"image_missing": 4}
    assert "embedded null byte" in hook.got[1]["reason"]
    assert "none.parquet" in hook.got[2]["text"]
    assert "none.yaml" in hook.got[3]["text"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_posted(tmp_path: Path, number: signal.Signals) -> None:
    hang = echo(delay=0.01, capacity=1, hang_after=20, hang_until=tmp_path / "go-on")
    words = [*small(tmp_path, 300), *hang, "--checkpoint-rows=2"]
    with hook_that() as hook, Command(*words, "--notify-url", hook.url) as command:
        shards = tmp_path / "out" / OURS / "shards"
        until(lambda: shards.exists() and list(shards.iterdir()), "a commit")
        command.signal(number)
        command.read_until("stopping")
        (tmp_path / "go-on").touch()
        ended = command.wait()
    assert ended.exit_code == 130, ended
    (got,) = hook.got
    assert (got["exit_code"], got["state"]) == (130, "interrupted")
    assert got["summary"]["ok"] > 0
    assert got["summary"]["left"] > 0


def test_who_is_tired_of_waiting_for_the_server_gets_the_runs_exit_code(tmp_path: Path) -> None:
    with hook_that("hang") as hook, Command(*small(tmp_path), "--notify-url", hook.url) as command:
        until(lambda: hook.got, "the post")
        command.signal(signal.SIGINT)
        ended = command.wait()
    assert len(hook.got) == 1  # it has not tried again: the signal ended it
    assert ended.exit_code == 0, ended
    assert "done: 6 rows" in ended.stdout
    assert "could not be posted" in ended.stderr
    assert "interrupted" in ended.stderr
    assert "Traceback" not in ended.stderr
