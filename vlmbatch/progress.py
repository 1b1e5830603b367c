"""What a person sees while a run goes on: a bar on a terminal, a line every 30 s elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from vlmbatch.placeholders import hidden
from vlmbatch.results.store import STATUS_FILE, Store
from vlmbatch.run_file import now
from vlmbatch.tally import Tally, WorkerState
from vlmbatch.terminal import say

LINE_SECONDS = 30.0
STATUS_SECONDS = 2.0


class ProgressReport:
    """Writes to stderr, and to status.json in the output."""

    def __init__(
        self,
        store: Store,
        *,
        total: int,
        skipped: int,
        label: str,
        earlier: Mapping[str, Any] | None = None,
    ) -> None:
        """``earlier``: the status.json of the starts that this one goes on from."""
        self._earlier = earlier or {}
        self._store = store
        self._total = total
        self._skipped = skipped
        self._started = now()
        self._ended: str | None = None
        self._next_line = time.monotonic() + LINE_SECONDS
        self._next_status = 0.0
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total + skipped,
                initial=skipped,
                desc=label,
                unit="row",
                file=sys.stderr,
                dynamic_ncols=True,
                smoothing=0.05,
            )

    def note(self, text: str) -> None:
        """One line of news."""
        if self._bar is not None:
            self._bar.write(hidden(text), file=sys.stderr)
        else:
            say(text)

    def update(self, tally: Tally, workers: Mapping[str, WorkerState]) -> None:
        """Call often; it looks at the clock by itself."""
        at = time.monotonic()
        if self._bar is not None:
            self._bar.n = self._skipped + _finished(tally, workers)
            self._bar.set_postfix_str(_postfix(tally, workers), refresh=False)
            self._bar.refresh()
        elif at >= self._next_line:
            self._next_line = at + LINE_SECONDS
            say(self._line(tally, workers))
        if at >= self._next_status:
            self._next_status = at + STATUS_SECONDS
            self._store.publish(STATUS_FILE, self._status("running", tally, workers))

    def write_status(
        self, state: str, tally: Tally, workers: Mapping[str, WorkerState], reason: str = ""
    ) -> None:
        """status.json: for ``vlmbatch status``, when the run has ended."""
        self._ended = now()
        if not self._total:  # this start did nothing, and took no time
            self._ended = self._earlier.get("ended") or self._ended
        self._store.write_json(STATUS_FILE, self._status(state, tally, workers, reason))

    def _status(
        self, state: str, tally: Tally, workers: Mapping[str, WorkerState], reason: str = ""
    ) -> dict[str, Any]:
        counts, earlier = tally.counts, self._earlier
        starved = tally.engine_starved if self._total else earlier.get("engine_starved")
        return {
            "state": state,
            "reason": hidden(reason),
            "started": self._started,
            "updated": now(),
            # Of this start and those before it that it goes on from; the rest is of this start.
            "began": earlier.get("began") or self._started,
            "ended": self._ended,
            "seconds": round((earlier.get("seconds") or 0.0) + tally.seconds, 3),
            "rows_answered": (earlier.get("rows_answered") or 0) + counts.rows,
            "rows_total": self._total + self._skipped,
            "rows_skipped": self._skipped,
            "rows_done": counts.rows,
            "rows_failed": counts.failed_rows,
            "failures": dict(counts.failures),
            "rows_finished": _finished(tally, workers),
            "rows_per_second": round(_rate(tally, workers), 2),
            "seconds_left": self._seconds_left(tally, workers),
            "completion_tokens": counts.completion_tokens,
            "engine_starved": starved,
            "workers": {
                name: {
                    "ready": worker.ready,
                    "answered": worker.answered,
                    "in_flight": worker.progress.in_flight if worker.progress else 0,
                    "in_engine": worker.progress.waiting_for_engine if worker.progress else 0,
                    "peak_memory": worker.progress.peak_memory if worker.progress else 0,
                }
                for name, worker in workers.items()
            },
        }

    def _line(self, tally: Tally, workers: Mapping[str, WorkerState]) -> str:
        done = self._skipped + _finished(tally, workers)
        left = self._seconds_left(tally, workers)
        eta = "" if left is None else f", {_duration(left)} left"
        total = self._total + self._skipped
        return f"{done:,} of {total:,} rows, {_postfix(tally, workers)}{eta}"

    def _seconds_left(self, tally: Tally, workers: Mapping[str, WorkerState]) -> int | None:
        rate = _rate(tally, workers)
        return round((self._total - _finished(tally, workers)) / rate) if rate > 0 else None

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _finished(tally: Tally, workers: Mapping[str, WorkerState]) -> int:
    """Rows with results, committed or about to be."""
    return tally.counts.rows + sum(w.progress.finished for w in workers.values() if w.progress)


def _seconds(tally: Tally) -> float:
    return 0.0 if tally.first_ready is None else max(time.monotonic() - tally.first_ready, 0.001)


def _rate(tally: Tally, workers: Mapping[str, WorkerState]) -> float:
    seconds = _seconds(tally)
    return _finished(tally, workers) / seconds if seconds else 0.0


def _postfix(tally: Tally, workers: Mapping[str, WorkerState]) -> str:
    ready = sum(worker.ready for worker in workers.values())
    if not _seconds(tally):
        return f"{len(workers)} worker{'s' if len(workers) != 1 else ''} starting"
    return (
        f"{tally.counts.failed_rows:,} failed, {_rate(tally, workers):.1f} rows/s, "
        f"{tally.tokens / _seconds(tally):.0f} tokens/s, "
        f"{ready} worker{'s' if ready != 1 else ''}"
    )


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
