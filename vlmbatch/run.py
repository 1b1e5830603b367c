"""``vlmbatch run`` and ``vlmbatch retry``: the way from a job spec to a finished output."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vlmbatch.driver import Driver, Interrupted, TooManyFailures
from vlmbatch.engines import asked_settings, check_engine
from vlmbatch.errors import FingerprintMismatch, RunStopped, UsageError
from vlmbatch.executors import Executor
from vlmbatch.executors.choice import NoWorkers, check_executor, choose_executor, make_executor
from vlmbatch.incremental.nights import note_night
from vlmbatch.incremental.planning import (
    Wanted,
    begin_generation,
    check_same_folder,
    check_same_ids,
    night_of,
    to_ask,
)
from vlmbatch.intervals import Intervals
from vlmbatch.job import JobSpec, check_same_ask
from vlmbatch.judged_output import open_rows, with_judged
from vlmbatch.manifest import Manifest
from vlmbatch.manifest.identities import check_identifiable
from vlmbatch.manifest.manifest import changes, stored_schema
from vlmbatch.progress import ProgressReport
from vlmbatch.records import Range
from vlmbatch.reopen import check_read_through, existing_run_file, reopened
from vlmbatch.resolve import Asking, Resolved, carried_fields, resolve
from vlmbatch.results.files import Counts, is_part_name, list_shards
from vlmbatch.results.gathering import gather_all
from vlmbatch.results.generations import Generation, delete_late
from vlmbatch.results.ids import MAX_ROWS, repeated_ids
from vlmbatch.results.output import Output, check_ours
from vlmbatch.results.retry import FailedResults
from vlmbatch.results.schema import RESULT_SCHEMA
from vlmbatch.results.store import (
    GENERATIONS,
    QUALITY_FILE,
    SHARDS,
    STATUS_FILE,
    Store,
    open_store,
)
from vlmbatch.run_file import INCREMENTAL, RunFile, new_run_id, now, read_run_file, write_run_file
from vlmbatch.storage import is_local
from vlmbatch.summary import INTERRUPTED, TOO_MANY_FAILED, Summary, summarise
from vlmbatch.tally import Tally
from vlmbatch.terminal import say, stdout_to

_TOO_MANY = "more rows failed than --max-failure-rate allows"
_BAD_ROW = "with --incremental, one id is one row, and these became bad_row"


@dataclass(frozen=True)
class Start:
    """What a start has found before it writes anything."""

    store: Store
    manifest: Manifest
    resolved: Resolved
    stored: RunFile | None
    """The run that this one resumes."""

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.manifest.notes, *self.resolved.notes)

    @cached_property
    def output(self) -> Output | None:
        """What earlier starts have committed; None where there is nothing to resume."""
        return None if self.stored is None else self.output_of(self.stored)

    def output_of(self, run_file: RunFile) -> Output:
        schema = self.resolved.asking.schema
        return Output(self.store, run_file.run, run_file.part_rows, schema)

    @cached_property
    def pending(self) -> list[Range]:
        """The rows of the manifest that are still to be asked about."""
        job = self.resolved.job
        if not job.incremental:
            return _pending(self.output, self.manifest, job.limit)
        asking = self.resolved.asking
        return to_ask(self.output, self.manifest, asking.columns, job, night_of(job))


def look(job: JobSpec, *, overwrite: bool = False, command: Sequence[str] = ()) -> Start:
    """How a run of this job would begin. Writes nothing; raises what would refuse the run."""
    check_executor(job)
    store = open_store(output_folder(job))
    command = _without_secrets(command, job)
    if job.detect_changes and not job.incremental:
        raise UsageError("--detect-changes is for --incremental", hint="give both, or neither")
    as_named = job = with_judged(job, store.place)
    job = job.model_copy(update={"manifest": [_absolute(path) for path in job.manifest]})
    if not overwrite:
        check_ours(store)
    stored = None if overwrite else _begun(store)
    manifest = open_rows(as_named, _same_listing(job, stored))
    resolved = resolve(job, manifest, stored)
    if job.incremental:
        check_identifiable(manifest, resolved.asking.columns)
        if stored is not None:
            check_same_ids(stored, manifest, resolved.asking.columns)
            check_same_folder(stored.manifest["folder"], manifest, resolved.asking.columns)
    if overwrite:
        check_ours(store)
    else:
        _check_same(stored, resolved, command, store, manifest)
    return Start(store, manifest, resolved, stored)


def run(
    job: JobSpec, *, overwrite: bool = False, prepare: bool = False, command: Sequence[str] = ()
) -> Summary:
    """The main job. Run again to resume. ``prepare``: all but the asking."""
    if prepare and job.incremental:
        raise UsageError(
            "--prepare and --incremental do not go together",
            hint="leave one out: batch files are made of a manifest that stays as it is",
        )
    start = look(job, overwrite=overwrite, command=command)
    store, manifest, resolved = start.store, start.manifest, start.resolved
    for note in start.notes:
        say(note)
    store.make()
    with store.lock(), stdout_to(store.logs / "stdout.log"):
        stored = None if overwrite else _begun(store)  # as it is now that it is ours
        _check_same(stored, resolved, command, store, manifest)
        run_file = _run_file(resolved, manifest, stored)
        output = start.output_of(run_file)
        epoch = 0 if overwrite else output.view().epoch
        run_file = replace(run_file, epoch=max(run_file.epoch, epoch) + 1)
        write_run_file(store, run_file)
        if overwrite:  # what is there belongs to another run from now on
            _delete_results(store)
        store.clean_tmp()
        output.delete_strays()
        resumed = stored is not None
        if prepare:
            return _prepared(output, run_file, manifest, resumed=resumed)
        if resolved.job.incremental:
            wanted = night_of(resolved.job)
            return _night(output, run_file, manifest, resolved.asking, wanted, resumed=resumed)
        todo = _todo(output, manifest, run_file.spec.limit)
        return _work(output, run_file, manifest, todo, resumed=resumed)


def retry(
    folder: str, codes: tuple[str, ...], changes: dict[str, Any], engine_changes: dict[str, Any]
) -> Summary:
    """The failed results of an output, asked again.

    ``changes`` are job settings, and ``engine_changes`` those of the engine (its ``args`` are
    added to what was given before), that change no answer.
    """
    job = existing_run_file(open_store(folder), hint="name the folder of a run").spec
    args = {**job.engine.args, **engine_changes.get("args", {})}
    engine = job.engine.model_copy(update={**engine_changes, "args": args})
    check_engine(engine)
    if asked_settings(engine) != asked_settings(job.engine):
        raise UsageError("that --engine-arg changes the answers; a retry asks the same again")
    job = job.model_copy(update={**changes, "engine": engine})
    check_executor(job)
    with (
        reopened(folder, job=job, any_manifest=True) as opened,
        stdout_to(opened.output.store.logs / "stdout.log"),
    ):
        output, run_file, manifest = opened.output, opened.run_file, opened.manifest
        if run_file.is_incremental:
            wanted = Wanted(codes, None, new=False)
            return _night(output, run_file, manifest, opened.asking, wanted, retry_codes=codes)
        pending = list(FailedResults(output, set(codes)).ranges(job.checkpoint_rows))
        todo = Todo(pending, list(manifest.boundaries()), None, sum(map(len, pending)))
        return _work(output, run_file, manifest, todo, retry_codes=codes)


def output_folder(job: JobSpec) -> str:
    """What -o says, else ``<manifest stem>-<tasks joined by +>`` in the current directory."""
    if job.output is not None:
        return job.output
    plain = [s for s in re.split(r"[/\\]", job.manifest[0]) if s and not re.search(r"[*?\[]", s)]
    stem = _stem(plain[-1]) if plain and plain[-1] not in (".", "..") else "results"
    tasks = [task.name for task in job.tasks] or ["caption"]
    return f"{stem}-{'+'.join(tasks)}"


def _stem(name: str) -> str:
    """Without its ending, and that of the compression."""
    return Path(re.sub(r"\.(gz|zst)$", "", name)).stem


def _prepared(output: Output, run_file: RunFile, manifest: Manifest, *, resumed: bool) -> Summary:
    """The output stands, and nothing was asked."""
    if not resumed:
        output.store.write_json(STATUS_FILE, {"state": "prepared", "updated": now()})
    total = manifest.rows_within(run_file.spec.limit)
    return summarise(
        run_file,
        Tally(),
        Counts(),
        output.counts(),
        rows=total,
        skipped=total - sum(map(len, _pending(output, manifest, run_file.spec.limit))),
        executor="none",
        workers=0,
        output=output.store.place,
        resumed=resumed,
        code=0,
        is_retry=False,
        warnings=list(run_file.warnings),
        state="prepared",
    )


@dataclass(frozen=True)
class Todo:
    """What a start has to do."""

    pending: list[Range]
    """Rows of the output, ascending; where some are asked again, with others between them."""
    boundaries: list[int]
    """Rows at which it is cheap to begin to read."""
    rows: int | None
    """That the start is about, asked or not; None: those that are asked again."""
    asked: int
    generation: Generation | None = None


def _todo(output: Output, manifest: Manifest, limit: int | None) -> Todo:
    pending = _pending(output, manifest, limit)
    rows = manifest.rows_within(limit)
    return Todo(pending, list(manifest.boundaries()), rows, sum(map(len, pending)))


def _night(
    output: Output,
    run_file: RunFile,
    manifest: Manifest,
    asking: Asking,
    wanted: Wanted,
    *,
    resumed: bool = True,
    retry_codes: tuple[str, ...] | None = None,
) -> Summary:
    """One start of an incremental run: what it has to do is planned and written down, then done."""
    began = begin_generation(output, run_file, manifest, asking.columns, wanted)
    run_file = replace(run_file, generation=began.number, manifest=manifest.to_json())
    write_run_file(output.store, run_file)
    if began.number is None:
        pending, boundaries = [], []
    else:
        pending = began.pending(run_file.spec.checkpoint_rows, run_file.part_rows)
        boundaries = list(began.selection.boundaries(list(manifest.boundaries())))
        output = replace(output, patched_since=run_file.epoch)
    generation = began.selection.generation
    rows = None
    if retry_codes is None:
        rows = manifest.rows_within(run_file.spec.limit) + generation.counts.get("gone", 0)
    todo = Todo(pending, boundaries, rows, generation.asked, generation)
    summary = _work(output, run_file, manifest, todo, resumed=resumed, retry_codes=retry_codes)
    if began.number is not None:
        note_night(output.store, began.number, summary)
    return summary


def _work(
    output: Output,
    run_file: RunFile,
    manifest: Manifest,
    todo: Todo,
    *,
    resumed: bool = True,
    retry_codes: tuple[str, ...] | None = None,
) -> Summary:
    """Run what is pending, gather, and sum up."""
    job = run_file.spec
    before = output.counts()
    name, workers = choose_executor(job, todo.asked)
    for warning in run_file.warnings:
        say(f"Warning: {warning}")
    skipped = 0 if todo.rows is None else todo.rows - todo.asked
    executor: Executor = NoWorkers()
    if todo.asked:
        executor, workers = make_executor(name, job, output.store, workers, todo.asked)
    _announce(run_file, manifest, todo.asked, skipped, name, workers, output)
    report = ProgressReport(
        output.store,
        total=todo.asked,
        skipped=skipped,
        label=job.tasks[0].name,
        earlier=_earlier(output.store, goes_on=not todo.asked or retry_codes is not None),
    )
    driver = Driver(
        output=output,
        run_file=run_file,
        executor=executor,
        workers=workers,
        pending=todo.pending,
        boundaries=todo.boundaries,
        report=report,
        retry_codes=retry_codes,
        generation=todo.generation,
    )
    state, code, reason = "stopped", 1, ""
    try:
        driver.run()
        if todo.generation is not None:
            delete_late(output.store, todo.generation)
        gather_all(output, whole_only=False)
        state, code = "finished" if _is_whole(output, todo) else "interrupted", 0
    except Interrupted:
        state, code = "interrupted", INTERRUPTED
    except TooManyFailures:
        state, code = "stopped", TOO_MANY_FAILED
        reason = _TOO_MANY
    except RunStopped as error:
        reason = error.message
        raise
    finally:
        report.close()
        with contextlib.suppress(RunStopped):
            output.store.clean_tmp()
            report.write_status(state, driver.tally, {}, reason)
    after, tally = output.counts(), driver.tally
    nightly = todo.generation is not None and retry_codes is None
    judged = driver.judged if nightly else after
    if code == 0 and judged.too_many_failed(job.max_failure_rate):
        code, reason = TOO_MANY_FAILED, _TOO_MANY
    warnings = list(run_file.warnings)
    if state == "finished" and retry_codes is None:
        warnings += _about_the_manifest(output, todo)
    plain = todo.generation is None and retry_codes is None
    return summarise(
        run_file,
        tally,
        after.minus(before) if plain else tally.counts,
        before,
        rows=tally.counts.rows if todo.rows is None else todo.rows,
        skipped=skipped,
        executor=name,
        workers=workers,
        output=output.store.place,
        resumed=resumed,
        code=code,
        is_retry=retry_codes is not None,
        warnings=warnings,
        state=state,
        reason=reason,
    )


def _earlier(store: Store, *, goes_on: bool) -> dict[str, Any]:
    """The status.json of the starts that this one belongs to: a resume's, a retry's, and those of a
    start that finds nothing to do. Empty where it begins anew, with rows that came later."""
    status: dict[str, Any] = {}
    with contextlib.suppress(RunStopped):  # it is only decoration
        status = store.read_json(STATUS_FILE) or {}
    return status if goes_on or status.get("state") != "finished" else {}


def _about_the_manifest(output: Output, todo: Todo) -> list[str]:
    if not todo.rows:
        return ["the manifest has no rows: nothing was asked"]
    if todo.generation is not None:
        again = todo.generation.counts.get("repeated", 0)
        has = "row has" if again == 1 else "rows have"
        return [f"{again:,} {has} the id of an earlier row: {_BAD_ROW}"] if again else []
    repeated = repeated_ids(output)
    if not repeated:
        return []
    among = f" (of the first {MAX_ROWS:,} rows)" if todo.rows > MAX_ROWS else ""
    has = "row has" if repeated == 1 else "rows have"
    return [f"{repeated:,} {has} the id of an earlier row{among}: tell them apart by `row`"]


def _is_whole(output: Output, todo: Todo) -> bool:
    """A retry may end with rows that were never asked."""
    committed = output.view().committed
    rows = todo.rows or 0
    if todo.generation is not None:
        rows = max((each.stop for each in committed), default=0)
    return not rows or committed.covers(Range(0, rows))


def _pending(output: Output | None, manifest: Manifest, limit: int | None) -> list[Range]:
    rows = manifest.rows_within(limit)
    committed = Intervals() if output is None else output.view().committed
    return committed.missing(Range(0, rows)) if rows else []


def _absolute(path: str) -> str:
    """So that a resume from another folder means the same manifest."""
    return path if "://" in path else os.path.abspath(path)


def _begun(store: Store) -> RunFile | None:
    """The run that the output holds answers of, or was prepared for: a start that failed before its
    first answer binds nobody to its settings."""
    stored = read_run_file(store)
    if stored is None:
        return None
    parts = any(is_part_name(entry.name) for entry in store.entries())
    check_read_through(store, stored)
    state = (store.read_json(STATUS_FILE) or {}).get("state")
    return stored if parts or state == "prepared" or list_shards(store) else None


def _same_listing(job: JobSpec, stored: RunFile | None) -> dict[str, Any] | None:
    """What a folder or glob stood for when the run began, if the same is asked for now."""
    if stored is None or job.incremental:
        return None
    before = stored.spec
    same = all(
        getattr(before, name) == getattr(job, name) for name in ("manifest", "include", "exclude")
    )
    return stored.manifest if same else None


def _run_file(resolved: Resolved, manifest: Manifest, stored: RunFile | None) -> RunFile:
    job = resolved.job.model_dump()
    if stored is not None:
        # The same manifest may be elsewhere by now: workers read it where it is.
        return stored.started_again(
            job=job,
            ask=resolved.ask,
            model=resolved.model,
            manifest=manifest.to_json(),
            variables=list(resolved.job.variables),
        )
    return RunFile(
        run=new_run_id(),
        created=now(),
        part_rows=resolved.job.part_rows,
        manifest=manifest.to_json(),
        ask=resolved.ask,
        read=resolved.read,
        model=resolved.model,
        job=job,
        epoch=0,
        warnings=resolved.warnings,
        variables=list(resolved.job.variables),
    ).started_again()


def _delete_results(store: Store) -> None:
    """--overwrite, under the lock: what earlier runs wrote here, and nothing else."""
    parts = [entry.name for entry in store.entries() if is_part_name(entry.name)]
    shards = [entry.name for entry in store.entries(SHARDS) if entry.name.endswith(".arrow")]
    nights = [f"{GENERATIONS}/{entry.name}" for entry in store.entries(GENERATIONS)]
    ours = [*(f"{SHARDS}/{name}" for name in shards), *nights, STATUS_FILE, QUALITY_FILE]
    store.delete([*parts, *ours])


def _check_same(
    stored: RunFile | None,
    resolved: Resolved,
    command: Sequence[str],
    store: Store,
    manifest: Manifest,
) -> None:
    """Raises FingerprintMismatch where the output, if there is one, is of another job."""
    if stored is None:
        return
    asked_before = stored.ask
    if resolved.job.incremental:  # of a run over one manifest, too: its answers have ids
        asked_before = {**stored.ask, "manifest": INCREMENTAL}
    elif stored.is_incremental:
        raise FingerprintMismatch(
            f"{store.place} grows by --incremental",
            hint="add --incremental to go on with it, or give another -o",
        )
    is_same = asked_before.get("manifest") == resolved.ask["manifest"]
    check_same_ask(
        asked_before,
        resolved.ask,
        retry_with=_elsewhere(command, store.place),
        manifest=None if is_same else changes(stored.manifest, manifest),
    )
    _check_same_carried(stored, resolved)
    changed = [key for key, now_is in resolved.read.items() if stored.read.get(key) != now_is]
    if changed:
        again = ["vlmbatch", "reparse", store.place]
        raise FingerprintMismatch(
            "this output's answers were read in another way: "
            + ", ".join(
                f"{key} was {stored.read.get(key)!r}, now {resolved.read[key]!r}" for key in changed
            ),
            hint=f"read them anew: {shlex.join(again)}; or leave --family and --box-space out, to "
            "go on as before",
        )
    if stored.part_rows != resolved.job.part_rows:
        raise FingerprintMismatch(f"this output has {stored.part_rows} rows per part")


def _check_same_carried(stored: RunFile, resolved: Resolved) -> None:
    """Raises FingerprintMismatch where the results have other columns than before."""
    before = carried_fields(stored.spec, stored_schema(stored.manifest))
    now_are = list(resolved.asking.schema)[len(RESULT_SCHEMA) :]
    was, is_now = (
        ", ".join(f"{field.name}: {field.type}" for field in fields) for fields in (before, now_are)
    )
    if was != is_now:
        raise FingerprintMismatch(
            f"the columns that --carry copies were {was or 'none'}, and are {is_now or 'none'} now",
            hint="give a manifest whose columns have the types that they had, and --carry in the "
            "same order, or give another -o",
        )


def _without_secrets(command: Sequence[str], job: JobSpec) -> list[str]:
    """Messages quote the command, and logs the messages."""
    secret = job.notify_url
    return [word.replace(secret, "URL") if secret else word for word in command]


def _elsewhere(command: Sequence[str], output: str) -> str:
    """The command that was given, with another -o."""
    words = list(command)
    for option in ("-o", "--output"):
        if option in words:
            at = words.index(option)
            del words[at : at + 2]
    words = [w for w in words if not re.match(r"--output=|-o.", w)]
    return shlex.join(["vlmbatch", *words, "-o", f"{output.rstrip('/')}-2"])


def _announce(
    run_file: RunFile,
    manifest: Manifest,
    todo: int,
    skipped: int,
    executor: str,
    workers: int,
    output: Output,
) -> None:
    job = run_file.spec
    say(
        f"{manifest.extent}, "
        f"{skipped:,} answered, {todo:,} to do; "
        f"{' + '.join(task.name for task in job.tasks)} by {run_file.model['label']} "
        f"({job.engine.name}, family {job.family}), "
        f"{workers} {executor} worker{'s' if workers != 1 else ''} -> {output.store.place}"
    )
    if not is_local(output.store.place):
        say(f"logs are on this machine: {output.store.logs}")
