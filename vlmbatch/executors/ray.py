"""Workers as Ray actors, one per place with enough GPUs; the only module that imports Ray.

An actor is a Host: the same Worker as in a local subprocess, with an inbox and an outbox. The
driver has one thread per actor, which asks for what the Worker said. A Host never restarts by
itself: the driver starts another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

# Read when Ray is imported or started, and inherited by a cluster of our own.
for _name, _value in {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a call after shutdown must not start another cluster
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
import ray.exceptions  # noqa: E402
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402

from vlmbatch.environments import CACHE, Built, Environment, cache_folder  # noqa: E402
from vlmbatch.errors import RunStopped, UsageError, VlmbatchError  # noqa: E402
from vlmbatch.executors import Died, Event, Placed, Said  # noqa: E402
from vlmbatch.messages import Broken, Message, Setup, from_json, to_json  # noqa: E402
from vlmbatch.results.store import LocalStore  # noqa: E402
from vlmbatch.terminal import say  # noqa: E402

CONNECT_SECONDS = 10.0
CLOSE_SECONDS = 5.0


class RayExecutor:
    """``address``: of an existing cluster (``auto``, or host:port); None starts one for this run.

    ``environment``: what workers run in, if not in the installation of their node; it is built on
    every node that can have one.

    Connects when it is made, because ``ray.init`` puts its own handler on SIGTERM. Raises
    UsageError for a ``ray://`` address or more GPUs than any node has, RunStopped where no cluster
    answers or the environment cannot be built.
    """

    def __init__(
        self,
        *,
        address: str | None,
        workers: int | None,
        gpus_per_worker: int,
        environment: Environment | None = None,
    ) -> None:
        self.events: SimpleQueue[Event] = SimpleQueue()
        self._actors: dict[str, _Actor] = {}
        self._closed = False
        _connect(address, workers or 1)
        try:
            nodes = _gpus_of_nodes()
            self._gpus = _gpus_that_exist(gpus_per_worker, nodes)
            self._python = _python_in(environment, self._gpus) if environment else None
        except VlmbatchError:
            ray.shutdown()
            raise
        self.workers = workers or _places(nodes, self._gpus)
        """As many as asked for, else as many as the cluster's GPUs allow."""
        self._per_node = math.ceil(self.workers / max(1, len(nodes)))

    def start(self, setup: Setup) -> None:
        self._actors[setup.worker] = _Actor(
            setup, self._python, self._gpus, self._per_node, self.events
        )

    def send(self, worker: str, message: Message) -> None:
        if not self._closed:
            self._actors[worker].send(message)

    def kill(self, worker: str) -> None:
        if not self._closed:
            self._actors[worker].kill()

    def free(self) -> str:
        """What a worker asks for, and what the cluster has free."""
        asks = f"{self._gpus} GPU{'s' if self._gpus != 1 else ''}"
        with contextlib.suppress(Exception):
            nodes = _gpus_of_nodes()
            free = ray.available_resources().get("GPU", 0)
            return (
                f"each worker asks for {asks} on one node; the cluster's {len(nodes)} "
                f"node{'s have' if len(nodes) != 1 else ' has'} {_gpus(sum(nodes))}, "
                f"{free:g} of them free"
            )
        return f"each worker asks for {asks} on one node; the cluster does not answer"

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for actor in self._actors.values():
            actor.kill()
        for actor in self._actors.values():
            actor.join(CLOSE_SECONDS)
        ray.shutdown()


