"""From a job spec to the file that starts it: facts about the spec, put into a template each."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from vlmbatch import __version__
from vlmbatch.errors import UsageError
from vlmbatch.job import JobSpec
from vlmbatch.job_file import load_job, read_job_file
from vlmbatch.placeholders import zone_of
from vlmbatch.schedule import TARGETS
from vlmbatch.storage import EXTRAS, is_local, scheme_of
from vlmbatch.templates import template

IMAGE = f"registry.example.com/vlmbatch:{__version__}"
"""Stands for a container image of one's own; vlmbatch publishes none."""
GPUS_PER_NODE = 8
ON_RAY = ["--executor", "ray", "--ray-address"]


@dataclass(frozen=True)
class Nightly:
    """A job spec that is started once a day."""

    path: str
    """Absolute."""
    folder: str
    """Where it is started, absolute: relative paths of the spec start there."""
    hour: int
    minute: int
    image: str
    spec: JobSpec
    written: dict[str, Any]
    """The spec as it is written, over its bases; variables and dates stand in it as they are."""

    @property
    def name(self) -> str:
        """As a Kubernetes object may be called: at most 40 of a-z, 0-9 and -."""
        stem = re.sub(r"[^a-z0-9]+", "-", Path(self.path).stem.lower()).strip("-")[:40].strip("-")
        return stem or "job"

    @property
    def timezone(self) -> str:
        return self.spec.timezone or "UTC"

    @property
    def secrets(self) -> list[str]:
        """Variables that the run needs: those that the spec names, and the endpoint's key."""
        names = set(self.spec.variables)
        if self.spec.engine.base_url is not None:
            names.add(self.spec.engine.api_key_env)
        return sorted(names)

    @property
    def uses_gpus(self) -> bool:
        engine = self.spec.engine
        remote = engine.name in ("openai", "echo") or engine.base_url is not None
        return not remote and self.spec.model != "demo"

    @property
    def workers(self) -> int:
        return self.spec.workers or 1

    @property
    def gpus(self) -> int:
        """Of the whole job."""
        return self.workers * self.spec.gpus_per_worker if self.uses_gpus else 0

    @property
    def local_places(self) -> list[str]:
        """Paths that the spec names on the local disk: a container must have them mounted."""
        places = [*self.spec.manifest, self.spec.output or ""]
        return [place for place in places if place and is_local(place) and place[:2] != "${"]

    @property
    def yaml(self) -> str:
        """The spec in one piece, for where its bases and schemas are not."""
        return yaml.safe_dump(self.written, sort_keys=False, allow_unicode=True, width=1000)

    @property
    def utc(self) -> tuple[int, int]:
        """Hour and minute in UTC, as the zone is today."""
        now = datetime.now(zone_of(self.spec.timezone))
        at = now.replace(hour=self.hour, minute=self.minute).astimezone(UTC)
        return at.hour, at.minute

    def command(self, *more: str) -> list[str]:
        """Absolute, so that it means the same from everywhere."""
        return [sys.executable, "-m", "vlmbatch", "run", "--job", self.path, *more]


def schedule(path: str, target: str, *, at: str = "02:30", image: str = IMAGE) -> str:
    """What starts the spec every night at ``at`` (in the spec's time zone), as a text to keep.

    Variables need not be set here. Raises UsageError for a spec that would not run.
    """
    if target not in TARGETS:
        raise UsageError(f"no schedule for {target!r}", hint=f"known: {', '.join(TARGETS)}")
    match = re.fullmatch(r"([01]?[0-9]|2[0-3]):([0-5][0-9])", at)
    if match is None:
        raise UsageError(f"--at {at}: expected a time of the day such as 02:30")
    spec = load_job(path, environment=None)
    written = read_job_file(path).values
    tasks = written.get("tasks")
    for task, read in zip(tasks if isinstance(tasks, list) else [], spec.tasks, strict=False):
        if isinstance(task, dict) and isinstance(task.get("json_schema"), str):
            named = str(task["json_schema"])  # a place that is only known at night stays a place
            task["json_schema"] = named if "{" in named else read.json_schema
    full, folder = os.path.abspath(path), os.getcwd()
    for place in (full, folder, image):
        if re.search(r"[\x00-\x1f]", place):
            raise UsageError(f"{place!r} has a line break or the like in it", hint="rename it")
    job = Nightly(full, folder, int(match[1]), int(match[2]), image, spec, written)
    for name in job.secrets:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UsageError(f"{name!r} is no name for a variable @ engine.api_key_env")
    return _WRITERS[target](job)


