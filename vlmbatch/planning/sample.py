"""A sample of the rows, its images fetched and decoded as a worker does it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from vlmbatch.answering import make_loader
from vlmbatch.errors import Failure, RequestFailed
from vlmbatch.families import Family
from vlmbatch.grounding import Size
from vlmbatch.images.load import Loader
from vlmbatch.job import JobSpec
from vlmbatch.records import IMAGE, Request, Row
from vlmbatch.resolve import Asking

EXAMPLES = 3
"""Of each error code."""
AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Checked:
    """A row of the sample. ``failure``: why it, or one of its requests, would fail."""

    row: int
    requests: int
    text: str
    """The texts of all its requests, joined."""
    failure: Failure | None = None
    sizes: tuple[Size, ...] = ()
    """Of the upright images."""
    shrunk: int = 0
    """How many are larger than what the model sees."""
    image_tokens: int | None = None
    """Of all images in one request; None: not known."""


@dataclass(frozen=True, slots=True)
class Problem:
    """An error code in the sample: how many rows, and the first of them as ``row 7: ...``."""

    rows: int
    examples: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Images:
    """The sizes of the sample's good images, upright, in pixels."""

    count: int
    smallest: tuple[int, int]
    median: tuple[int, int]
    """By their pixels, as are the others."""
    largest: tuple[int, int]
    shrunk: float
    """The share of those that are larger than what the model sees."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What became of the rows that were looked at. ``seconds``: to read, fetch and decode them."""

    rows: int
    failed: int
    problems: Mapping[str, Problem]
    images: Images | None
    """None: there is no good one, or the endpoint fetches them."""
    seconds: float

    @property
    def failure_rate(self) -> float:
        return self.failed / self.rows if self.rows else 0.0


async def checked(
    rows: Iterator[tuple[Row, list[Request]]], job: JobSpec, asking: Asking, folder: str
) -> list[Checked]:
    """The rows, each looked at. Raises CredentialsRefused where a store lets nobody in."""
    with ThreadPoolExecutor(max_workers=8, thread_name_prefix="load") as threads:
        loader = make_loader(job, asking.family, base=folder, threads=threads)
        free = asyncio.Semaphore(AT_ONCE)
        tasks: list[asyncio.Task[Checked]] = []

        async def check(row: Row, requests: list[Request]) -> Checked:
            try:
                return await _check(row, requests, loader, asking.family)
            finally:
                free.release()

        try:
            while True:
                await free.acquire()
                found = await asyncio.to_thread(next, rows, None)
                if found is None:
                    return list(await asyncio.gather(*tasks))
                tasks.append(asyncio.create_task(check(*found)))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await loader.close()


async def _check(row: Row, requests: list[Request], loader: Loader, family: Family) -> Checked:
    problems = [request.problem for request in requests if request.problem is not None]
    asked = [request for request in requests if request.problem is None]
    words = "".join(f"{each.system or ''}{each.prompt.replace(IMAGE, '')}" for each in asked)
    found = Checked(row.row, len(requests), words, problems[0] if problems else None)
    if not asked:
        return found
    try:
        loaded = await loader.load(row.images)
    except RequestFailed as error:
        return replace(found, failure=error.failure)
    with loaded:
        here = [image for image in loaded.images if image.url is None]
        sizes = tuple(image.size for image in here)
        shrunk = sum(image.pixels.width < image.size.width for image in here)
    costs = [family.image_tokens(size) for size in sizes]
    known = [cost for cost in costs if cost is not None]
    tokens = sum(known) if costs and len(known) == len(costs) else None
    return replace(found, sizes=sizes, shrunk=shrunk, image_tokens=tokens)


def sample_of(found: Sequence[Checked], seconds: float) -> Sample:
    """What the rows have in common."""
    by_code: dict[str, list[str]] = {}
    for each in found:
        if each.failure is not None:
            said = f"row {each.row}: {each.failure.message}"
            by_code.setdefault(str(each.failure.code), []).append(said)
    by_count = sorted(by_code.items(), key=lambda item: -len(item[1]))
    problems = {code: Problem(len(said), tuple(said[:EXAMPLES])) for code, said in by_count}
    failed = sum(map(len, by_code.values()))
    return Sample(len(found), failed, problems, _images_of(found), round(seconds, 2))


def _images_of(found: Sequence[Checked]) -> Images | None:
    sizes = sorted((size for each in found for size in each.sizes), key=lambda size: size.pixels)
    if not sizes:
        return None
    small, median, large = (
        (size.width, size.height) for size in (sizes[0], sizes[len(sizes) // 2], sizes[-1])
    )
    shrunk = sum(each.shrunk for each in found) / len(sizes)
    return Images(len(sizes), small, median, large, round(shrunk, 4))
