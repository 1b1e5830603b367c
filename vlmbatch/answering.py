"""One row's way through a worker: its images loaded, its requests asked, its answers read."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from vlmbatch.engines.base import Engine
from vlmbatch.errors import ErrorCode, Failure, RequestFailed, Stage
from vlmbatch.families import Family
from vlmbatch.grounding import Size
from vlmbatch.images.budget import Reservation
from vlmbatch.images.fetch import Reach, reference
from vlmbatch.images.load import ImageLoader, ImageMemory, Limits, Loader
from vlmbatch.images.urls import ImageUrls
from vlmbatch.job import JobSpec
from vlmbatch.reading import CUT, read_answer
from vlmbatch.records import Completion, Request, Result, Row
from vlmbatch.resolve import Asking
from vlmbatch.results.retry import Earlier, asked_anew
from vlmbatch.tasks import requests_of
from vlmbatch.truncation import MORE_TRIES, sampling_after

ATTEMPTS = 3
BACKOFF_SECONDS = 0.5
NOTHING_ASKED = Failure(ErrorCode.BAD_ROW, Stage.ROW, "nothing is asked about this row")
CRASHED = Failure(
    ErrorCode.ENGINE_CRASH,
    Stage.GENERATE,
    "the worker died twice while it worked on this row alone",
)


@dataclass(slots=True)
class Asked:
    """Totals of a worker's requests, for its progress.

    How long the engine starved is told as of the last row that was fed: that it idles when no rows
    are left is no fault.
    """

    engine: Engine
    answered: int = 0
    in_engine: int = 0
    tokens: int = 0
    starved: float = 0.0
    """Seconds with fewer requests in the engine than it can use at once."""
    elapsed: float = 0.0
    """Seconds since the first request."""
    _starved: float = 0.0
    _first: float | None = None
    _last: float = 0.0

    def changed(self, by: int) -> None:
        """Requests went into the engine, or came out of it."""
        now = time.monotonic()
        if self._first is None:
            self._first = self._last = now
        if self.in_engine < self.engine.capacity:
            self._starved += now - self._last
        self._last = now
        self.in_engine += by

    def fed(self) -> None:
        """The worker took on another row."""
        if self._first is not None:
            self.changed(0)
            self.starved, self.elapsed = self._starved, self._last - self._first


class RowRequests:
    """What is asked about rows, and the results of what cannot be."""

    def __init__(self, asking: Asking, earlier: Earlier = asked_anew) -> None:
        self._asking = asking
        self._earlier = earlier

    def of(self, row: Row) -> list[Request]:
        """At least one per row, unless this is a retry and none of the row's results failed."""
        asking = self._asking
        requests = requests_of(
            row,
            asking.tasks,
            asking.family,
            system=asking.system,
            sampling=asking.sampling,
            num_samples=asking.num_samples,
        )
        if not requests:
            task = asking.tasks[0]
            nothing = Request(row.row, 0, 0, task.name, task.kind, "", None, problem=NOTHING_ASKED)
            requests = [nothing]
        wanted = self._earlier(row.row)
        if wanted is not None:
            requests = [each for each in requests if (each.request, each.sample) in wanted]
        return requests

    def bare_result(self, row: Row, request: Request) -> Result:
        """No answer yet; ``attempts`` are those of earlier runs."""
        earlier = self._earlier(row.row) or {}
        references = tuple(reference(image) for image in row.images)
        return Result(
            row=row.row,
            id=row.id,
            task=request.task,
            request=request.request,
            sample=request.sample,
            question=request.question,
            image=references[0] if references else None,
            images=references if len(references) > 1 else None,
            attempts=earlier.get((request.request, request.sample), 0),
            carried={name: row.fields.get(name) for name in self._asking.carried},
        )

    def failed_result(self, row: Row, request: Request, failure: Failure | None = None) -> Result:
        """``failure`` is the row's; a request's own problem comes first."""
        return replace(self.bare_result(row, request), failure=request.problem or failure)


