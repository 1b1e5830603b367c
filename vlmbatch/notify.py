"""--notify-url: how a run ended, posted as JSON to whoever wants to know.

The address is a secret (whoever has it can post): it is stored nowhere, and messages show its
scheme and host alone. Whether it can be posted changes nothing of the run.
"""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit, urlunsplit

from vlmbatch import __version__
from vlmbatch.errors import VlmbatchError
from vlmbatch.run_file import now
from vlmbatch.storage import without_secrets
from vlmbatch.summary import INTERRUPTED, Summary
from vlmbatch.terminal import say

SECONDS = 10.0
"""For one try, all in all."""
WAITS = (1.0, 3.0)
"""Seconds before the second and the third try."""


@dataclass(slots=True)
class Ending:
    """What is known of the command that ends; it fills this in as it goes."""

    event: str
    """run or retry."""
    url: str | None
    output: str
    summary: Summary | None = None


@contextmanager
def notified(event: str, url: str | None, output: str) -> Iterator[Ending]:
    """However the block ends, that is posted: the summary, or the error that goes on its way."""
    ending = Ending(event, url, output)
    error: BaseException | None = None
    try:
        yield ending
    except BaseException as raised:
        error = raised
        raise
    finally:
        if ending.url is not None:
            post(ending.url, news(ending, error))


def news(ending: Ending, error: BaseException | None) -> dict[str, Any]:
    """What is posted. ``text`` is a line that says it all, as chat services show it."""
    event, summary = ending.event, ending.summary
    output = without_secrets(ending.output)
    if error is not None:
        code = _exit_code(error)
        state = {INTERRUPTED: "interrupted", 2: "refused"}.get(code, "stopped")
        reason = error.message if isinstance(error, VlmbatchError) else _words(error)
        said = f"{state}: {reason}" if reason else state
    else:
        assert summary is not None
        code, state, reason = summary.exit_code, summary.state, summary.reason
        said = summary.as_text().partition("\n")[0]
    host = socket.gethostname()
    return {
        "text": f"vlmbatch {event} {' '.join(said.split())} -> {output} ({host})",
        "event": event,
        "output": output,
        "host": host,
        "ended": now(),
        "exit_code": code,
        "state": state,
        "reason": reason,
        "summary": None if summary is None else summary.to_json(),
    }


def _exit_code(error: BaseException) -> int:
    """What the command ends with."""
    if isinstance(error, VlmbatchError):
        return error.exit_code
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


def _words(error: BaseException) -> str:
    return "" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__


def post(
    url: str,
    value: dict[str, Any],
    *,
    seconds: float = SECONDS,
    waits: Sequence[float] = WAITS,
) -> None:
    """Three tries of so many seconds each; then a warning, and never an error."""
    body = json.dumps(value).encode()
    why = ""
    try:
        for wait in (0.0, *waits):
            time.sleep(wait)
            why = _why_not(url, body, seconds)
            if not why:
                return
    except KeyboardInterrupt:
        why = "interrupted"
    parts = urlsplit(url)
    say(
        f"Warning: how this ended could not be posted to {parts.scheme}://{parts.hostname} "
        f"(--notify-url): {why}"
    )


def _why_not(url: str, body: bytes, seconds: float) -> str:
    """Empty where it was taken.

    In a thread, which is left alone when its time is over: the library's own timeout is for one
    packet, and a name may take longer still.
    """
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(_send(url, body, seconds)), daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else _no_answer(seconds)


def _no_answer(seconds: float) -> str:
    return f"no answer within {seconds:g} s"


def _send(url: str, body: bytes, seconds: float) -> str:
    """One request. No text of the library's goes on: it may quote the address."""
    address, user = _without_user(url)
    headers = {"Content-Type": "application/json", "User-Agent": f"vlmbatch/{__version__}", **user}
    request = urllib.request.Request(address, body, headers, method="POST")
    opener = urllib.request.build_opener(_NoRedirects)
    try:
        with opener.open(request, timeout=seconds):
            return ""
    except HTTPError as error:
        error.close()
        return f"it answered {error.code}"
    except TimeoutError:
        return _no_answer(seconds)
    except URLError as error:
        reason = error.reason
        if isinstance(reason, TimeoutError):
            return _no_answer(seconds)
        said = reason.strerror if isinstance(reason, OSError) else None
        return said or type(reason).__name__
    except Exception as error:
        return type(error).__name__


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive as a GET without its body, or somewhere else."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _without_user(url: str) -> tuple[str, dict[str, str]]:
    """(the address without user:password@, the header that says them)."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, {}
    token = base64.b64encode(unquote(user).encode()).decode()
    return urlunsplit(parts._replace(netloc=host)), {"Authorization": f"Basic {token}"}
