"""The process that plans, hands out ranges, restarts workers and gathers parts."""

from __future__ import annotations

import contextlib
import math
import random
import secrets
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from queue import Empty
from types import FrameType

from vlmbatch import __version__
from vlmbatch.errors import EngineStartError, RunStopped, VlmbatchError
from vlmbatch.executors import Died, Event, Executor, Placed, Said
from vlmbatch.intervals import Intervals
from vlmbatch.job import CHECKPOINT_ROWS
from vlmbatch.messages import Broken, Committed, Drain, Ended, Progress, Ready, Setup, Work
from vlmbatch.placeholders import values_of
from vlmbatch.progress import ProgressReport
from vlmbatch.records import Range
from vlmbatch.results.files import Counts, list_shards
from vlmbatch.results.gathering import Gatherer
from vlmbatch.results.generations import Generation
from vlmbatch.results.output import Output
from vlmbatch.results.store import NONCE_FILE
from vlmbatch.run_file import RunFile
from vlmbatch.scheduler import Lease, Mode, Scheduler
from vlmbatch.tally import Tally, WorkerState

LEASES_PER_WORKER = 2
"""So many are outstanding, or more where the worker can have more rows in flight than they hold."""
LEASES_PER_SHARE = 4
"""A small job is cut so that each worker gets so many leases, not one worker all of it."""
PLACE_SECONDS = 60.0
"""So long a run waits for places before it says that it goes on with fewer workers."""
DEATHS_IN_A_ROW = 8
"""So many without any committed row stop the run."""
DRAIN_SECONDS = 5.0
DRAIN_GRACE_SECONDS = 3.0
EARLY_STOP_ROWS = 512
"""The failure rate ends a run early only after so many rows."""
MAX_BACKOFF_SECONDS = 30.0


class Interrupted(Exception):
    """A signal asked the run to stop."""


class TooManyFailures(Exception):
    """More rows failed than allowed."""


