"""Workers as subprocesses on this machine, joined by a pipe each way: JSON lines."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO

from vlmbatch.executors import Died, Event, Placed, Said
from vlmbatch.messages import Broken, Message, Setup, from_json, to_json
from vlmbatch.results.store import reported


class LocalExecutor:
    """Each worker has a session of its own; when the driver's end of its pipe closes, however the
    driver ended, it kills its own process group."""

    def __init__(
        self,
        logs: Path,
        *,
        workers: int = 1,
        gpus: int = 0,
        gpus_per_worker: int = 1,
        share_cores: bool = True,
        python: str | None = None,
    ) -> None:
        """``share_cores``: each worker is told how many threads are its share; an engine that
        settles that for its own processes is not. ``python``: what runs a worker, else what
        runs this."""
        self.events: SimpleQueue[Event] = SimpleQueue()
        self._logs = logs
        self._python = python or sys.executable
        self._slots = gpus // gpus_per_worker
        self._gpus_per_worker = gpus_per_worker
        self._workers: dict[str, _Process] = {}
        # Several engines that each take all cores slow one another down many times, and so do
        # threads that spin while they wait.
        threads = max(1, (os.cpu_count() or 1) // workers)
        share = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        self._share = share if share_cores else {}
        self._slot_of: dict[str, int] = {}

    def start(self, setup: Setup) -> None:
        for name in [name for name, process in self._workers.items() if process.is_over]:
            self._slot_of.pop(name, None)
        environment = {**self._share, **os.environ}
        taken = set(self._slot_of.values())
        slot = next((slot for slot in range(self._slots) if slot not in taken), None)
        if slot is not None:
            self._slot_of[setup.worker] = slot
            devices = range(slot * self._gpus_per_worker, (slot + 1) * self._gpus_per_worker)
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(_device(index) for index in devices)
        process = _Process(setup, self._python, self._logs, self.events, environment)
        self._workers[setup.worker] = process
        self.events.put(Placed(setup.worker, socket.gethostname()))

    def send(self, worker: str, message: Message) -> None:
        self._workers[worker].send(message)

    def kill(self, worker: str) -> None:
        self._workers[worker].kill()

    def free(self) -> str:
        return "a worker on this machine waits for nothing"

    def close(self) -> None:
        for process in self._workers.values():
            process.kill()
        for process in self._workers.values():
            process.reap()


class _Process:
    """A worker subprocess and the thread that listens to it."""

    def __init__(
        self,
        setup: Setup,
        python: str,
        logs: Path,
        events: SimpleQueue[Event],
        environment: dict[str, str],
    ) -> None:
        self._name = setup.worker
        self._events = events
        self.log = logs / f"worker-{setup.epoch:04d}-{setup.worker}.log"
        to_worker_read, to_worker_write = os.pipe()
        to_driver_read, to_driver_write = os.pipe()
        with reported(self.log), open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [
                    python,
                    "-m",
                    "vlmbatch.executors.process",
                    str(to_worker_read),
                    str(to_driver_write),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(to_worker_read, to_driver_write),
                start_new_session=True,
                env=environment,
            )
        os.close(to_worker_read)
        os.close(to_driver_write)
        self._to_worker: BinaryIO = os.fdopen(to_worker_write, "wb", buffering=0)
        self._sending = threading.Lock()
        self._listener = threading.Thread(
            target=self._listen, args=(os.fdopen(to_driver_read, "rb"),), daemon=True
        )
        self.send(setup)
        self._listener.start()

    def send(self, message: Message) -> None:
        line = f"{json.dumps(to_json(message))}\n".encode()
        with self._sending, contextlib.suppress(OSError, ValueError):
            self._to_worker.write(line)

    def _listen(self, from_worker: BinaryIO) -> None:
        try:
            with from_worker:
                for line in from_worker:
                    if line.endswith(b"\n"):
                        self._events.put(Said(self._name, from_json(json.loads(line))))
        except (ValueError, TypeError, LookupError, AttributeError) as error:  # else waited for
            hint = "install the same version of vlmbatch anew, and run the same command again"
            broken = Broken(f"the worker said what this version cannot read: {error}", hint, True)
            self._events.put(Said(self._name, broken))
            self.kill()
        code = self._process.wait()
        self._events.put(Died(self._name, self._reason(code)))

    def _reason(self, code: int) -> str:
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exit code {code}{_last_line(self.log)}"

    @property
    def is_over(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        """The whole process group: an engine may have children of its own."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def reap(self) -> None:
        self._process.wait()
        self._listener.join(timeout=5)
        with contextlib.suppress(OSError):
            self._to_worker.close()


def _device(index: int) -> str:
    """The GPU that counts as ``index`` here, where CUDA_VISIBLE_DEVICES may have narrowed them."""
    visible = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    return visible[index] if index < len(visible) else str(index)


def _last_line(log: Path) -> str:
    """The last line of a log that says something, for a message."""
    with contextlib.suppress(OSError):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
        said = [line for line in lines[-20:] if line]
        if said:
            return f": {said[-1][:300]}"
    return ""
