"""Requests that arrive one by one, made into batches, for engines that answer a batch at a time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from vlmbatch.errors import EngineDead, ErrorCode, RequestFailed, Stage, VlmbatchError, failed
from vlmbatch.records import Completion, Request

FILL_SECONDS = 0.005
"""How long an idle engine waits for more requests after the first."""

Prepared = TypeVar("Prepared")


class BatchTooLarge(Exception):
    """The batch did not fit into memory; a smaller one may."""


class Computes(Protocol[Prepared]):
    """A loaded model, as the batcher sees it: two steps, each called from a thread.

    Both may raise RequestFailed (of a batch of one: that request's failure), BatchTooLarge,
    EngineDead (nothing more can be answered), or anything else (something in the batch is bad).
    A batch that raised is asked again in halves, down to one request.
    """

    def prepare(self, requests: Sequence[Request]) -> Prepared:
        """The model's input. Called while another batch is being answered."""

    def answer(
        self, prepared: Prepared, is_over: Callable[[], bool]
    ) -> Sequence[Completion | None]:
        """The completions, in order; None for a request that must be asked again, alone.

        May return anything as soon as ``is_over()``: nobody waits for the answers any more.
        """


@dataclass(slots=True, eq=False)
class Ticket:
    """A request on its way, and where its answer goes."""

    request: Request
    future: asyncio.Future[Completion]

    def settle(self, outcome: Completion | VlmbatchError) -> None:
        """Hand over the outcome, from any thread; nothing happens where it has one already."""
        self.future.get_loop().call_soon_threadsafe(self._settle, outcome)

    def _settle(self, outcome: Completion | VlmbatchError) -> None:
        if self.future.done():
            return
        if isinstance(outcome, Completion):
            self.future.set_result(outcome)
        else:
            self.future.set_exception(outcome)


@dataclass(slots=True)
class _Batch(Generic[Prepared]):
    tickets: list[Ticket]
    prepared: Prepared


class Batcher(Generic[Prepared]):
    """One batch is answered while the next is prepared; a batch starts when full, or when the
    engine would idle.

    The oldest request is in every next batch, so none starves; those most like it come along, so
    padding is little. ``batch_size`` is halved whenever a batch does not fit into memory. Only
    requests of the same ``group`` share a batch.
    """

    def __init__(
        self,
        model: Computes[Prepared],
        batch_size: int,
        group: Callable[[Request], Hashable] = lambda request: None,
    ) -> None:
        self.batch_size = batch_size
        self._model = model
        self._group = group
        self._waiting: list[Ticket] = []
        self._open: set[Ticket] = set()
        self._changed = asyncio.Event()
        self._busy = False
        self._gone: str | None = None
        self._one_prepares = threading.Lock()  # tokenizers in Rust refuse two threads at once
        self._preparing = ThreadPoolExecutor(1, "vlmbatch-prepare")
        self._answering = ThreadPoolExecutor(1, "vlmbatch-answer")
        self._task = asyncio.create_task(self._serve())

    async def generate(self, request: Request) -> Completion:
        """The completion; raises RequestFailed or EngineDead. Cancelling it takes it back."""
        if self._gone is not None:
            raise EngineDead(self._gone)
        ticket = Ticket(request, asyncio.get_running_loop().create_future())
        self._open.add(ticket)
        self._waiting.append(ticket)
        self._changed.set()
        try:
            return await ticket.future
        finally:
            self._open.discard(ticket)
            if ticket in self._waiting:
                self._waiting.remove(ticket)

    async def close(self) -> None:
        """Fail what is open with EngineDead and end the threads, within about one token's time."""
        self._die(EngineDead("the engine was closed"))
        self._task.cancel()
        await asyncio.wait([self._task])
        for threads in (self._preparing, self._answering):
            await asyncio.to_thread(threads.shutdown, cancel_futures=True)

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        answering: asyncio.Future[None] = loop.create_future()
        answering.set_result(None)
        try:
            while True:
                await self._ready()
                tickets = self._take()
                batches = await loop.run_in_executor(self._preparing, self._prepare, tickets)
                await answering
                self._busy = True
                answering = loop.run_in_executor(self._answering, self._answer, batches)
                answering.add_done_callback(self._idle)
        except Exception as error:
            self._die(error)

    async def _ready(self) -> None:
        """Until a batch is full, or something waits and nothing is being answered."""
        while not self._waiting or (self._busy and len(self._waiting) < self.batch_size):
            self._changed.clear()
            await self._changed.wait()
        if not self._busy and len(self._waiting) < self.batch_size:
            await asyncio.sleep(FILL_SECONDS)

    def _idle(self, answering: asyncio.Future[None]) -> None:
        self._busy = False
        self._changed.set()
        error = None if answering.cancelled() else answering.exception()
        if error is not None:
            self._die(error)

    def _take(self) -> list[Ticket]:
        if not self._waiting:
            return []
        oldest = self._waiting[0].request
        alike = [ticket for ticket in self._waiting if self._may_share(oldest, ticket.request)]
        alike.sort(key=lambda ticket: _unlikeness(oldest, ticket.request))
        taken = alike[: self.batch_size]
        chosen = set(taken)
        self._waiting = [ticket for ticket in self._waiting if ticket not in chosen]
        return taken

    def _may_share(self, a: Request, b: Request) -> bool:
        return (
            a.sampling == b.sampling
            and len(a.images) == len(b.images)
            and self._group(a) == self._group(b)
        )

    def _prepare(self, tickets: list[Ticket]) -> list[_Batch[Prepared]]:
        """The tickets as one batch; in smaller ones if they fail together."""
        tickets = [ticket for ticket in tickets if not ticket.future.done()]
        if not tickets:
            return []
        try:
            with self._one_prepares:
                prepared = self._model.prepare([ticket.request for ticket in tickets])
            return [_Batch(tickets, prepared)]
        except Exception as error:
            parts = self._after(error, tickets, Stage.PROMPT)
        return [batch for part in parts for batch in self._prepare(part)]

    def _answer(self, batches: list[_Batch[Prepared]]) -> None:
        for batch in batches:
            for part in self._settle(batch):
                self._answer(self._prepare(part))

    def _settle(self, batch: _Batch[Prepared]) -> list[list[Ticket]]:
        """Answer the batch; what is left of it to be asked again, in parts."""

        def is_over() -> bool:
            return self._gone is not None or all(t.future.done() for t in batch.tickets)

        try:
            if is_over():
                return []
            completions = self._model.answer(batch.prepared, is_over)
        except Exception as error:
            return self._after(error, batch.tickets, Stage.GENERATE)
        again = []
        for ticket, completion in zip(batch.tickets, completions, strict=True):
            if completion is None:
                again.append([ticket])
            else:
                ticket.settle(completion)
        return again

    def _after(self, error: Exception, tickets: list[Ticket], stage: Stage) -> list[list[Ticket]]:
        """What to ask again after this error: the halves, or nothing where one request was left."""
        if isinstance(error, EngineDead):
            raise error
        if len(tickets) == 1:
            tickets[0].settle(
                error
                if isinstance(error, RequestFailed)
                else failed(ErrorCode.ENGINE_FAILED, stage, one_line(error))
            )
            return []
        half = (len(tickets) + 1) // 2
        if isinstance(error, BatchTooLarge):
            self.batch_size = min(self.batch_size, half)
        return [tickets[:half], tickets[half:]]

    def _die(self, error: BaseException) -> None:
        """Nothing is answered from now on; whoever waits hears why. The first reason stays."""
        if self._gone is None:
            self._gone = one_line(error)
        for ticket in self._open:
            ticket.settle(EngineDead(self._gone))


def one_line(error: BaseException) -> str:
    """The first line of what the exception says, with its kind where it says little."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = type(error).__name__
    if not lines:
        return kind
    plain = isinstance(error, (BatchTooLarge, VlmbatchError))  # worded by us
    return lines[0] if plain else f"{kind}: {lines[0]}"


def _unlikeness(a: Request, b: Request) -> tuple[int, int]:
    """How much padding the two need: by the images' pixels, then by the prompt's length."""
    pixels = abs(_pixels(a) - _pixels(b))
    return pixels, abs(len(a.prompt) - len(b.prompt))


def _pixels(request: Request) -> int:
    return sum(image.pixels.width * image.pixels.height for image in request.images)
