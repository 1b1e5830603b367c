"""Images from object stores, through fsspec: one GET each, in flight together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

from vlmbatch.errors import CredentialsRefused, RequestFailed, UsageError
from vlmbatch.images.failures import (
    check_size,
    fetch_failed,
    forbidden,
    missing,
    timed_out,
    unreadable,
)
from vlmbatch.images.turns import Turns
from vlmbatch.storage import (
    Trouble,
    check_names_object,
    filesystem_of,
    said,
    scheme_of,
    trouble_of,
    without_secrets,
)

T = TypeVar("T")

VERSIONS = ("ETag", "etag", "blob_id")
"""What s3fs, gcsfs and adlfs, and the Hub call the version of an object's content."""


class StoreImages:
    """``get`` for one event loop; fsspec's own loop, or a thread of ``executor``, does the work."""

    def __init__(self, *, max_bytes: int, at_once: int, seconds: float, executor: Executor) -> None:
        """``at_once``: requests to one store. ``seconds``: for one attempt at one image."""
        self._max_bytes = max_bytes
        self._at_once = at_once
        self._turns = Turns(at_once)
        self._seconds = seconds
        self._executor = executor
        self._filesystems: dict[str, Any] = {}

    async def get(self, uri: str, reserved: int) -> bytes:
        """All bytes of an image. Raises Larger where they are more than were reserved,
        CredentialsRefused where nothing of this store can be read, else RequestFailed."""
        reserved = min(reserved, self._max_bytes)
        data = await self.read(uri, 0, reserved + 1)  # a range: what is larger is not sent
        if len(data) > reserved:
            name = without_secrets(uri)
            size = max(await self.size(uri), len(data))
            check_size(name, size, reserved=reserved, max_bytes=self._max_bytes)
        return data

    async def read(self, uri: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the object, fewer where it ends before."""
        fs, path = await self._opened(uri)
        read = partial(_call, fs, "cat_file", path, start=start, end=stop)
        try:
            data: bytes = await self._answer(uri, fs, read)
        except _Odd as odd:  # S3 has no range of an empty object
            with_size = await self._size_or_none(uri)
            if with_size == 0:
                data = b""
            else:
                raise fetch_failed(odd.message) from odd.__cause__
        if not data and start == 0:
            raise unreadable(f"empty (0 bytes): {without_secrets(uri)}")
        return data

    async def size(self, uri: str) -> int:
        return int((await self._info(uri))["size"] or 0)

    async def version(self, uri: str) -> str | None:
        """Its ETag, or what the store has in place of it, else its size; errors as of ``get``."""
        info = await self._info(uri)
        for name in VERSIONS:
            if info.get(name):
                return str(info[name])
        return None if info.get("size") is None else f"{info['size']} bytes"

    async def _info(self, uri: str) -> Any:
        fs, path = await self._opened(uri)
        try:
            return await self._answer(uri, fs, partial(_call, fs, "info", path))
        except _Odd as odd:
            raise fetch_failed(odd.message) from odd.__cause__

    async def _size_or_none(self, uri: str) -> int | None:
        try:
            return await self.size(uri)
        except CredentialsRefused:
            raise
        except Exception:
            return None

    async def _opened(self, uri: str) -> tuple[Any, str]:
        """(the filesystem, the path in it); looked for in a thread, since that may import."""
        try:
            check_names_object(uri)
        except UsageError as error:
            raise _refused(error) from error
        scheme, _, rest = uri.partition("://")
        place = f"{scheme}://{rest.partition('/')[0]}"
        fs = self._filesystems.get(place)
        if fs is None:
            loop = asyncio.get_running_loop()
            options = _options(scheme_of(uri) or "", self._at_once)
            find = partial(filesystem_of, uri, **options)
            try:
                fs, path = await loop.run_in_executor(self._executor, find)
            except UsageError as error:
                raise _refused(error) from error
            except CredentialsRefused:
                raise
            except Exception as error:
                failure = self._failure(uri, error)
                if isinstance(failure, _Odd):
                    failure = fetch_failed(failure.message)
                raise failure from error
            self._filesystems[place] = fs
            return fs, path
        return fs, fs._strip_protocol(uri)

    async def _answer(self, uri: str, fs: Any, call: Callable[[], Any]) -> Any:
        """What the store says, in our words."""
        name = without_secrets(uri)
        async with self._turns.turn(uri.partition("://")[0]):
            try:
                async with asyncio.timeout(self._seconds):
                    return await self._run(fs, call)
            except TimeoutError:
                raise timed_out(name, self._seconds) from None
            except Exception as error:
                raise self._failure(uri, error) from error

    def _failure(self, uri: str, error: Exception) -> Exception:
        name, words = without_secrets(uri), said(error)
        match trouble_of(error):
            case Trouble.MISSING:
                return missing(f"no such object: {name}")
            case Trouble.FORBIDDEN:
                return forbidden(f"the store does not give it: {name} ({words})")
            case Trouble.CREDENTIALS:
                return CredentialsRefused(
                    f"{_store(uri)} does not let us in: its credentials are missing, wrong or "
                    f"expired ({words})",
                    hint="set them in the environment of every worker, and run the same command "
                    "again: it goes on from here",
                )
            case Trouble.BUSY:
                return fetch_failed(f"the store is busy or cannot be reached: {name} ({words})")
        return _Odd(f"cannot read {name} ({words})")

    async def _run(self, fs: Any, call: Callable[[], Any]) -> Any:
        if not fs.async_impl:
            return await asyncio.get_running_loop().run_in_executor(self._executor, call)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_await(call), fs.loop))


class _Odd(Exception):
    """An answer of a store that has no word of its own."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


def _call(fs: Any, name: str, path: str, **how: int) -> Any:
    """The result, or a coroutine of it where the filesystem is asynchronous."""
    return getattr(fs, f"_{name}" if fs.async_impl else name)(path, **how)


async def _await(call: Callable[[], Awaitable[T]]) -> T:
    return await call()


def _refused(error: UsageError) -> RequestFailed:
    return forbidden(f"{error.message} ({error.hint})" if error.hint else error.message)


def _store(uri: str) -> str:
    """``s3://bucket``."""
    scheme, _, rest = without_secrets(uri).partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


def _options(scheme: str, at_once: int) -> dict[str, Any]:
    """botocore has 10 connections if it is not told otherwise."""
    if scheme not in ("s3", "s3a"):
        return {}
    import fsspec

    given = fsspec.config.conf.get(scheme, {}).get("config_kwargs", {})
    return {"config_kwargs": {"max_pool_connections": at_once, **given}}
