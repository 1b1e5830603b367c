"""What the tests of runs, kills, resumes and retries share: real manifests, the real command line,
real signals, and the invariants of an output, read with pyarrow alone."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner
from PIL import Image

OURS = "__vlmbatch"
_SHARD = re.compile(r"([0-9a-f]+)-(\d+)-(\d+)-(\d+)(-patch)?\.arrow")


PATIENCE = 200.0
"""Seconds after which what should have happened never will; generous, for slow machines under load.
Below pytest's own timeout (pyproject.toml), which says less."""


def until(condition: Callable[[], Any], what: str, *, seconds: float = PATIENCE) -> Any:
    """Look every few milliseconds until the condition holds; its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.003)
    return value


# manifests


def picture(width: int = 8, height: int = 6, colour: str = "red", **save: Any) -> bytes:
    """An encoded picture of one colour; PNG unless ``format`` says otherwise."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, **{"format": "PNG", **save})
    return file.getvalue()


def write_manifest(path: Path, columns: Mapping[str, Sequence[Any]], row_group: int = 100) -> Path:
    """A Parquet manifest; without an image column every row has the same small picture inline."""
    rows = len(next(iter(columns.values())))
    table = pa.table({"image": [picture()] * rows, **columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group)
    return path


@dataclass(frozen=True)
class Quiz:
    """A manifest of ``rows`` rows with ids and lists of questions, whose answers are known: every
    third row has two questions, the others have one."""

    path: Path
    rows: int

    @property
    def answers(self) -> list[list[str]]:
        """The answers of each row, in the order of its questions."""
        return [[f"answer {i}.{j}" for j in range(1 + (i % 3 == 0))] for i in range(self.rows)]

    @property
    def ids(self) -> list[str]:
        return [f"id-{i}" for i in range(self.rows)]

    @property
    def options(self) -> list[str]:
        """How to ask it, with the answers from the manifest."""
        return [str(self.path), "-t", "vqa", *echo(reply_from="answers")]


def quiz(folder: Path, rows: int, *, row_group: int = 100) -> Quiz:
    made = Quiz(folder / "quiz.parquet", rows)
    questions = [[f"question {i}.{j}?" for j in range(len(a))] for i, a in enumerate(made.answers)]
    columns = {"id": made.ids, "questions": questions, "answers": made.answers}
    write_manifest(made.path, columns, row_group)
    return made


def echo(**args: Any) -> list[str]:
    """Options for the echo engine with these arguments; rows may be a range or a set."""
    said = {
        key: ",".join(map(str, value)) if isinstance(value, range | set) else value
        for key, value in args.items()
    }
    return ["--engine", "echo", *(f"--engine-arg={key}={value}" for key, value in said.items())]


# the command line


@dataclass(frozen=True)
class Finished:
    """How a command ended and what it printed."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        assert self.stdout.strip(), self
        return json.loads(self.stdout)

    def __str__(self) -> str:
        return f"exit code {self.exit_code}\n{self.stdout}\n{self.stderr}"


def vlmbatch(*args: str | Path) -> Finished:
    """The command, run to its end in this process; its workers are processes as ever."""
    from vlmbatch.cli import main

    result = CliRunner().invoke(main, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Finished(result.exit_code, result.stdout, result.stderr)


class Command:
    """The command in a process of its own, leader of a process group; ended with the block.

    ``program``: what Python runs in the place of ``-m vlmbatch``."""

    def __init__(
        self,
        *args: str | Path,
        folder: Path | None = None,
        program: Sequence[str] = ("-m", "vlmbatch"),
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *program, *map(str, args)],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
            bufsize=0,  # so that nothing is lost between `read_until` and `wait`
        )
        self.pid = self._process.pid
        self._read = {"stdout": b"", "stderr": b""}

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_running:
            self.signal(signal.SIGKILL, group=True)
        self._process.communicate()

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: signal.Signals, *, group: bool = False) -> None:
        if self.is_running:
            (os.killpg if group else os.kill)(self.pid, number)

    def read_until(self, text: str, *, stream: Literal["stdout", "stderr"] = "stderr") -> None:
        """Until a line with this text has come; ``wait`` has all lines."""
        for line in getattr(self._process, stream):
            self._read[stream] += line
            if text in line.decode():
                return
        raise AssertionError(f"it never said {text!r} on {stream}: {self.wait()}")

    def wait(self, seconds: float = PATIENCE) -> Finished:
        stdout, stderr = self._process.communicate(timeout=seconds)
        stdout, stderr = self._read["stdout"] + stdout, self._read["stderr"] + stderr
        return Finished(self._process.returncode, stdout.decode(), stderr.decode())


def run_command(
    *args: str | Path, folder: Path | None = None, seconds: float = PATIENCE
) -> Finished:
    """The command in a process of its own, run to its end."""
    with Command(*args, folder=folder) as command:
        return command.wait(seconds)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that is dead but not yet waited for does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def descendants(pid: int) -> set[int]:
    """Processes under this one, whatever their session."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text()
                parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found, new = set(), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


# what the echo engine answered


@dataclass(frozen=True)
class Answered:
    """A line of the echo engine's log."""

    row: int
    request: int
    sample: int
    pid: int


class EchoLog:
    """The requests that echo engines answered, in the order of their answers."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[Answered]:
        """Whole lines only: a killed process may leave a piece of one."""
        text = self.path.read_text() if self.path.exists() else ""
        values = [json.loads(line) for line in text.split("\n")[:-1]]
        return [Answered(v["row"], v["request"], v["sample"], v["pid"]) for v in values]

    def __len__(self) -> int:
        return self.path.read_bytes().count(b"\n") if self.path.exists() else 0

    def rows_twice(self) -> int:
        """How many rows had a request answered more than once; each further time counts."""
        times = Counter((line.row, line.request, line.sample) for line in self.lines())
        worst: dict[int, int] = {}
        for (row, *_), count in times.items():
            worst[row] = max(worst.get(row, 0), count - 1)
        return sum(worst.values())


# an output


def parts(output: Path) -> list[Path]:
    return sorted(output.glob("part-*.parquet"))


def shards(output: Path) -> list[Path]:
    return sorted((output / OURS / "shards").glob("*"))


def leftovers(output: Path) -> list[Path]:
    return sorted((output / OURS / "tmp").glob("*"))


def run_json(output: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((output / OURS / "run.json").read_text())
    return value


def meta_of(part: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(pq.read_metadata(part).metadata[b"vlmbatch"])
    return value


def read_results(output: Path) -> pa.Table:
    """The parts in the order of their names."""
    return pa.concat_tables([pq.read_table(part) for part in parts(output)])


def committed_rows(output: Path) -> set[int]:
    """The rows whose results are in files: parts and shards of this run, patches aside."""
    run = run_json(output)["run"]
    found: set[int] = set()
    for shard in shards(output):  # before the parts, which they may go into meanwhile
        name = _SHARD.fullmatch(shard.name)
        assert name, shard
        if name[1] == run and not name[5]:
            found.update(range(int(name[3]), int(name[4]) + 1))
    for part in parts(output):
        meta = meta_of(part)
        if meta["run"] == run:
            found.update(range(meta["first"], meta["stop"]))
    return found


def assert_whole(
    output: Path,
    answers: Sequence[Sequence[str | None]],
    *,
    ids: Sequence[str] | None = None,
    failed: Mapping[int, str] | None = None,
    samples: int = 1,
) -> pa.Table:
    """A finished output: each (row, request, sample) once and in manifest order, with its answer or
    (``failed``: row to code) its failure; whole parts of one run on the grid, and nothing else.

    With several samples, ``answers`` has them all, each request's in turn."""
    failed = failed or {}
    run = run_json(output)
    names = [part.name for part in parts(output)]
    assert sorted(path.name for path in output.iterdir()) == [OURS, *names]
    assert not shards(output)
    assert not leftovers(output)
    table = read_results(output)
    found = table.select(["row", "request", "sample"]).to_pylist()
    wanted = [(row, i) for row, texts in enumerate(answers) for i in range(len(texts))]
    keys = [(key["row"], key["request"], key["sample"]) for key in found]
    assert keys == [(row, *divmod(i, samples)) for row, i in wanted]
    texts = [None if row in failed else answers[row][i] for row, i in wanted]
    assert table["text"].to_pylist() == texts
    assert table["raw"].to_pylist() == texts
    codes = [error and error["code"] for error in table["error"].to_pylist()]
    assert codes == [failed.get(row) for row, _ in wanted]
    statuses = ["failed" if row in failed else "ok" for row, _ in wanted]
    assert table["status"].to_pylist() == statuses
    if ids is not None:
        assert table["id"].to_pylist() == [ids[row] for row, _ in wanted]
    _assert_on_the_grid(output, run, len(answers))
    return table


def _assert_on_the_grid(output: Path, run: dict[str, Any], rows: int) -> None:
    """Parts begin at multiples of part_rows, end where the next begins, count what they hold."""
    width = run["part_rows"]
    for number, part in enumerate(parts(output)):
        assert part.name == f"part-{number:05d}.parquet"
        meta = meta_of(part)
        assert meta["run"] == run["run"]
        assert meta["epoch"] <= run["epoch"]
        assert (meta["first"], meta["stop"]) == (number * width, min((number + 1) * width, rows))
        table = pq.read_table(part, columns=["row", "status"])
        assert meta["counts"]["rows"] == len(set(table["row"].to_pylist()))
        assert meta["counts"]["requests"] == table.num_rows
    assert len(parts(output)) == -(-rows // width)


def assert_adds_up(summary: Mapping[str, Any]) -> None:
    assert summary["rows"] == summary["ok"] + summary["failed"] + summary["skipped"], summary
    assert summary["left"] == 0


# faults


def forge_shard(
    output: Path, rows: range, *, epoch: int, text: str, run: str | None = None
) -> Path:
    """A shard of these rows, whole and well formed, whose answers all say ``text``; the results
    are otherwise those in the parts."""
    from vlmbatch.records import Range
    from vlmbatch.results.files import write_shard
    from vlmbatch.results.store import LocalStore

    table = read_results(output)
    mask = pa.array([row in rows for row in table["row"].to_pylist()])
    kept = table.filter(mask).replace_schema_metadata().combine_chunks()
    texts = pa.array([text] * kept.num_rows, pa.string())
    for name in ("text", "raw"):
        kept = kept.set_column(kept.schema.get_field_index(name), kept.schema.field(name), texts)
    write_shard(
        LocalStore(output),
        kept.to_batches()[0],
        run=run or run_json(output)["run"],
        epoch=epoch,
        rows=Range(rows.start, rows.stop),
    )
    name = f"{run or run_json(output)['run']}-{epoch:04d}-{rows.start:012d}-{rows.stop - 1:012d}"
    return output / OURS / "shards" / f"{name}.arrow"


Kind = Literal["driver", "group", "worker"]


@dataclass(frozen=True)
class KillPoint:
    """SIGKILL to the driver alone, to its process group, or to one worker, when the echo engines
    have answered ``after`` more requests. ``checkpoint_rows`` and ``workers`` are those of the
    start that is killed."""

    kind: Kind
    after: int
    checkpoint_rows: int
    workers: int

    @property
    def hang_after(self) -> int:
        """Answers after which an engine waits for the kill, however late that comes: a little
        later, so that the kill finds it at work."""
        return self.after + 20

    @property
    def most(self) -> int:
        """Answers that the start gives at most."""
        return self.workers * self.hang_after

    @property
    def allowed(self) -> int:
        """Rows that this kill may cost at most: a worker holds two ranges."""
        return 2 * self.checkpoint_rows * (1 if self.kind == "worker" else self.workers)


def kill_points(kind: Kind, count: int, *, seed: int, answers: int) -> list[KillPoint]:
    """Moments by the seed: up to so many answers apart, ranges of 3 to 16 rows, 1 or 2 workers.

    A worker is killed within one run: there the ranges and the workers stay the same.
    """
    chance = random.Random(f"{kind} {seed}")
    points = [
        KillPoint(kind, chance.randint(0, answers), chance.randint(3, 16), chance.randint(1, 2))
        for _ in range(count)
    ]
    if kind == "worker":
        return [replace(point, checkpoint_rows=8, workers=1) for point in points]
    return points


@dataclass
class KillReport:
    """What the kills of one run cost, in rows."""

    name: str
    rows: int
    kills: int = 0
    twice: int = 0
    """Computed again; a row that was computed three times counts as two."""
    uncommitted: int = 0
    """Answered, but in no file, when the kill came: these have to be computed again."""
    allowed: int = 0
    """What the design allows: KillPoint.allowed."""

    HEADER: ClassVar[str] = (
        f"{'killed':<14} {'rows':>6} {'kills':>6} {'computed twice':>15} {'uncommitted':>12} "
        f"{'allowed':>8}"
    )

    def __str__(self) -> str:
        return (
            f"{self.name:<14} {self.rows:>6} {self.kills:>6} {self.twice:>15} "
            f"{self.uncommitted:>12} {self.allowed:>8}"
        )


class KillRun:
    """A run over a quiz that is killed at given moments and started again until it is done."""

    def __init__(
        self,
        folder: Path,
        questions: Quiz,
        *,
        executor: str = "local",
        part_rows: int = 64,
        delay: float = 0.01,
    ) -> None:
        self.quiz = questions
        self.output = folder / "out"
        self.log = EchoLog(folder / "echo.log")
        self.go_on = folder / "go-on"
        """The file that ends what ``hang_after`` brings about."""
        self.executor = executor
        self.report = KillReport(executor, questions.rows)
        self._starts: list[tuple[int, set[int]]] = []
        self._options = [
            *questions.options,
            *echo(log=self.log.path, delay=delay, capacity=4),
            f"--part-rows={part_rows}",
            f"--executor={executor}",
            f"--output={self.output}",
            "--json",
        ]

    def start(
        self, checkpoint_rows: int = 16, workers: int = 1, *more: str, hang_after: int | None = None
    ) -> Command:
        """The run in a process, from what is committed; it cannot outrun the test where its
        engines hang after so many answers."""
        self._starts.append((len(self.log), self._committed()))
        sizes = [f"--checkpoint-rows={checkpoint_rows}", f"--workers={workers}"]
        hang = echo(hang_after=hang_after, hang_until=self.go_on) if hang_after else []
        return Command("run", *self._options, *sizes, *hang, *more)

    def kill(self, point: KillPoint) -> None:
        """A start that ends with the driver killed, alone or with its group."""
        before = len(self.log)
        sizes = (point.checkpoint_rows, point.workers)
        with self.start(*sizes, hang_after=point.hang_after) as command:
            until(lambda: len(self.log) >= before + point.after, f"{point.after} answers")
            self.kill_driver(command, group=point.kind == "group")
        self.report.allowed += point.allowed

    def kill_driver(self, command: Command, *, group: bool = False) -> None:
        """Kill, and see that no process of the run lives on."""
        before = self._starts[-1][0]
        assert command.is_running, command.wait()
        # Ray's own agents look every now and then whether their raylet is still there.
        family = set() if self.executor == "ray" else descendants(command.pid)
        command.signal(signal.SIGKILL, group=group)
        assert command.wait().exit_code == -signal.SIGKILL
        family |= {line.pid for line in self.log.lines()[before:]}
        until(lambda: not any(map(is_alive, family)), "its processes are gone")
        self.report.kills += 1
        answered = {line.row for line in self.log.lines()[before:]}
        self.report.uncommitted += len(answered - self._committed())

    def kill_workers(self, points: list[KillPoint]) -> Finished:
        """All of these moments within one run, which then ends by itself; see ``kill_points``."""
        sizes = (points[0].checkpoint_rows, points[0].workers)
        longest = max(point.hang_after for point in points)
        with self.start(*sizes, hang_after=longest) as command:
            for point in points:
                self.kill_worker(command, point)
            self.go_on.touch()
            return command.wait(seconds=500)

    def kill_worker(self, command: Command, point: KillPoint) -> None:
        """Kill the worker that answered last, when more answers have come."""
        before = max(1, len(self.log))
        until(lambda: len(self.log) >= before + point.after, f"{point.after} answers")
        pid = self.log.lines()[-1].pid
        assert command.is_running, command.wait()
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.kill(pid, signal.SIGKILL)
        until(lambda: not is_alive(pid), "the worker is gone")
        self.report.kills += 1
        answered = {line.row for line in self.log.lines() if line.pid == pid}
        self.report.uncommitted += len(answered - self._committed())
        self.report.allowed += point.allowed

    def finish(self, checkpoint_rows: int = 16, workers: int = 1) -> Finished:
        with self.start(checkpoint_rows, workers) as command:
            return command.wait()

    def assert_kept(self) -> None:
        """The output is whole, no start computed a row that was committed before it, and no more
        was computed twice than was uncommitted when a kill came."""
        assert_whole(self.output, self.quiz.answers, ids=self.quiz.ids)
        lines = self.log.lines()
        ends = [*(first for first, _ in self._starts[1:]), len(lines)]
        for (first, committed), end in zip(self._starts, ends, strict=True):
            assert not {line.row for line in lines[first:end]} & committed
        self.report.twice = self.log.rows_twice()
        assert self.report.twice <= self.report.uncommitted <= self.report.allowed, self.report

    def _committed(self) -> set[int]:
        return committed_rows(self.output) if (self.output / OURS / "run.json").exists() else set()
