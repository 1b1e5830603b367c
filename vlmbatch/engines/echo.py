"""An engine without a model: it answers with a fixed text, or with a column of the row.

It ships with the package, and every part of the machinery is tested with it. Its faults are real:
a row in ``crash_rows`` kills the process that the engine runs in.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmbatch.engines.arguments import parsed
from vlmbatch.errors import EngineStartError, ErrorCode, Stage, failed
from vlmbatch.records import Completion, Request, TaskKind


@dataclass(frozen=True, slots=True)
class EchoArgs:
    """What ``--engine-arg`` may set. Row lists are comma-separated manifest rows."""

    reply: str | None = None
    """Default: "an image". Where boxes are asked for, the default is that none was found."""
    reply_from: str | None = None
    """Answer with this column of the row; a list answers its requests in turn, and a list in it
    the samples of a request."""
    truncate: bool = False
    """Cut answers after ``max_tokens`` words, as a model would."""
    delay: float = 0.0
    """Seconds per request."""
    capacity: int = 32
    """Requests at once."""
    log: str | None = None
    """Append a JSON line per answered request to this file."""
    fail_rows: frozenset[int] = frozenset()
    """Requests of these rows fail with engine_failed."""
    flaky_rows: frozenset[int] = frozenset()
    """Requests of these rows fail once with engine_timeout, and then succeed."""
    hang_rows: frozenset[int] = frozenset()
    """Requests of these rows are never answered."""
    hang_after: int | None = None
    """When the process has answered so many requests, the others are never answered."""
    hang_until: str | None = None
    """But they are when this file exists."""
    crash_rows: frozenset[int] = frozenset()
    """A request of one of these rows kills the worker with SIGKILL."""
    crash_after: int | None = None
    """The process dies when it has answered so many requests."""


OPERATIONAL = (
    *("delay", "capacity", "log", "flaky_rows", "hang_rows", "hang_after", "hang_until"),
    *("crash_rows", "crash_after"),
)
"""Arguments that change no answer; they are not part of what was asked."""
LOOK_SECONDS = 0.02
"""So often is looked whether ``hang_until`` exists."""


def parse_args(args: Mapping[str, str]) -> EchoArgs:
    """The arguments, checked. Raises UsageError for an unknown key or an unreadable value."""
    return parsed("echo", EchoArgs, args, _parse)


def _parse(key: str, value: str) -> Any:
    if key.endswith("_rows"):
        return frozenset(int(row) for row in value.split(",") if row)
    if key in ("capacity", "hang_after", "crash_after"):
        number = int(value)
        if number < 1:
            raise ValueError("at least 1")
        return number
    if key == "truncate":
        if value.lower() not in ("true", "false"):
            raise ValueError("true or false")
        return value.lower() == "true"
    return float(value) if key == "delay" else value


class EchoEngine:
    """See the module. ``log`` lines: {"row", "request", "sample", "pid"}."""

    def __init__(self, args: EchoArgs) -> None:
        self._args = args
        self.capacity = args.capacity
        self._slots = asyncio.Semaphore(args.capacity)
        self._answered = 0
        self._failed_once: set[tuple[int, int]] = set()
        self._log: int | None = None

    async def start(self) -> None:
        if self._args.log:
            try:
                self._log = os.open(self._args.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            except OSError as error:
                raise EngineStartError(
                    f"--engine-arg log={self._args.log} cannot be written: {error.strerror}"
                ) from None

    async def generate(self, request: Request) -> Completion:
        args = self._args
        async with self._slots:
            if args.delay:
                await asyncio.sleep(args.delay)
            self._fault(request)
            if request.row in args.hang_rows or self._answered == args.hang_after:
                await self._let_go()
            text, finish_reason = self._cut(self._reply(request), request)
            self._answered += 1
            self._note(request)
        if self._answered == args.crash_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return Completion(text, finish_reason, len(request.prompt.split()), len(text.split()))

    async def close(self) -> None:
        if self._log is not None:
            os.close(self._log)
            self._log = None

    async def _let_go(self) -> None:
        while self._args.hang_until is None or not os.path.exists(self._args.hang_until):
            await asyncio.sleep(LOOK_SECONDS)

    def _fault(self, request: Request) -> None:
        args, key = self._args, (request.row, request.request)
        if request.row in args.crash_rows:
            os.kill(os.getpid(), signal.SIGKILL)
        if request.row in args.fail_rows:
            raise failed(ErrorCode.ENGINE_FAILED, Stage.GENERATE, "fail_rows names this row")
        if request.row in args.flaky_rows and key not in self._failed_once:
            self._failed_once.add(key)
            raise failed(
                ErrorCode.ENGINE_TIMEOUT,
                Stage.GENERATE,
                "flaky_rows names this row",
                retryable=True,
            )

    def _reply(self, request: Request) -> str:
        if self._args.reply_from is None:
            wants_boxes = request.kind in (TaskKind.GROUND, TaskKind.DETECT)
            return self._args.reply or ("none" if wants_boxes else "an image")
        value = request.fields[self._args.reply_from]
        if isinstance(value, list):
            value = value[request.request] if request.request < len(value) else ""
        if isinstance(value, list):
            value = value[request.sample] if request.sample < len(value) else ""
        return "" if value is None else str(value)

    def _cut(self, text: str, request: Request) -> tuple[str, str]:
        """(the answer, its finish_reason)."""
        words = text.split(maxsplit=request.sampling.max_tokens)
        if not self._args.truncate or len(words) <= request.sampling.max_tokens:
            return text, "stop"
        return text.removesuffix(words[-1]), "length"

    def _note(self, request: Request) -> None:
        if self._log is not None:
            line = {
                "row": request.row,
                "request": request.request,
                "sample": request.sample,
                "pid": os.getpid(),
            }
            os.write(self._log, f"{json.dumps(line)}\n".encode())
