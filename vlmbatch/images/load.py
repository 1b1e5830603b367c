"""The images of a row: fetched, decoded and shrunk off the event loop, within the byte budget."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

import xxhash

from vlmbatch.errors import RequestFailed, VlmbatchError
from vlmbatch.grounding import Size
from vlmbatch.images.budget import ByteBudget, Reservation
from vlmbatch.images.decode import decode, header
from vlmbatch.images.failures import Busy, Larger, fetch_failed
from vlmbatch.images.fetch import Fetcher, Reach, is_embedded, page_of, reference
from vlmbatch.images.malloc import keep_freed_pages
from vlmbatch.records import ImageRef, LoadedImage

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
_BYTES_PER_PIXEL = 4  # Pillow pads RGB to 32 bits
SMALL_BYTES, SMALL_PART = 16 * 2**20, 32
"""Reserved for the pixels of an image of unknown size, at most and as a part of all: two
megapixels, whose decoding takes some 10 ms."""
ROUNDS = 6
"""So often the images of a row may turn out larger than they were thought to be; enough for an
answer of unknown length to grow from LEAST_BYTES by GROWS each time to any limit."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one image may be, where it may be, and how often a fetch that failed for a passing
    reason is tried.

    ``max_pixels`` is where Pillow by itself refuses an image. ``backoff`` is in seconds: the wait
    before the second attempt, doubled for each further one, times a random 0.5 to 1.5.
    """

    reach: Reach = field(default_factory=Reach)
    max_pixels: int = 178_956_970
    attempts: int = 3
    backoff: float = 0.2


class ImageMemory:
    """One number of bytes for a worker's images, in two parts that are always reserved in the same
    order: ``encoded``, a quarter, from before an image is fetched until it is decoded, then
    ``pixels``. Who holds pixels waits for nothing more, so that rows cannot block one another.
    """

    def __init__(self, total: int) -> None:
        self.encoded = ByteBudget(total // 4)
        self.pixels = ByteBudget(total - total // 4)


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
    """Bytes that one image's pixels take: while it is decoded, and afterwards."""

    working: int
    kept: int


