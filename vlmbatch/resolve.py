"""From what the user said to what will run: tasks, columns, model, family, fingerprint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os import environ, path
from pathlib import Path
from typing import Any

import pyarrow as pa

from vlmbatch.engines import asked_settings, check_engine, own_code
from vlmbatch.engines.choice import choose_engine
from vlmbatch.errors import ManifestError, UsageError
from vlmbatch.families import ENTRIES, Entry, Family, entry_of, made
from vlmbatch.families.base import BOX_TASKS
from vlmbatch.families.own import is_file
from vlmbatch.job import JUDGE, EngineSpec, JobSpec, SamplingSpec, TaskSpec
from vlmbatch.judging import completed
from vlmbatch.manifest import Columns, Manifest
from vlmbatch.manifest.columns import ASKED, choose_columns
from vlmbatch.models import ModelNotFound, folder_fingerprint, resolve_model
from vlmbatch.reading import Reading, read_half, reading_of
from vlmbatch.records import Sampling, TaskKind
from vlmbatch.results.schema import RESULT_SCHEMA, result_schema
from vlmbatch.run_file import INCREMENTAL, RunFile
from vlmbatch.tasks import PLACEHOLDERS, Ask, Task, make_task, sampling_of

DEFAULT_MODEL = "HuggingFaceTB/SmolVLM-500M-Instruct"
DEMO_ROWS = 1000
GUESSED = ENTRIES[-1]
"""The family of models that none was written for."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Asking:
    """All that a worker needs to know about what is asked, besides the engine."""

    tasks: tuple[Task, ...]
    family: Family
    """Words what is asked, and says how large the images are to be."""
    reading: Reading
    columns: Columns
    carried: tuple[str, ...]
    schema: pa.Schema
    system: str | None
    sampling: Sampling
    num_samples: int


@dataclass(frozen=True)
class Resolved:
    """A job with nothing left open."""

    job: JobSpec
    model: dict[str, Any]
    ask: dict[str, Any]
    read: dict[str, Any]
    warnings: list[str]
    notes: list[str]
    """What was decided for this start, and why; said, and not stored."""
    asking: Asking


def asking_of(job: JobSpec, manifest: Manifest, config: Mapping[str, Any]) -> Asking:
    """Raises UsageError or ManifestError for a task, template or column that does not fit."""
    tasks = tuple(make_task(spec) for spec in job.tasks)
    _no_task_twice(tasks)
    _check_sampling(job.sampling)
    _check_structures(tasks, job.engine.name)
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
    entry = entry_of(config, job.model or "", job.family)
    _check_family(tasks, entry)
    reading = reading_of(job, config)
    return Asking(
        tasks,
        made(entry, config) if job.parser else reading.family,
        reading,
        columns,
        tuple(carried),
        result_schema([manifest.schema.field(name) for name in carried]),
        job.system,
        sampling_of(job.sampling),
        job.sampling.num_samples,
    )


def resolve(job: JobSpec, manifest: Manifest, stored: RunFile | None) -> Resolved:
    """Fill in what the user left open; from ``stored`` where an earlier start decided it."""
    warnings: list[str] = []
    if stored is not None:
        job = _as_before(job, stored)
    tasks = [completed(spec) for spec in job.tasks or _default_tasks(job, manifest)]
    job = job.model_copy(update={"tasks": tasks})
    pinned = "revision" in job.model_fields_set and _COMMIT.fullmatch(job.revision or "")
    notes: list[str] = []
    job, model = _with_engine_and_model(
        job, manifest, fresh=stored is None, warnings=warnings, notes=notes
    )
    check_engine(job.engine)
    if job.engine.name == "transformers":
        own_code.check(
            model,
            job.engine,
            trusted=job.trust_remote_code,
            sampling=job.sampling,
            system=job.system,
        )
    if job.engine.lora is not None:
        engine = job.engine.model_copy(update={"lora": path.abspath(job.engine.lora)})
        job = job.model_copy(update={"engine": engine})
    if job.engine.name == "transformers" and job.gpus_per_worker > 1:
        raise UsageError(
            "the transformers engine puts a model on one GPU",
            hint="leave --gpus-per-worker out, and give --workers instead",
        )
    asking = asking_of(job, manifest, model["config"])
    family = path.abspath(job.family) if job.family and is_file(job.family) else asking.family.name
    job = job.model_copy(update={"family": family})
    if job.trust_remote_code and model["hub"] and not pinned:
        raise UsageError(
            "--trust-remote-code runs code from the Hub, and no --revision pins it to a commit",
            hint=f"after reading that code, pin it: --revision {model['revision']}",
        )
    if asking.family.name == GUESSED.name and job.engine.name != "echo":
        notes.append(_about_guess(model["config"]))
        if job.box_space is None and any(task.kind in BOX_TASKS for task in asking.tasks):
            warnings.append(
                f"that boxes come as {asking.family.name} reads them (0 to 1000) is a guess: look "
                "at some of them; `vlmbatch reparse OUTPUT --box-space ...` mends them without the "
                f"model (it knows {', '.join(GUESSED.box_spaces)})"
            )
    return Resolved(
        job,
        model,
        _ask(job, manifest, model, asking),
        read_half(job, asking.reading),
        warnings,
        notes,
        asking,
    )


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
    for name in ("box_space", "parser"):
        if name not in given:
            changes[name] = getattr(before, name)
    if "family" not in given and changes.get("model", job.model) == before.model:
        changes["family"] = before.family
    engine = {
        name: getattr(before.engine, name)
        for name in ("name", "dtype")
        if getattr(job.engine, name) == "auto"
    }
    if before.engine.name == "openai" == engine.get("name", job.engine.name):
        engine |= _endpoint_as_before(job.engine, before.engine)
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


