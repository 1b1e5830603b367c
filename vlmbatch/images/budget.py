"""One number of bytes that the rows in flight share."""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType
from typing import Self


class ByteBudget:
    """Grants reservations first come, first served, so that at most ``total`` bytes are held.

    A request for more than ``total`` waits until nothing is held, and then runs alone. Belongs to
    one event loop; not for use from other threads.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.held = 0
        self._waiting: deque[tuple[int, asyncio.Future[Reservation]]] = deque()

    async def reserve(self, size: int) -> Reservation:
        """Waits its turn; a caller that is cancelled while it waits holds nothing."""
        if size < 0:
            raise ValueError(f"cannot reserve {size} bytes")
        if not self._waiting and self._fits(size):
            self.held += size
            return Reservation(self, size)
        granted: asyncio.Future[Reservation] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, granted))
        self._grant()
        try:
            return await granted
        except asyncio.CancelledError:
            if granted.cancelled():
                self._grant()  # those behind may fit now
            else:
                granted.result().release()  # granted and cancelled in the same turn of the loop
            raise

    def _fits(self, size: int) -> bool:
        return self.held == 0 or self.held + size <= self.total

    def _grant(self) -> None:
        while self._waiting:
            size, granted = self._waiting[0]
            if not granted.cancelled():
                if not self._fits(size):
                    return
                self.held += size
                granted.set_result(Reservation(self, size))
            self._waiting.popleft()

    def _give_back(self, size: int) -> None:
        self.held -= size
        self._grant()


class Reservation:
    """A part of a budget, held until ``release``, which ``with`` calls at its end."""

    def __init__(self, budget: ByteBudget, size: int) -> None:
        self._budget = budget
        self.size = size

    def resize(self, size: int) -> None:
        """Gives back what is above ``size``; growing is refused, since growers could deadlock."""
        if not 0 <= size <= self.size:
            raise ValueError(f"cannot resize a reservation of {self.size} bytes to {size}")
        excess, self.size = self.size - size, size
        self._budget._give_back(excess)

    def release(self) -> None:
        """Gives everything back; a second call gives back nothing."""
        self.resize(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
