"""Where workers run: ``local`` (a subprocess) or ``ray`` (actors). The same messages, the same
Worker."""

from __future__ import annotations

from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

from vlmbatch.messages import Message, Setup


@dataclass(frozen=True, slots=True)
class Placed:
    """A worker's process runs, on this host; until then it waits for a place."""

    worker: str
    host: str


@dataclass(frozen=True, slots=True)
class Said:
    """A worker said something."""

    worker: str
    message: Message


@dataclass(frozen=True, slots=True)
class Died:
    """A worker's process is gone; nothing more comes from it."""

    worker: str
    reason: str


Event = Placed | Said | Died


class Executor(Protocol):
    """Starts workers and carries messages. ``events`` may be filled from any thread."""

    events: SimpleQueue[Event]

    def start(self, setup: Setup) -> None:
        """Start a worker; it says Ready, or Broken, or dies. Does not block."""

    def send(self, worker: str, message: Message) -> None:
        """Pass a message on; one for a dead worker is dropped (its Died comes, or came)."""

    def kill(self, worker: str) -> None:
        """End the worker's processes at once; Died follows."""

    def free(self) -> str:
        """What a worker that waits for its place asks for, and what there is, for a message."""

    def close(self) -> None:
        """Kill every worker that is left. May be called twice."""