def _endpoint_as_before(engine: EngineSpec, before: EngineSpec) -> dict[str, Any]:
    changes: dict[str, Any] = {"base_url": engine.base_url or before.base_url}
    dialect = before.args.get("dialect", "auto")
    if engine.args.get("dialect", "auto") == "auto" != dialect:
        changes["args"] = {**engine.args, "dialect": dialect}
    return changes


def _default_tasks(job: JobSpec, manifest: Manifest) -> list[TaskSpec]:
    asked = [name for name in ASKED if job.columns.get(name, name) in manifest.schema.names]
    if asked:
        raise UsageError(
            f"the manifest has a column {asked[0]!r}: say what to ask",
            hint="give -t vqa, -t ground, -t detect or -t caption",
        )
    return [TaskSpec(name="caption")]


def _with_engine_and_model(
    job: JobSpec, manifest: Manifest, *, fresh: bool, warnings: list[str], notes: list[str]
) -> tuple[JobSpec, dict[str, Any]]:
    if job.engine.name == "echo":
        model = {"label": "echo", "path": "", "revision": "", "config": {}, "hub": False}
        if job.model is not None:  # its family is wanted, not the model itself
            try:
                model["config"] = resolve_model(job.model, job.revision).config
            except ModelNotFound as error:
                warnings.append(f"{error.message}; the echo engine asks as for any model")
        return job, model
    if _wants_endpoint(job.engine):
        return _with_endpoint(job, fresh=fresh)
    name, fallback = job.model or environ.get("VLMBATCH_MODEL"), False
    if not name:
        name, fallback = DEFAULT_MODEL, fresh and job.ray_address is None
    try:
        found = resolve_model(name, job.revision)
    except ModelNotFound as error:
        if not fallback:
            raise
        rows = manifest.rows_within(job.limit)
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
        chosen, reason = choose_engine(found.config)
        engine = engine.model_copy(update={"name": chosen})
        notes.append(f"engine {chosen}: {reason}")
    model = {
        "label": found.label,
        "path": found.path,
        "revision": found.revision,
        "config": dict(found.config),
        "hub": not found.is_local,
    }
    revision = None if found.is_local else found.revision
    return job.model_copy(update={"model": name, "revision": revision, "engine": engine}), model


def _wants_endpoint(engine: EngineSpec) -> bool:
    return engine.name == "openai" or (engine.name == "auto" and engine.base_url is not None)


def _with_endpoint(job: JobSpec, *, fresh: bool) -> tuple[JobSpec, dict[str, Any]]:
    """The endpoint's name for the model, as it is: asked for when the run is new.

    Raises EndpointError where the endpoint cannot be reached, before anything is written.
    """
    engine = job.engine.model_copy(update={"name": "openai"})
    check_engine(engine)
    if job.revision is not None:
        raise UsageError(
            "--revision is not for an endpoint, which decides itself what it serves",
            hint="leave it out",
        )
    boxes = [task.name for task in job.tasks if task.name in ("ground", "detect")]
    if boxes and engine.image_transport == "url":
        raise UsageError(
            f"-t {boxes[0]} needs the sizes of the images, which are not read here where they go "
            "to the endpoint as URLs",
            hint="--image-transport inline",
        )
    name = job.model
    if fresh or name is None:
        from vlmbatch.engines.chat import check_dialect
        from vlmbatch.engines.endpoint import address_of, check_served, chosen_model, look

        offer, address = look(engine), address_of(engine.base_url or "")
        if name is None:
            name = chosen_model(offer, address)
        check_served(name, offer, address)
        dialect = engine.args.get("dialect", "auto")
        dialect = offer.dialect if dialect == "auto" else dialect
        for task in job.tasks:
            check_dialect(dialect, sampling_of(job.sampling), make_task(task).structure)
        engine = engine.model_copy(update={"args": {**engine.args, "dialect": dialect}})
    model = {"label": name, "path": name, "revision": "", "config": {}, "hub": False}
    with suppress(UsageError):  # the same name may be known here: then so is its family
        model["config"] = dict(resolve_model(name, offline=True).config)
    return job.model_copy(update={"model": name, "engine": engine}), model


