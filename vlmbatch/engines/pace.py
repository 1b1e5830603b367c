"""How many requests may be out at an endpoint at once: more while it answers, half when it groans.

The limit grows as TCP's window does: by one per answer up to ``_brake``, which is half of what was
out when the endpoint last asked for less, and from there by one per limit's worth of answers.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

FIRST_LIMIT = 8
FIRST_WAIT = 0.5
LONGEST_WAIT = 30.0


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row: doubled each time, times 0.5 to 1.5."""
    doublings = min(max(0, failures - 1), 16)
    return float(min(LONGEST_WAIT, FIRST_WAIT * 2**doublings) * random.uniform(0.5, 1.5))


@dataclass(frozen=True, slots=True)
class Turn:
    """Leave to send one request. ``epoch``: how often the pace had been slowed down by then."""

    epoch: int


class Pace:
    """Gives turns, first come, first served, on one event loop. ``most``: at once, at most."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.limit = float(min(most, FIRST_LIMIT))
        self._brake = float(most)
        self.out = 0
        """Requests that are out."""
        self._epoch = 0
        self._setbacks = 0
        self._not_before = 0.0
        self._silent_since: float | None = None
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._alarm: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Turn]:
        """Waits until one more request may be sent; the block is the request."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._admit()
        try:
            await place
        except asyncio.CancelledError:
            if not place.cancelled():  # admitted and cancelled in the same turn of the loop
                self._give_back()
            raise
        try:
            yield Turn(self._epoch)
        finally:
            self._give_back()

    @property
    def silent(self) -> float:
        """Seconds since the first failure after the last answer; 0 if there was none."""
        return 0.0 if self._silent_since is None else _now() - self._silent_since

    def answered(self) -> None:
        """The endpoint answered a request: it may have one more."""
        self._setbacks, self._silent_since = 0, None
        step = 1.0 if self.limit < self._brake else 1.0 / self.limit
        self.limit = min(float(self._most), self.limit + step)
        self._admit()

    def failed(self) -> None:
        """A request was not answered: the silence begins, if it has not begun."""
        if self._silent_since is None:
            self._silent_since = _now()

    def slow_down(self, turn: Turn, *, wait: float | None = None, to_one: bool = False) -> None:
        """Half as many at once, after a pause for all; ``to_one``: one alone tries the way again.

        Of the failures of one burst the first speaks for all. ``wait``: the endpoint's own wish, in
        seconds; else the pause doubles with each slowing down that no answer came after.
        """
        self.failed()
        if turn.epoch == self._epoch:
            self._epoch += 1
            self._setbacks += 1
            self._brake = max(1.0, self.limit / 2)
            self.limit = 1.0 if to_one else self._brake
            wait = backoff(self._setbacks) if wait is None else wait
        self._not_before = max(self._not_before, _now() + (wait or 0.0))

    def _give_back(self) -> None:
        self.out -= 1
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self.out < int(self.limit):
            pause = self._not_before - _now()
            if pause > 0:
                self._admit_after(pause)
                return
            place = self._waiting.popleft()
            if not place.done():
                self.out += 1
                place.set_result(None)

    def _admit_after(self, pause: float) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = asyncio.get_running_loop().call_later(pause, self._admit)


def _now() -> float:
    return asyncio.get_running_loop().time()
