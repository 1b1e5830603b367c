"""From what the user said to what will run: tasks, columns, model, family, fingerprint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from os import environ
from typing import Any

import pyarrow as pa

from vlmbatch.engines import asked_args, check_args
from vlmbatch.errors import ManifestError, UsageError
from vlmbatch.families import Family, family_for
from vlmbatch.job import JobSpec, TaskSpec
from vlmbatch.manifest import Columns, Manifest
from vlmbatch.manifest.columns import ASKED, choose_columns
from vlmbatch.models import ModelNotFound, resolve_model
from vlmbatch.records import Sampling
from vlmbatch.results.schema import RESULT_SCHEMA, SCHEMA_VERSION, result_schema
from vlmbatch.run_file import RunFile
from vlmbatch.tasks import Task, make_task

DEFAULT_MODEL = "HuggingFaceTB/SmolVLM-500M-Instruct"
DEMO_ROWS = 1000
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Asking:
    """All that a worker needs to know about what is asked, besides the engine."""

    tasks: tuple[Task, ...]
    family: Family
    columns: Columns
    carried: tuple[str, ...]
    schema: pa.Schema
    system: str | None
    sampling: Sampling


@dataclass(frozen=True)
class Resolved:
    """A job with nothing left open."""

    job: JobSpec
    model: dict[str, Any]
    ask: dict[str, Any]
    read: dict[str, Any]
    warnings: list[str]


def asking_of(job: JobSpec, manifest: Manifest, config: Mapping[str, Any]) -> Asking:
    """Raises UsageError or ManifestError for a task, template or column that does not fit."""
    tasks = tuple(make_task(spec) for spec in job.tasks)
    _no_task_twice(tasks)
    where = manifest.files[0].name if len(manifest.files) == 1 else manifest.folder
    carried = _carried(job.carry, manifest.schema, job.columns)
    wanted = [*carried, *_template_columns(tasks, job, manifest.schema)]
    if job.engine.name == "echo" and "reply_from" in job.engine.args:
        wanted.append(job.engine.args["reply_from"])
        if wanted[-1] == job.columns.get("image", "image"):
            raise UsageError("--engine-arg reply_from names the images; name a column of texts")
    columns = choose_columns(manifest.schema, job.columns, wanted, where=where)
    for task in tasks:
        _check_asked(task.spec, columns, where)
    sampling = job.sampling
    return Asking(
        tasks,
        family_for(config, job.family),
        columns,
        tuple(carried),
        result_schema([manifest.schema.field(name) for name in carried]),
        job.system,
        Sampling(sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.seed),
    )


def resolve(job: JobSpec, manifest: Manifest, stored: RunFile | None) -> Resolved:
    """Fill in what the user left open; from ``stored`` where an earlier start decided it."""
    warnings: list[str] = []
    if stored is not None:
        job = _as_before(job, stored)
    job = job.model_copy(update={"tasks": job.tasks or _default_tasks(job, manifest)})
    pinned = "revision" in job.model_fields_set and _COMMIT.fullmatch(job.revision or "")
    job, model = _with_engine_and_model(job, manifest, fresh=stored is None, warnings=warnings)
    check_args(job.engine)
    if job.engine.name == "transformers" and job.gpus_per_worker > 1:
        raise UsageError(
            "the transformers engine puts a model on one GPU",
            hint="leave --gpus-per-worker out, and give --workers instead",
        )
    asking = asking_of(job, manifest, model["config"])
    job = job.model_copy(update={"family": asking.family.name})
    if job.trust_remote_code and model["hub"] and not pinned:
        raise UsageError(
            "--trust-remote-code runs code from the Hub, and no --revision pins it to a commit",
            hint=f"after reading that code, pin it: --revision {model['revision']}",
        )
    return Resolved(job, model, _ask(job, manifest, model), _read(asking), warnings)


def _as_before(job: JobSpec, stored: RunFile) -> JobSpec:
    """What was resolved automatically stays as it was, unless it is given explicitly now."""
    before, given = stored.spec, job.model_fields_set
    changes: dict[str, Any] = {}
    if "model" not in given:
        changes["model"] = before.model
        if "revision" not in given:
            changes["revision"] = before.revision
    elif job.model == before.model and "revision" not in given:
        changes["revision"] = before.revision
    if "family" not in given and changes.get("model", job.model) == before.model:
        changes["family"] = before.family
    engine = {
        name: getattr(before.engine, name)
        for name in ("name", "dtype")
        if getattr(job.engine, name) == "auto"
    }
    if before.engine.name == "echo" and "model" in given:  # a model's answers are wanted now
        engine.pop("name", None)
    changes["engine"] = job.engine.model_copy(update=engine)
    if "part_rows" in given and job.part_rows != stored.part_rows:
        raise UsageError(
            f"this output has {stored.part_rows} rows per part; that is fixed at its start",
            hint="leave --part-rows out, or give another -o",
        )
    changes["part_rows"] = stored.part_rows
    return job.model_copy(update=changes)


def _default_tasks(job: JobSpec, manifest: Manifest) -> list[TaskSpec]:
    asked = [name for name in ASKED if job.columns.get(name, name) in manifest.schema.names]
    if asked:
        raise UsageError(
            f"the manifest has a column {asked[0]!r}: say what to ask",
            hint="give -t vqa, -t ground, -t detect or -t caption",
        )
    return [TaskSpec(name="caption")]


def _with_engine_and_model(
    job: JobSpec, manifest: Manifest, *, fresh: bool, warnings: list[str]
) -> tuple[JobSpec, dict[str, Any]]:
    if job.engine.name == "echo":
        model = {"label": "echo", "path": "", "revision": "", "config": {}, "hub": False}
        if job.model is not None:  # its family is wanted, not the model itself
            try:
                model["config"] = resolve_model(job.model, job.revision).config
            except ModelNotFound as error:
                warnings.append(f"{error.message}; the echo engine asks as for any model")
        return job, model
    name, fallback = job.model or environ.get("VLMBATCH_MODEL"), False
    if not name:
        name, fallback = DEFAULT_MODEL, fresh and job.ray_address is None
    try:
        found = resolve_model(name, job.revision)
    except ModelNotFound as error:
        if not fallback:
            raise
        rows = min(manifest.rows, job.limit or manifest.rows)
        if rows > DEMO_ROWS:
            raise UsageError(
                f"{error.message}, and the bundled demo model stands in for at most "
                f"{DEMO_ROWS:,} rows (these are {rows:,})",
                hint="name a model with -m: a Hub id, a local folder, or demo",
            ) from None
        warnings.append(
            f"{DEFAULT_MODEL} cannot be found here, so the bundled demo model answers: it knows "
            "only simple coloured shapes. Name a model with -m"
        )
        name = "demo"
        found = resolve_model(name, None)
    engine = job.engine
    if engine.name == "auto":
        if find_spec("torch") is None or find_spec("transformers") is None:
            raise UsageError(
                "no engine is installed that can run a model",
                hint="pip install 'vlmbatch[transformers]', or --engine echo to try the pipeline",
            )
        engine = engine.model_copy(update={"name": "transformers"})
    model = {
        "label": found.label,
        "path": found.path,
        "revision": found.revision,
        "config": dict(found.config),
        "hub": not found.is_local,
    }
    revision = None if found.is_local else found.revision
    return job.model_copy(update={"model": name, "revision": revision, "engine": engine}), model


def _ask(job: JobSpec, manifest: Manifest, model: Mapping[str, Any]) -> dict[str, Any]:
    """What the model is given. A resume with any difference is refused, field by field."""
    ask: dict[str, Any] = {
        "manifest": manifest.identity,
        "columns": dict(sorted(job.columns.items())),
        "carry": sorted(job.carry),
        "system": job.system,
        "model": f"{model['label']} {model['revision']}".strip(),
        "engine": job.engine.name,
        "engine.args": asked_args(job.engine),
        "dtype": job.engine.dtype,
        "max_image_pixels": job.max_image_pixels,
        "max_image_bytes": job.max_image_bytes,
    }
    for task in job.tasks:
        for key, value in task.model_dump().items():
            if key != "name":
                ask[f"tasks.{task.name}.{key}"] = value
    ask["tasks"] = [task.name for task in job.tasks]
    for key, value in job.sampling.model_dump().items():
        ask[f"sampling.{key}"] = value
    return ask


def _read(asking: Asking) -> dict[str, Any]:
    family = asking.family
    return {"family": family.name, "family_version": family.version, "schema": SCHEMA_VERSION}


def _no_task_twice(tasks: Sequence[Task]) -> None:
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"task {name!r} is given twice", hint="give each -t once")


def _carried(carry: Sequence[str], schema: pa.Schema, renamed: Mapping[str, str]) -> list[str]:
    image = renamed.get("image", "image")
    names: list[str] = []
    for name in carry:
        names += [n for n in schema.names if n != image] if name == "*" else [name]
    fixed = set(RESULT_SCHEMA.names)
    if "*" in carry:  # the results have these from the manifest anyway
        same = {"id", "question", "image", image}
        names = [n for n in names if n not in same or n in carry]
    names = list(dict.fromkeys(names))
    for name in names:
        if name in fixed:
            raise UsageError(
                f"--carry {name}: the results have a column {name!r} of their own",
                hint="rename the manifest's column",
            )
        if name == image:
            raise UsageError(f"--carry {name}: images are not copied to the results")
    return names


def _template_columns(tasks: Sequence[Task], job: JobSpec, schema: pa.Schema) -> list[str]:
    """Columns that prompt templates name, besides those that a run reads anyway."""
    image = job.columns.get("image", "image")
    read_anyway = {"id", "row"}
    read_anyway.update(name for name in ASKED if job.columns.get(name, name) in schema.names)
    wanted: set[str] = set()
    for task in tasks:
        own = {"vqa": "question", "ground": "phrase", "detect": "labels"}.get(task.name)
        for name in sorted(task.variables - read_anyway - {own}):
            if name not in schema.names or name == image:
                raise ManifestError(
                    f"the prompt of task {task.name!r} names {name!r}, and a row has no such field "
                    f"(it has: {', '.join(n for n in [*schema.names, 'row'] if n != image)})",
                    hint="{{ column }} stands for a column of the row; images go to the model by "
                    "themselves",
                )
            wanted.add(name)
    return sorted(wanted)


def _check_asked(spec: TaskSpec, columns: Columns, where: str) -> None:
    """A task needs its column, or the option that stands for it."""
    needs = {
        "vqa": (("question", "questions"), spec.question, "--question TEXT"),
        "ground": (("phrase",), spec.phrase, "--phrase TEXT"),
        "detect": (("labels",), spec.labels, "--labels a,b"),
    }
    if spec.name not in needs:
        return
    names, stand_in, option = needs[spec.name]
    if stand_in is None and not any(columns.names[n] in columns.fields for n in names):
        if spec.name == "vqa" and spec.prompt is not None:
            return
        raise ManifestError(
            f"task {spec.name!r} needs a column {names[0]!r}, and {where} has none",
            hint=f"name it with --column {names[0]}=NAME, or ask the same of every row: {option}",
        )
