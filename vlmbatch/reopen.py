"""An output that is there, opened to be added to by this process, without workers."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from vlmbatch.errors import RunStopped, UsageError
from vlmbatch.intervals import Intervals
from vlmbatch.job import JobSpec
from vlmbatch.manifest import Manifest
from vlmbatch.manifest.manifest import changes
from vlmbatch.placeholders import hide, values_of
from vlmbatch.records import Range
from vlmbatch.resolve import Asking, asking_of
from vlmbatch.results.appending import Appending
from vlmbatch.results.gathering import gather_all
from vlmbatch.results.generations import newest_epoch
from vlmbatch.results.output import Output
from vlmbatch.results.retry import FailedResults
from vlmbatch.results.store import STATUS_FILE, Store, open_store
from vlmbatch.run_file import RunFile, now, read_run_file, write_run_file


@dataclass(frozen=True)
class Reopened:
    """All that is known of a run, and what of it was committed when it was opened."""

    output: Output
    run_file: RunFile
    manifest: Manifest
    asking: Asking
    committed: Intervals
    failed: FailedResults

    @property
    def rows(self) -> int:
        """How many rows the run has: those of the manifest up to its --limit."""
        return self.manifest.rows_within(self.run_file.spec.limit)

    def appending(self, *, patch: bool = False) -> Appending:
        return Appending(
            self.output,
            epoch=self.run_file.epoch,
            model=self.run_file.model["label"],
            rows=self.run_file.spec.checkpoint_rows,
            patch=patch,
        )

    def write_status(self, state: str) -> None:
        """For ``vlmbatch status``; what a run said of its time stays."""
        store = self.output.store
        earlier: dict[str, Any] = {}
        with suppress(RunStopped):  # it is only decoration
            earlier = store.read_json(STATUS_FILE) or {}
        news = {"state": state, "reason": "", "updated": now()}
        store.write_json(STATUS_FILE, {**earlier, **news})


@contextmanager
def reopened(
    folder: str, *, job: JobSpec | None = None, any_manifest: bool = False
) -> Iterator[Reopened]:
    """Holds the output's lock meanwhile, under a new epoch; ``job``: the run's, with settings that
    change no answer. ``any_manifest``: also where the output grows by --incremental.

    Raises UsageError where it is no output, or its manifest changed, and OutputLocked.
    """
    store = open_store(folder)
    run_file = existing_run_file(store)
    check_read_through(store, run_file)
    if run_file.is_incremental and not any_manifest:
        raise UsageError(
            f"{folder} grows by --incremental: its rows are not those of one manifest",
            hint="batch files are made of a run without --incremental",
        )
    from vlmbatch.judged_output import open_rows  # which opens an output, too

    listing = None if run_file.is_incremental else run_file.manifest
    manifest = open_rows(run_file.spec, listing)
    if not run_file.is_incremental and manifest.identity != run_file.ask["manifest"]:
        what = changes(run_file.manifest, manifest)
        raise UsageError(
            f"the manifest of {folder} changed since the run" + (f": {what}" if what else ""),
            hint="restore it; its rows are what the output is about",
        )

    def asking(run_file: RunFile) -> Asking:
        return asking_of(run_file.spec, manifest, run_file.model["config"])

    with held(store, lambda run_file: asking(run_file).schema, job=job) as (output, run_file):
        committed = output.view().committed
        failed = FailedResults(output, set())
        yield Reopened(output, run_file, manifest, asking(run_file), committed, failed)


@contextmanager
def held(
    store: Store, schema_of: Callable[[RunFile], pa.Schema], *, job: JobSpec | None = None
) -> Iterator[tuple[Output, RunFile]]:
    """Holds the output's lock, under a new epoch, and tidies up after a start that was killed."""
    store.make()
    with store.lock():
        run_file = existing_run_file(store)  # as it is now that it is ours
        output = Output(
            store,
            run_file.run,
            run_file.part_rows,
            schema_of(run_file),
            patched_since=newest_epoch(store),  # else the next night would ask these again
        )
        epoch = max(run_file.epoch, output.view().epoch) + 1
        changes = {} if job is None else {"job": job.model_dump()}
        run_file = run_file.started_again(epoch=epoch, **changes)
        write_run_file(store, run_file)
        store.clean_tmp()
        output.delete_strays()
        gather_all(output, whole_only=True)
        yield output, run_file


def check_read_through(store: Store, run_file: RunFile) -> None:
    """Raises UsageError where a ``reparse`` was cut short: half of the answers are read anew."""
    if run_file.rereading:
        raise UsageError(
            f"a reparse of {store.place} was cut short",
            hint=f"finish it first: {shlex.join(['vlmbatch', 'reparse', store.place])}",
        )


def existing_run_file(
    store: Store,
    *,
    hint: str = "name the folder of a run; `vlmbatch run ... --prepare` makes one, asking nothing",
) -> RunFile:
    """Raises UsageError, with the hint, where the folder is no output."""
    run_file = read_run_file(store)
    if run_file is None:
        raise UsageError(f"{store.place} is no output of vlmbatch", hint=hint)
    held = values_of(run_file.variables)
    if missing := [name for name in run_file.variables if name not in held]:
        raise UsageError(
            f"the job of {store.place} names environment variables that are not set: "
            f"{', '.join(missing)}",
            hint="set them as they were for the run: run.json has their names only",
        )
    hide(held)
    return run_file


def joined(ranges: Intervals, gap: int) -> list[Range]:
    """The ranges, with gaps of at most so many rows filled: reading on beats opening again."""
    found: list[Range] = []
    for rows in ranges:
        if found and rows.first - found[-1].stop <= gap:
            found[-1] = Range(found[-1].first, rows.stop)
        else:
            found.append(rows)
    return found
