"""The engine protocol: one coroutine. Batching, queueing and padding belong to the engine."""

from __future__ import annotations

from typing import Protocol

from vlmbatch.records import Completion, Request


class Engine(Protocol):
    """A started model. One instance per worker; ``generate`` is called many times at once."""

    capacity: int
    """How many requests the engine can use at once; the worker keeps somewhat more ready."""

    async def start(self) -> None:
        """Load the model. Raises EngineStartError with the way out."""

    async def generate(self, request: Request) -> Completion:
        """The answer to one request.

        Raises RequestFailed if this request alone failed, EngineDead if the engine is gone.
        """

    async def close(self) -> None:
        """End the engine and everything it started. May be called twice."""
