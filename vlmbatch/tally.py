"""What the driver knows of its workers and of this start, for the progress and the summary."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from vlmbatch.messages import Broken, Progress, Setup
from vlmbatch.results.files import Counts


@dataclass(slots=True)
class WorkerState:
    """What the driver knows of one worker."""

    setup: Setup
    started: float
    """Seconds, monotonic; also what follows."""
    moved: float
    placed: bool = False
    ready: bool = False
    in_flight: int = 0
    """Rows that it can work on at once."""
    answered: int = 0
    ended: bool = False
    broken: Broken | None = None
    progress: Progress | None = None


@dataclass(slots=True)
class Tally:
    """What this driver start has seen. Seconds are monotonic."""

    counts: Counts = field(default_factory=Counts)
    """Of what was committed."""
    patched: Counts = field(default_factory=Counts)
    """Of these, what was committed of rows that had results before."""
    tokens: int = 0
    """Of completions, committed or not."""
    deaths: int = 0
    starved: float = 0.0
    """Of all workers, as in Progress; so is ``elapsed``."""
    elapsed: float = 0.0
    counters: Counter[str] = field(default_factory=Counter)
    """What loaders and engines have done: decoded images, cached tokens, ..."""
    first_ready: float | None = None
    last_commit: float | None = None

    def heard(self, progress: Progress, before: Progress | None) -> None:
        """Add what a worker has done since it last said so."""
        self.tokens += progress.tokens - (before.tokens if before else 0)
        self.starved += progress.starved - (before.starved if before else 0.0)
        self.elapsed += progress.elapsed - (before.elapsed if before else 0.0)
        self.counters.update(progress.counters)
        self.counters.subtract(before.counters if before else {})

    @property
    def engine_starved(self) -> float | None:
        """The share of the time in which engines had too little to do; None: too short to say."""
        return round(min(1.0, self.starved / self.elapsed), 4) if self.elapsed > 0 else None

    @property
    def seconds(self) -> float:
        """From the first worker's readiness to the last commit."""
        if self.first_ready is None or self.last_commit is None:
            return 0.0
        return max(self.last_commit - self.first_ready, 0.001)
