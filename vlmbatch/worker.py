"""One engine with its image loader and its writer: rows in, committed shards out. No Ray here.

Bounded stages on one event loop: read rows, load images, ask the engine, read the answer, commit.
Rows of the next lease flow in while the last rows of this one finish; no barrier between shards.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa

from vlmbatch import __version__
from vlmbatch.answering import Answering, make_loader
from vlmbatch.engines import make_engine
from vlmbatch.errors import (
    CredentialsRefused,
    EndpointError,
    EngineDead,
    EngineStartError,
    ManifestError,
    ManifestUnreachable,
    VlmbatchError,
    WorkerRefused,
)
from vlmbatch.grounding import Size
from vlmbatch.images.budget import Reservation
from vlmbatch.incremental.rows import SelectedRows, earlier_of
from vlmbatch.intervals import Intervals
from vlmbatch.manifest import Manifest, RowStream
from vlmbatch.messages import Broken, Committed, Drain, Ended, Message, Progress, Ready, Setup, Work
from vlmbatch.placeholders import Hiding, hide
from vlmbatch.records import Range, Result, Row
from vlmbatch.resolve import Asking, asking_of
from vlmbatch.results.files import write_shard
from vlmbatch.results.generations import Selection, open_selection
from vlmbatch.results.output import Output
from vlmbatch.results.retry import Earlier, FailedResults, asked_anew
from vlmbatch.results.schema import to_batch
from vlmbatch.results.store import NONCE_FILE, Store, open_store
from vlmbatch.run_file import RunFile, read_run_file
from vlmbatch.scheduler import Mode

log = logging.getLogger(__name__)

USUAL = Size(640, 480)
"""A picture, for engines that want to see one before the first row."""
READ_ROWS = 64
READ_BYTES = 8 * 2**20
LOADING_ROWS = 32
FETCHING_ROWS = 128
"""In place of these where the manifest names the images, which may be far away."""
SHARD_BYTES = 64 * 2**20
PROGRESS_SECONDS = 2.0


@dataclass(slots=True)
class OpenLease:
    """A lease being worked on; ``answered`` holds the results of rows not committed yet."""

    work: Work
    next_row: int
    """The first row that is not committed."""
    answered: dict[int, list[Result]] = field(default_factory=dict)
    size: int = 0
    """Approximate bytes of the results held."""
    commit: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def ready(self) -> int:
        """The first row at or after ``next_row`` that has no results yet."""
        row = self.next_row
        while row in self.answered:
            row += 1
        return row

    @property
    def finished(self) -> bool:
        return len(self.answered) == self.work.stop - self.next_row


class Worker:
    """Runs leases until it is drained. ``emit`` hands a message to the driver, from the loop."""

    def __init__(self, setup: Setup, emit: Callable[[Message], None]) -> None:
        self._setup = setup
        self._emit = emit
        _take_variables(setup.environment)
        self._store = open_store(setup.output)
        self._run_file, self._manifest = _see_what_the_driver_sees(setup, self._store)
        self._asking: Asking = asking_of(
            self._run_file.spec, self._manifest, self._run_file.model["config"]
        )
        job = self._run_file.spec
        self._engine = make_engine(
            job,
            self._run_file.model,
            self._asking.family,
            many_images=self._asking.columns.images_as_lists,
            image_size=self._asking.family.target(USUAL),
        )
        self._threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="load")
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read")
        self._loader = make_loader(
            job, self._asking.family, base=self._manifest.folder, threads=self._threads
        )
        self._rows_source: RowStream | SelectedRows
        self._rows_source = RowStream(self._manifest, self._asking.columns)
        self._selection: Selection | None = None
        earlier: Earlier = asked_anew
        if self._run_file.generation is not None:
            self._selection = open_selection(self._store, self._run_file.generation)
            self._rows_source = SelectedRows(self._rows_source, self._selection)
            earlier = earlier_of(self._selection, self._output())
        elif setup.retry:
            earlier = FailedResults(self._output(), set(setup.codes)).attempts
        self._answering = Answering(self._asking, self._loader, self._engine, earlier)
        self._open: dict[int, OpenLease] = {}
        self._rows: set[asyncio.Task[None]] = set()
        fetched = self._asking.columns.images_as_uris  # little is held of a row that waits
        self._loading = asyncio.Semaphore(FETCHING_ROWS if fetched else LOADING_ROWS)
        self._end: asyncio.Future[None] | None = None

    def _output(self) -> Output:
        run_file = self._run_file
        return Output(self._store, run_file.run, run_file.part_rows, self._asking.schema)

    async def run(self, inbox: asyncio.Queue[Message]) -> None:
        """Work until Drain comes or the engine dies; Ended or Broken is emitted last."""
        try:
            await self._engine.start()
        except Exception as error:
            if not isinstance(error, VlmbatchError):  # another start would end as this one
                log.exception("unforeseen")
                said = " ".join(str(error).split())[:300]
                error = EngineStartError(
                    f"the engine cannot start: {type(error).__name__}: {said}",
                    hint=f"its whole log is in {self._store.logs}",
                )
            self._emit(_broken(error))
            return
        in_flight = 2 * self._engine.capacity + READ_ROWS
        self._emit(Ready(socket.gethostname(), os.getpid(), in_flight))
        self._end = asyncio.get_running_loop().create_future()
        self._in_flight = asyncio.Semaphore(in_flight)
        leases: asyncio.Queue[Work] = asyncio.Queue()
        feeder = asyncio.create_task(self._guarded(self._feed(leases)))
        ticker = asyncio.create_task(self._tick())
        try:
            drain = await self._receive(inbox, leases)
            if drain is not None:
                await self._drain(drain.seconds, feeder)
                self._emit(self.progress())
                self._emit(Ended())
        except VlmbatchError as error:
            log.error("%s", error)
            with contextlib.suppress(VlmbatchError):  # what was answered before is worth keeping
                if isinstance(error, ManifestError | ManifestUnreachable):
                    await self._drain(1.0, feeder)
                elif isinstance(error, EngineDead | EndpointError | CredentialsRefused):
                    await self._keep_answered(feeder)
            self._emit(_broken(error))
        finally:
            ticker.cancel()
            feeder.cancel()
            for task in list(self._rows):
                task.cancel()
            with contextlib.suppress(Exception):
                await self._engine.close()
            with contextlib.suppress(Exception):
                await self._loader.close()
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._reader.shutdown(wait=False, cancel_futures=True)

    async def _receive(
        self, inbox: asyncio.Queue[Message], leases: asyncio.Queue[Work]
    ) -> Drain | None:
        """Pass work on until Drain comes; raises what ended the worker before that."""
        assert self._end is not None
        while True:
            message = asyncio.ensure_future(inbox.get())
            waiting: set[asyncio.Future[Any]] = {message, self._end}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if self._end.done():
                message.cancel()
                self._end.result()
                return None
            match message.result():
                case Work() as work:
                    leases.put_nowait(work)
                case Drain() as drain:
                    return drain

    async def _guarded(self, work: Awaitable[None]) -> None:
        """Awaits; an error of the engine, the store or the manifest ends the worker.

        So does one that nobody foresaw: a worker that went on would never finish its lease.
        """
        try:
            await work
        except Exception as error:
            if not isinstance(error, VlmbatchError):
                log.exception("unforeseen")
                error = EngineDead(f"{type(error).__name__}: {error}")
            if self._end is not None and not self._end.done():
                self._end.set_exception(error)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            self._emit(self.progress())

    def progress(self) -> Progress:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        finished = sum(len(lease.answered) for lease in self._open.values())
        asked = self._answering.asked
        return Progress(
            asked.answered,
            finished,
            len(self._rows),
            asked.tokens,
            asked.in_engine,
            peak,
            asked.starved,
            asked.elapsed,
            _counters(self._loader, self._engine),
        )

    # feeding

    async def _feed(self, leases: asyncio.Queue[Work]) -> None:
        while True:
            work = await leases.get()
            rows = Range(work.first, work.stop)
            absent = self._rows_source.absent(rows)
            lease = OpenLease(work, work.first, {row: [] for row in absent})
            self._open[work.lease] = lease
            if absent:  # a row that kills must be the first one that is left
                await self._commit(lease)
            async for row in self._rows_of(rows):
                if work.mode == Mode.NORMAL:
                    await self._in_flight.acquire()
                    await self._loading.acquire()
                    admitted = await self._loader.admit(row.images)
                    self._answering.asked.fed()
                    task = asyncio.create_task(self._guarded(self._row_task(lease, row, admitted)))
                    self._rows.add(task)
                    task.add_done_callback(self._rows.discard)
                else:
                    await self._one_row(lease, row)

    async def _one_row(self, lease: OpenLease, row: Row) -> None:
        """A suspect row, with nothing else in flight: committed before the next one starts."""
        if lease.work.mode == Mode.CONDEMNED:
            results = self._answering.condemned(row)
        else:
            await self._loading.acquire()
            results = await self._answering.results_of(row, loaded=self._loading.release)
        self._take(lease, row.row, results)
        await self._commit(lease)

    async def _row_task(self, lease: OpenLease, row: Row, admitted: Reservation | None) -> None:
        try:
            results = await self._answering.results_of(
                row, loaded=self._loading.release, admitted=admitted
            )
        finally:
            self._in_flight.release()
        self._take(lease, row.row, results)
        if lease.finished or lease.size >= SHARD_BYTES:
            await self._commit(lease)

    async def _rows_of(self, wanted: Range) -> AsyncIterator[Row]:
        """The rows, read in a thread a few at a time."""
        loop = asyncio.get_running_loop()
        rows = self._rows_source.rows(wanted)
        while True:
            some = await loop.run_in_executor(self._reader, partial(_some, rows))
            if not some:
                return
            some.reverse()
            while some:  # a row's bytes are let go as soon as it has its images
                yield some.pop()

    # committing

    def _take(self, lease: OpenLease, row: int, results: list[Result]) -> None:
        lease.answered[row] = results
        lease.size += sum(map(_size, results))

    async def _commit(self, lease: OpenLease) -> None:
        """Write the finished prefix of the lease as a shard, and say so once it is durable."""
        async with lease.commit:
            first, stop = lease.next_row, lease.ready
            if first == stop:
                return
            committed = await self._commit_rows(lease, Range(first, stop))
            lease.next_row = stop
            if lease.next_row == lease.work.stop:
                del self._open[lease.work.lease]
        self._emit(committed)

    async def _commit_rows(self, lease: OpenLease, rows: Range) -> Committed:
        """Write these rows, all answered, as a shard."""
        each = range(rows.first, rows.stop)
        results = [result for row in each for result in lease.answered[row]]
        write = partial(self._write, results, rows)
        counts = await asyncio.get_running_loop().run_in_executor(self._threads, write)
        for row in each:
            lease.size -= sum(map(_size, lease.answered.pop(row)))
        return Committed(rows.first, rows.stop, counts)

    async def _keep_answered(self, feeder: asyncio.Task[None]) -> None:
        """The engine or a store is gone: commit all answered rows, wherever in a lease."""
        feeder.cancel()
        for task in list(self._rows):
            task.cancel()
        for lease in self._open.values():
            async with lease.commit:  # a commit that is being written comes first
                for rows in Intervals(Range(row, row + 1) for row in lease.answered):
                    self._emit(await self._commit_rows(lease, rows))

    def _write(self, results: list[Result], rows: Range) -> dict[str, object]:
        if not results:  # nothing in these rows is asked again
            return {}
        patch, anew = self._setup.retry, []
        if self._selection is not None:
            patch = not self._selection.generation.is_added(rows.first)
            anew = self._selection.anew(rows) if patch else []
        batch: pa.RecordBatch = to_batch(
            results, model=self._run_file.model["label"], schema=self._asking.schema
        )
        counts = write_shard(
            self._store,
            batch,
            run=self._run_file.run,
            epoch=self._setup.epoch,
            rows=rows,
            patch=patch,
            anew=anew,
        )
        return counts.to_json()

    async def _drain(self, seconds: float, feeder: asyncio.Task[None]) -> None:
        """No more rows; wait a little for those in flight, then commit each finished prefix."""
        feeder.cancel()
        if self._rows:
            await asyncio.wait(self._rows, timeout=seconds)
        for task in list(self._rows):
            task.cancel()
        for lease in list(self._open.values()):
            await self._commit(lease)


def _some(rows: Iterator[Row]) -> list[Row]:
    """The next rows, few enough to be held while they wait; none where none is left."""
    some: list[Row] = []
    size = 0
    for row in rows:
        some.append(row)
        size += sum(len(image.data or b"") for image in row.images)
        if len(some) == READ_ROWS or size >= READ_BYTES:
            break
    return some


def _counters(*sources: object) -> dict[str, int]:
    """What loader and engine say they have done, where they count it."""
    found: dict[str, int] = {}
    for source in sources:
        found.update(getattr(source, "counters", {}))
    return found


def _size(result: Result) -> int:
    """About how many bytes the result takes."""
    size = 200 + len(result.question or "") + len(result.image or "")
    if result.completion is not None:
        size += 2 * len(result.completion.text)
    if result.carried:
        values = result.carried.values()
        size += sum(len(v) if isinstance(v, str | bytes | list) else 8 for v in values)
    return size


def _take_variables(variables: Mapping[str, str]) -> None:
    """What the job's spec names by ``${NAME}``, on a node whose environment may lack it; logs keep
    the names."""
    os.environ.update(variables)
    if variables:
        hide(variables)
        for handler in logging.getLogger().handlers:
            handler.setFormatter(Hiding("%(asctime)s %(levelname)s %(message)s"))


def _broken(error: VlmbatchError) -> Broken:
    """An engine that dies may be started again; one that cannot start, or a store, cannot."""
    fatal = not isinstance(error, EngineDead)
    exit_code = 1 if isinstance(error, ManifestError) else error.exit_code  # rows ran before
    suspects = error.suspects if isinstance(error, EngineDead) else None
    rows = None if suspects is None else tuple(sorted(suspects))
    return Broken(error.message, error.hint, fatal, exit_code, rows)


def _see_what_the_driver_sees(setup: Setup, store: Store) -> tuple[RunFile, Manifest]:
    """Raises WorkerRefused, naming the host and what it does not see."""
    host = socket.gethostname()
    if setup.version != __version__:
        raise WorkerRefused(
            f"{host} has vlmbatch {__version__}, the driver has {setup.version}",
            hint="install the same version on every node",
        )
    try:
        nonce = (store.read(NONCE_FILE) or b"nothing is there").decode(errors="replace")
    except OSError as error:
        nonce = str(error)
    run_file = read_run_file(store)
    if nonce != setup.nonce or run_file is None:
        raise WorkerRefused(
            f"{host} does not see the output {setup.output} that the driver writes ({nonce})",
            hint="the output must be on a filesystem that every node shares, or on an object "
            "store whose address every node's environment has",
        )
    try:
        manifest = Manifest.from_json(run_file.manifest)
    except (ManifestError, ManifestUnreachable) as error:
        raise WorkerRefused(f"{host} does not see the manifest: {error.message}") from None
    return run_file, manifest
