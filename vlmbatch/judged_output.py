"""The rows of a job: its manifest's, or, for ``-t judge``, those that another output answers.

A judge sees the images of the run that it judges: its manifest is that run's, as run.json knows it,
and the answers are read beside it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vlmbatch.errors import OutputLocked, UsageError
from vlmbatch.job import JUDGE, JobSpec
from vlmbatch.manifest import Manifest, open_manifest
from vlmbatch.manifest.answers import Answers
from vlmbatch.records import Range
from vlmbatch.reopen import check_read_through, existing_run_file
from vlmbatch.results.output import Output
from vlmbatch.results.schema import RESULT_SCHEMA
from vlmbatch.results.store import Store, open_store
from vlmbatch.run_file import RunFile

_HINT = "-t judge takes the OUTPUT of another run: vlmbatch run OUTPUT -t judge -m JUDGE"


def judges(job: JobSpec) -> bool:
    return any(task.name == JUDGE for task in job.tasks)


def with_judged(job: JobSpec, output: str) -> JobSpec:
    """A judge's job, with the column names and variables of the run that it judges; any other as it
    is. ``output``: where its results go. Raises UsageError for what a judge cannot be asked."""
    if not judges(job):
        return job
    if len(job.tasks) > 1:
        raise UsageError("-t judge stands alone", hint="ask the other tasks in a run of their own")
    if len(job.manifest) > 1 or job.include or job.exclude or job.incremental:
        raise UsageError(
            "-t judge takes one output, and all of it: no --include, --exclude or --incremental",
            hint=_HINT,
        )
    store = open_store(job.manifest[0])
    if os.path.realpath(store.address) == os.path.realpath(open_store(output).address):
        raise UsageError(
            f"the judgements cannot go to {output}, which holds the answers",
            hint="give another output with -o",
        )
    judged = existing_run_file(store, hint=_HINT)
    columns = {**judged.spec.columns, **job.columns}
    found = job.model_copy(update={"columns": columns})
    found.name_variables({*job.variables, *judged.variables})
    return found


def open_rows(job: JobSpec, stored: Mapping[str, Any] | None = None) -> Manifest:
    """The manifest of a job; ``stored`` is an earlier listing. Raises as ``open_manifest`` does."""
    if not judges(job):
        return open_manifest(job.manifest, stored, include=job.include, exclude=job.exclude)
    store = open_store(job.manifest[0])
    judged = existing_run_file(store, hint=_HINT)
    check_read_through(store, judged)
    if judged.is_incremental:
        raise UsageError(
            f"{store.place} grows by --incremental: its rows are not those of one manifest",
            hint="-t judge takes the output of a run without --incremental",
        )
    if store.is_locked():
        raise OutputLocked(
            f"a run is going on in {store.place}, whose answers are to be judged",
            hint="wait for its end, then run the same command again",
        )
    rows = open_rows(judged.spec, judged.manifest)
    if rows.identity != judged.ask["manifest"]:
        raise UsageError(
            f"the manifest of {store.place} changed since its run",
            hint="restore it: its rows and images are what the answers are about",
        )
    return replace(rows, answers=_answers(store, judged, rows.rows))


def _answers(store: Store, judged: RunFile, rows: int) -> Answers:
    """Raises UsageError where they are not whole."""
    view = Output(store, judged.run, judged.part_rows, RESULT_SCHEMA).view()
    parts = [view.parts[number] for number in sorted(view.parts)]
    answered = parts[-1].rows.stop if parts else 0
    wanted = max(answered, min(rows, judged.spec.limit or rows))
    if not wanted:
        raise UsageError(f"{store.place} holds no answers to judge")
    if view.shards or not view.committed.covers(Range(0, wanted)):
        raise UsageError(
            f"{store.place} is not finished: {view.committed.rows:,} of {wanted:,} rows "
            "are answered, or not all of them gathered",
            hint="run the command that it was made with again; its state: "
            f"{shlex.join(['vlmbatch', 'status', store.place])}",
        )
    epochs = tuple(part.epoch for part in parts)
    return Answers(store.address, judged.run, wanted, judged.part_rows, epochs)