class Loader(Protocol):
    """Gives a row's images; ImageLoader reads them."""

    async def admit(self, refs: Sequence[ImageRef]) -> Reservation | None: ...

    async def load(
        self, refs: Sequence[ImageRef], admitted: Reservation | None = None
    ) -> LoadedImages: ...

    async def close(self) -> None: ...


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
        memory: ImageMemory,
        executor: Executor,
        limits: Limits,
        target: Callable[[Size], Size] | None,
        prepare: Callable[[Image], Image] | None = None,
    ) -> None:
        keep_freed_pages()
        self._fetcher = Fetcher(base=base, reach=limits.reach, executor=executor)
        self._memory = memory
        self._executor = executor
        self._limits = limits
        self._target = target
        self._prepare = prepare
        self._small_bytes = min(SMALL_BYTES, memory.pixels.total // SMALL_PART)
        self._counting = Lock()
        self._decoded = 0

    @property
    def counters(self) -> Mapping[str, int]:
        """What it has done since its start."""
        return {"decoded_images": self._decoded}

    async def close(self) -> None:
        """Ends the connections to web servers."""
        await self._fetcher.close()

    async def admit(self, refs: Sequence[ImageRef]) -> Reservation | None:
        """Waits until a row whose images are in memory already, because the manifest holds them,
        may be taken on; ``load`` takes the reservation over. None for any other row."""
        if not refs or not all(map(is_embedded, refs)):
            return None
        return await self._memory.encoded.reserve(sum(map(self._fetcher.expected, refs)))

    async def load(
        self, refs: Sequence[ImageRef], admitted: Reservation | None = None
    ) -> LoadedImages:
        """All images of one row, in order; RequestFailed, with nothing held, if any of them fails.

        The row reserves each part of the memory once, for all of its images: two rows that each
        hold half of it and wait for the other half cannot come about.
        """
        if len(refs) == 1 and (read := self._fetcher.at_hand(refs[0])):
            found = await self._small(refs[0], read, admitted)
            if isinstance(found, LoadedImages):
                return found
            files, encoded = found
        else:
            sizes = [self._fetcher.expected(ref) for ref in refs]
            reserved = admitted or await self._memory.encoded.reserve(sum(sizes))
            files, encoded = await self._files(refs, sizes, reserved)
        with encoded:
            needs = await self._in_thread(partial(self._needs, refs, files))
            working = max((need.working for need in needs), default=0)  # one after the other
            pixels = await self._memory.pixels.reserve(working + sum(need.kept for need in needs))
            try:
                images = []
                for position, ref in enumerate(refs):
                    data, files[position] = files[position], b""
                    images.append(await self._in_thread(partial(self._decode, ref, data)))
            except BaseException:
                pixels.release()
                raise
        return _loaded(images, pixels)

    async def _small(
        self, ref: ImageRef, read: Callable[[int], bytes], admitted: Reservation | None
    ) -> LoadedImages | tuple[list[bytes], Reservation]:
        """An image at hand, read and decoded in one turn of a thread, since each turn costs a tenth
        of a small image; of one that is not small, its bytes, and what is reserved for them."""
        encoded = admitted or await self._memory.encoded.reserve(self._fetcher.expected(ref))
        try:
            pixels = await self._memory.pixels.reserve(self._small_bytes)
            try:
                work = partial(self._read_small, ref, read, encoded.size)
                data, image = await retried(partial(self._in_thread, work), self._limits)
            except BaseException:
                pixels.release()
                raise
        except Larger as larger:
            encoded.release()
            encoded = await self._memory.encoded.reserve(larger.size)
            return await self._files([ref], [larger.size], encoded)
        except BaseException:
            encoded.release()
            raise
        self._fetcher.took(ref, data)
        if image is None:
            pixels.release()
            encoded.resize(len(data))
            return [data], encoded
        encoded.release()
        return _loaded([image], pixels)

    def _read_small(
        self, ref: ImageRef, read: Callable[[int], bytes], reserved: int
    ) -> tuple[bytes, LoadedImage | None]:
        data = read(reserved)
        need = self._need(ref, data)
        small = need.working + need.kept <= self._small_bytes
        return data, self._decode(ref, data) if small else None

    async def _files(
        self, refs: Sequence[ImageRef], sizes: Sequence[int], reserved: Reservation
    ) -> tuple[list[bytes], Reservation]:
        """The encoded bytes of all images, and what is reserved for them: first ``reserved``, for
        images of these sizes.

        How many they are is often known only when they come: then all are let go, and fetched
        again when there is room for them."""
        for _ in range(ROUNDS):
            try:
                found = await self._fetched(refs, sizes)
            except BaseException:
                reserved.release()
                raise
            files = [data for data in found if isinstance(data, bytes)]
            if len(files) == len(found):
                reserved.resize(sum(map(len, files)))
                return files, reserved
            reserved.release()
            sizes = [each.size if isinstance(each, Larger) else len(each) for each in found]
            del found, files
            reserved = await self._memory.encoded.reserve(sum(sizes))
        reserved.release()
        raise fetch_failed(f"grows while it is read: {reference(refs[0])}")

    async def _fetched(
        self, refs: Sequence[ImageRef], sizes: Sequence[int]
    ) -> list[bytes | Larger]:
        """All at once; what goes wrong with the first of them is raised when all have ended."""
        fetching = (
            retried(partial(self._fetch, *each), self._limits)
            for each in zip(refs, sizes, strict=True)
        )
        if len(refs) == 1:
            return [await next(fetching)]
        found = await asyncio.gather(*map(_outcome, fetching))
        errors = [each for each in found if isinstance(each, VlmbatchError)]
        for error in sorted(errors, key=lambda error: isinstance(error, RequestFailed)):
            raise error  # a store that lets nobody in comes first
        return [each for each in found if not isinstance(each, VlmbatchError)]

    async def _fetch(self, ref: ImageRef, reserved: int) -> bytes | Larger:
        try:
            return await self._fetcher.fetch(ref, reserved)
        except Larger as larger:
            return larger

    def _needs(self, refs: Sequence[ImageRef], files: Sequence[bytes]) -> list[Need]:
        """From the headers, so that nothing is decoded before it is reserved."""
        return [self._need(ref, data) for ref, data in zip(refs, files, strict=True)]

    def _need(self, ref: ImageRef, data: bytes) -> Need:
        with _named(ref):
            found = header(data, max_pixels=self._limits.max_pixels, page=page_of(ref))
        kept = found.size if self._target is None else self._target(found.size)
        return Need(found.decoded_bytes, kept.pixels * _BYTES_PER_PIXEL)

    def _decode(self, ref: ImageRef, data: bytes) -> LoadedImage:
        page = page_of(ref)
        with _named(ref):
            decoded = decode(
                data, max_pixels=self._limits.max_pixels, target=self._target, page=page
            )
        with self._counting:
            self._decoded += 1
        pixels = decoded.pixels if self._prepare is None else self._prepare(decoded.pixels)
        content = xxhash.xxh3_128_hexdigest(data) + (f"-page{page}" if page else "")
        return LoadedImage(pixels, decoded.size, f"{content}-{pixels.width}x{pixels.height}")

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


async def retried(work: Callable[[], Awaitable[T]], limits: Limits) -> T:
    """What ``work`` gives, tried again while it fails for a reason that may pass."""
    attempt = 1
    while True:
        try:
            return await work()
        except RequestFailed as error:
            if not error.failure.retryable or attempt >= limits.attempts:
                raise
            asked = error.seconds if isinstance(error, Busy) else 0.0
        wait = limits.backoff * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
        await asyncio.sleep(max(wait, asked))
        attempt += 1


def _loaded(images: Sequence[LoadedImage], pixels: Reservation) -> LoadedImages:
    kept = sum(image.pixels.width * image.pixels.height for image in images) * _BYTES_PER_PIXEL
    pixels.resize(min(kept, pixels.size))
    return LoadedImages(tuple(images), pixels)


async def _outcome(work: Awaitable[T]) -> T | VlmbatchError:
    try:
        return await work
    except VlmbatchError as error:
        return error


@contextmanager
def _named(ref: ImageRef) -> Iterator[None]:
    """Puts the image's name before the message of a failure to decode it."""
    try:
        yield
    except RequestFailed as error:
        message = f"{reference(ref) or 'embedded image'}: {error.failure.message}"
        raise RequestFailed(replace(error.failure, message=message)) from error.__cause__
