"""What the driver knows of its workers and of this start, for the progress and the summary."""

from __future__ import annotations

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
    answered: int = 0
    ended: bool = False
    broken: Broken | None = None
    progress: Progress | None = None


@dataclass(slots=True)
class Tally:
    """What this driver start has seen. Seconds are monotonic."""

    counts: Counts = field(default_factory=Counts)
    """Of what was committed."""
    tokens: int = 0
    """Of completions, committed or not."""
    deaths: int = 0
    first_ready: float | None = None
    last_commit: float | None = None

    @property
    def seconds(self) -> float:
        """From the first worker's readiness to the last commit."""
        if self.first_ready is None or self.last_commit is None:
            return 0.0
        return max(self.last_commit - self.first_ready, 0.001)
