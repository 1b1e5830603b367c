"""Job specs as files: YAML over its bases, ``--set``, placeholders; then one JobSpec.

``extends: base.yaml`` (relative to the file that says so) puts a spec over another one, section by
section: keys of a section win one by one, lists are replaced as a whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, tzinfo
from typing import Any

from vlmbatch.errors import UsageError
from vlmbatch.job import JobSpec, spec_from
from vlmbatch.placeholders import Address, AsGiven, BesideSpec, Filler, day_of, hide, zone_of


@dataclass(frozen=True)
class JobFile:
    """A spec as it is written, over its bases."""

    layers: tuple[tuple[str, dict[str, Any]], ...]
    """(file, its values), the first base first; the spec itself is the last."""

    @property
    def values(self) -> dict[str, Any]:
        both: dict[str, Any] = {}
        for _, values in self.layers:
            both = merged(both, values)
        return both

    def file_of(self, address: Address) -> str:
        """`` (in base.yaml)``, where what stands at this address is from a base."""
        for name, values in reversed(self.layers):
            if _holds(values, address):
                return "" if name == self.layers[-1][0] else f" (in {name})"
        return ""


def load_job(
    path: str | None,
    *,
    options: Mapping[str, Any] | None = None,
    settings: Mapping[str, str] | None = None,
    date: str | None = None,
    environment: Mapping[str, str] | None = None,
    where: str | None = None,
) -> JobSpec:
    """The job of a spec file, options over it, and ``--set`` over both.

    ``environment``: where variables are looked up; without it, ``${NAME}`` stays. Raises
    UsageError with all problems and their addresses.
    """
    where = where or path or "the command line"
    file = JobFile(() if path is None else tuple(_layers(path)))
    over = ((where, _as_given(options or {})), (where, set_keys(settings or {})))
    file = JobFile((*file.layers, *over))
    values = file.values
    if "manifest" not in values:
        raise UsageError(
            "no manifest is given", hint="vlmbatch run MANIFEST, or manifest: in a --job file"
        )
    day = day_of(date, _zone(values), datetime.now)
    filler = Filler(day, environment)
    values = filler.fill(values)
    if environment is not None:
        hide({name: environment[name] for name in filler.variables if name in environment})
    problems = [*filler.problems, *_read_schemas(values, filler)]
    spec = spec_from(values, where=where, problems=problems, origin=file.file_of)
    spec.name_variables(filler.variables)
    if path is not None and (spec.model is None or spec.output is None):
        missing = "model" if spec.model is None else "output"
        raise UsageError(f"{where} names no {missing}", hint=f"a job spec must have {missing}: ...")
    return spec


def read_job_file(path: str) -> JobFile:
    """Raises UsageError where it, or a base, is missing or no spec."""
    return JobFile(tuple(_layers(path)))


def _layers(path: str, above: tuple[str, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    values = _read(path, above[-1] if above else None)
    _beside(values, os.path.dirname(path))
    base = values.pop("extends", None)
    if base is None:
        return [(path, values)]
    if not isinstance(base, str) or not base:
        raise UsageError(f"{path}: extends is the path of one spec, such as base.yaml")
    base = os.path.join(os.path.dirname(path), base)
    chain = (*above, path)
    if os.path.realpath(base) in map(os.path.realpath, chain):
        raise UsageError(
            f"extends goes round in a circle: {' -> '.join([*chain, base])}",
            hint="take one of them out",
        )
    return [*_layers(base, chain), (path, values)]


def _read(path: str, extended_by: str | None) -> dict[str, Any]:
    """A spec's YAML as plain values."""
    import yaml

    wanted = f", which {extended_by} extends" if extended_by else ""
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file)
    except OSError as error:
        raise UsageError(f"cannot read the job spec {path}{wanted}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} is not YAML: {' '.join(str(error).split())}",
            hint="a text that begins with {, [ or * needs quotes, as in output: '{date}/captions'",
        ) from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} is not a job spec: it holds no keys", hint="see jobs/")
    return values


def _beside(values: dict[str, Any], folder: str) -> None:
    """Files that a spec names for itself are beside it, not beside the spec that extends it."""
    for task in _tasks(values):
        if isinstance(named := task.get("json_schema"), str):
            task["json_schema"] = BesideSpec(named)
            task["json_schema"].folder = folder


def _tasks(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    tasks = values.get("tasks")
    return [task for task in tasks if isinstance(task, dict)] if isinstance(tasks, list) else []


def _read_schemas(values: dict[str, Any], filler: Filler) -> list[tuple[Address, str]]:
    """Puts the objects where their files were named; what is wrong with them."""
    problems: list[tuple[Address, str]] = []
    unfilled = {address for address, _ in filler.problems}
    tasks = values.get("tasks")
    for index, task in enumerate(tasks if isinstance(tasks, list) else []):
        if not isinstance(task, dict) or not isinstance(task.get("json_schema"), str):
            continue
        address = ("tasks", index, "json_schema")
        path = task["json_schema"]
        task["json_schema"] = {}
        if address in unfilled or (filler.environment is None and "${" in path):
            continue
        try:
            task["json_schema"] = read_json_schema(path)
        except UsageError as error:
            problems.append((address, error.message))
    return problems


def read_json_schema(path: str) -> Any:
    """The object in a JSON file; whether it is a schema is seen later, with its task."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except OSError as error:
        raise UsageError(f"cannot read the JSON Schema {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} is no JSON Schema: it holds no object")
    return value


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``over``, section by section."""
    both = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(both.get(key), dict):
            both[key] = merged(both[key], value)
        else:
            both[key] = value
    return both


def set_keys(settings: Mapping[str, str]) -> dict[str, Any]:
    """``a.b=value`` pairs as nested values; each value is read as YAML."""
    import yaml

    values: dict[str, Any] = {}
    for address, text in settings.items():
        section = values
        *path, last = address.split(".")
        for step in path:
            section = section.setdefault(step, {})
            if not isinstance(section, dict):
                raise UsageError(f"--set {address}: {step!r} is set to a value already")
        try:
            section[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            section[last] = text
    return values


def _zone(values: Mapping[str, Any]) -> tzinfo:
    """A wrong one is found again, with its address, when the spec is made."""
    try:
        return zone_of(values.get("timezone"))
    except ValueError:
        return zone_of(None)


def _as_given(value: Any) -> Any:
    """Options of the command line, marked: no placeholder is looked for in them."""
    if isinstance(value, str):
        return AsGiven(value)
    if isinstance(value, Mapping):
        return {key: _as_given(item) for key, item in value.items()}
    return [_as_given(item) for item in value] if isinstance(value, list | tuple) else value


def _holds(values: Any, address: Address) -> bool:
    for step in address:
        try:
            values = values[step]
        except (LookupError, TypeError):
            return False
    return True
