"""A proxy before an S3 server: requests pass as they are, over real sockets, and faults are
injected by rule and counted.

The ``Host`` header, which clients sign, passes too: they are told the proxy's address, and the
server checks the signature against what it is sent.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.s3 import S3Endpoint


@dataclass(frozen=True)
class Request:
    """What came in; ``number`` counts from 0 in the order of arrival."""

    number: int
    method: str
    bucket: str
    key: str
    query: Mapping[str, str]
    headers: Mapping[str, str]

    @property
    def range(self) -> str:
        """The ``Range`` header, as in ``bytes=0-99``; empty without one."""
        return self.headers.get("range", "")

    @property
    def operation(self) -> str:
        """The method; ``LIST`` for what asks for names, ``POST`` for the steps of a multipart
        upload and for deletions of many."""
        return "LIST" if self.method == "GET" and not self.key else self.method


@dataclass(frozen=True)
class Error:
    """An answer with this status, its code in S3's XML (a HEAD has no body); the server never sees
    the request."""

    status: int = 503
    code: str = "SlowDown"


@dataclass(frozen=True)
class Reset:
    """The connection is reset when this share of the answer's body was sent."""

    after: float = 0.5


@dataclass(frozen=True)
class Short:
    """The connection is closed in order, with this many bytes of the announced body missing."""

    missing: int = 1


@dataclass(frozen=True)
class Stall:
    """The body stops at half, and nothing more comes until the client gives up."""


@dataclass(frozen=True)
class LostAnswer:
    """The server does what it was asked; its answer never arrives: the connection is reset."""


@dataclass(frozen=True)
class Slow:
    """The request waits so many seconds before it goes to the server."""

    seconds: float = 0.1


@dataclass(frozen=True)
class Together:
    """The request waits until so many are in flight, or have been; not for ever."""

    count: int


Fault = Error | Reset | Short | Stall | LostAnswer | Slow | Together
Rule = Callable[[Request], Fault | None]

SLOW_DOWN = Error()
INTERNAL = Error(500, "InternalError")
EXPIRED = Error(403, "ExpiredToken")
PASSING = (SLOW_DOWN, INTERNAL, Reset(), Short(), LostAnswer())
"""What goes by when a client asks again, but for ``Stall``, which costs it its timeout."""


def never(_request: Request) -> Fault | None:
    return None


def by_chance(share: float, *faults: Fault, seed: int) -> Rule:
    """One of these faults for so large a share of the requests, by their number."""

    def rule(request: Request) -> Fault | None:
        chance = random.Random(f"{seed} {request.number}")
        return chance.choice(faults) if chance.random() < share else None

    return rule


def first(*faults: Fault) -> Rule:
    """These faults for the first requests that it is shown, one each (see ``where``)."""
    left = list(faults)
    return lambda _request: left.pop(0) if left else None


def where(rule: Rule, *, operation: str | None = None, key: str = "") -> Rule:
    """The rule for requests of this operation whose key holds this text; other requests are not
    shown to it."""

    def narrowed(request: Request) -> Fault | None:
        fits = operation in (None, request.operation) and key in request.key
        return rule(request) if fits else None

    return narrowed


def from_request(number: int, fault: Fault) -> Rule:
    """The fault for each request from this one on, as when credentials expire."""
    return lambda request: fault if request.number >= number else None


def one_of(*rules: Rule) -> Rule:
    """What the first of the rules says that has a fault."""
    return lambda request: next((fault for rule in rules if (fault := rule(request))), None)


@dataclass
class Exchange:
    """A request, and what became of it."""

    request: Request
    fault: Fault | None
    status: int = 0
    """Of the answer; 0 until its head is sent."""
    sent: int = 0
    """Bytes of the answer's body that went to the client."""
    received: int = 0
    """Bytes of the request's body."""


