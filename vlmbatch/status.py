"""What ``vlmbatch status`` says: from the output's files, and status.json while a run goes on."""

from __future__ import annotations

import shlex
from contextlib import suppress
from typing import Any

from vlmbatch.errors import RunStopped, UsageError
from vlmbatch.incremental.nights import describe_nights, last_nights
from vlmbatch.manifest.manifest import stored_rows
from vlmbatch.results.generations import read_generation
from vlmbatch.results.output import Output
from vlmbatch.results.schema import RESULT_SCHEMA
from vlmbatch.results.store import STATUS_FILE, Store, open_store
from vlmbatch.run_file import RunFile, read_run_file


def status_of(output: str | Store) -> dict[str, Any]:
    """Seconds are of computing, from the first worker's readiness to the last commit, over all
    starts since the output was last whole.

    Raises UsageError where it is no output.
    """
    store = output if isinstance(output, Store) else open_store(output)
    run_file = read_run_file(store)
    if run_file is None:
        raise NoOutput(store.place)
    running = store.is_locked()  # before the rest: who ends after this look was running
    counts = Output(store, run_file.run, run_file.part_rows, RESULT_SCHEMA).counts()
    latest: dict[str, Any] = {}
    with suppress(RunStopped):  # it is only decoration
        latest = store.read_json(STATUS_FILE) or {}
    total = max(counts.rows, rows_wanted(store, run_file))
    state = latest.get("state", "started")
    unfinished = state in ("started", "running") or (state == "finished" and counts.rows < total)
    running = running or (unfinished and store.is_locked())  # it may have begun meanwhile
    if running:
        state = "running"
    elif unfinished:
        state = "killed"  # before it could say anything else
    nights = last_nights(store) if run_file.is_incremental else []
    if running and nights and nights[-1]["ended"] is None:
        nights[-1]["state"] = "running"
    seconds = latest.get("seconds")
    rate = latest.get("rows_per_second", 0.0)
    if seconds and not running:  # else that of the newest start says more
        rate = round(latest.get("rows_answered", 0) / seconds, 2)
    return {
        "output": store.place,
        "state": state,
        "reason": latest.get("reason", ""),
        "rows": total,
        "done": counts.rows,
        "ok": counts.rows - counts.failed_rows,
        "failed": counts.failed_rows,
        "requests": counts.requests,
        "failures": dict(counts.failures.most_common()),
        "truncated": counts.truncated,
        "rows_per_second": rate,
        "seconds_left": latest.get("seconds_left") if running else None,
        "engine_starved": latest.get("engine_starved"),
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
        "model": run_file.model["label"],
        "engine": run_file.spec.engine.name,
        "tasks": [task.name for task in run_file.spec.tasks],
        "workers": latest.get("workers", {}) if running else {},
        "nights": nights,
        "updated": latest.get("updated", run_file.created),
        "created": run_file.created,
        "began": latest.get("began", run_file.created),
        "ended": None if running or state == "killed" else latest.get("ended"),
        "seconds": seconds,
    }


def rows_wanted(store: Store, run_file: RunFile) -> int:
    """Rows that the output has when its newest start is through; 0 where nobody can tell."""
    if not run_file.is_incremental:
        rows = stored_rows(run_file.manifest)
        return min(rows, run_file.spec.limit or rows)
    with suppress(RunStopped):  # its manifest is tonight's, and has what is answered, or not
        if run_file.generation is not None:
            return read_generation(store, run_file.generation).rows
    return 0


class NoOutput(UsageError):
    """There is no run in that folder."""

    def __init__(self, place: str) -> None:
        super().__init__(
            f"{place} is no output of vlmbatch, and no folder of outputs",
            hint="name the folder that `vlmbatch run` printed after ->, or the one above",
        )


def describe(found: dict[str, Any]) -> str:
    """For a person."""
    share = 100 * found["done"] / found["rows"] if found["rows"] else 100.0
    lines = [
        f"{found['output']}: {found['state']}"
        + (f" ({found['reason']})" if found["reason"] else ""),
        f"  {' + '.join(found['tasks'])} by {found['model']} ({found['engine']})",
        f"  {found['done']:,} of {found['rows']:,} rows ({share:.1f} %), "
        f"{found['ok']:,} ok, {found['failed']:,} failed",
    ]
    for code, count in found["failures"].items():
        lines.append(f"    {count:>9,}  {code}")
    if found["state"] == "running":
        left = found["seconds_left"]
        lines.append(
            f"  {found['rows_per_second']:.1f} rows/s"
            + (f", about {left:,} s left" if left is not None else "")
        )
        if found["engine_starved"] is not None:
            lines.append(
                f"  engines had too little to do {found['engine_starved']:.1%} of the time"
            )
        for name, worker in found["workers"].items():
            doing = (
                f"{worker['answered']:,} answered, {worker['in_flight']} rows in flight"
                if worker["ready"]
                else "starting"
            )
            lines.append(f"    {name}: {doing}")
    elif found["seconds"]:
        lines.append(
            f"  {found['seconds']:,.1f} s of computing ({found['rows_per_second']:,.1f} rows/s), "
            f"began {found['began']}" + (f", ended {found['ended']}" if found["ended"] else "")
        )
    if found["nights"]:
        lines += ["  the last starts that had something to do:", *describe_nights(found["nights"])]
    if found["state"] == "killed" or (
        found["state"] != "running" and found["done"] < found["rows"]
    ):
        raised = "--max-failure-rate" in found["reason"]
        how = ", with a higher --max-failure-rate," if raised else ""
        how = " without --prepare" if found["state"] == "prepared" else how
        lines.append(f"  run the same command again{how} to go on")
    if found["failed"] and found["state"] != "running":
        command = shlex.join(["vlmbatch", "retry", found["output"]])
        lines.append(f"  to ask the failed ones again: {command}")
    return "\n".join(lines)
