"""What runs the model. ``base`` is the protocol; each engine is one module, imported when asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmbatch.engines.base import Engine
from vlmbatch.errors import UsageError
from vlmbatch.job import EngineSpec, JobSpec
from vlmbatch.models import DEMO, demo_path


def make_engine(job: JobSpec, model: Mapping[str, Any]) -> Engine:
    """The engine of a resolved job, not started. ``model``: as run.json keeps it."""
    if job.engine.name == "echo":
        from vlmbatch.engines.echo import EchoEngine, parse_args

        return EchoEngine(parse_args(job.engine.args))
    from vlmbatch.engines.transformers import TransformersEngine

    is_demo = job.model == DEMO  # every node has its own copy, in the package
    return TransformersEngine(
        str(demo_path()) if is_demo else model["path"],
        revision=model["revision"] if model["hub"] else None,
        dtype=job.engine.dtype,
        batch_size=job.engine.batch_size,
        device=None,
        trust_remote_code=job.trust_remote_code,
    )


def check_args(engine: EngineSpec) -> None:
    """Raises UsageError for an argument that the engine does not know."""
    if engine.name == "echo":
        from vlmbatch.engines.echo import parse_args

        parse_args(engine.args)
    elif engine.args:
        raise UsageError(
            f"the {engine.name} engine has no argument {next(iter(engine.args))!r}",
            hint="its settings have options of their own: --dtype, --batch-size",
        )


def asked_args(engine: EngineSpec) -> dict[str, str]:
    """The arguments that change answers: those are part of what was asked."""
    from vlmbatch.engines.echo import OPERATIONAL

    return {key: value for key, value in engine.args.items() if key not in OPERATIONAL}