class FaultProxy(S3Endpoint):
    """Listens until its block ends, on a thread of its own. ``rule`` may be replaced meanwhile:
    so credentials are renewed."""

    def __init__(
        self, server: S3Endpoint, rule: Rule = never, *, read_timeout: float | None = None
    ) -> None:
        self.rule = rule
        self.log: list[Exchange] = []
        """Of all requests, in the order they came."""
        self.in_flight = 0
        self.most_in_flight = 0
        self._server = server
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._connections: set[asyncio.Task[None]] = set()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        super().__init__(
            self._socket.getsockname()[1], read_timeout=read_timeout, checksums=server.checksums
        )

    # counts

    @property
    def operations(self) -> Counter[str]:
        return Counter(each.request.operation for each in list(self.log))

    @property
    def injected(self) -> Counter[Fault]:
        return Counter(each.fault for each in list(self.log) if each.fault)

    @property
    def sent(self) -> Counter[tuple[str, str]]:
        """Bytes of objects that went to clients, by (key, range)."""
        counter: Counter[tuple[str, str]] = Counter()
        for each in list(self.log):
            if each.request.operation == "GET":
                counter[each.request.key, each.request.range] += each.sent
        return counter

    # life

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self._call(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _start(self) -> None:
        self._accepting = self._loop.create_task(self._accept())

    async def _stop(self) -> None:
        tasks = [self._accepting, *self._connections]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._socket.close()

    async def _accept(self) -> None:
        self._socket.setblocking(False)
        while True:
            accepted, _ = await self._loop.sock_accept(self._socket)
            task = self._loop.create_task(self._serve(accepted))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    # a connection

    async def _serve(self, accepted: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=accepted, limit=_LIMIT)
        upstream = _Upstream(self._server.port)
        try:
            while await self._exchange(reader, writer, upstream):
                pass
        except (OSError, asyncio.IncompleteReadError):
            _reset(writer)  # whatever broke on one side breaks on the other
        finally:
            upstream.close()
            writer.close()

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, upstream: _Upstream
    ) -> bool:
        """One request and its answer; whether the connection lives on."""
        head = await reader.readuntil(_END)
        request = _parse(head, len(self.log))
        exchange = Exchange(request, self.rule(request))
        self.log.append(exchange)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if request.headers.get("expect", "").lower() == "100-continue":
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = await reader.readexactly(int(request.headers.get("content-length", "0")))
            exchange.received = len(body)
            match exchange.fault:
                case Error() as error:
                    exchange.status = error.status
                    writer.write(_said(error, request))
                    await writer.drain()
                    return True
                case Slow(seconds):
                    await asyncio.sleep(seconds)
                case Together(count):
                    until = self._loop.time() + _FOR_EVER
                    while self.most_in_flight < count and self._loop.time() < until:
                        await asyncio.sleep(0.01)
            await upstream.send(head, body)
            return await self._answer(exchange, reader, writer, upstream)
        finally:
            self.in_flight -= 1

    async def _answer(
        self,
        exchange: Exchange,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        upstream: _Upstream,
    ) -> bool:
        head = await upstream.head()
        status, headers = int(head.split()[1]), _headers(head)
        body = await upstream.body(exchange.request.method, status, headers)
        if not body:  # then the head is what breaks
            head, body = b"", head
        sent = len(body)
        match exchange.fault:
            case LostAnswer():
                sent = 0
            case Reset(after):
                sent = int(len(body) * after)
            case Short(missing):
                sent = max(0, len(body) - missing)
            case Stall():
                sent = len(body) // 2
        if not isinstance(exchange.fault, LostAnswer):
            writer.write(head + body[:sent])
            await writer.drain()
            exchange.status, exchange.sent = status, sent if head else 0
        match exchange.fault:
            case LostAnswer() | Reset():
                _reset(writer)
                return False
            case Short():
                return False
            case Stall():
                await reader.read()  # until the client ends the connection
                return False
        return "close" not in headers.get("connection", "").lower()


class _Upstream:
    """The connection to the server that belongs to one of a client; opened when needed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def send(self, head: bytes, body: bytes) -> None:
        if self._reader is None or self._reader.at_eof():  # never opened, or idle for too long
            self.close()
            self._reader, self._writer = await asyncio.open_connection(
                "127.0.0.1", self._port, limit=_LIMIT
            )
        assert self._writer
        self._writer.write(head + body)
        await self._writer.drain()

    async def head(self) -> bytes:
        """Of the answer proper: the client has had its ``100 Continue``."""
        assert self._reader
        while True:
            head = await self._reader.readuntil(_END)
            if not head.startswith(b"HTTP/1.1 1"):
                return head

    async def body(self, method: str, status: int, headers: Mapping[str, str]) -> bytes:
        """As it came, with the lengths of its chunks where it has chunks."""
        assert self._reader
        if method == "HEAD" or status in (204, 304):
            return b""
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return await self._reader.readexactly(int(headers["content-length"]))
        body = b""
        while True:
            line = await self._reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            body += line + await self._reader.readexactly(size + 2)
            if size == 0:
                return body

    def close(self) -> None:
        if self._writer:
            self._writer.close()


_END = b"\r\n\r\n"
_LIMIT = 1 << 20
_FOR_EVER = 100.0


def _parse(head: bytes, number: int) -> Request:
    method, target, _ = head.partition(b"\r\n")[0].decode("latin-1").split()
    parts = urlsplit(target)
    bucket, _, key = unquote(parts.path).removeprefix("/").partition("/")
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    return Request(number, method, bucket, key, query, _headers(head))


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines) if k}


def _said(error: Error, request: Request) -> bytes:
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{error.code}</Code><Message>injected</Message>"
        f"<RequestId>{request.number}</RequestId></Error>"
    ).encode()
    if request.method == "HEAD":
        body = b""
    head = [
        f"HTTP/1.1 {error.status} Injected",
        f"x-ms-error-code: {error.code}",  # Azure's clients read it there
        "Content-Type: application/xml",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


def _reset(writer: asyncio.StreamWriter) -> None:
    """End with RST, not with FIN: the other side's next read or write fails."""
    if (open_socket := writer.get_extra_info("socket")) is not None and open_socket.fileno() >= 0:
        open_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
