"""From the options of `run` to a JobSpec."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vlmbatch.cli.values import split_words, text_of
from vlmbatch.errors import UsageError

if TYPE_CHECKING:
    from vlmbatch.job import JobSpec

ENGINE_OPTIONS = {"name": "engine", "args": "engine_args"}
"""Keys of the engine section whose options have other names."""


def job_from_options(options: dict[str, Any]) -> JobSpec:
    """The spec that these options describe, over that of --job: only what was given is set."""
    from vlmbatch.job_file import load_job

    given = {key: value for key, value in options.items() if value not in (None, (), {}, [])}
    if "date" in given and "job_file" not in given:
        raise UsageError("--date is for the {date} of a job spec", hint="add --job FILE")
    return load_job(
        given.get("job_file"),
        options=_values(given),
        settings=given.get("settings"),
        date=given.get("date"),
        environment=os.environ,
    )


def _values(given: dict[str, Any]) -> dict[str, Any]:
    from vlmbatch.job import EngineSpec, SamplingSpec

    values: dict[str, Any] = {
        key: given[key]
        for key in (
            *("output", "model", "revision", "columns", "limit", "family", "box_space", "workers"),
            *("gpus_per_worker", "executor", "ray_address", "checkpoint_rows", "part_rows"),
            *("max_failure_rate", "image_memory", "max_image_pixels", "max_image_bytes"),
            *("fetch_concurrency", "fetch_timeout", "allow_private_hosts"),
            *("start_timeout", "stall_timeout", "trust_remote_code", "notify_url"),
            *("incremental", "detect_changes", "max_attempts"),
        )
        if key in given
    }
    for key in ("manifest", "carry", "include", "exclude", "allow_roots"):
        if key in given:
            values[key] = list(given[key])
    if "system" in given:
        values["system"] = text_of(given["system"])
    engine = {name: name for name in EngineSpec.model_fields} | ENGINE_OPTIONS
    sampling = {name: name for name in SamplingSpec.model_fields}
    for section, names in (("engine", engine), ("sampling", sampling)):
        chosen = {ours: given[theirs] for ours, theirs in names.items() if theirs in given}
        if chosen:
            values[section] = chosen
    tasks = _tasks(given)
    if tasks:
        values["tasks"] = tasks
    return values


def _tasks(given: dict[str, Any]) -> list[dict[str, Any]]:
    from vlmbatch.job_file import read_json_schema

    asked = list(given.get("tasks", ()))
    per_task: dict[str, tuple[str, str, Callable[[str], Any]]] = {
        "prompts": ("--prompt", "prompt", text_of),
        "json_schemas": ("--json-schema", "json_schema", read_json_schema),
        "choices": ("--choices", "choices", split_words),
        "regexes": ("--regex", "regex", str),
    }
    names = asked
    if not names and any(key in given for key in (*per_task, "style")):
        names = ["caption"]
    specs: dict[str, dict[str, Any]] = {name: {} for name in names}
    for option, (flag, key, read) in per_task.items():
        for value in given.get(option, ()):
            task, text = _of_task(flag, value, asked)
            if task not in specs:
                raise UsageError(
                    f"{flag} is for a task {task!r} that is not asked", hint=f"add -t {task}"
                )
            specs[task][key] = read(text)
    wording = {
        "caption": ("style",),
        "vqa": ("question",),
        "ground": ("phrase",),
        "detect": ("labels",),
    }
    for task, keys in wording.items():
        for key in keys:
            if key in given and task not in names:
                raise UsageError(f"--{key} is for -t {task}, which is not asked")
    return [
        {
            "name": name,
            **specs[name],
            **{key: given[key] for key in wording.get(name, ()) if key in given},
        }
        for name in names
    ]


def _of_task(flag: str, value: str, names: list[str]) -> tuple[str, str]:
    """(task, text) of an option; without TASK= it is for the only task."""
    task, equals, text = value.partition("=")
    if equals and task in names:
        return task, text
    if equals and task.isidentifier() and not names:
        return task, text
    if len(names) > 1:
        raise UsageError(
            f"{flag} {value[:40]!r} does not say which task it is for",
            hint=f"write TASK={value[:40]} with one of: {', '.join(names)}",
        )
    return (names[0] if names else "caption"), value
