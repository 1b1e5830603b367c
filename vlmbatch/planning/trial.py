"""Some rows through the real model, and nothing of it left behind."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

from vlmbatch.errors import RunStopped
from vlmbatch.job import JobSpec
from vlmbatch.results.output import Output
from vlmbatch.results.schema import RESULT_SCHEMA
from vlmbatch.results.store import LocalStore
from vlmbatch.run import run
from vlmbatch.run_file import read_run_file
from vlmbatch.summary import INTERRUPTED


@dataclass(frozen=True, slots=True)
class Tried:
    """The first rows of the manifest, answered by the real model. ``results`` are rows of the
    results."""

    rows: int
    failed: int
    seconds: float
    rows_per_second: float
    completion_tokens: int
    results: list[dict[str, Any]]


def tried(job: JobSpec, rows: int) -> Tried:
    """The first rows of the manifest through the whole machinery, into a folder that is removed."""
    with tempfile.TemporaryDirectory(prefix="vlmbatch-plan-") as folder:
        changes = {"output": f"{folder}/run", "workers": 1, "ray_address": None}
        trial = job.model_copy(update={**changes, "limit": min(rows, job.limit or rows)})
        try:
            summary = run(trial)
        except RunStopped as error:
            raise type(error)(
                error.message,
                hint=f"the same with `vlmbatch run ... --limit {rows} -o NEW` keeps its logs",
            ) from None
        if summary.exit_code == INTERRUPTED:
            raise KeyboardInterrupt
        store = LocalStore(f"{folder}/run")
        run_file = read_run_file(store)
        assert run_file is not None
        output = Output(store, run_file.run, run_file.part_rows, RESULT_SCHEMA)
        results = [
            record
            for batch in output.results()
            for record in batch.select(RESULT_SCHEMA.names).to_pylist()
        ]
    return Tried(
        summary.ok + summary.failed,
        summary.failed,
        summary.seconds,
        summary.rows_per_second,
        summary.completion_tokens,
        results,
    )
