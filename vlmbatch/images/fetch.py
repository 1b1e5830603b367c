"""An image's encoded bytes, from wherever its reference points."""

from __future__ import annotations

import asyncio
import os
import re
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import xxhash

from vlmbatch.images.archives import ArchiveImages
from vlmbatch.images.data_uri import data_of, data_size
from vlmbatch.images.failures import (
    Larger,
    forbidden,
    missing,
    too_many_bytes,
    unreadable,
)
from vlmbatch.images.http import HttpImages
from vlmbatch.images.local import LocalFiles
from vlmbatch.images.stores import StoreImages
from vlmbatch.records import ImageRef
from vlmbatch.storage import (
    PAGE,
    STORES,
    is_local,
    joined,
    scheme_of,
    with_plain_scheme,
    without_secrets,
)

_MEDIA_TYPE = re.compile(r"data:([a-z]+/[a-z0-9.+-]{1,60}(?=[;,]))?", re.IGNORECASE)
FIRST_BYTES, LEAST_BYTES = 4 * 2**20, 2**18


@dataclass(frozen=True, slots=True)
class Reach:
    """What the images of a run may name, and how they are asked for.

    ``at_once``: requests to one host or store. ``seconds``: for one answer. ``max_bytes``: of one
    image.
    """

    max_bytes: int = 256 * 1024 * 1024
    at_once: int = 32
    seconds: float = 60.0
    roots: tuple[str, ...] = ()
    allow_private: bool = False


class Fetcher:
    """``fetch`` for one event loop. Blocking work is done by ``executor``; ``base`` is the
    manifest's folder, where relative paths start."""

    def __init__(self, *, base: str, reach: Reach, executor: Executor) -> None:
        self._base = base
        self._executor = executor
        self._max_bytes = reach.max_bytes
        self._local = LocalFiles(base, reach.roots, reach.max_bytes)
        self._http = HttpImages(
            max_bytes=reach.max_bytes,
            at_once=reach.at_once,
            seconds=reach.seconds,
            allow_private=reach.allow_private,
        )
        self._stores = StoreImages(
            max_bytes=reach.max_bytes,
            at_once=reach.at_once,
            seconds=reach.seconds,
            executor=executor,
        )
        self._places = _Places(self._local, self._stores, executor)
        self._archives = ArchiveImages(max_bytes=reach.max_bytes, executor=executor)
        self._usual = Usual(reach.max_bytes)

    def expected(self, ref: ImageRef) -> int:
        """Bytes to reserve before ``fetch``: at most so many where they are here already, else
        about as many as the images had lately."""
        if ref.data is not None:
            return len(ref.data)
        if ref.uri and scheme_of(ref.uri) == "data":
            return min(data_size(ref.uri), self._max_bytes)
        return self._usual.size

    async def fetch(self, ref: ImageRef, reserved: int) -> bytes:
        """All bytes of an image, at most ``reserved``. Raises Larger where there are more,
        CredentialsRefused, or RequestFailed: missing, forbidden, unreadable, too large, timeout,
        or fetch_failed (retryable)."""
        if ref.data is not None:
            return self._embedded(ref)
        if not ref.uri:
            raise missing("the row names no image")
        try:
            if read := self.at_hand(ref):
                loop = asyncio.get_running_loop()
                data = await loop.run_in_executor(self._executor, read, reserved)
            else:
                data = await self._named(ref.uri, reserved)
        except Larger as larger:
            self._usual.add(larger.size)
            raise
        self.took(ref, data)
        return data

    async def version(self, uri: str) -> str | None:
        """A text that is another one when the image was replaced, of what its place says of it:
        its ETag, else its size (never its time, which a copy changes); of a data: URI the
        xxh3-64 hex. None where the place says neither. Raises as ``fetch``."""
        uri = absolute(uri, self._base)
        name = reference(ImageRef(uri=uri)) or uri
        uri = PAGE.sub("", uri)
        match scheme_of(uri):
            case None | "file":
                return await self._places.version(uri)
            case "data":
                return xxhash.xxh3_64_hexdigest(uri.encode())
            case "http" | "https":
                return await self._http.version(uri)
            case "zip" | "tar":
                return await self._archives.version(uri, places=self._places)
            case scheme if scheme in STORES and "::" not in uri:
                return await self._stores.version(uri)
            case scheme:
                raise forbidden(f"images are not read from {scheme}: {name}")

    def took(self, ref: ImageRef, data: bytes) -> None:
        """This image had these bytes; ``expected`` learns from it."""
        if ref.data is None:
            self._usual.add(len(data))

    def at_hand(self, ref: ImageRef) -> Callable[[int], bytes] | None:
        """What reads an image in the manifest or on the local disk, at most so many bytes, and
        blocks; it raises what ``fetch`` does. None where the image is elsewhere."""
        if ref.data is not None:
            return lambda reserved: self._embedded(ref)
        if not ref.uri:
            return None
        uri = absolute(ref.uri, self._base)
        name = reference(ImageRef(uri=uri)) or uri
        uri = PAGE.sub("", uri)
        match scheme_of(uri):
            case None | "file":
                return partial(self._local.read, name, uri)
            case "data":
                return lambda reserved: data_of(name, uri, self._max_bytes)
        return None

    async def close(self) -> None:
        """Ends the connections to web servers."""
        await self._http.close()

    def _embedded(self, ref: ImageRef) -> bytes:
        assert ref.data is not None
        name = reference(ref) or "embedded image"
        if not ref.data:
            raise unreadable(f"empty (0 bytes): {name}")
        if len(ref.data) > self._max_bytes:
            raise too_many_bytes(name, len(ref.data), self._max_bytes)
        return ref.data

    async def _named(self, uri: str, reserved: int) -> bytes:
        """The dispatch: a further kind of place is a further case here."""
        uri = absolute(uri, self._base)
        name = reference(ImageRef(uri=uri)) or uri
        uri = PAGE.sub("", uri)
        match scheme_of(uri):
            case "http" | "https":
                return await self._http.get(uri, reserved)
            case "zip" | "tar":
                return await self._archives.get(uri, reserved, places=self._places)
            case scheme if scheme in STORES and "::" not in uri:
                return await self._stores.get(uri, reserved)
            case scheme:
                raise forbidden(f"images are not read from {scheme}: {name}")


