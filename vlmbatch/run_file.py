"""run.json: the resolved job of an output, from which workers, resumes and status read."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vlmbatch import __version__
from vlmbatch.errors import RunStopped
from vlmbatch.job import JobSpec
from vlmbatch.placeholders import PLACES, by_name, by_value, values_of
from vlmbatch.results.store import RUN_FILE, Store

INCREMENTAL = "grows by --incremental"
"""Stands in ``ask`` for the identity of the manifest."""


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
    variables: list[str] = field(default_factory=list)
    """Environment variables that the job's spec names; in run.json ``${NAME}`` stands for what
    they hold, and whoever reads it looks in its own environment."""
    rereading: bool = False
    """A ``reparse`` has begun and not ended: some answers are read as ``read`` says, some not."""
    generation: int | None = None
    """Of an incremental run: what the newest start has to do; None where there was nothing."""

    @property
    def is_incremental(self) -> bool:
        return bool(self.ask.get("manifest") == INCREMENTAL)

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


def read_run_file(store: Store) -> RunFile | None:
    """None where the folder has no run.json (yet)."""
    value = store.read_json(RUN_FILE)
    if value is None:
        return None
    try:
        known = {name: value[name] for name in RunFile.__slots__ if name in value}
        held = values_of(known.get("variables", []))
        known = _with_places(known, lambda text: by_value(text, held))
        run_file = RunFile(**known)
        run_file.spec  # noqa: B018  parses
    except (TypeError, ValueError):
        raise RunStopped(
            f"{store.at(RUN_FILE)} was not written by this version of vlmbatch",
            hint="go on with the version of vlmbatch that wrote it, or give another -o",
        ) from None
    return run_file


def write_run_file(store: Store, run_file: RunFile) -> None:
    held = values_of(run_file.variables)
    store.write_json(RUN_FILE, _with_places(asdict(run_file), lambda text: by_name(text, held)))


def _with_places(value: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """With every text changed that may hold what a variable of the spec holds."""
    if not value.get("variables"):
        return value
    manifest, model = value["manifest"], value["model"]
    files = [{**file, "name": change(file["name"])} for file in manifest["files"]]
    manifest = {**manifest, "folder": change(manifest["folder"]), "files": files}
    if answers := manifest.get("answers"):
        manifest["answers"] = {**answers, "place": change(answers["place"])}
    model = {**model, "path": change(model["path"])}
    warnings = [change(warning) for warning in value.get("warnings", [])]
    job = _in_places(value["job"], change)
    return {**value, "manifest": manifest, "model": model, "job": job, "warnings": warnings}


def _in_places(value: Any, change: Callable[[str], str], key: tuple[str, ...] = ()) -> Any:
    if isinstance(value, dict):
        return {name: _in_places(item, change, (*key, name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_in_places(item, change, key) for item in value]
    return change(value) if isinstance(value, str) and key in PLACES else value
