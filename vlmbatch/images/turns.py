"""So many requests at once to one host or store, and none while it asked for a pause."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Place:
    turns: asyncio.Semaphore
    users: int = 0
    not_before: float = field(default=0.0)
    """In the event loop's time."""


class Turns:
    """Requests in flight, counted by place; a place that nobody uses is forgotten."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._places: dict[str, _Place] = {}

    @asynccontextmanager
    async def turn(self, place: str) -> AsyncIterator[None]:
        """Waits until fewer than ``at_once`` others use the place, and until its pause is over."""
        found = self._places.setdefault(place, _Place(asyncio.Semaphore(self._at_once)))
        found.users += 1
        try:
            async with found.turns:
                while (wait := found.not_before - _now()) > 0:
                    await asyncio.sleep(wait)
                yield
        finally:
            found.users -= 1
            if not found.users and found.not_before <= _now():
                del self._places[place]

    def pause(self, place: str, seconds: float) -> None:
        """Whoever has the turn says that the place wants no requests for so long."""
        found = self._places[place]
        found.not_before = max(found.not_before, _now() + seconds)


def _now() -> float:
    return asyncio.get_running_loop().time()
