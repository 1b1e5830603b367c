"""What runs the model. ``base`` is the protocol; each engine is one module, imported when asked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from vlmbatch.engines.base import Engine
from vlmbatch.engines.own_code import adapter_for
from vlmbatch.engines.own_code import parse_args as parse_own_args
from vlmbatch.errors import UsageError
from vlmbatch.families import entry_named
from vlmbatch.families.base import Family
from vlmbatch.grounding import Size
from vlmbatch.job import EngineSpec, JobSpec
from vlmbatch.models import DEMO, demo_path

SETTING_OF = {
    "dtype": ("transformers", "vllm"),
    "batch_size": ("transformers",),
    "max_model_len": ("vllm",),
    "max_num_seqs": ("vllm",),
    "gpu_memory_utilization": ("vllm",),
    "quantization": ("vllm",),
    "kv_cache_dtype": ("vllm",),
    "lora": ("vllm",),
    "base_url": ("openai",),
    "api_key_env": ("openai",),
    "concurrency": ("openai",),
    "image_transport": ("openai",),
}
"""Which engines take which named setting."""

ASKED_SETTINGS = ("dtype", "max_model_len", "quantization", "kv_cache_dtype", "image_transport")
"""Named settings that may change an answer."""


def make_engine(
    job: JobSpec,
    model: Mapping[str, Any],
    family: Family,
    *,
    many_images: bool = False,
    image_size: Size | None = None,
) -> Engine:
    """The engine of a resolved job, not started. ``model``: as run.json keeps it.

    ``many_images``: a row may have several; ``image_size``: of a usual one, as the engine gets it.
    """
    match job.engine.name:
        case "echo":
            from vlmbatch.engines.echo import EchoEngine, parse_args

            return EchoEngine(parse_args(job.engine.args))
        case "openai":
            from vlmbatch.engines.openai import OpenAIEngine

            return OpenAIEngine(job.engine, model=model["path"])
        case "vllm":
            from vlmbatch.engines.vllm import VllmEngine

            return VllmEngine(
                job,
                _path(job, model),
                revision=_revision(model),
                many_images=many_images,
                image_size=image_size,
            )
    if job.trust_remote_code and (own := adapter_for(model["config"])) is not None:
        from vlmbatch.engines.own_code.engine import OwnCodeEngine

        return OwnCodeEngine(
            _path(job, model),
            own,
            parse_own_args(job.engine.args),
            revision=_revision(model),
            dtype=job.engine.dtype,
            requirements=entry_named(job.family).requirements if job.family else (),
        )
    from vlmbatch.engines.transformers import TransformersEngine

    return TransformersEngine(
        _path(job, model),
        revision=_revision(model),
        dtype=job.engine.dtype,
        batch_size=job.engine.batch_size,
        device=None,
        trust_remote_code=job.trust_remote_code,
        frame=family.frame,
        text_of=family.text_of,
    )


def _path(job: JobSpec, model: Mapping[str, Any]) -> str:
    """Where the worker finds the model: every node has its own copy of the bundled one."""
    return str(demo_path()) if job.model == DEMO else str(model["path"])


def _revision(model: Mapping[str, Any]) -> str | None:
    return str(model["revision"]) if model["hub"] else None


def check_engine(engine: EngineSpec) -> None:
    """Raises UsageError for a setting or argument that the engine does not know."""
    for name in sorted(engine.model_fields_set & SETTING_OF.keys()):
        default = EngineSpec.model_fields[name].default
        if engine.name not in SETTING_OF[name] and getattr(engine, name) != default:
            raise UsageError(
                f"--{name.replace('_', '-')} is a setting of the {' and '.join(SETTING_OF[name])} "
                f"engine, and this run takes {engine.name}",
                hint=f"leave it out, or give --engine {SETTING_OF[name][0]}",
            )
    match engine.name:
        case "echo":
            from vlmbatch.engines.echo import parse_args

            parse_args(engine.args)
        case "openai":
            from vlmbatch.engines.openai import check

            check(engine)
        case "vllm":
            from vlmbatch.engines.vllm_args import check as check_vllm

            check_vllm(engine)
        case _:
            parse_own_args(engine.args)


def asked_settings(engine: EngineSpec) -> dict[str, Any]:
    """The settings and arguments that may change answers: those are part of what was asked."""
    settings: dict[str, Any] = {name: getattr(engine, name) for name in ASKED_SETTINGS}
    operational = _operational(engine.name)
    given = {key.replace("-", "_"): value for key, value in engine.args.items()}  # vLLM takes both
    args = {key: value for key, value in given.items() if key not in operational}
    return {**settings, "engine.args": args}


def _operational(name: str) -> Collection[str]:
    """Arguments of the engine that change no answer."""
    match name:
        case "echo":
            from vlmbatch.engines import echo

            return echo.OPERATIONAL
        case "openai":
            from vlmbatch.engines import openai

            return openai.OPERATIONAL
        case "vllm":
            from vlmbatch.engines import vllm_args

            return vllm_args.OPERATIONAL
    return ()
