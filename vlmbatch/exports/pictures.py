"""The images of examples: named where they are, copied, or brought as bytes."""

from __future__ import annotations

import asyncio
import io
import os
import re
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Self

from vlmbatch.errors import RequestFailed
from vlmbatch.exports.base import Example, Format, ImageMode, Picture
from vlmbatch.grounding import Size
from vlmbatch.images.decode import decode, header, is_turned
from vlmbatch.images.failures import Larger
from vlmbatch.images.fetch import Fetcher, Reach, absolute, page_of, reference
from vlmbatch.images.load import Limits, retried
from vlmbatch.images.local import local_path
from vlmbatch.job import JobSpec
from vlmbatch.records import ImageRef
from vlmbatch.results.store import reported
from vlmbatch.storage import is_local, scheme_of, without_secrets

AT_ONCE = 16
"""Examples whose images are fetched while an earlier one is written."""
RESERVED = 16 * 2**20
"""Bytes of an image that may be held meanwhile; a larger one is fetched in its turn, alone."""
_ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
"""What every consumer opens; images of other formats become PNG or JPEG."""
_PHOTOS = ("JPEG", "MPO", "HEIF", "AVIF", "JPEG2000", "WEBP")
_UNUSUAL = re.compile(r"[^A-Za-z0-9._-]+")

Images = tuple[Example, tuple[ImageRef, ...]]


@dataclass(frozen=True, slots=True)
class File:
    """An image's encoded bytes as any consumer can open them: upright, of a usual format."""

    data: bytes
    ending: str
    size: Size