class Answering:
    """Turns rows into results."""

    def __init__(
        self, asking: Asking, loader: Loader, engine: Engine, earlier: Earlier = asked_anew
    ) -> None:
        self._asking = asking
        self._loader = loader
        self._engine = engine
        self.requests = RowRequests(asking, earlier)
        self.asked = Asked(engine)

    async def results_of(
        self, row: Row, *, loaded: Callable[[], None], admitted: Reservation | None = None
    ) -> list[Result]:
        """All results of the row, in the order of its requests; a failure is a result too.

        ``loaded`` is called once, when the row's images have been loaded, or will not be;
        ``admitted`` is what the loader said to the row, given back by then.
        """
        requests = self.requests.of(row)
        try:
            if all(request.problem for request in requests):
                return [self.requests.failed_result(row, request) for request in requests]
            images = await self._loader.load(row.images, admitted)
        except RequestFailed as error:
            failures = [
                self.requests.failed_result(row, request, error.failure) for request in requests
            ]
            tried = int(error.failure.retryable)  # else another night would not be the last one
            return [replace(each, attempts=each.attempts + tried) for each in failures]
        finally:
            if admitted is not None:
                admitted.release()
            loaded()
        row = replace(row, images=tuple(replace(image, data=None) for image in row.images))
        with images:
            with_images = (replace(request, images=images.images) for request in requests)
            return await asyncio.gather(*(self._result_of(row, each) for each in with_images))

    def condemned(self, row: Row) -> list[Result]:
        """The results of a row that has killed its worker twice: it is not asked again."""
        results = [
            self.requests.failed_result(row, request, CRASHED) for request in self.requests.of(row)
        ]
        return [replace(result, attempts=result.attempts + 2) for result in results]

    async def _result_of(self, row: Row, request: Request) -> Result:
        """Ask, and ask again for an answer that was cut, if that is wanted; the result tells how
        often."""
        if request.problem is not None:
            return self.requests.failed_result(row, request)
        reading = self._asking.reading
        result = _with_sizes(self.requests.bare_result(row, request), request, reading.family)
        again = MORE_TRIES if reading.on_truncation == "retry" else 0
        while True:
            outcome, calls = await self._outcome_of(request)
            result = replace(result, attempts=result.attempts + calls)
            if isinstance(outcome, Completion):
                result = replace(result, completion=outcome)
            elif result.completion is None:
                return replace(result, failure=outcome)
            else:  # the cut answer is better than none
                return self._read(request, result)
            if outcome.finish_reason != CUT or not again:
                return self._read(request, result)
            again -= 1
            sampling = sampling_after(request.sampling, outcome.text)
            request = replace(request, sampling=sampling)

    async def _outcome_of(self, request: Request) -> tuple[Completion | Failure, int]:
        """(what came of it, calls of the engine); asked again where a failure may pass."""
        for calls in range(1, ATTEMPTS + 1):
            try:
                return await self._generate(request), calls
            except RequestFailed as error:
                failure = error.failure
            if not failure.retryable or calls == ATTEMPTS:
                break
            await asyncio.sleep(BACKOFF_SECONDS * 2 ** (calls - 1) * random.uniform(0.5, 1.5))
        return failure, calls

    async def _generate(self, request: Request) -> Completion:
        self.asked.changed(+1)
        try:
            completion = await self._engine.generate(request)
            self.asked.tokens += completion.completion_tokens or 0
            return completion
        finally:
            self.asked.changed(-1)
            self.asked.answered += 1

    def _read(self, request: Request, result: Result) -> Result:
        """The result with what its completion says, or with why that is no answer."""
        assert result.completion is not None
        try:
            answer, value = read_answer(self._asking.reading, request, result.completion)
        except RequestFailed as error:
            return replace(result, failure=error.failure)
        return replace(result, answer=answer, json=value)


def _with_sizes(result: Result, request: Request, family: Family) -> Result:
    """The result with the sizes of the first image, if it was seen here."""
    image = request.images[0]
    if image.url is not None:
        return result
    given = Size(image.pixels.width, image.pixels.height)
    return replace(result, image_size=image.size, model_image_size=family.seen(given))


def reach_of(job: JobSpec) -> Reach:
    """Which images a job may fetch, and how."""
    return Reach(
        max_bytes=job.max_image_bytes,
        at_once=job.fetch_concurrency,
        seconds=job.fetch_timeout,
        roots=tuple(job.allow_roots),
        allow_private=job.allow_private_hosts,
    )


def make_loader(job: JobSpec, family: Family, *, base: str, threads: Executor) -> Loader:
    """What brings a run's images, from the manifest's folder ``base``."""
    if job.engine.image_transport == "url":
        return ImageUrls()
    return ImageLoader(
        base=base,
        memory=ImageMemory(job.image_memory),
        executor=threads,
        limits=Limits(
            reach_of(job),
            max_pixels=job.max_image_pixels,
        ),
        target=family.target,
        prepare=family.prepare,
    )
