"""Ray actors as workers, through the command line: a cluster of the run's own, and one that was
there before (``ray start``, with two GPUs that exist on paper only)."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.harness import PATIENCE, is_alive, until

ROWS = 60
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
"""Of the cluster that was there before, and the drivers that know it."""
RAY = Path(sys.executable).parent / "ray"


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    path = tmp_path / "manifest.parquet"
    answers = [f"answer {row}" for row in range(ROWS)]
    columns = {"id": answers, "image": ["red.png"] * ROWS, "answer": answers}
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster with its own ports and folder; nothing of it is left afterwards."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: sockets lie in it
    port = free_port()
    command = [
        *(str(RAY), "start", "--head", "--block", "--disable-usage-stats"),
        *(f"--port={port}", f"--temp-dir={folder}"),
        *("--include-dashboard=false", "--num-cpus=2", "--num-gpus=2"),
        *("--object-store-memory=100000000", f"--dashboard-agent-listen-port={free_port()}"),
    ]
    said = Path(folder) / "start.log"
    with open(said, "wb") as log:
        head = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=os.environ | TOKEN
        )
    try:
        until(
            lambda: "Ray runtime started" in said.read_text() or head.poll() is not None,
            "Ray has started",
        )
        assert head.poll() is None, said.read_text()
        yield f"127.0.0.1:{port}"
    finally:
        head.terminate()
        try:
            head.wait(20)
        except subprocess.TimeoutExpired:
            head.kill()
            head.wait()
        for pid in in_session(head.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


VLMBATCH = ("-m", "vlmbatch")
IMPATIENT = (
    "-c",
    "import vlmbatch.driver; vlmbatch.driver.PLACE_SECONDS = 0.5;"
    "from vlmbatch.cli import main; main()",
)
"""Says after half a second, not a minute, that it goes on with fewer workers."""
RUNS: list["Run"] = []


@pytest.fixture(autouse=True)
def no_run_is_left() -> Iterator[None]:
    yield
    while RUNS:
        run = RUNS.pop()
        run.process.kill()
        run.process.wait()


class Run:
    """A ``vlmbatch run`` as a process, in a session of its own as at a terminal."""

    def __init__(
        self, manifest: Path, output: Path, *options: str, program: Sequence[str] = VLMBATCH
    ) -> None:
        self.output = output
        self.log = output.with_suffix(".log")
        self.go_on = output.with_suffix(".go-on")
        self._files = [output.with_suffix(".out"), output.with_suffix(".err")]
        command = [
            *(sys.executable, *program, "run", str(manifest), "-o", str(output), "--json"),
            *("--engine", "echo", "--engine-arg", "reply_from=answer", "--checkpoint-rows", "5"),
            *("--engine-arg", f"log={self.log}", "--executor", "ray", *options),
        ]
        with open(self._files[0], "wb") as out, open(self._files[1], "wb") as err:
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=err,
                start_new_session=True,
                env=os.environ | (TOKEN if "--ray-address" in options else {}),
            )
        RUNS.append(self)

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    @property
    def summary(self) -> dict[str, object]:
        """What stands on stdout, which is JSON and nothing else."""
        value: dict[str, object] = json.loads(self._files[0].read_text())
        return value

    @property
    def stderr(self) -> str:
        return self._files[1].read_text()

    @property
    def pids(self) -> list[int]:
        """The processes that answered something, each once, in order."""
        lines = self.log.read_text().splitlines(keepends=True) if self.log.exists() else []
        return list(dict.fromkeys(json.loads(li)["pid"] for li in lines if li.endswith("\n")))

    @property
    def answers(self) -> list[tuple[int, str, str | None]]:
        """(row, status, text) of the parts, as they stand in the files."""
        parts = sorted(self.output.glob("part-*.parquet"))
        rows = [row for part in parts for row in pq.read_table(part).to_pylist()]
        return [(row["row"], row["status"], row["text"]) for row in rows]


EVERY_ROW_ONCE = [(row, "ok", f"answer {row}") for row in range(ROWS)]


def test_two_actors_of_an_own_cluster_answer_every_row_once(manifest: Path, tmp_path: Path) -> None:
    ray = held_run(manifest, tmp_path / "ray", "--workers", "2")
    until(lambda: len(ray.pids) == 2, "both answer")
    ray.go_on.touch()
    assert ray.wait() == 0, ray.stderr
    assert ray.answers == EVERY_ROW_ONCE
    assert (ray.summary["executor"], ray.summary["workers"]) == ("ray", 2)
    assert len(ray.pids) == 2
    assert len(ray.stderr.splitlines()) == 1, ray.stderr  # what is done; nothing of Ray's
    assert {log.name for log in (ray.output / "__vlmbatch" / "logs").glob("worker-*")} == {
        "worker-0001-w1.log",
        "worker-0001-w2.log",
    }


@pytest.mark.slow  # with a cluster that was there before: test_a_killed_driver_takes_its_actors_...
def test_actors_of_an_own_cluster_end_with_a_driver_that_is_killed(
    manifest: Path, tmp_path: Path
) -> None:
    run = held_run(manifest, tmp_path / "out", "--workers", "2")
    until(lambda: len(run.pids) == 2, "both answer")
    run.process.kill()
    run.wait()
    until(lambda: not any(map(is_alive, run.pids)), "all are gone")


def test_ctrl_c_keeps_what_is_committed_and_the_same_command_goes_on(
    manifest: Path, tmp_path: Path
) -> None:
    run = held_run(manifest, tmp_path / "out", "--workers", "2")
    until(lambda: bool(shards(run.output)), "a commit")
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does it: to everybody
    assert run.wait() == 130, run.stderr
    assert "Traceback" not in run.stderr
    kept = run.summary["ok"]
    assert isinstance(kept, int)
    assert 0 < kept < ROWS
    assert run.answers == EVERY_ROW_ONCE[: len(run.answers)]
    again = Run(manifest, tmp_path / "out", "--executor", "local")
    assert again.wait() == 0, again.stderr
    assert again.summary["skipped"] == kept
    assert again.answers == EVERY_ROW_ONCE


def test_an_actor_that_is_killed_is_replaced(manifest: Path, tmp_path: Path, cluster: str) -> None:
    run = held_run(manifest, tmp_path / "out", "--workers", "2", "--ray-address", cluster)
    until(lambda: len(run.pids) == 2, "both answer")
    os.kill(run.pids[0], signal.SIGKILL)
    until(lambda: len(run.pids) == 3, "a third one answers")
    run.go_on.touch()
    assert run.wait() == 0, run.stderr
    assert run.answers == EVERY_ROW_ONCE
    assert run.summary["worker_deaths"] == 1
    assert len(run.pids) == 3
    assert "killed from outside or crashed" in run.stderr
    assert len(run.stderr.splitlines()) == 2, run.stderr  # what is done, who died; nothing of Ray's


def test_a_killed_driver_takes_its_actors_along_and_a_second_run_goes_on(
    manifest: Path, tmp_path: Path, cluster: str
) -> None:
    run = held_run(manifest, tmp_path / "out", "--workers", "2", "--ray-address", cluster)
    until(lambda: len(run.pids) == 2 and bool(shards(run.output)), "both answer, and a commit")
    run.process.kill()
    run.wait()
    again = Run(manifest, tmp_path / "out", "--workers", "2", "--ray-address", cluster)
    assert again.wait() == 0, again.stderr
    assert again.summary["resumed"] is True
    assert again.summary["skipped"] != 0
    assert again.answers == EVERY_ROW_ONCE
    until(lambda: not any(map(is_alive, run.pids)), "all are gone")


def test_a_row_that_kills_its_actor_is_the_only_one_that_fails(
    manifest: Path, tmp_path: Path, cluster: str
) -> None:
    crash = ("--engine-arg", "crash_rows=7")
    run = Run(manifest, tmp_path / "out", "--workers", "2", "--ray-address", cluster, *crash)
    assert run.wait() == 0, run.stderr
    assert run.summary["failures"] == {"engine_crash": 1}
    assert run.answers == [
        (row, "failed", None) if row == 7 else (row, status, text)
        for row, status, text in EVERY_ROW_ONCE
    ]


def test_runs_share_a_cluster_and_one_without_a_place_says_what_is_free(
    manifest: Path, tmp_path: Path, cluster: str
) -> None:
    three = ("--workers", "3", "--ray-address", cluster)
    holder = held_run(manifest, tmp_path / "first", *three, program=IMPATIENT)
    until(lambda: len(holder.pids) == 2, "two answer")  # of three: there are two GPUs
    short = ("--start-timeout", "1s", "--ray-address", cluster)
    other = Run(manifest, tmp_path / "second", *short)
    assert other.wait() == 1, other.stderr
    assert "no worker found a place in 1 s: each worker asks for 1 GPU on one node" in other.stderr
    assert "1 node has 2 GPUs, 0 of them free" in other.stderr
    assert "Traceback" not in other.stderr
    holder.go_on.touch()
    assert holder.wait() == 0, holder.stderr  # the third worker never came, and nobody waits
    assert holder.answers == EVERY_ROW_ONCE
    assert len(holder.pids) == 2
    assert " of 3 workers are placed: going on with those" in holder.stderr
    assert holder.summary["worker_deaths"] == 0


def test_more_gpus_per_worker_than_any_node_has_are_refused(
    manifest: Path, tmp_path: Path, cluster: str
) -> None:
    run = Run(manifest, tmp_path / "out", "--gpus-per-worker", "3", "--ray-address", cluster)
    assert run.wait() == 2
    assert "no node of the Ray cluster has more than 2 GPUs" in run.stderr
    assert not run.pids


def test_a_ray_client_address_is_answered_with_the_line_to_submit(
    manifest: Path, tmp_path: Path
) -> None:
    run = Run(manifest, tmp_path / "out", "--ray-address", "ray://head:10001")
    assert run.wait() == 2
    assert "ray job submit --address http://head:8265 -- vlmbatch run" in run.stderr
    assert run.stderr.rstrip().endswith("--ray-address auto")


def test_a_cluster_that_does_not_answer_stops_the_run(manifest: Path, tmp_path: Path) -> None:
    run = Run(manifest, tmp_path / "out", "--ray-address", f"127.0.0.1:{free_port()}")
    assert run.wait() == 1
    assert "no Ray cluster answers at 127.0.0.1" in run.stderr
    assert "Traceback" not in run.stderr


def test_what_an_actor_started_dies_with_it(tmp_path: Path) -> None:
    """Without a raylet: the guard alone does it."""
    script = (
        "import subprocess, sys, time; from vlmbatch.executors.ray import guard_process_group;"
        "guard_process_group();"
        "subprocess.run(['sh', '-c', 'sleep 600 & echo $!; wait'])"
    )
    actor = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    with actor:
        assert actor.stdout is not None
        grandchild = int(actor.stdout.readline())
        assert is_alive(grandchild)
        actor.kill()
        until(lambda: not is_alive(grandchild), "it is gone")


FAMILY = """
from dataclasses import replace
from vlmbatch.families import entry_named
ENTRY = replace(entry_named("generic"), name="older", requirements=("no-such-package==1",))
"""


@pytest.mark.slow
def test_an_environment_that_has_another_path_on_another_node_is_refused_before_it_is_built(
    manifest: Path, tmp_path: Path, cluster: str
) -> None:
    (tmp_path / "older.py").write_text(FAMILY)
    command = [
        *(str(RAY), "start", f"--address={cluster}", "--block", "--disable-usage-stats"),
        *("--num-gpus=1", "--object-store-memory=100000000"),
        f"--dashboard-agent-listen-port={free_port()}",
    ]
    elsewhere = {**os.environ, **TOKEN, "VLMBATCH_CACHE": str(tmp_path / "elsewhere")}
    said = tmp_path / "node.log"
    with open(said, "wb") as log:
        node = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=elsewhere
        )
    try:
        until(
            lambda: "Ray runtime started" in said.read_text() or node.poll() is not None,
            "the node has started",
        )
        run = subprocess.run(
            [
                *(sys.executable, *VLMBATCH, "run", str(manifest), "-o", str(tmp_path / "out")),
                *("-t", "caption", "-m", "demo", "--engine", "transformers"),
                *("--family", str(tmp_path / "older.py"), "--ray-address", cluster),
            ],
            capture_output=True,
            text=True,
            check=False,
            env={k: v for k, v in os.environ.items() if k != "VLMBATCH_CACHE"} | TOKEN,
        )
    finally:
        for pid in in_session(node.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.wait()
    assert run.returncode == 2, run.stderr
    assert "executor ray: family older needs no-such-package==1" in run.stderr
    assert "must have one path on all nodes, not " in run.stderr
    assert f"{tmp_path}/elsewhere/environments/" in run.stderr
    assert "VLMBATCH_CACHE" in run.stderr


def held_run(manifest: Path, output: Path, *options: str, program: Sequence[str] = VLMBATCH) -> Run:
    """A run whose workers answer a dozen rows each, and the others when ``go_on`` is there."""
    hang = ("--engine-arg", "hang_after=12", "--engine-arg", "capacity=1")
    until_then = ("--engine-arg", f"hang_until={output.with_suffix('.go-on')}")
    return Run(manifest, output, *hang, *until_then, *options, program=program)


def shards(output: Path) -> list[Path]:
    return list(output.glob("__vlmbatch/shards/*.arrow"))


def in_session(leader: int) -> list[int]:
    """The processes of a session that are still there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            session = int(path.read_text().rpartition(")")[2].split()[3])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if session == leader:
            found.append(int(path.parent.name))
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_workers_get_the_variables_of_the_job_spec_from_the_driver(
    manifest: Path, cluster: str
) -> None:
    """The cluster was started without them; what they hold is written nowhere."""
    folder = manifest.parent
    (folder / "hush-hush").mkdir()
    for name in ("manifest.parquet", "red.png"):
        (folder / name).rename(folder / "hush-hush" / name)
    job = folder / "job.yaml"
    job.write_text(
        f"manifest: '{folder}/${{PICTURES}}/manifest.parquet'\noutput: {folder}/out\n"
        "model: demo\ntasks: [caption]\nexecutor: ray\nworkers: 1\n"
        "engine: {name: echo, args: {reply_from: answer}}\n"
    )
    assert "PICTURES" not in os.environ
    ended = subprocess.run(
        [sys.executable, *VLMBATCH, "run", "--job", job, "--ray-address", cluster, "--json"],
        env=os.environ | TOKEN | {"PICTURES": "hush-hush"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["ok"] == ROWS
    files = [path for path in (folder / "out" / "__vlmbatch").rglob("*") if path.is_file()]
    assert any(path.name.startswith("worker-") for path in files)
    assert [path for path in files if b"hush-hush" in path.read_bytes()] == []