def _rendered(name: str, job: Nightly, **more: Any) -> str:
    return template(f"schedule/{name}").render(
        job=job,
        cron=f"{job.minute} {job.hour} * * *",
        environment_file=os.path.join(job.folder, f"{job.name}.env"),
        shell=shlex.quote,
        words=shlex.join,
        json=lambda value: json.dumps(value, ensure_ascii=False),
        python=repr,
        indent=_indented,
        **more,
    )


def _cron(job: Nightly) -> str:
    lock, log, secrets = (
        os.path.join(job.folder, f"{job.name}.{e}") for e in ("lock", "log", "env")
    )
    steps = [f"cd {shlex.quote(job.folder)}"]
    if job.secrets:
        steps += ["set -a", f". {shlex.quote(secrets)}", "set +a"]
    run = shlex.join(["flock", "-n", lock, *job.command()])
    steps.append(f"{run} >> {shlex.quote(log)} 2>&1")
    said = shlex.quote(f"vlmbatch {job.name}: exit code")
    line = f"{' && '.join(steps)} || echo {said} $?, {shlex.quote(f'see {log}')}"
    return _rendered("cron", job, line=_cron_line(line))


def _cron_line(text: str) -> str:
    """To cron a % is the end of the command."""
    return text.replace("\\", "\\\\").replace("%", r"\%")


def _systemd(job: Nightly) -> str:
    command = " ".join(_systemd_word(word) for word in job.command())
    return _rendered("systemd", job, command=command, path=lambda path: path.replace("%", "%%"))


def _systemd_word(text: str) -> str:
    """A word of a command line in a unit file."""
    text = text.replace("%", "%%").replace("$", "$$")
    if re.fullmatch(r"[\w@%+=:,./$-]+", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _kubernetes(job: Nightly) -> str:
    command = ["vlmbatch", "run", "--job", f"/etc/vlmbatch/{job.name}.yaml"]
    container = _rendered("container", job, container="vlmbatch", command=command, gpus=job.gpus)
    return _rendered("kubernetes", job, container=container, **_pieces(job))


def _kuberay(job: Nightly) -> str:
    words = ["vlmbatch", "run", "--job", f"/etc/vlmbatch/{job.name}.yaml"]
    gpus = job.spec.gpus_per_worker if job.uses_gpus else 0
    return _rendered(
        "kuberay",
        job,
        entrypoint=shlex.join([*words, *ON_RAY, "auto"]),
        head=_rendered("container", job, container="ray-head", command=None, gpus=0),
        worker=_rendered("container", job, container="ray-worker", command=None, gpus=gpus),
        ray_version=version("ray"),
        **_pieces(job),
    )


def _pieces(job: Nightly) -> dict[str, str]:
    return {
        "notes": _rendered("container_notes", job).rstrip("\n"),
        "volumes": _rendered("volumes", job),
        "config": _rendered("container_spec", job).rstrip("\n"),
    }


def _slurm(job: Nightly) -> str:
    return _rendered(
        "slurm",
        job,
        nodes=max(1, math.ceil(job.gpus / GPUS_PER_NODE)),
        gpus_per_node=min(job.gpus, GPUS_PER_NODE),
        ray=[sys.executable, "-m", "ray.scripts.scripts"],
        command=[*job.command(), *ON_RAY],
    )


def _airflow(job: Nightly) -> str:
    return _rendered("airflow", job, command=job.command())


def _actions(job: Nightly) -> str:
    hour, minute = job.utc
    inside = os.path.relpath(job.path, job.folder)
    return _rendered(
        "actions",
        job,
        in_repository=job.path if inside.startswith("..") else inside,
        cron_utc=f"{minute} {hour} * * *",
        package=f"vlmbatch[{','.join(_extras(job))}]=={__version__}",
    )


def _extras(job: Nightly) -> list[str]:
    """Of this package: what the stores and the engine of the spec need."""
    places = [scheme_of(place) for place in (*job.spec.manifest, job.spec.output or "")]
    found = {EXTRAS[scheme] for scheme in places if scheme in EXTRAS}
    engine = "openai" if job.spec.engine.base_url else job.spec.engine.name
    found.add({"vllm": "vllm", "openai": "openai"}.get(engine, "transformers"))
    return sorted(found)


def _indented(text: str, spaces: int) -> str:
    return "\n".join(" " * spaces + line if line else "" for line in text.rstrip("\n").split("\n"))


_WRITERS: dict[str, Callable[[Nightly], str]] = {
    "cron": _cron,
    "systemd": _systemd,
    "kubernetes": _kubernetes,
    "kuberay": _kuberay,
    "slurm": _slurm,
    "airflow": _airflow,
    "actions": _actions,
}
