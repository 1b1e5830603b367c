"""``vlmbatch quality``: one pass over an output's results.

Memory: a batch of results, counters, and DuckDB's share (scratch.py), whatever the output's size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow.compute as pc

from vlmbatch import __version__
from vlmbatch.errors import RunStopped, UsageError
from vlmbatch.quality.base import COLUMNS, Answers, Measure, Metric
from vlmbatch.quality.gates import Gate, GateResult, checked, judged
from vlmbatch.quality.measures import Subject, measures_of
from vlmbatch.quality.measures.labels import LABELS
from vlmbatch.quality.measures.repeated import TEXTS
from vlmbatch.quality.scratch import Scratch
from vlmbatch.records import Range
from vlmbatch.reopen import check_read_through
from vlmbatch.results.output import Output
from vlmbatch.results.schema import RESULT_SCHEMA
from vlmbatch.results.store import QUALITY_FILE, Store, open_store
from vlmbatch.run_file import now, read_run_file
from vlmbatch.summary import TOO_MANY_FAILED
from vlmbatch.tasks import make_task
from vlmbatch.terminal import say

_LINE_SECONDS = 30.0


@dataclass(slots=True)
class TaskQuality:
    """What was found in the results of one task."""

    name: str
    results: int = 0
    measures: list[Measure] = field(default_factory=list)

    def add(self, answers: Answers) -> None:
        self.results += len(answers)
        for measure in self.measures:
            measure.add(answers)

    @property
    def metrics(self) -> list[Metric]:
        return [metric for measure in self.measures for metric in measure.metrics()]

    def to_json(self) -> dict[str, Any]:
        metrics = self.metrics
        details: dict[str, Any] = {}
        for measure in self.measures:
            details.update(measure.details())
        return {
            "results": self.results,
            "metrics": {metric.name: _rounded(metric.value) for metric in metrics},
            "findings": {
                metric.name: {
                    "count": metric.count,
                    "of": metric.of,
                    "examples": [asdict(example) for example in metric.examples],
                }
                for metric in metrics
                if metric.count
            },
            "details": details,
        }


@dataclass(slots=True)
class Quality:
    """What a look at an output found. ``run`` and ``results`` tell what it was like then."""

    output: str
    run: str
    model: str
    rows: int
    results: int
    tasks: list[TaskQuality]
    gates: list[GateResult]
    measured: str
    seconds: float

    @property
    def exit_code(self) -> int:
        return 0 if all(gate.passed for gate in self.gates) else TOO_MANY_FAILED

    def to_json(self) -> dict[str, Any]:
        return {
            "output": self.output,
            "run": self.run,
            "model": self.model,
            "rows": self.rows,
            "results": self.results,
            "measured": self.measured,
            "seconds": self.seconds,
            "versions": {"vlmbatch": __version__},
            "tasks": {task.name: task.to_json() for task in self.tasks},
            "gates": [gate.to_json() for gate in self.gates],
            "passed": self.exit_code == 0,
        }


@dataclass(frozen=True)
class Measured:
    """``quality`` and how it is told: both, because the figures are gone from DuckDB afterwards."""

    quality: dict[str, Any]
    text: str
    failed_gates: tuple[str, ...]
    exit_code: int
    warnings: tuple[str, ...]


def measure(folder: str, *, fail_on: Sequence[str] = ()) -> Measured:
    """Look at all results of an output, and store what was found in it (QUALITY_FILE).

    ``fail_on``: gates, as in ``repeated>0.05``. Raises UsageError where the folder is no output, or
    a gate names what is not measured here.
    """
    from vlmbatch.quality.text import describe

    gates = [Gate.parse(text) for text in fail_on]
    store = open_store(folder)
    run_file = read_run_file(store)
    if run_file is None:
        raise UsageError(
            f"{store.place} is no output of vlmbatch",
            hint="name the folder that `vlmbatch run` printed after ->",
        )
    check_read_through(store, run_file)
    output = Output(store, run_file.run, run_file.part_rows, RESULT_SCHEMA)
    started = time.monotonic()
    with Scratch({"texts": TEXTS, "labels": LABELS}) as scratch:
        counts = output.counts()
        tasks: dict[str, TaskQuality] = {}
        for number, spec in enumerate(run_file.spec.tasks):
            subject = Subject(
                make_task(spec),
                number,
                counts.requests // len(run_file.spec.tasks),
                scratch,
                lambda row, name=spec.name: _results_of(output, row, name),  # type: ignore[misc]
            )
            tasks[spec.name] = TaskQuality(spec.name, measures=measures_of(subject))
        checked(gates, tasks.values())
        for answers, name in _answers(output, list(tasks), counts.requests):
            tasks[name].add(answers)
        found = list(tasks.values())
        quality = Quality(
            output=store.place,
            run=run_file.run,
            model=run_file.model["label"],
            rows=counts.rows,
            results=sum(task.results for task in found),
            tasks=found,
            gates=judged(gates, found),
            measured=now(),
            seconds=round(time.monotonic() - started, 3),
        )
        told = quality.to_json()
        text = describe(quality)
    failed = tuple(str(gate) for gate in quality.gates if not gate.passed)
    return Measured(told, text, failed, quality.exit_code, _stored(store, told))


def _answers(output: Output, tasks: list[str], total: int) -> Iterator[tuple[Answers, str]]:
    """The results in manifest order, each batch by task, with the task's name."""
    done, next_line = 0, time.monotonic() + _LINE_SECONDS
    try:
        for batch in output.results(columns=COLUMNS):
            for name in tasks:
                mine = batch if len(tasks) == 1 else batch.filter(pc.equal(batch["task"], name))
                if mine.num_rows:
                    yield Answers(mine), name
            done += batch.num_rows
            if time.monotonic() >= next_line:
                next_line = time.monotonic() + _LINE_SECONDS
                say(f"measured {done:,} of {total:,} results")
    except FileNotFoundError as error:  # gathered into a part meanwhile
        raise RunStopped(
            f"a run is writing {output.store.place} at this moment: {error.filename} has gone",
            hint="look again when the run has ended",
        ) from None


def _results_of(output: Output, row: int, task: str) -> Answers:
    for batch in output.results(Range(row, row + 1), COLUMNS):
        mine = batch.filter(pc.equal(batch["task"], task))
        if mine.num_rows:
            return Answers(mine)
    raise RunStopped(
        f"row {row} of {output.store.place} has gone", hint="look again when the run has ended"
    )


def _stored(store: Store, quality: dict[str, Any]) -> tuple[str, ...]:
    """Warnings: who may only read the output sees the figures all the same."""
    try:
        store.write_json(QUALITY_FILE, quality)
    except RunStopped as error:
        return (f"not stored: {error.message}",)
    return ()


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
