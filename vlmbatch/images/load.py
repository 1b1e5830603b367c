"""The images of a row: fetched, decoded and shrunk off the event loop, within the byte budget."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

import xxhash

from vlmbatch.errors import RequestFailed
from vlmbatch.grounding import Size
from vlmbatch.images.budget import ByteBudget, Reservation
from vlmbatch.images.decode import decode, header
from vlmbatch.images.fetch import file_errors, locate, read
from vlmbatch.records import ImageRef, LoadedImage

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
_BYTES_PER_PIXEL = 4  # Pillow pads RGB to 32 bits


@dataclass(frozen=True, slots=True)
class Limits:
    """What one image may be, and how often a fetch that failed for a passing reason is tried.

    ``max_pixels`` is where Pillow by itself refuses an image. ``backoff`` is in seconds: the wait
    before the second attempt, doubled for each further one, times a random 0.5 to 1.5.
    """

    max_bytes: int = 256 * 1024 * 1024
    max_pixels: int = 178_956_970
    attempts: int = 3
    backoff: float = 0.2


@dataclass(frozen=True, slots=True)
class LoadedImages:
    """The images of one row, and the part of the budget that they hold until ``release``."""

    images: tuple[LoadedImage, ...]
    reservation: Reservation

    def release(self) -> None:
        """Gives the bytes back to the budget; a second call does nothing."""
        self.reservation.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that one image takes: while it is decoded, and afterwards."""

    working: int
    kept: int


class Loader(Protocol):
    """Gives a row's images; ImageLoader reads them."""

    async def load(self, refs: Sequence[ImageRef]) -> LoadedImages: ...


class ImageLoader:
    """Loads rows; safe to call for many rows at once from one event loop.

    ``base`` is the folder of the manifest; ``target`` maps an image's upright size to the size that
    the model will see (None: not resized), and ``prepare`` changes the resized image, which becomes
    at most a square of its longer side. ``executor`` runs the blocking work: threads.
    """

    def __init__(
        self,
        *,
        base: str,
        budget: ByteBudget,
        executor: Executor,
        limits: Limits,
        target: Callable[[Size], Size] | None,
        prepare: Callable[[Image], Image] | None = None,
    ) -> None:
        self._base = base
        self._budget = budget
        self._executor = executor
        self._limits = limits
        self._target = target
        self._prepare = prepare
        self._counting = Lock()
        self._decoded = 0

    @property
    def counters(self) -> Mapping[str, int]:
        """What it has done since its start."""
        return {"decoded_images": self._decoded}

    async def load(self, refs: Sequence[ImageRef]) -> LoadedImages:
        """All images of one row, in order; RequestFailed, with nothing held, if any of them fails.

        The row reserves once, for all of its images: two rows that each hold half of the budget and
        wait for the other half cannot come about.
        """
        needs = [await self._retried(partial(self._measure, ref)) for ref in refs]
        working = max((need.working for need in needs), default=0)  # one after the other
        reservation = await self._budget.reserve(working + sum(need.kept for need in needs))
        try:
            images = [await self._retried(partial(self._load, ref)) for ref in refs]
        except BaseException:
            reservation.release()
            raise
        kept = sum(image.pixels.width * image.pixels.height for image in images) * _BYTES_PER_PIXEL
        reservation.resize(min(kept, reservation.size))
        return LoadedImages(tuple(images), reservation)

    def _measure(self, ref: ImageRef) -> Need:
        """Reads no more than the header, so that nothing big is held before it is reserved."""
        source = locate(ref, base=self._base, max_bytes=self._limits.max_bytes)
        with file_errors(source.name), source.open() as file, _named(source.name):
            found = header(file, max_pixels=self._limits.max_pixels)
        kept = found.size if self._target is None else self._target(found.size)
        return Need(source.size + found.decoded_bytes, kept.pixels * _BYTES_PER_PIXEL)

    def _load(self, ref: ImageRef) -> LoadedImage:
        source = locate(ref, base=self._base, max_bytes=self._limits.max_bytes)
        data = read(source)
        with _named(source.name):
            decoded = decode(data, max_pixels=self._limits.max_pixels, target=self._target)
        with self._counting:
            self._decoded += 1
        pixels = decoded.pixels if self._prepare is None else self._prepare(decoded.pixels)
        key = f"{xxhash.xxh3_128_hexdigest(data)}-{pixels.width}x{pixels.height}"
        return LoadedImage(pixels, decoded.size, key)

    async def _retried(self, work: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        attempt = 1
        while True:
            try:
                return await loop.run_in_executor(self._executor, work)
            except RequestFailed as error:
                if not error.failure.retryable or attempt >= self._limits.attempts:
                    raise
            wait = self._limits.backoff * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
            await asyncio.sleep(wait)
            attempt += 1


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Puts the image's name before the message of a failure to decode it."""
    try:
        yield
    except RequestFailed as error:
        message = f"{name}: {error.failure.message}"
        raise RequestFailed(replace(error.failure, message=message)) from error.__cause__
