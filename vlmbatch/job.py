"""JobSpec: the whole run described, and its fingerprint.

A spec holds what the user said; ``resolve.py`` fills in what was left open. The resolved job stands
in run.json, and workers read it from there.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from vlmbatch.errors import FingerprintMismatch, UsageError

BUILT_IN_TASKS = ("caption", "vqa", "ground", "detect", "ocr")

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(value: object) -> object:
    """'512MiB', '1G' or a number of bytes as an int; other values are left to pydantic."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)(?:i?B)?\s*", value, re.IGNORECASE)
        if match:
            return int(float(match[1]) * _UNITS[match[2].upper()])
    return value


def parse_seconds(value: object) -> object:
    """'30s', '30min', '2h' or a number of seconds as a float; other values go to pydantic."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([\d.]+)\s*(s|m|min|h)?\s*", value)
        if match:
            return float(match[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600}[match[2] or "s"]
    return value


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=2**20)]
Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(gt=0)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


class TaskSpec(Section):
    """What is asked about every row."""

    name: str = Field(description="caption, vqa, ground, detect, ocr, or a name of your own")
    prompt: str | None = Field(
        None, description="Jinja template over the row's fields that words the task differently"
    )
    style: Literal["short", "detailed"] = Field("short", description="of captions")
    question: str | None = Field(None, description="stands for a missing question column")
    phrase: str | None = Field(None, description="stands for a missing phrase column")
    labels: list[str] | None = Field(None, description="stand for a missing labels column")


class EngineSpec(Section):
    """What runs the model."""

    name: Literal["auto", "transformers", "echo"] = "auto"
    dtype: str = Field("auto", description="auto, float32, bfloat16 or float16")
    batch_size: int | None = Field(None, ge=1, description="transformers: requests per batch")
    args: dict[str, str] = Field(default_factory=dict, description="key=value for the engine")


class SamplingSpec(Section):
    """How tokens are picked; greedy by default."""

    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(256, ge=1)
    seed: int | None = None


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_tasks(value: object) -> object:
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        return [{"name": item} if isinstance(item, str) else item for item in value]
    return value


class JobSpec(Section):
    """The whole run described."""

    manifest: Annotated[list[str], BeforeValidator(_as_list)] = Field(
        description="Parquet files, folders or globs", min_length=1
    )
    output: str | None = Field(None, description="folder that the results go to")
    columns: dict[str, str] = Field(
        default_factory=dict, description="our column name: the manifest's column name"
    )
    carry: list[str] = Field(
        default_factory=list, description="manifest columns copied to the results; * is all"
    )
    limit: int | None = Field(None, ge=1, description="only the first so many rows")
    tasks: Annotated[list[TaskSpec], BeforeValidator(_as_tasks)] = Field(default_factory=list)
    system: str | None = Field(None, description="system prompt")

    model: str | None = Field(None, description="Hub id, local directory, or demo")
    revision: str | None = Field(None, description="commit, branch or tag of a Hub model")
    family: str | None = Field(None, description="force a model family")
    trust_remote_code: bool = False
    engine: EngineSpec = Field(default_factory=EngineSpec)
    sampling: SamplingSpec = Field(default_factory=SamplingSpec)

    workers: int | None = Field(None, ge=1, description="engines; default: one per usable GPU")
    gpus_per_worker: int = Field(1, ge=1)
    executor: Literal["auto", "local", "ray"] = "auto"
    ray_address: str | None = None

    checkpoint_rows: int = Field(256, ge=1, description="rows per commit, at most")
    part_rows: int = Field(65_536, ge=1, le=2**22, description="rows per output file")
    max_failure_rate: float = Field(0.1, ge=0, le=1, description="share of rows that may fail")
    image_memory: Bytes = Field(2**30, description="bytes of images held per worker")
    max_image_pixels: int = Field(178_956_970, ge=1, description="larger images fail")
    max_image_bytes: Bytes = Field(2**28, description="larger files fail")
    start_timeout: Seconds = Field(1800.0, description="until a worker is ready")
    stall_timeout: Seconds = Field(900.0, description="without any progress of a busy worker")


def spec_from(values: dict[str, Any], *, where: str) -> JobSpec:
    """The spec that these values describe; all problems with their addresses in one UsageError."""
    try:
        return JobSpec.model_validate(values)
    except ValidationError as error:
        lines = [_problem(item) for item in error.errors()]
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
        raise UsageError("\n  ".join([f"{count} in {where}", *lines])) from None


def _problem(item: Any) -> str:
    address = ".".join(str(step) for step in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown key {item['loc'][-1]!r} @ {address}"
    found = item.get("input")
    shown = f", got {found!r}" if isinstance(found, str | int | float | bool) else ""
    return f"{item['msg'][0].lower()}{item['msg'][1:]}{shown} @ {address}"


def check_same_ask(stored: dict[str, Any], now: dict[str, Any], *, retry_with: str) -> None:
    """Raises FingerprintMismatch, naming each field, unless both asked the model the same."""
    changed = sorted(key for key in stored.keys() | now.keys() if stored.get(key) != now.get(key))
    if not changed:
        return
    lines = [f"{key}: was {_short(stored.get(key))}, now {_short(now.get(key))}" for key in changed]
    raise FingerprintMismatch(
        "\n  ".join(
            ["this output holds answers to another question; these changed:", *lines],
        ),
        hint=f"keep both: {retry_with}\n  -> or start anew: the same command with --overwrite",
    )


def _short(value: object, length: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."
