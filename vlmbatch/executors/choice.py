"""Which executor a job takes, and how many workers."""

from __future__ import annotations

import os
from pathlib import Path
from queue import SimpleQueue

from vlmbatch.environments import Environment
from vlmbatch.errors import UsageError
from vlmbatch.executors import Event, Executor
from vlmbatch.families import entry_named
from vlmbatch.job import JobSpec
from vlmbatch.messages import Message, Setup
from vlmbatch.results.store import LocalStore
from vlmbatch.terminal import say


def choose_executor(job: JobSpec, rows: int) -> tuple[str, int]:
    """(local or ray, how many workers for so many rows)."""
    workers = job.workers or (
        max(1, usable_gpus() // job.gpus_per_worker) if _takes_gpus(job) else 1
    )
    name = job.executor
    if name == "auto":
        name = "ray" if workers > 1 or job.ray_address or environment_of(job) else "local"
    return name, max(1, min(workers, rows))


def environment_of(job: JobSpec) -> Environment | None:
    """Where the workers run, if the model's own code needs other versions than are installed."""
    if job.engine.name != "transformers" or job.family is None:
        return None
    requirements = entry_named(job.family).requirements
    return Environment(requirements) if requirements else None


def _takes_gpus(job: JobSpec) -> bool:
    """A worker that asks an endpoint leaves the GPUs to the endpoint."""
    return job.engine.name != "openai"


def check_executor(job: JobSpec) -> None:
    """Raises UsageError for settings that exclude each other."""
    if job.executor == "local" and job.ray_address:
        raise UsageError(
            "--ray-address is given, and --executor local does not use Ray",
            hint="leave one of the two out",
        )
    here = usable_gpus()
    if job.gpus_per_worker > max(1, here) and not job.ray_address:
        raise UsageError(
            f"--gpus-per-worker {job.gpus_per_worker}: this machine has {here} usable "
            f"GPU{'s' if here != 1 else ''}",
            hint="a worker's GPUs are on one node: --ray-address names a cluster that has such "
            "nodes, CUDA_VISIBLE_DEVICES says which GPUs are usable",
        )


def usable_gpus() -> int:
    """How many GPUs a worker could take here; none where there is no NVIDIA driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def make_executor(
    name: str, job: JobSpec, store: LocalStore, workers: int, rows: int
) -> tuple[Executor, int]:
    """The executor, and how many workers it is to start: a cluster knows its own GPUs.

    Builds the environment that the model's own code needs, if it needs one.
    """
    environment = environment_of(job)
    if environment is not None:
        family = entry_named(job.family or "").name
        say(f"executor {name}: family {family} needs {environment}, in an environment of its own")
    if name == "local":
        from vlmbatch.executors.local import LocalExecutor

        local = LocalExecutor(
            store.logs,
            workers=workers,
            gpus=usable_gpus() if _takes_gpus(job) else 0,
            gpus_per_worker=job.gpus_per_worker,
            share_cores=job.engine.name != "vllm",
            python=environment.ensure(say).python if environment else None,
        )
        return local, workers
    try:
        from vlmbatch.executors.ray import RayExecutor
    except ImportError as error:
        raise UsageError(f"Ray cannot be imported ({error})", hint="pip install vlmbatch") from None
    cluster = RayExecutor(
        address=job.ray_address,
        workers=None if job.ray_address and job.workers is None else workers,
        gpus_per_worker=job.gpus_per_worker if _takes_gpus(job) else 0,
        environment=environment,
    )
    return cluster, min(cluster.workers, rows)


class NoWorkers:
    """The executor of a run with nothing to do."""

    def __init__(self) -> None:
        self.events: SimpleQueue[Event] = SimpleQueue()

    def start(self, setup: Setup) -> None:
        raise AssertionError("nothing to do")

    def send(self, worker: str, message: Message) -> None: ...

    def kill(self, worker: str) -> None: ...

    def free(self) -> str:
        return ""

    def close(self) -> None: ...
