"""A web server on loopback, in the test's own event loop: one function for each path."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

from aiohttp import web

Answer = bytes | web.StreamResponse | Callable[[web.Request], Awaitable[web.StreamResponse]]


class WebServer:
    """``port`` once it listens; counts requests, connections, and how many it had at once."""

    def __init__(self, answers: Mapping[str, Answer]) -> None:
        self.answers = dict(answers)
        self.requests: list[web.Request] = []
        self.peers: set[tuple[str, int]] = set()
        self.asked: Counter[str] = Counter()
        self.in_flight = self.most_in_flight = 0
        self.port = 0

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        self.asked[request.path] += 1
        self.peers.add(request.transport.get_extra_info("peername"))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            answer = self.answers.get(request.path, b"")
            if isinstance(answer, web.StreamResponse):
                return answer
            if callable(answer):
                return await answer(request)
            return web.Response(body=answer) if answer else web.Response(status=404)
        finally:
            self.in_flight -= 1


@asynccontextmanager
async def web_server(answers: Mapping[str, Answer]) -> AsyncIterator[WebServer]:
    """Listens on a free port of 127.0.0.1 until the block ends."""
    server = WebServer(answers)
    runner = web.ServerRunner(web.Server(server.answer), shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.port = site._server.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        await runner.cleanup()
