"""One row's way through a worker: its images loaded, its requests asked, its answers read."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from vlmbatch.engines.base import Engine
from vlmbatch.errors import ErrorCode, Failure, RequestFailed, Stage
from vlmbatch.grounding import Size
from vlmbatch.images.fetch import reference
from vlmbatch.images.load import ImageLoader
from vlmbatch.records import Completion, Request, Result, Row
from vlmbatch.resolve import Asking
from vlmbatch.results.retry import FailedResults
from vlmbatch.tasks import requests_of

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
    """Totals of a worker's requests, for its progress."""

    answered: int = 0
    in_engine: int = 0
    tokens: int = 0


class Answering:
    """Turns rows into results. ``failed``: on a retry, the only results that are wanted."""

    def __init__(
        self, asking: Asking, loader: ImageLoader, engine: Engine, failed: FailedResults | None
    ) -> None:
        self._asking = asking
        self._loader = loader
        self._engine = engine
        self._failed = failed
        self.asked = Asked()

    async def results_of(self, row: Row, *, loaded: Callable[[], None]) -> list[Result]:
        """All results of the row, in the order of its requests; a failure is a result too.

        ``loaded`` is called once, when the row's images have been loaded, or will not be.
        """
        requests = self._requests_of(row)
        try:
            if all(request.problem for request in requests):
                return [self._failed_result(row, request) for request in requests]
            images = await self._loader.load(row.images)
        except RequestFailed as error:
            return [self._failed_result(row, request, error.failure) for request in requests]
        finally:
            loaded()
        row = replace(row, images=tuple(replace(image, data=None) for image in row.images))
        with images:
            with_images = (replace(request, images=images.images) for request in requests)
            return await asyncio.gather(*(self._result_of(row, each) for each in with_images))

    def condemned(self, row: Row) -> list[Result]:
        """The results of a row that has killed its worker twice: it is not asked again."""
        results = [self._failed_result(row, request, CRASHED) for request in self._requests_of(row)]
        return [replace(result, attempts=result.attempts + 2) for result in results]

    def _requests_of(self, row: Row) -> list[Request]:
        """At least one per row, unless this is a retry and none of the row's results failed."""
        asking = self._asking
        requests = requests_of(
            row,
            asking.tasks,
            asking.family,
            system=asking.system,
            sampling=asking.sampling,
        )
        if not requests:
            task = asking.tasks[0]
            nothing = Request(row.row, 0, 0, task.name, task.kind, "", None, problem=NOTHING_ASKED)
            requests = [nothing]
        if self._failed is not None:
            wanted = self._failed.attempts(row.row)
            requests = [each for each in requests if (each.request, each.sample) in wanted]
        return requests

    async def _result_of(self, row: Row, request: Request) -> Result:
        """Ask, and ask again where a failure may pass; the result tells how often."""
        if request.problem is not None:
            return self._failed_result(row, request)
        attempt = 0
        completion: Completion | None = None
        result = _with_sizes(self._bare_result(row, request), request)
        before = result.attempts
        while True:
            attempt += 1
            try:
                completion = await self._generate(request)
                answer = self._asking.family.read(
                    request.kind, completion.text, labels=request.labels, image=request.images[0]
                )
                return replace(
                    result, answer=answer, completion=completion, attempts=before + attempt
                )
            except RequestFailed as error:
                failure = error.failure
            if not failure.retryable or attempt >= ATTEMPTS:
                return replace(
                    result, failure=failure, completion=completion, attempts=before + attempt
                )
            await asyncio.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))

    async def _generate(self, request: Request) -> Completion:
        self.asked.in_engine += 1
        try:
            completion = await self._engine.generate(request)
            self.asked.tokens += completion.completion_tokens or 0
            return completion
        finally:
            self.asked.in_engine -= 1
            self.asked.answered += 1

    def _failed_result(self, row: Row, request: Request, failure: Failure | None = None) -> Result:
        """``failure`` is the row's; a request's own problem comes first."""
        return replace(self._bare_result(row, request), failure=request.problem or failure)

    def _bare_result(self, row: Row, request: Request) -> Result:
        """No answer yet; ``attempts`` are those of earlier runs."""
        earlier = {} if self._failed is None else self._failed.attempts(row.row)
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


def _with_sizes(result: Result, request: Request) -> Result:
    """The result with the sizes of the first image."""
    image = request.images[0]
    given = Size(image.pixels.width, image.pixels.height)
    return replace(result, image_size=image.size, model_image_size=given)
