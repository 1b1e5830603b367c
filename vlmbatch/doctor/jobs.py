"""Whether one job can run here: its manifest, its output, its model, its engine, its images."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlmbatch.doctor.findings import Check, Finding, findings_of, ok, problem, warning
from vlmbatch.doctor.machine import INSTALL
from vlmbatch.doctor.places import output_place
from vlmbatch.engines import transformers_probe, vllm_probe
from vlmbatch.engines.choice import choose_engine
from vlmbatch.engines.own_code import adapter_for
from vlmbatch.executors.choice import usable_gpus
from vlmbatch.families import entry_of
from vlmbatch.job import EngineSpec, JobSpec
from vlmbatch.judged_output import open_rows
from vlmbatch.models import ModelNotFound, ResolvedModel, resolve_model
from vlmbatch.planning.rows import RowsToDo
from vlmbatch.planning.sample import checked, sample_of
from vlmbatch.resolve import DEFAULT_MODEL
from vlmbatch.run import Start, look, output_folder

STORE_SECONDS = 180.0
IMAGES = 8
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
IN_CACHE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


@dataclass
class Model:
    """The model that a job names, found once for all checks."""

    name: str | None
    revision: str | None = None
    family: str | None = None
    engine: EngineSpec = field(default_factory=EngineSpec)
    trusted: bool = False

    @property
    def is_needed(self) -> bool:
        """An endpoint has its own; the echo engine has none."""
        return self.engine.name not in ("echo", "openai") and self.engine.base_url is None

    @cached_property
    def found(self) -> ResolvedModel:
        name = self.name or os.environ.get("VLMBATCH_MODEL") or DEFAULT_MODEL
        return resolve_model(name, self.revision)


def model_of(job: JobSpec) -> Model:
    return Model(job.model, job.revision, job.family, job.engine, job.trust_remote_code)


def model_checks(model: Model) -> list[Check]:
    checks = [Check("engine", lambda: engine(model), vllm_probe.PROBE_SECONDS, needed=True)]
    if model.is_needed:
        checks.insert(0, Check("model", lambda: found_model(model), 60.0, needed=True))
    return checks


def checks_of(job: JobSpec) -> list[Check]:
    """Each looks at one thing; whether they fit is seen by ``start_findings``."""
    where = output_folder(job)
    return [
        Check("manifest", lambda: manifest(job), STORE_SECONDS, needed=True),
        Check("output", lambda: output_place(where), STORE_SECONDS, needed=True),
        *model_checks(model_of(job)),
        *([Check("cluster", lambda: cluster(job))] if job.ray_address else []),
        Check("workers", lambda: workers(job)),
    ]


def start_findings(job: JobSpec) -> list[Finding]:
    """How a run would begin, and a few of its images: where all else is in order."""
    began: list[Start] = []

    def start() -> Finding:
        began.append(look(job))
        resolved, todo = began[0].resolved, sum(map(len, began[0].pending))
        tasks = " + ".join(task.name for task in resolved.job.tasks)
        label = resolved.model["label"]
        what = f"{todo:,} rows to do: {tasks} by {label} ({resolved.job.engine.name})"
        if resolved.warnings:
            return warning("start", f"{what}; {'; '.join(resolved.warnings)}")
        return ok("start", what)

    found = findings_of([Check("start", start, STORE_SECONDS, needed=True)])
    if began:
        found += findings_of(
            [Check("images", lambda: images(began[0]), STORE_SECONDS, needed=True)]
        )
    return found


def manifest(job: JobSpec) -> Finding:
    there = open_rows(job)
    return ok("manifest", f"{there.extent}, {there.folder}")


def found_model(model: Model) -> Finding:
    """Found, of which family, and whether its weights are here."""
    name = "model"
    try:
        found = model.found
    except ModelNotFound as error:
        if model.name is None and not os.environ.get("VLMBATCH_MODEL"):
            return warning(name, f"{error.message}: the demo model stands in", "name one with -m")
        raise
    family = entry_of(found.config, model.name or found.name, model.family)
    what = f"{found.label}, family {family.name}"
    if found.is_local:
        if not any(next(Path(found.path).glob(form), None) for form in WEIGHTS):
            return problem(
                name,
                f"{what}: no weights in {found.path}",
                "copy the whole folder of the model, large files too (git lfs pull)",
            )
        return ok(name, what)
    if _in_cache(found):
        return ok(name, f"{what}, in the cache")
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return problem(
            name,
            f"{what}: its weights are not in the cache, and HF_HUB_OFFLINE is set",
            f"with a network: hf download {found.name}",
        )
    return ok(name, f"{what}; its weights will be fetched at the start")


def engine(model: Model) -> Finding:
    """Whether the engine that is asked for is here and takes the model."""
    name, wanted = "engine", model.engine
    if wanted.name == "echo":
        return ok(name, "echo, which needs no model")
    if not model.is_needed:
        from vlmbatch.engines.endpoint import address_of, look

        offer = look(wanted)
        served = "" if offer.models is None else f", serves {', '.join(offer.models[:5])}"
        return ok(name, f"{address_of(wanted.base_url or '')} answers{served}")
    try:
        config: Mapping[str, Any] = model.found.config
    except ModelNotFound:  # the model's own finding says so
        config = {}
    if wanted.name == "auto":
        chosen, reason = choose_engine(config)
        return ok(name, f"{chosen}: {reason}")
    if wanted.name == "vllm":
        architectures = tuple(map(str, config.get("architectures") or ()))
        if not vllm_probe.is_installed():
            return problem(name, "vllm is not installed", "pip install 'vlmbatch[vllm]'")
        said = vllm_probe.probe(architectures)
        if said.problem is not None:
            return problem(name, f"vllm: {said.problem}", "--engine transformers, or another model")
        return ok(name, f"vllm {said.version} on {said.device}")
    for library in ("torch", "transformers"):
        if find_spec(library) is None:
            return problem(name, f"{library} is not installed", INSTALL)
    kind = config.get("model_type")
    own = adapter_for(config)
    known = kind in transformers_probe.image_text_classes() or not config
    if own is not None and not model.trusted and not known:
        return problem(
            name,
            "the model brings its own code, which runs only if it is trusted",
            "after reading it: --trust-remote-code --revision COMMIT",
        )
    if not known and own is None:
        return problem(
            name,
            f"transformers does not know the model type {kind!r}",
            "a newer transformers, or --engine vllm",
        )
    return ok(name, "transformers")


def cluster(job: JobSpec) -> Finding:
    """Whether anything listens at --ray-address; it is not joined."""
    address = job.ray_address or ""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        return ok("cluster", f"{address}: looked for at the start")
    try:
        with socket.create_connection((host, int(port)), timeout=5.0):
            return ok("cluster", f"{address} listens")
    except OSError as error:
        return problem(
            "cluster",
            f"nothing listens at {address} ({error.strerror or error})",
            "`ray status` on a node of the cluster says its address",
        )


def workers(job: JobSpec) -> Finding:
    """More workers than GPUs share them, and their memory."""
    here, wanted = usable_gpus(), (job.workers or 1) * job.gpus_per_worker
    if here and wanted > here and job.ray_address is None and job.engine.name != "openai":
        return warning(
            "workers",
            f"{job.workers or 1} workers of {job.gpus_per_worker} GPUs each, and {here} here",
            "fewer --workers, or --ray-address with a cluster",
        )
    return ok("workers", str(job.workers or "one per usable GPU, else 1"))


def images(start: Start) -> Finding:
    """A few rows' images, through the loader of a worker: their hosts and stores answer."""
    job, asking = start.resolved.job, start.resolved.asking
    rows = RowsToDo(start.manifest, start.pending, asking)
    looked_at = asyncio.run(checked(rows.sample(IMAGES), job, asking, start.manifest.folder))
    found = sample_of(looked_at, 0.0)
    what = f"{found.rows - found.failed} of {found.rows} sampled rows can be asked about"
    if not found.failed:
        return ok("images", what)
    code, first = next(iter(found.problems.items()))
    make = problem if found.failure_rate > job.max_failure_rate else warning
    return make(
        "images", f"{what}; {code}: {first.examples[0]}", "`vlmbatch plan` looks at more of them"
    )


def _in_cache(found: ResolvedModel) -> bool:
    with suppress(ImportError):
        from huggingface_hub import try_to_load_from_cache

        return any(
            isinstance(try_to_load_from_cache(found.name, file, revision=found.revision), str)
            for file in IN_CACHE
        )
    return False
