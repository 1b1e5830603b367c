"""Server processes on loopback that end with the test, whatever becomes of it."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

WAIT = 200.0
"""Seconds until a server must be ready; it takes 1 to 5."""


class ServerProcess:
    """A server of objects on ``port``; killed with the block, and with the process that started it.
    The others of this class tell what it speaks."""

    scheme: str
    port: int

    def __init__(
        self,
        words: Sequence[str],
        *,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        sockets: Sequence[Path] = (),
    ) -> None:
        self._log = folder / "server.log"
        self._sockets = sockets
        self._names = map("bucket-{}".format, itertools.count(1))
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                words,
                cwd=folder,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_parent,
            )

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # its data is thrown away, and SIGTERM takes SeaweedFS 25 s
        self._process.wait()
        for path in self._sockets:
            path.unlink(missing_ok=True)

    @property
    def pid(self) -> int:
        return self._process.pid

    def make(self, bucket: str) -> None:
        raise NotImplementedError

    def works(self) -> bool:
        raise NotImplementedError

    def new_bucket(self) -> str:
        """The name of a bucket that nobody else uses."""
        bucket = next(self._names)
        self.make(bucket)
        return bucket

    def wait_until_ready(self) -> bool:
        """Whether it lists, stores and gives back; False where it ended, as it does when another
        process took one of its ports first."""
        deadline = time.monotonic() + WAIT
        while self._process.poll() is None:
            if _listens(self.port) and self.works():
                return True
            assert time.monotonic() < deadline, f"not ready in {WAIT} s:\n{self.log()}"
            time.sleep(0.02)
        return False

    def log(self) -> str:
        """The end of what it said."""
        return self._log.read_text(errors="replace")[-3000:]


Server = TypeVar("Server", bound=ServerProcess)


def ready(start: Callable[[], Server]) -> Server:
    for _ in range(3):
        server = start()
        try:
            if server.wait_until_ready():
                return server
        except BaseException:
            server.__exit__()
            raise
    raise AssertionError(f"it ended at its start, three times:\n{server.log()}")


def free_ports(count: int) -> list[int]:
    """Ports of loopback that were free a moment ago."""
    with contextlib.ExitStack() as open_sockets:
        made = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in made:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in made]


def set_variables(variables: Mapping[str, str | None]) -> None:
    """In this process's environment; None takes one out."""
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _listens(port: int) -> bool:
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
