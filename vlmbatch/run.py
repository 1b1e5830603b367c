"""``vlmbatch run`` and ``vlmbatch retry``: the way from a job spec to a finished output."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmbatch.driver import Driver, Interrupted, TooManyFailures
from vlmbatch.engines import asked_settings, check_engine
from vlmbatch.errors import FingerprintMismatch, RunStopped, UsageError
from vlmbatch.executors import Executor
from vlmbatch.executors.choice import NoWorkers, check_executor, choose_executor, make_executor
from vlmbatch.job import JobSpec, check_same_ask
from vlmbatch.manifest import Manifest, open_manifest
from vlmbatch.progress import ProgressReport
from vlmbatch.records import Range
from vlmbatch.reopen import check_read_through, existing_run_file, reopened
from vlmbatch.resolve import Resolved, asking_of, resolve
from vlmbatch.results.files import is_part_name, list_shards
from vlmbatch.results.gathering import gather_all
from vlmbatch.results.ids import MAX_ROWS, repeated_ids
from vlmbatch.results.output import Output, check_ours
from vlmbatch.results.retry import FailedResults
from vlmbatch.results.store import QUALITY_FILE, SHARDS, STATUS_FILE, Store, open_store
from vlmbatch.run_file import RunFile, new_run_id, now, read_run_file, write_run_file
from vlmbatch.storage import is_local
from vlmbatch.summary import INTERRUPTED, TOO_MANY_FAILED, Summary, summarise
from vlmbatch.tally import Tally
from vlmbatch.terminal import say, stdout_to

_TOO_MANY = "more rows failed than --max-failure-rate allows"


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

    @property
    def output(self) -> Output | None:
        """What earlier starts have committed; None where there is nothing to resume."""
        return None if self.stored is None else _output(self.store, self.stored, self.manifest)

    @property
    def pending(self) -> list[Range]:
        """The rows that are still to be asked about."""
        rows = min(self.manifest.rows, self.resolved.job.limit or self.manifest.rows)
        whole = [Range(0, rows)] if rows else []
        found = self.output
        return whole if found is None else _pending(found, self.manifest, self.resolved.job.limit)


def look(job: JobSpec, *, overwrite: bool = False, command: Sequence[str] = ()) -> Start:
    """How a run of this job would begin. Writes nothing; raises what would refuse the run."""
    check_executor(job)
    store = open_store(output_folder(job))
    command = _without_secrets(command, job)
    named = job.manifest
    job = job.model_copy(update={"manifest": [_absolute(path) for path in named]})
    if not overwrite:
        check_ours(store)
    stored = None if overwrite else _begun(store)
    listing = _same_listing(job, stored)
    manifest = open_manifest(named, listing, include=job.include, exclude=job.exclude)
    resolved = resolve(job, manifest, stored)
    if overwrite:
        check_ours(store)
    else:
        _check_same(stored, resolved, command, store)
    return Start(store, manifest, resolved, stored)


def run(
    job: JobSpec, *, overwrite: bool = False, prepare: bool = False, command: Sequence[str] = ()
) -> Summary:
    """The main job. Run again to resume. ``prepare``: all but the asking."""
    start = look(job, overwrite=overwrite, command=command)
    store, manifest, resolved = start.store, start.manifest, start.resolved
    for note in start.notes:
        say(note)
    store.make()
    with store.lock(), stdout_to(store.logs / "stdout.log"):
        stored = None if overwrite else _begun(store)  # as it is now that it is ours
        _check_same(stored, resolved, command, store)
        run_file = _run_file(resolved, manifest, stored)
        output = _output(store, run_file, manifest)
        epoch = 0 if overwrite else output.view().epoch
        run_file = replace(run_file, epoch=max(run_file.epoch, epoch) + 1)
        write_run_file(store, run_file)
        if overwrite:  # what is there belongs to another run from now on
            _delete_results(store)
        store.clean_tmp()
        output.delete_strays()
        if prepare:
            return _prepared(output, run_file, manifest, resumed=stored is not None)
        return _work(
            output,
            run_file,
            manifest,
            pending=_pending(output, manifest, run_file.spec.limit),
            resumed=stored is not None,
        )


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
        reopened(folder, job=job) as opened,
        stdout_to(opened.output.store.logs / "stdout.log"),
    ):
        pending = list(FailedResults(opened.output, set(codes)).ranges(job.checkpoint_rows))
        return _work(
            opened.output,
            opened.run_file,
            opened.manifest,
            pending=pending,
            resumed=True,
            retry_codes=codes,
        )


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
    total = min(manifest.rows, run_file.spec.limit or manifest.rows)
    there = output.counts()
    return summarise(
        run_file,
        Tally(),
        there,
        there,
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


def _work(
    output: Output,
    run_file: RunFile,
    manifest: Manifest,
    *,
    pending: list[Range],
    resumed: bool,
    retry_codes: tuple[str, ...] | None = None,
) -> Summary:
    """Run what is pending, gather, and sum up."""
    job = run_file.spec
    before = output.counts()
    todo = sum(map(len, pending))
    name, workers = choose_executor(job, todo)
    for warning in run_file.warnings:
        say(f"Warning: {warning}")
    total = min(manifest.rows, job.limit or manifest.rows)
    skipped = total - todo if retry_codes is None else 0
    executor: Executor = NoWorkers()
    if todo:
        executor, workers = make_executor(name, job, output.store, workers, todo)
    _announce(run_file, manifest, todo, skipped, name, workers, output)
    report = ProgressReport(
        output.store,
        total=todo,
        skipped=skipped,
        label=job.tasks[0].name,
        earlier=_earlier(output.store, goes_on=not todo or retry_codes is not None),
    )
    driver = Driver(
        output=output,
        run_file=run_file,
        executor=executor,
        workers=workers,
        pending=pending,
        boundaries=list(manifest.boundaries()),
        report=report,
        retry_codes=retry_codes,
    )
    state, code, reason = "stopped", 1, ""
    try:
        driver.run()
        gather_all(output, whole_only=False)
        state, code = "finished" if _is_whole(output, total) else "interrupted", 0
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
    after = output.counts()
    if code == 0 and after.too_many_failed(job.max_failure_rate):
        code, reason = TOO_MANY_FAILED, _TOO_MANY
    warnings = list(run_file.warnings)
    if state == "finished" and retry_codes is None:
        warnings += _about_the_manifest(output, total)
    return summarise(
        run_file,
        driver.tally,
        before,
        after,
        rows=total if retry_codes is None else driver.tally.counts.rows,
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


def _about_the_manifest(output: Output, rows: int) -> list[str]:
    if not rows:
        return ["the manifest has no rows: nothing was asked"]
    repeated = repeated_ids(output)
    if not repeated:
        return []
    among = f" (of the first {MAX_ROWS:,} rows)" if rows > MAX_ROWS else ""
    has = "row has" if repeated == 1 else "rows have"
    return [f"{repeated:,} {has} the id of an earlier row{among}: tell them apart by `row`"]


def _is_whole(output: Output, rows: int) -> bool:
    """A retry may end with rows that were never asked."""
    return not rows or output.view().committed.covers(Range(0, rows))


def _pending(output: Output, manifest: Manifest, limit: int | None) -> list[Range]:
    rows = min(manifest.rows, limit or manifest.rows)
    return output.view().committed.missing(Range(0, rows)) if rows else []


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
    if stored is None:
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


def _output(store: Store, run_file: RunFile, manifest: Manifest) -> Output:
    asking = asking_of(run_file.spec, manifest, run_file.model["config"])
    return Output(store, run_file.run, run_file.part_rows, asking.schema)


def _delete_results(store: Store) -> None:
    """--overwrite, under the lock: what earlier runs wrote here, and nothing else."""
    parts = [entry.name for entry in store.entries() if is_part_name(entry.name)]
    shards = [entry.name for entry in store.entries(SHARDS) if entry.name.endswith(".arrow")]
    store.delete([*parts, *(f"{SHARDS}/{name}" for name in shards), STATUS_FILE, QUALITY_FILE])


def _check_same(
    stored: RunFile | None, resolved: Resolved, command: Sequence[str], store: Store
) -> None:
    """Raises FingerprintMismatch where the output, if there is one, is of another job."""
    if stored is None:
        return
    check_same_ask(stored.ask, resolved.ask, retry_with=_elsewhere(command, store.place))
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
