"""run.json: the resolved job of an output, from which workers, resumes and status read."""

from __future__ import annotations

import secrets
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vlmbatch import __version__
from vlmbatch.errors import RunStopped
from vlmbatch.job import JobSpec
from vlmbatch.results.store import LocalStore


@dataclass(frozen=True, slots=True)
class RunFile:
    """What is fixed for a run (``run`` to ``read``), and what the newest driver start set."""

    run: str
    """Random hex, made when the output is made or overwritten."""
    created: str
    part_rows: int
    manifest: dict[str, Any]
    """The listing: Manifest.to_json()."""
    ask: dict[str, Any]
    """What the model was given; another ask refuses the resume."""
    read: dict[str, Any]
    """How answers are read; another way of reading refuses the resume too. ``reparse`` sets it."""
    model: dict[str, Any]
    """label, path, revision, config of the resolved model."""
    job: dict[str, Any]
    """The resolved JobSpec of the newest start."""
    epoch: int
    """Driver starts so far."""
    versions: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    rereading: bool = False
    """A ``reparse`` has begun and not ended: some answers are read as ``read`` says, some not."""

    @property
    def spec(self) -> JobSpec:
        return JobSpec.model_validate(self.job)

    def started_again(self, **changed: Any) -> RunFile:
        return replace(self, versions={"vlmbatch": __version__}, **changed)


def new_run_id() -> str:
    return secrets.token_hex(4)


def now() -> str:
    """UTC, to the second, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def read_run_file(store: LocalStore) -> RunFile | None:
    """None where the folder has no run.json (yet)."""
    value = store.read_json(store.ours / "run.json")
    if value is None:
        return None
    try:
        known = {name: value[name] for name in RunFile.__slots__ if name in value}
        run_file = RunFile(**known)
        run_file.spec  # noqa: B018  parses
    except (TypeError, ValueError):
        raise RunStopped(
            f"{store.ours / 'run.json'} was not written by this version of vlmbatch",
            hint="go on with the version of vlmbatch that wrote it, or give another -o",
        ) from None
    return run_file


def write_run_file(store: LocalStore, run_file: RunFile) -> None:
    store.write_json(store.ours / "run.json", asdict(run_file))