def _ask(
    job: JobSpec, manifest: Manifest, model: Mapping[str, Any], asking: Asking
) -> dict[str, Any]:
    """What the model is given. A resume with any difference is refused, field by field."""
    ask: dict[str, Any] = {
        "manifest": INCREMENTAL if job.incremental else manifest.identity,
        "columns": dict(sorted(job.columns.items())),
        "carry": sorted(job.carry),
        "system": job.system,
        "model": f"{model['label']} {model['revision']}".strip(),
        "family": asking.family.name,
        "family_stop": list(asking.family.stop),
        "engine": job.engine.name,
        **asked_settings(job.engine),
        "lora": None if job.engine.lora is None else _content_of_lora(job.engine.lora),
        "max_image_pixels": job.max_image_pixels,
        "max_image_bytes": job.max_image_bytes,
    }
    for spec in job.tasks:
        for key, value in spec.model_dump().items():
            if key != "name":
                ask[f"tasks.{spec.name}.{key}"] = value
    for task in asking.tasks:
        ask[f"tasks.{task.name}.words"] = _words_of(task, asking.family)
    ask["tasks"] = [task.name for task in job.tasks]
    for key, value in job.sampling.model_dump().items():
        ask[f"sampling.{key}"] = value
    return ask


def _content_of_lora(folder: str) -> str:
    if not Path(folder).is_dir():
        raise UsageError(f"--lora {folder}: no such folder")
    return folder_fingerprint(Path(folder))


def _words_of(task: Task, family: Family) -> str | None:
    """How the family words it; None where the task has a prompt of its own."""
    if task.template is not None or task.kind is TaskKind.TEXT:
        return None
    return family.word(PLACEHOLDERS.get(task.kind) or Ask(task.kind, style=task.spec.style))


def _about_guess(config: Mapping[str, Any]) -> str:
    kind = config.get("model_type")
    what = f"models of the type {kind!r} are" if kind else "this model is"
    return f"family {GUESSED.name}: {what} unknown to vlmbatch, and asked in plain words"


def _no_task_twice(tasks: Sequence[Task]) -> None:
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"task {name!r} is given twice", hint="give each -t once")


def _check_sampling(sampling: SamplingSpec) -> None:
    if sampling.num_samples > 1 and sampling.temperature == 0:
        raise UsageError(
            f"--num-samples {sampling.num_samples} at temperature 0 gives the same answer "
            f"{sampling.num_samples} times",
            hint="--temperature 0.7",
        )
    if sampling.min_tokens > sampling.max_tokens:
        raise UsageError(
            f"--min-tokens {sampling.min_tokens} is more than --max-tokens {sampling.max_tokens}"
        )
    if "" in sampling.stop:
        raise UsageError("--stop is empty: every answer would end at once")


def _check_structures(tasks: Sequence[Task], engine: str) -> None:
    """A judge's form is no wish of the user's: where the model is not held to it, some of its
    answers fail, and can be asked for again."""
    structured = [task.name for task in tasks if task.structure is not None and task.name != JUDGE]
    if structured and engine == "transformers":
        raise UsageError(
            f"the transformers engine cannot hold a model to a schema (task {structured[0]!r})",
            hint="--engine vllm or openai can",
        )


def _check_family(tasks: Sequence[Task], entry: Entry) -> None:
    """A family is asked only what its models can answer; a prompt of one's own is any text."""
    has = frozenset(entry.tasks)
    for task in tasks:
        boxes = task.kind in BOX_TASKS
        own_words = task.template is not None and (not boxes or not has.isdisjoint(BOX_TASKS))
        if task.kind in has or task.kind is TaskKind.TEXT or own_words:
            continue
        what = "boxes as JSON" if boxes else "it in plain words"
        raise UsageError(
            f"-t {task.name} is nothing that models of the family {entry.name!r} were trained for "
            f"(they have: {', '.join(kind for kind in TaskKind if kind in has)})",
            hint=f"another model, or --family generic, which asks any model for {what}",
        )


def carried_fields(job: JobSpec, schema: pa.Schema) -> list[pa.Field]:
    """The columns of a manifest with this schema that go into the results, as they are there."""
    names = _carried(job.carry, schema, job.columns)
    return list(result_schema([schema.field(name) for name in names]))[len(RESULT_SCHEMA) :]


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


_OWN_VARIABLES = {
    "vqa": {"question"},
    "ground": {"phrase"},
    "detect": {"labels"},
    JUDGE: {"question", "answer", "task"},
}
"""What a task's prompt may name without any such column."""


def _template_columns(tasks: Sequence[Task], job: JobSpec, schema: pa.Schema) -> list[str]:
    """Columns that prompt templates name, besides those that a run reads anyway."""
    image = job.columns.get("image", "image")
    read_anyway = {"id", "row"}
    read_anyway.update(name for name in ASKED if job.columns.get(name, name) in schema.names)
    wanted: set[str] = set()
    for task in tasks:
        for name in sorted(task.variables - read_anyway - _OWN_VARIABLES.get(task.name, set())):
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