class _Actor:
    """The driver's side of one actor, and the thread that listens to it."""

    def __init__(
        self,
        setup: Setup,
        python: str | None,
        gpus: int,
        workers_per_node: int,
        events: SimpleQueue[Event],
    ) -> None:
        self._name = setup.worker
        self._events = events
        self._sent = 0
        kind: Any = ray.remote(Host)
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": gpus, "max_restarts": 0}
        if python is not None:  # Ray hands it to a shell
            options["runtime_env"] = {"py_executable": shlex.quote(python)}
        self._host: Any = kind.options(scheduling_strategy="SPREAD", **options).remote(
            to_json(setup), os.getcwd(), os.environ.get("OMP_NUM_THREADS"), workers_per_node
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def send(self, message: Message) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            self._host.say.remote(self._sent, to_json(message))
        self._sent += 1

    def _listen(self) -> None:
        reason = "it ended"
        try:
            self._events.put(Placed(self._name, ray.get(self._host.place.remote())))
            while said := ray.get(self._host.hear.remote()):
                for message in said:
                    self._events.put(Said(self._name, from_json(message)))
        except Exception as error:
            reason = _reason(error)
            if "No module named 'vlmbatch" in str(error):
                hint = "install the same version on every node"
                broken = Broken(f"a node of the Ray cluster lacks vlmbatch: {reason}", hint, True)
                self._events.put(Said(self._name, broken))
        self.kill()
        self._events.put(Died(self._name, reason))

    def kill(self) -> None:
        """The actor's process; its guard kills what that has started."""
        with contextlib.suppress(Exception):
            ray.kill(self._host, no_restart=True)

    def join(self, seconds: float) -> None:
        self._listener.join(seconds)


class Host:
    """Runs in the actor's process: one Worker, what it is told, and what it said.

    Its output goes to the log of the same name as a local worker's.
    """

    def __init__(
        self, setup: dict[str, Any], folder: str, threads: str | None, workers_per_node: int
    ) -> None:
        asked = from_json(setup)
        assert isinstance(asked, Setup)
        self._setup = asked
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._early: dict[int, Message] = {}
        self._heard = 0
        self._said: list[dict[str, Any]] = []
        self._news = asyncio.Event()
        self._work: asyncio.Task[None] | None = None
        guard_process_group()
        with contextlib.suppress(OSError):
            os.chdir(folder)  # relative paths mean the same as to the driver
        # Ray allows a process without CPUs of its own one thread; engines take their share.
        share = max(1, len(os.sched_getaffinity(0)) // workers_per_node)
        os.environ["OMP_NUM_THREADS"] = threads or str(share)
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        _log_to(LocalStore(asked.output).logs / f"worker-{asked.epoch:04d}-{asked.worker}.log")

    async def place(self) -> str:
        """Answers as soon as the actor has its place: the host's name."""
        return socket.gethostname()

    async def say(self, number: int, message: dict[str, Any]) -> None:
        """Put a message into the inbox; calls may overtake each other, so they are numbered."""
        self._early[number] = from_json(message)
        while self._heard in self._early:
            self._inbox.put_nowait(self._early.pop(self._heard))
            self._heard += 1

    async def hear(self) -> list[dict[str, Any]]:
        """What the Worker said since the last call, in order, at least one message; [] when it is
        over. The first call starts it. Raises what ended it unexpectedly."""
        if self._work is None:
            self._work = asyncio.create_task(self._run())
            self._work.add_done_callback(lambda _: self._news.set())
        while not self._said and not self._work.done():
            self._news.clear()
            await self._news.wait()
        said, self._said = self._said, []
        if not said:
            self._work.result()
        return said

    async def _run(self) -> None:
        from vlmbatch.worker import Worker

        try:
            worker = Worker(self._setup, self._emit)
        except VlmbatchError as error:
            self._emit(Broken(error.message, error.hint, True, error.exit_code))
            return
        await worker.run(self._inbox)

    def _emit(self, message: Message) -> None:
        self._said.append(to_json(message))
        self._news.set()


_GUARD = """
import os, select, signal, sys
group, *watched = map(int, sys.argv[1:])
if os.fork():
    os._exit(0)  # the guard is nobody's child: Ray ends the children of an actor
poll = select.poll()
try:
    for pid in watched:
        poll.register(os.pidfd_open(pid), select.POLLIN)
    poll.poll()
finally:
    os.killpg(group, signal.SIGKILL)
"""


def guard_process_group() -> None:
    """When this process or its raylet ends, however it ends, everything in its process group is
    killed: an orphaned vLLM engine keeps the GPU otherwise.

    Ray 2.60 does that by itself as long as the raylet lives; the raylet of a cluster of our own
    dies with the driver, and older versions kill only the children, or none after a SIGKILL.
    """
    with contextlib.suppress(PermissionError):
        os.setpgid(0, 0)
    if os.getpgrp() != os.getpid() or not hasattr(os, "pidfd_open"):
        return
    subprocess.run(
        [
            *(sys.executable, "-I", "-S", "-c", _GUARD),
            *map(str, (os.getpgrp(), os.getpid(), os.getppid())),
        ],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )


def _log_to(path: Path) -> None:
    """Descriptors 1 and 2 go to this log, where the node sees it."""
    with contextlib.suppress(OSError), open(path, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True
    )


def _connect(address: str | None, workers: int) -> None:
    quiet: dict[str, Any] = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    if address is None:
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            # Ray 2.59 and newer would write one to the home folder, for all later clusters.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        ray.init(address="local", include_dashboard=False, num_cpus=workers, **quiet)
        return
    if address.startswith("ray://"):
        raise UsageError(
            f"{address} is a Ray client address; the driver belongs inside the cluster",
            hint=_submit_line(address, sys.argv[1:]),
        )
    if address != "auto":
        _check_reachable(address)
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunStopped(
            f"no Ray cluster at {address}: {_one_line(str(error))}",
            hint="`ray status` on the driver's machine says what runs there. Driver and cluster "
            "need the same versions of Ray and Python, and the same token: a cluster that has one "
            "takes only drivers with RAY_AUTH_MODE=token",
        ) from None


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes, and then ends the process."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        raise UsageError(
            f"--ray-address {address!r} is no address",
            hint="give auto, or HOST:PORT as in node1:6379",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise RunStopped(
            f"no Ray cluster answers at {address} ({error})",
            hint="`ray start --head` starts one; its GCS port is 6379 unless told otherwise",
        ) from None


def _submit_line(address: str, words: list[str]) -> str:
    """The same command as a job inside the cluster."""
    host = address.removeprefix("ray://").partition(":")[0] or "HOST"
    rest = [word for word in words if not word.startswith("--ray-address=")]
    if "--ray-address" in rest:
        at = rest.index("--ray-address")
        del rest[at : at + 2]
    command = shlex.join(["vlmbatch", *rest, "--ray-address", "auto"])
    return f"ray job submit --address http://{host}:8265 -- {command}"


def _python_in(environment: Environment, gpus: int) -> str:
    """The environment's interpreter, which has the same path on every node with so many GPUs."""
    nodes = [
        node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) >= gpus
    ]
    if CACHE in os.environ:
        environment = replace(environment, cache=str(cache_folder().absolute()))
    found = _on_nodes(nodes, _look, environment)
    hosts = {there.python: there.host for there in found}
    if len(hosts) > 1:
        listed = ", ".join(f"{python} on {host}" for python, host in sorted(hosts.items()))
        raise UsageError(
            f"the environment with {environment} must have one path on all nodes, not {listed}",
            hint="install vlmbatch in the same place everywhere, and let "
            f"{CACHE} name a folder that every node has, shared or its own",
        )
    missing = [node for node, there in zip(nodes, found, strict=True) if there.built is None]
    if missing:
        where = f" on {len(missing)} of {len(nodes)} nodes" if len(nodes) > 1 else ""
        say(
            f"building an environment with {environment}{where}, once per machine "
            f"(log: {found[0].log})"
        )
        for built in _on_nodes(missing, _build, environment):
            say(f"{built}" + (f", on {built.host}" if where else f", in {found[0].folder}"))
    return str(found[0].python)


@dataclass(frozen=True, slots=True)
class _Found:
    """Of an environment, on the node where it was looked for."""

    host: str
    folder: str
    python: str
    log: str
    built: Built | None


def _look(environment: Environment) -> _Found:
    folder, python, log = map(str, (environment.folder, environment.python, environment.log))
    return _Found(socket.gethostname(), folder, python, log, environment.built())


def _build(environment: Environment) -> Built:
    return environment.ensure(logging.getLogger(__name__).info)


def _on_nodes(
    nodes: list[dict[str, Any]], function: Callable[..., Any], environment: Environment
) -> list[Any]:
    """What the function says on each of these nodes, at the same time."""
    task: Any = ray.remote(function)
    asked = [
        task.options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote(environment)
        for node in nodes
    ]
    said = []
    for node, answer in zip(nodes, asked, strict=True):
        try:
            said.append(ray.get(answer))
        except Exception as error:
            name = node["NodeManagerHostname"]
            cause = getattr(error, "cause", None)
            if isinstance(cause, VlmbatchError):
                message = f"{cause.message} (on node {name})"
                raise type(cause)(message, hint=cause.hint) from None
            raise RunStopped(
                f"node {name} cannot build an environment: {_reason(error)}",
                hint="is the same version of vlmbatch installed on every node?",
            ) from None
    return said


def _gpus_of_nodes() -> list[int]:
    """How many GPUs each living node has."""
    return [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]


def _gpus_that_exist(asked: int, nodes: list[int]) -> int:
    """What a worker can have: as many GPUs as asked for, or none where there is none at all."""
    most = max(nodes, default=0)
    if most == 0 and asked <= 1:
        return 0
    if asked > most:
        raise UsageError(
            f"--gpus-per-worker {asked}: no node of the Ray cluster has more than {_gpus(most)}",
            hint="a worker's GPUs must be on one node",
        )
    return asked


def _places(nodes: list[int], gpus_per_worker: int) -> int:
    if gpus_per_worker == 0:
        return 1
    return max(1, sum(gpus // gpus_per_worker for gpus in nodes))


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count != 1 else ''}"


def _reason(error: BaseException) -> str:
    """In one line why an actor is gone."""
    text = str(error)
    if isinstance(error, ray.exceptions.RayTaskError):
        return _one_line(repr(error.cause))
    if "killed by `ray.kill`" in text:
        return "killed by the driver"
    if "error code 2. End of file" in text:
        return "its process was killed from outside or crashed (Ray saw only that it is gone)"
    worker_exit = re.search(r"Worker exit type: (\w+) Worker exit detail: (.*)", text, re.DOTALL)
    if worker_exit:
        return _one_line(f"{worker_exit[1]}: {worker_exit[2]}")
    known = re.search(r"ModuleNotFoundError: .*|The actor is dead because.*|.*node.*", text)
    return _one_line(known[0] if known else text)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
