"""What driver and workers say to each other, the same over a pipe and to a Ray actor.

Each message is a frozen dataclass; ``to_json`` and ``from_json`` carry it as a plain dict.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Setup:
    """To a worker, first: where everything else stands, and what it must be able to see."""

    output: str
    worker: str
    epoch: int
    nonce: str
    version: str
    retry: bool = False
    codes: tuple[str, ...] = ()
    """On a retry: only failures with these codes; empty means all."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that the job's spec names, as the driver has them: nothing stores them."""


@dataclass(frozen=True, slots=True)
class Work:
    """To a worker: a lease on rows [first, stop)."""

    lease: int
    first: int
    stop: int
    mode: str


@dataclass(frozen=True, slots=True)
class Drain:
    """To a worker: no more rows; commit what is finished, end the engine, say Ended."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Ready:
    """From a worker: the engine is up."""

    host: str
    pid: int
    in_flight: int
    """Rows that it can work on at once."""


@dataclass(frozen=True, slots=True)
class Committed:
    """From a worker: the results of rows [first, stop) are on disk."""

    first: int
    stop: int
    counts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Progress:
    """From a worker, every two seconds: totals since it started."""

    answered: int
    """Requests."""
    finished: int
    """Rows whose results are there, and not committed yet."""
    in_flight: int
    """Rows."""
    tokens: int
    """Tokens of the completions."""
    waiting_for_engine: int
    peak_memory: int
    """Bytes of resident memory, at most so far."""
    starved: float = 0.0
    """Seconds in which the engine had fewer requests than it can use, while rows were left."""
    elapsed: float = 0.0
    """Seconds of which ``starved`` is a part: from the first request to the last row fed."""
    counters: dict[str, int] = field(default_factory=dict)
    """What the loader and the engine have done."""


@dataclass(frozen=True, slots=True)
class Broken:
    """From a worker: it cannot go on. ``fatal``: neither could another one."""

    message: str
    hint: str | None
    fatal: bool
    exit_code: int = 1
    suspects: tuple[int, ...] | None = None
    """Rows that the engine was computing when it died; None: any that the worker held."""


@dataclass(frozen=True, slots=True)
class Ended:
    """From a worker: drained; nothing more comes."""


Message = Setup | Work | Drain | Ready | Committed | Progress | Broken | Ended
_TYPES: dict[str, type[Any]] = {
    kind.__name__.lower(): kind
    for kind in (Setup, Work, Drain, Ready, Committed, Progress, Broken, Ended)
}


def to_json(message: Message) -> dict[str, Any]:
    return {"type": type(message).__name__.lower(), **asdict(message)}


def from_json(value: dict[str, Any]) -> Message:
    rest = {key: item for key, item in value.items() if key != "type"}
    for name in ("codes", "suspects"):
        if rest.get(name) is not None:
            rest[name] = tuple(rest[name])
    message: Message = _TYPES[value["type"]](**rest)
    return message
