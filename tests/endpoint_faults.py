"""A small OpenAI-compatible endpoint for tests, over real sockets, and the faults it can have.

Faults are a script: each chat request takes the next one, until none is left. What was asked is
kept, so that tests count instead of measuring time.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import socket
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

MODELS = ("tiny",)


@dataclass(frozen=True)
class Status:
    """An answer with this status; ``body`` is JSON, or text as it is."""

    code: int
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Reset:
    """The connection is closed in the middle of the answer's body."""


@dataclass(frozen=True)
class Stall:
    """No answer, ever."""


Fault = Status | Reset | Stall
Script = Callable[[int, dict[str, Any]], Fault | None]
"""(number of the chat request, from 0; its body) -> its fault, or None."""


def said(message: str, code: str | None = None) -> dict[str, Any]:
    """An error's body as the OpenAI API has it."""
    return {"error": {"message": message, "type": "error", "param": None, "code": code}}


def completion(text: str | None, **more: Any) -> dict[str, Any]:
    """A chat completion's body; ``more`` goes into the message."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, **more},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


def prompt_of(body: dict[str, Any]) -> str:
    """The text of the user's turn."""
    content = body["messages"][-1]["content"]
    return next(str(part["text"]) for part in content if part["type"] == "text")


def image_urls_of(body: dict[str, Any]) -> list[str]:
    content = body["messages"][-1]["content"]
    return [part["image_url"]["url"] for part in content if part["type"] == "image_url"]


class FakeEndpoint:
    """Serves on a thread of its own; answers ``re: <prompt>``, or with what ``upstream``, a real
    server, says: then it is a proxy that has faults. ``down`` and ``up`` close and open the port,
    as a server does that is killed and started again."""

    def __init__(
        self,
        script: Script | None = None,
        *,
        models: tuple[str, ...] | None = MODELS,
        owner: str = "vllm",
        key: str | None = None,
        upstream: str | None = None,
        upstream_key: str = "",
    ) -> None:
        self._script = script or (lambda _number, _body: None)
        self._models, self._owner, self._key = models, owner, key
        self._upstream, self._upstream_key = upstream, upstream_key
        self.bodies: list[dict[str, Any]] = []
        """Of all chat requests, in the order they came."""
        self.answered: Counter[str] = Counter()
        """Prompts that were answered well."""
        self.at_once = 0
        self.most_at_once = 0
        self.listed = 0
        """How often the models were asked for."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._open: set[asyncio.StreamWriter] = set()
        self._place = socket.socket()  # holds the port, also while nobody listens there
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._place.bind(("127.0.0.1", 0))
        self.port: int = self._place.getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FakeEndpoint:
        self._thread.start()
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._place.close()

    def up(self) -> None:
        async def start() -> None:
            self._server = await asyncio.start_server(
                self._serve, "127.0.0.1", self.port, reuse_port=True
            )

        asyncio.run_coroutine_threadsafe(start(), self._loop).result()

    def down(self) -> None:
        """No new connections, and those that are open are reset."""

        async def stop() -> None:
            for listening in self._server.sockets:
                self._loop.remove_reader(listening.fileno())
            for _ in range(5):  # asyncio leaks a connection that it accepts while it closes
                await asyncio.sleep(0)
            self._server.close()
            quiet = 0  # turns of the loop: a connection takes some to come about, and to end
            while quiet < 10:
                for writer in list(self._open):
                    writer.transport.abort()
                await asyncio.sleep(0)
                busy = self._open or len(asyncio.all_tasks()) > 1
                quiet = 0 if busy else quiet + 1

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while self._server.is_serving() and await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._open.discard(writer)
            writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:])}
        text = await reader.readexactly(int(headers.get("content-length", "0")))
        path = head[0].split()[1]
        if self._key is not None and headers.get("authorization") != f"Bearer {self._key}":
            given = headers.get("authorization", "").removeprefix("Bearer ")
            await _reply(writer, Status(401, said(f"Incorrect API key provided: {given}")))
            return True
        if path == "/v1/models":
            self.listed += 1
            listed = await self._from_upstream(path) if self._upstream else self._list()
            if listed is not None:
                await _reply(writer, listed)
            return listed is not None
        if path != "/v1/chat/completions":
            await _reply(writer, Status(404, {"detail": "Not Found"}))
            return True
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self._chat(json.loads(text), reader, writer)
        finally:
            self.at_once -= 1

    def _list(self) -> Status:
        if self._models is None:
            return Status(404, {"detail": "Not Found"})
        return Status(200, {"data": [{"id": m, "owned_by": self._owner} for m in self._models]})

    async def _chat(
        self, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        number = len(self.bodies)
        self.bodies.append(body)
        match self._script(number, body):
            case None:
                answer: Status | None = Status(200, completion(f"re: {prompt_of(body)}"))
                if self._upstream:
                    answer = await self._from_upstream("/v1/chat/completions", body)
                if answer is None:
                    return False
                await _reply(writer, answer)
                self.answered[prompt_of(body)] += answer.code == 200
                return True
            case Status() as status:
                await _reply(writer, status)
                return True
            case Reset():
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{")
                await writer.drain()
                return False
            case Stall():
                await reader.read()  # until the other side, or down(), ends the connection
        return False

    async def _from_upstream(self, path: str, body: Any = None) -> Status | None:
        """None: upstream broke the connection, or is not there; so is this one to be broken."""

        def ask() -> Status | None:
            data = None if body is None else json.dumps(body).encode()
            headers = {"content-type": "application/json"}
            headers["authorization"] = f"Bearer {self._upstream_key}"
            call = urllib.request.Request(f"{self._upstream}{path}", data, headers)
            try:
                with urllib.request.urlopen(call, timeout=300) as answer:
                    return Status(answer.status, json.loads(answer.read()))
            except urllib.error.HTTPError as error:
                with error:
                    return Status(error.code, json.loads(error.read() or b"null"))
            except (OSError, http.client.HTTPException, ValueError):
                return None

        return await asyncio.to_thread(ask)


async def _reply(writer: asyncio.StreamWriter, status: Status) -> None:
    text = status.body if isinstance(status.body, str) else json.dumps(status.body)
    content = text.encode()
    lines = [
        f"HTTP/1.1 {status.code} Said",
        f"content-type: {'text/plain' if isinstance(status.body, str) else 'application/json'}",
        f"content-length: {len(content)}",
        *(f"{name}: {value}" for name, value in status.headers.items()),
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode() + content)
    await writer.drain()


def first(*faults: Fault) -> Script:
    """These faults for the first chat requests, one each; then none."""
    return lambda number, _body: faults[number] if number < len(faults) else None


def by_chance(share: float, *faults: Fault, seed: int) -> Script:
    """One of these faults for so large a share of the requests."""
    chance = random.Random(seed)
    return lambda _number, _body: chance.choice(faults) if chance.random() < share else None


def for_prompt(prompt: str, fault: Fault) -> Script:
    """This fault whenever the prompt holds this text."""
    return lambda _number, body: fault if prompt in prompt_of(body) else None


def files_with(folder: Any, secret: str) -> Iterator[str]:
    """The files under a folder that hold this text."""
    for path in folder.rglob("*"):
        if path.is_file() and secret.encode() in path.read_bytes():
            yield str(path)
