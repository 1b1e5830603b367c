"""Images from web servers: one connection pool per worker, and limits on everything.

Only public addresses unless told otherwise (public.py). Redirects are followed by hand, so that
each address is seen; proxies of the environment are not used, since they would connect for us.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from vlmbatch import __version__
from vlmbatch.errors import ErrorCode, RequestFailed
from vlmbatch.images.failures import (
    Busy,
    check_size,
    fetch_failed,
    forbidden,
    load_failed,
    missing,
    timed_out,
    too_many_bytes,
    unreadable,
)
from vlmbatch.images.public import REFUSED, public_socket
from vlmbatch.images.turns import Turns
from vlmbatch.storage import said, without_secrets

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession
    from yarl import URL

T = TypeVar("T")
REDIRECTS = 5
MAX_RETRY_AFTER = 60.0
"""Seconds: a server that asks for a longer pause gets this one."""
GROWS = 8
"""An answer of unknown length that is larger than was thought may be so many times larger."""
CONNECT_SECONDS = 15.0
SILENT_SECONDS = 30.0
_CHUNK = 256 * 1024
_IN_ORDER = re.compile(r"[!-~]+")  # printable ASCII, no spaces: a URL that somebody encoded


class HttpImages:
    """``get`` for one event loop. Made without a connection; ``close`` ends those it has."""

    def __init__(
        self, *, max_bytes: int, at_once: int, seconds: float, allow_private: bool
    ) -> None:
        """``at_once``: requests to one host. ``seconds``: for one image, redirects included."""
        self._max_bytes = max_bytes
        self._turns = Turns(at_once)
        self._seconds = seconds
        self._allow_private = allow_private
        self._session: ClientSession | None = None

    async def get(self, uri: str, reserved: int) -> bytes:
        """All bytes of an image. Raises Larger where the server says that they are more than were
        reserved, else RequestFailed."""
        return await self._found(uri, "GET", partial(self._body, reserved=reserved))

    async def version(self, uri: str) -> str | None:
        """Its ETag, else its size, as the server tells them of it; RequestFailed as ``get``."""
        return await self._found(uri, "HEAD", _version)

    async def _found(
        self, uri: str, method: str, take: Callable[[ClientResponse, str], Awaitable[T]]
    ) -> T:
        """What is taken of the answer, at the end of its redirects."""
        from yarl import URL

        name = without_secrets(uri)
        url = _url(uri, name)
        for _ in range(REDIRECTS + 1):
            place = f"{url.scheme}://{url.host}:{url.port}"
            async with self._turns.turn(place):
                try:
                    async with asyncio.timeout(self._seconds):
                        found = await self._answer(url, name, method, take)
                except TimeoutError:
                    raise timed_out(name, self._seconds) from None
                except Busy as busy:
                    self._turns.pause(place, busy.seconds)
                    raise
            if not isinstance(found, URL):
                return found
            url = found
        raise load_failed(ErrorCode.FETCH_FAILED, f"more than {REDIRECTS} redirects: {name}")

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _answer(
        self,
        url: URL,
        name: str,
        method: str,
        take: Callable[[ClientResponse, str], Awaitable[T]],
    ) -> T | URL:
        """What is taken of the image, or where else it is."""
        import aiohttp

        try:
            async with self._connected().request(method, url, allow_redirects=False) as response:
                if response.status in (301, 302, 303, 307, 308):
                    return _redirect(response, url, name)
                _check_status(response, name)
                return await take(response, name)
        except aiohttp.ClientConnectorCertificateError as error:
            raise fetch_failed(f"its certificate is not valid: {name} ({said(error)})") from error
        except (aiohttp.InvalidURL, UnicodeError) as error:
            raise missing(f"not a URL: {name}") from error
        except aiohttp.ClientPayloadError as error:
            raise fetch_failed(f"ended before its end: {name} ({said(error)})") from error
        except aiohttp.ServerTimeoutError:
            raise TimeoutError from None
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            reason = str(getattr(error, "os_error", error))
            if REFUSED in reason:
                raise forbidden(
                    f"{url.host} {REFUSED}: {name} (--allow-private-hosts lets it pass)"
                ) from error
            raise fetch_failed(f"no answer from {url.host}: {name} ({said(error)})") from error

    async def _body(self, response: ClientResponse, name: str, *, reserved: int) -> bytes:
        encoded = response.headers.get("Content-Encoding", "identity").lower() != "identity"
        length = response.content_length
        if length is not None and not encoded:
            check_size(name, length, reserved=reserved, max_bytes=self._max_bytes)
        body = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK):
            body += chunk
            if len(body) > self._max_bytes:  # however much more there may be
                raise too_many_bytes(name, len(body), self._max_bytes)
            if len(body) > reserved:
                # Its length was not told: room for much more, so that few attempts reach any limit.
                more = min(GROWS * len(body), self._max_bytes)
                check_size(name, more, reserved=reserved, max_bytes=self._max_bytes)
        if not body:
            raise unreadable(f"empty (0 bytes): {name}")
        return bytes(body)

    def _connected(self) -> ClientSession:
        if self._session is None:
            import aiohttp

            guard = None if self._allow_private else public_socket
            self._session = aiohttp.ClientSession(
                # Turns counts the requests; a name that moved is asked for again soon.
                connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=60, socket_factory=guard),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": f"vlmbatch/{__version__}", "Accept": "image/*,*/*;q=0.5"},
                skip_auto_headers=("Accept-Encoding",),  # images are compressed as they are
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS
                ),
                trust_env=False,
            )
        return self._session


def _url(uri: str, name: str) -> URL:
    """Sent as it is where it is encoded already: a signature is over these very characters."""
    from yarl import URL

    try:
        url = URL(uri, encoded=_IN_ORDER.fullmatch(uri) is not None)
        if url.host and url.port is not None:
            return url
    except ValueError:
        pass
    raise missing(f"not a URL: {name[:200]}")


async def _version(response: ClientResponse, name: str) -> str | None:
    length = response.headers.get("Content-Length")
    return response.headers.get("ETag") or (f"{length} bytes" if length else None)


def _redirect(response: ClientResponse, url: URL, name: str) -> URL:
    where = response.headers.get("Location")
    if not where:
        raise load_failed(ErrorCode.FETCH_FAILED, f"redirected to nowhere: {name}")
    from yarl import URL

    try:
        target = url.join(URL(where, encoded=_IN_ORDER.fullmatch(where) is not None))
        port = target.port
    except ValueError:
        raise missing(f"redirected to what is no URL: {name}") from None
    if target.scheme not in ("http", "https") or not target.host or port is None:
        raise forbidden(f"redirected to a {target.scheme[:20] or 'nameless'}: address: {name}")
    return target


def _check_status(response: ClientResponse, name: str) -> None:
    status = response.status
    if status == 200:
        return
    told = f"the server says {status}: {name}"
    if status in (404, 410):
        raise missing(told)
    if status in (401, 403, 407, 451):
        raise forbidden(told)
    if status in (429, 503):
        seconds = _retry_after(response.headers.get("Retry-After"))
        raise fetch_failed(told) if seconds is None else Busy(told, seconds)
    raise _odd_status(status, told)


def _odd_status(status: int, told: str) -> RequestFailed:
    passing = status in (408, 425) or status >= 500
    return load_failed(ErrorCode.FETCH_FAILED, told, retryable=passing)


def _retry_after(value: str | None) -> float | None:
    """Seconds, bounded; the header holds a number of them or a date."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            until = parsedate_to_datetime(value)
        except ValueError:
            return None
        if until.tzinfo is None:
            until = until.replace(tzinfo=UTC)
        seconds = (until - datetime.now(UTC)).total_seconds()
    return min(max(seconds, 0.0), MAX_RETRY_AFTER) if seconds == seconds else None