class _Places:
    """Where archives lie: in stores, or on the local disk, under the rules of local files."""

    def __init__(self, local: LocalFiles, stores: StoreImages, executor: Executor) -> None:
        self._local, self._stores, self._executor = local, stores, executor

    async def size(self, uri: str) -> int:
        if self._is_store(uri):
            return await self._stores.size(uri)
        work = partial(self._local.size, without_secrets(uri), uri)
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def version(self, uri: str) -> str | None:
        if self._is_store(uri):
            return await self._stores.version(uri)
        return f"{self._local.size(without_secrets(uri), uri)} bytes"  # quicker than a thread

    async def read(self, uri: str, start: int, stop: int) -> bytes:
        if self._is_store(uri):
            return await self._stores.read(uri, start, stop)
        work = partial(self._local.read_range, without_secrets(uri), uri, start, stop)
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def _is_store(self, uri: str) -> bool:
        scheme = scheme_of(uri)
        if scheme not in STORES and not is_local(uri):
            raise forbidden(f"archives are not read from {scheme}: {without_secrets(uri)}")
        return scheme in STORES


class Usual:
    """How many bytes to reserve for an image whose size is not known: what 9 of 10 of the last
    ones would have fitted in, and a quarter more."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._last: deque[int] = deque(maxlen=64)
        self.size = min(FIRST_BYTES, max_bytes)

    def add(self, size: int) -> None:
        self._last.append(size)
        if len(self._last) >= 8:
            usual = sorted(self._last)[len(self._last) * 9 // 10]
            self.size = min(max(usual + usual // 4, LEAST_BYTES), self._max_bytes)


def is_embedded(ref: ImageRef) -> bool:
    """Whether the manifest holds the image itself."""
    return ref.data is not None or (bool(ref.uri) and scheme_of(ref.uri or "") == "data")


def page_of(ref: ImageRef) -> int | None:
    """Which page of a document its URI names, from 1; None for an image that is no page."""
    if not ref.uri or scheme_of(ref.uri) == "data":
        return None
    page = PAGE.search(ref.uri)
    return int(page[1]) if page else None


def reference(ref: ImageRef) -> str | None:
    """What results call the image: no payload, and no user info or query behind a scheme.

    ``data:image/png`` for a data URI, a local path as it is, None for bytes without a URI.
    """
    if not ref.uri:
        return None
    if scheme_of(ref.uri) == "data":
        media_type = _MEDIA_TYPE.match(ref.uri)
        return media_type.group() if media_type else "data:"
    return without_secrets(ref.uri)


def absolute(uri: str, base: str) -> str:
    """A relative path in a manifest from elsewhere is relative to that; local ones stay."""
    if scheme_of(uri) not in ("zip", "tar"):
        return _place_of(uri, base)
    chain, colons, archive = uri.rpartition("::")
    return f"{chain}{colons}{_place_of(archive, base)}"


def _place_of(uri: str, base: str) -> str:
    if not is_local(base) and scheme_of(uri) is None and not os.path.isabs(uri):
        uri = joined(base, uri)
    return with_plain_scheme(uri)