class Driver:
    """Runs the pending ranges to their end. One instance per driver start."""

    def __init__(
        self,
        *,
        output: Output,
        run_file: RunFile,
        executor: Executor,
        workers: int,
        pending: Sequence[Range],
        boundaries: Sequence[int],
        report: ProgressReport,
        retry_codes: tuple[str, ...] | None = None,
        generation: Generation | None = None,
    ) -> None:
        """``retry_codes``: the rows stand, and only what failed of them is asked again.
        ``generation``: so it is of those rows that are not added."""
        self._output = output
        self._run_file = run_file
        self._job = run_file.spec
        self._executor = executor
        self._wanted = workers
        self._report = report
        self._retry_codes = retry_codes
        self._generation = generation
        self._total = sum(map(len, pending))
        self._share = math.ceil(self._total / workers)
        small = math.ceil(self._share / LEASES_PER_SHARE)
        self._lease_rows = max(1, min(self._job.checkpoint_rows, small))
        self._scheduler = Scheduler(
            pending,
            lease_rows=self._lease_rows,
            part_rows=run_file.part_rows,
            boundaries=boundaries,
        )
        self._nonce = secrets.token_hex(8)
        self._workers: dict[str, WorkerState] = {}
        self._restarts: list[float] = []
        self._number = 0
        self._deaths_in_a_row = 0
        self._gatherer: Gatherer | None = None
        if retry_codes is None:
            # A patch that came after its part was written anew in this start would be taken for an
            # old one: parts with rows that may be patched wait for the end.
            before = output.view().committed if generation is None else Intervals()
            self._gatherer = Gatherer(output, before)
        self._signals = 0
        self._said_how_many = False
        self.tally = Tally()

    def run(self) -> None:
        """Until every row is committed. Raises Interrupted, TooManyFailures or RunStopped; what is
        committed by then is kept. Parts that are whole are gathered on the way."""
        self._output.store.write(NONCE_FILE, lambda path: _write(path, self._nonce))
        with self._signals_handled():
            try:
                if not self._scheduler.done:
                    for _ in range(min(self._wanted, self._total)):
                        self._start_worker()
                while not self._scheduler.done:
                    self._turn()
                self._drain()
            except Interrupted:
                self._report.note("stopping: what is finished is being committed")
                self._drain()
                raise
            except TooManyFailures:
                self._drain()
                raise
            finally:
                self._executor.close()
                if self._gatherer is not None:
                    self._gatherer.close()

    def _turn(self) -> None:
        """Take what workers said, look after those that stand still, hand out rows."""
        for event in self._events(0.2):
            self._take(event)
        if self._signals:
            raise Interrupted
        self._output.store.check_held()
        now = time.monotonic()
        self._look_after(now)
        for due in [due for due in self._restarts if due <= now]:
            self._restarts.remove(due)
            self._start_worker()
        for name, state in self._workers.items():
            if state.ready and not state.ended:
                self._feed(name, state)
        if self._gatherer is not None:
            self._gatherer.go_on()
        self._check_failures()
        self._report.update(self.tally, self._workers)

    def _events(self, seconds: float) -> Iterator[Event]:
        with contextlib.suppress(Empty):
            yield self._executor.events.get(timeout=seconds)
            while True:
                yield self._executor.events.get_nowait()

    # workers

    def _start_worker(self) -> None:
        self._number += 1
        setup = Setup(
            output=self._output.store.address,
            worker=f"w{self._number}",
            epoch=self._run_file.epoch,
            nonce=self._nonce,
            version=__version__,
            retry=self._retry_codes is not None,
            codes=self._retry_codes or (),
            environment=values_of(self._run_file.variables),
        )
        now = time.monotonic()
        self._workers[setup.worker] = WorkerState(setup, started=now, moved=now)
        self._executor.start(setup)

    def _take(self, event: Event) -> None:
        state = self._workers.get(event.worker)
        if state is None:
            return
        match event:
            case Died(reason=reason):
                del self._workers[event.worker]
                self._died(state, reason)
            case Placed():
                state.placed, state.started = True, time.monotonic()
            case Said(message=Ready() as message):
                state.ready, state.moved = True, time.monotonic()
                state.in_flight = message.in_flight
                self.tally.first_ready = self.tally.first_ready or state.moved
            case Said(message=Committed() as message):
                self._committed(event.worker, state, message)
            case Said(message=Progress() as message):
                if message.answered != state.answered:
                    state.moved = time.monotonic()
                self.tally.heard(message, state.progress)
                state.answered, state.progress = message.answered, message
            case Said(message=Broken() as message):
                state.broken = message
                self._executor.kill(event.worker)  # Died follows
            case Said(message=Ended()):
                state.ended = True

    def _committed(self, worker: str, state: WorkerState, message: Committed) -> None:
        rows = Range(message.first, message.stop)
        condemned = any(lease.mode is Mode.CONDEMNED for lease in self._scheduler.leases_of(worker))
        self._scheduler.committed(worker, rows)
        if state.progress is not None:  # what it said was finished may be committed by now
            left = max(0, state.progress.finished - len(rows))
            state.progress = replace(state.progress, finished=left)
        state.moved = self.tally.last_commit = time.monotonic()
        if not condemned:
            self._deaths_in_a_row = 0
        self._count(rows, Counts.from_json(message.counts))

    def _count(self, rows: Range, counts: Counts) -> None:
        self.tally.counts.add(counts)
        if self._generation is not None and not self._generation.is_added(rows.first):
            self.tally.patched.add(counts)
        elif self._gatherer is not None:
            self._gatherer.committed(rows)

    def _died(self, state: WorkerState, reason: str) -> None:
        """Its ranges go back; a new worker comes after a while."""
        if state.ended:
            return
        worker = state.setup.worker
        fatal = state.broken is not None and state.broken.fatal
        suspects = None if state.broken is None else state.broken.suspects
        self._take_over_commits(worker)
        self._scheduler.died(worker, strike=not fatal, suspects=suspects)
        if self._signals:
            return
        if state.broken is not None and fatal:
            self._go_on_without(worker, state.broken)
            return
        self.tally.deaths += 1
        self._deaths_in_a_row += 1
        said = state.broken.message if state.broken else reason
        self._report.note(f"worker {worker} died ({said}); its rows go to another one")
        limit = DEATHS_IN_A_ROW + self._wanted
        if self._deaths_in_a_row >= limit:
            raise EngineStartError(
                f"{self._deaths_in_a_row} workers died in a row without a committed row; "
                f"the last one: {said}",
                hint=f"its log is in {self._output.store.logs}",
            )
        wait = min(MAX_BACKOFF_SECONDS, 0.25 * 2 ** (self._deaths_in_a_row - 1))
        self._restarts.append(time.monotonic() + wait * random.uniform(0.5, 1.0))

    def _go_on_without(self, worker: str, broken: Broken) -> None:
        """A worker that could not do better if it were started again: the others go on."""
        others = len(self._workers) + len(self._restarts)
        if others == 0:
            raise _stopped(broken)
        self._report.note(f"going on with {others} workers, without {worker}: {broken.message}")

    def _take_over_commits(self, worker: str) -> None:
        """Shards that the dead worker committed without our having heard of it."""
        leases = self._scheduler.leases_of(worker)
        if not leases:
            return
        for shard in list_shards(self._output.store):
            fresh = shard.run == self._run_file.run and shard.epoch == self._run_file.epoch
            if fresh and any(_within(shard.rows, lease) for lease in leases):
                before = self._scheduler.left_of(worker)
                self._scheduler.committed(worker, shard.rows)
                if self._scheduler.left_of(worker) != before:
                    self._count(shard.rows, shard.counts())

    def _feed(self, name: str, state: WorkerState) -> None:
        rows = LEASES_PER_WORKER * self._lease_rows
        if self._job.checkpoint_rows >= CHECKPOINT_ROWS:  # else little may be computed again
            # What is in flight goes on while the range before it is committed.
            rows = max(rows, min(state.in_flight + self._lease_rows, self._share))
        while self._scheduler.left_of(name) < rows:
            lease = self._scheduler.next_lease(name)
            if lease is None:
                return
            if not self._scheduler.leases_of(name)[:-1]:
                state.moved = time.monotonic()
            work = Work(lease.number, lease.rows.first, lease.rows.stop, str(lease.mode))
            self._executor.send(name, work)

    def _look_after_places(self, now: float) -> None:
        """Fewer workers than asked for are enough; none at all are not."""
        waiting = [state for state in self._workers.values() if not state.placed]
        waited = now - max((state.started for state in waiting), default=now)
        placed = len(self._workers) - len(waiting)
        if placed and waited > PLACE_SECONDS and not self._said_how_many:
            self._said_how_many = True
            self._report.note(
                f"{placed} of {len(self._workers)} workers are placed: going on with those "
                f"({self._executor.free()})"
            )
        if not placed and not self._restarts and waited > self._job.start_timeout:
            raise EngineStartError(
                f"no worker found a place in {self._job.start_timeout:.0f} s: "
                f"{self._executor.free()}",
                hint="free some, ask for less with --gpus-per-worker, or raise --start-timeout",
            )

    def _look_after(self, now: float) -> None:
        self._look_after_places(now)
        for name, state in list(self._workers.items()):
            slow = state.placed and not state.ready
            if slow and now - state.started > self._job.start_timeout:
                state.broken = Broken(
                    f"worker {name} was not ready after {self._job.start_timeout:.0f} s",
                    "raise --start-timeout, or look into "
                    f"{self._output.store.logs} for what it waits for",
                    fatal=True,
                )
                state.started = now
                self._executor.kill(name)
            busy = state.ready and self._scheduler.leases_of(name)
            if busy and now - state.moved > self._job.stall_timeout:
                state.moved = now
                self._report.note(
                    f"worker {name} has not moved for {self._job.stall_timeout:.0f} s: killed"
                )
                self._executor.kill(name)

    @property
    def judged(self) -> Counts:
        """What --max-failure-rate is about: neither what was asked again, nor the rows that left
        the manifest, about which nothing failed. Of those, all count as done already."""
        counts = self.tally.counts.minus(self.tally.patched)
        gone = 0 if self._generation is None else self._generation.counts.get("gone", 0)
        return counts.minus(Counts(rows=gone, failed_rows=gone))

    def _check_failures(self) -> None:
        """Stop early where more rows fail than are allowed, and many rows of this start have shown
        it; what is asked again may well fail again, and stops nothing."""
        if self._retry_codes is not None:
            return
        counts, rate = self.judged, self._job.max_failure_rate
        if rate < 1 and counts.rows >= EARLY_STOP_ROWS and counts.too_many_failed(rate):
            raise TooManyFailures

    def _drain(self) -> None:
        """Workers commit the finished prefix of each lease and end; who does not is killed."""
        for name, state in self._workers.items():
            if state.ready:
                self._executor.send(name, Drain(DRAIN_SECONDS if self._signals else 1.0))
            else:
                self._executor.kill(name)
                state.ended = True
        until = time.monotonic() + DRAIN_SECONDS + DRAIN_GRACE_SECONDS
        while self._workers and time.monotonic() < until and self._signals < 2:
            for event in self._events(0.1):
                with contextlib.suppress(VlmbatchError):
                    self._take(event)
            done = [name for name, state in self._workers.items() if state.ended]
            for name in done:
                del self._workers[name]

    @contextlib.contextmanager
    def _signals_handled(self) -> Iterator[None]:
        """First SIGINT or SIGTERM: drain. A second one: at once."""

        def on_signal(number: int, frame: FrameType | None) -> None:
            self._signals += 1  # and no more: a handler may interrupt anything

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _within(rows: Range, lease: Lease) -> bool:
    return lease.rows.first <= rows.first and rows.stop <= lease.rows.stop


def _stopped(message: Broken) -> VlmbatchError:
    error = RunStopped(message.message, hint=message.hint)
    error.exit_code = message.exit_code
    return error


def _write(path: object, text: str) -> None:
    with open(str(path), "w", encoding="utf-8") as file:
        file.write(text)