class Pictures:
    """Gives examples their images; to be used as a context, which ends its threads.

    Counts what it did in ``referenced``, ``copied``, ``embedded``, ``made_anew`` and ``shortened``,
    and in ``not_there`` those referenced files that cannot be seen from here.
    """

    def __init__(
        self, form: Format, job: JobSpec, *, base: str, place: Path, mode: ImageMode
    ) -> None:
        self._form, self._base, self._place, self._mode = form, base, place, mode
        self._limits = Limits(
            Reach(
                max_bytes=job.max_image_bytes,
                at_once=job.fetch_concurrency,
                seconds=job.fetch_timeout,
                roots=tuple(job.allow_roots),
                allow_private=job.allow_private_hosts,
            ),
            max_pixels=job.max_image_pixels,
        )
        self._folders: set[Path] = set()
        self._counting = threading.Lock()
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> Self:
        self._threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="load")
        self._loop = asyncio.new_event_loop()
        self._fetcher = Fetcher(base=self._base, reach=self._limits.reach, executor=self._threads)
        self._thread = threading.Thread(target=self._loop.run_forever, name="fetch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._ended(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def fetches(self) -> bool:
        """All images are fetched, whatever they are."""
        return self._mode is not ImageMode.REFERENCE

    def of(self, examples: Iterable[Images]) -> Iterator[tuple[Example, RequestFailed | None]]:
        """Each example with its images, in order; or why they cannot be had."""
        waiting: deque[tuple[Images, Future[list[File | None]] | None]] = deque()
        for images in examples:
            wanted = any(self._address(ref) is None for ref in images[1])
            work = self._files(images, RESERVED) if wanted else None
            coming = work and asyncio.run_coroutine_threadsafe(work, self._loop)
            waiting.append((images, coming or None))
            if len(waiting) >= AT_ONCE:
                yield self._done(*waiting.popleft())
        while waiting:
            yield self._done(*waiting.popleft())

    def _done(
        self, images: Images, coming: Future[list[File | None]] | None
    ) -> tuple[Example, RequestFailed | None]:
        example, refs = images
        files: list[File | None] = [None] * len(refs)
        try:
            if coming is not None:
                try:
                    files = coming.result()
                except Larger:
                    work = self._files(images, self._limits.reach.max_bytes)
                    files = asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except RequestFailed as error:
            return example, error
        pictures = [
            self._picture(example, at, ref, file, len(refs))
            for at, (ref, file) in enumerate(zip(refs, files, strict=True))
        ]
        return replace(example, images=tuple(pictures)), None

    def _picture(
        self, example: Example, at: int, ref: ImageRef, file: File | None, of: int
    ) -> Picture:
        name = _name_of(example, at, ref, of, file)
        if file is None:
            self.counts["referenced"] += 1
            address = self._address(ref) or ""
            if is_local(address) and not os.path.exists(address):
                self.counts["not_there"] += 1
            size = example.results[0].image_size if at == 0 else None
            return Picture(name, self._written(address), None, size)
        if self._mode is ImageMode.EMBED:
            self.counts["embedded"] += 1
            return Picture(name, None, file.data, file.size)
        self.counts["copied"] += 1
        copy = self._form.copy_to(example, name)
        self._form.export.destination.claim(copy)
        path = self._place / copy
        with reported(self._place):
            if path.parent not in self._folders:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._folders.add(path.parent)
            path.write_bytes(file.data)
        return Picture(name, str(path) if self._form.absolute_paths else copy, None, file.size)

    def _address(self, ref: ImageRef) -> str | None:
        """Where the consumer finds the image by itself; None where it must be fetched."""
        if self._mode is not ImageMode.REFERENCE or ref.data is not None or not ref.uri:
            return None
        if page_of(ref) is not None:
            return None
        uri = absolute(ref.uri, self._base)
        if scheme_of(uri) is None:
            uri = os.path.join(self._base, uri)
        if is_local(uri):
            path = local_path(uri)
            return None if self._form.upright and _is_turned(path) else path
        scheme = scheme_of(uri)
        if not self._form.opens_addresses or scheme in ("data", "zip", "tar") or "::" in uri:
            return None
        return uri

    def _written(self, address: str) -> str:
        if is_local(address):
            return address if self._form.absolute_paths else os.path.relpath(address, self._place)
        bare = without_secrets(address)
        if bare != address:
            self.counts["shortened"] += 1
        return bare

    async def _files(self, images: Images, most: int) -> list[File | None]:
        """Of those images that must be fetched. Raises Larger, or RequestFailed."""
        fetching = [self._file(ref, most) for ref in images[1]]
        found = await asyncio.gather(*fetching, return_exceptions=True)
        for each in found:
            if isinstance(each, BaseException):
                raise each
        return [each for each in found if not isinstance(each, BaseException)]

    async def _file(self, ref: ImageRef, most: int) -> File | None:
        if self._address(ref) is not None:
            return None
        data = await retried(partial(self._fetcher.fetch, ref, most), self._limits)
        work = partial(self._usable, ref, data)
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _usable(self, ref: ImageRef, data: bytes) -> File:
        """The bytes as they are where any consumer sees in them what the model saw; else the image
        anew: upright, or the page of the document, or in a usual format."""
        most, page = self._limits.max_pixels, page_of(ref)
        found = header(data, max_pixels=most, page=page)
        ending = _ENDINGS.get(found.format)
        if ending in self._form.endings and page is None and found.orientation == 1:
            return File(data, str(ending), found.size)
        decoded = decode(data, max_pixels=most, page=page)
        photo = found.format in _PHOTOS
        file = io.BytesIO()
        decoded.pixels.save(
            file, **({"format": "JPEG", "quality": 95} if photo else {"format": "PNG"})
        )
        with self._counting:
            self.counts["made_anew"] += 1
        return File(file.getvalue(), "jpg" if photo else "png", decoded.size)

    async def _ended(self) -> None:
        waiting = asyncio.all_tasks() - {asyncio.current_task()}
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await self._fetcher.close()


@lru_cache(1024)  # asked some times about each image that is on its way
def _is_turned(path: str) -> bool:
    return os.path.isfile(path) and is_turned(path)


def _name_of(example: Example, at: int, ref: ImageRef, images: int, file: File | None) -> str:
    """``000000012-cat.jpg``, ``000000012-1-dog.jpg`` the second of several."""
    called = reference(ref) or ""
    base = os.path.basename(called) if scheme_of(called) != "data" else ""
    stem, ending = os.path.splitext(base.partition("#")[0])
    stem = _UNUSUAL.sub("_", stem)[:80].strip("._")
    parts = [f"{example.row:09d}", *([str(at)] if images > 1 else []), *([stem] if stem else [])]
    return f"{'-'.join(parts)}{f'.{file.ending}' if file else ending.lower()}"
