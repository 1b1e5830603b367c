"""JobSpec: the whole run described, and its fingerprint.

A spec holds what the user said; ``resolve.py`` fills in what was left open. The resolved job stands
in run.json, and workers read it from there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    WithJsonSchema,
)

from vlmbatch.errors import FingerprintMismatch, UsageError
from vlmbatch.placeholders import Address, zone_of

CHECKPOINT_ROWS = 256
SECRET = ("notify_url",)
"""Keys whose values stand in no message."""
BUILT_IN_TASKS = ("caption", "vqa", "ground", "detect", "ocr")
JUDGE = "judge"
"""The task whose rows are the answers of another run."""

_DECIMAL = r"([0-9]{1,15}(?:\.[0-9]{0,15})?)"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(value: object) -> object:
    """'512MiB', '1G' or a number of bytes as an int; what is no text is left to pydantic."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(rf"\s*{_DECIMAL}\s*([KMGT]?)(?:i?B)?\s*", value, re.IGNORECASE)
    if match is None:
        raise ValueError("expected a size such as 512MiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_seconds(value: object) -> object:
    """'30s', '30min', '2h' or a number of seconds as a float; what is no text goes to pydantic."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(rf"\s*{_DECIMAL}\s*(s|m|min|h)?\s*", value)
    if match is None:
        raise ValueError("expected a time such as 90s, 30min or 2h")
    return float(match[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600}[match[2] or "s"]


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=2**20)]
Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(gt=0)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


_OBJECT_OR_PATH = {"anyOf": [{"type": "object"}, {"type": "string"}, {"type": "null"}]}


class TaskSpec(Section):
    """What is asked about every row."""

    name: str = Field(description="caption, vqa, ground, detect, ocr, judge, or a name of your own")
    prompt: str | None = Field(
        None, description="Jinja template over the row's fields that words the task differently"
    )
    style: Literal["short", "detailed"] = Field("short", description="of captions")
    question: str | None = Field(None, description="stands for a missing question column")
    phrase: str | None = Field(None, description="stands for a missing phrase column")
    labels: list[str] | None = Field(None, description="stand for a missing labels column")
    json_schema: Annotated[dict[str, Any] | None, WithJsonSchema(_OBJECT_OR_PATH)] = Field(
        None,
        description="JSON Schema that the answer must fit, or the path of its file beside the job "
        "spec; the object goes to `json`",
    )
    choices: list[str] | None = Field(None, description="the answer is one of these")
    regex: str | None = Field(None, description="the whole answer matches this")


def _as_texts(value: object) -> object:
    """YAML reads 0.05 as a number; on the command line it is text."""
    if not isinstance(value, dict):
        return value
    scalar = str | int | float
    return {k: str(v) if isinstance(v, scalar) else v for k, v in value.items()}


class EngineSpec(Section):
    """What runs the model."""

    name: Literal["auto", "vllm", "transformers", "openai", "echo"] = "auto"
    dtype: str = Field("auto", description="auto, float32, bfloat16 or float16")
    batch_size: int | None = Field(None, ge=1, description="transformers: requests per batch")
    max_model_len: int | None = Field(None, ge=1, description="vllm: tokens of context")
    max_num_seqs: int | None = Field(None, ge=1, description="vllm: requests computed at once")
    gpu_memory_utilization: float | None = Field(
        None, gt=0, le=1, description="vllm: share of each GPU's memory that it takes"
    )
    quantization: str | None = Field(None, description="vllm: awq, gptq, fp8, ...")
    kv_cache_dtype: str | None = Field(None, description="vllm: auto, fp8, ...")
    lora: str | None = Field(None, description="vllm: folder of a LoRA adapter")
    base_url: str | None = Field(None, description="openai: address that ends in /v1")
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="openai: name of the environment variable with the key"
    )
    concurrency: int | None = Field(None, ge=1, description="openai: requests at once, at most")
    image_transport: Literal["inline", "url"] = Field(
        "inline", description="openai: images travel in the request, or as the manifest's URLs"
    )
    args: Annotated[dict[str, str], BeforeValidator(_as_texts)] = Field(
        default_factory=dict, description="key=value for the engine"
    )


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class SamplingSpec(Section):
    """How tokens are picked; greedy by default."""

    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(256, ge=1)
    min_tokens: int = Field(0, ge=0)
    seed: int | None = None
    repetition_penalty: float = Field(1.0, gt=0)
    stop: Annotated[list[str], BeforeValidator(_as_list)] = Field(
        default_factory=list, description="an answer ends before any of these texts"
    )
    num_samples: int = Field(1, ge=1, le=1000, description="answers per request")
    on_truncation: Literal["keep", "retry", "fail"] = Field(
        "keep", description="of an answer that is cut at max_tokens"
    )


def _absolute(folders: list[str]) -> list[str]:
    """Workers may start elsewhere."""
    return [os.path.abspath(folder) for folder in folders]


def _known_zone(name: str | None) -> str | None:
    zone_of(name)
    return name


def notify_url_from(url: str) -> str:
    """The address as it is. Raises ValueError, which never quotes it, where nothing can be posted
    to it."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    plain = url.isascii() and url.isprintable() and " " not in url
    if not host or not plain or parts.scheme not in ("http", "https"):
        raise ValueError("expected an http(s) address")
    return url


def _as_tasks(value: object) -> object:
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        return [{"name": item} if isinstance(item, str) else item for item in value]
    return value


class JobSpec(Section):
    """The whole run described."""

    extends: str | None = Field(
        None, description="path of a spec, beside this one, that this one changes and adds to"
    )
    timezone: Annotated[str | None, AfterValidator(_known_zone)] = Field(
        None, description="whose day {date} is, as in Europe/Berlin; default: UTC"
    )
    manifest: Annotated[list[str], BeforeValidator(_as_list)] = Field(
        description="files, folders, globs, addresses in a store, or a dataset of the Hub",
        min_length=1,
    )
    include: Annotated[list[str], BeforeValidator(_as_list)] = Field(
        default_factory=list, description="globs: of what a folder holds, only these files"
    )
    exclude: Annotated[list[str], BeforeValidator(_as_list)] = Field(
        default_factory=list, description="globs: of what a folder holds, all but these files"
    )
    output: str | None = Field(
        None, description="folder, or prefix on an object store, for the results"
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="our column name: the manifest's column name"
    )
    carry: Annotated[list[str], BeforeValidator(_as_list)] = Field(
        default_factory=list, description="manifest columns copied to the results; * is all"
    )
    limit: int | None = Field(None, ge=1, description="only the first so many rows")
    incremental: bool = Field(
        False, description="only rows whose id the output has not answered, start after start"
    )
    detect_changes: bool = Field(
        False, description="incremental: ask anew where an image's ETag or size changed"
    )
    max_attempts: int = Field(
        5, ge=1, le=100, description="incremental: ask again what failed for a cause that may pass"
    )
    tasks: Annotated[list[TaskSpec], BeforeValidator(_as_tasks)] = Field(default_factory=list)
    system: str | None = Field(None, description="system prompt")

    model: str | None = Field(None, description="Hub id, local directory, or demo")
    revision: str | None = Field(None, description="commit, branch or tag of a Hub model")
    family: str | None = Field(
        None, description="force a model family: its name, or the path of a family file (*.py)"
    )
    parser: str | None = Field(
        None, description="family that reads the answers, if another one than asks"
    )
    box_space: str | None = Field(None, description="another reading of the family's boxes")
    trust_remote_code: bool = False
    engine: EngineSpec = Field(default_factory=EngineSpec)
    sampling: SamplingSpec = Field(default_factory=SamplingSpec)

    workers: int | None = Field(None, ge=1, description="engines; default: one per usable GPU")
    gpus_per_worker: int = Field(1, ge=1)
    executor: Literal["auto", "local", "ray"] = "auto"
    ray_address: str | None = None

    checkpoint_rows: int = Field(CHECKPOINT_ROWS, ge=1, description="rows per commit, at most")
    part_rows: int = Field(65_536, ge=1, le=2**22, description="rows per output file")
    max_failure_rate: float = Field(0.1, ge=0, le=1, description="share of rows that may fail")
    image_memory: Bytes = Field(2**30, description="bytes of images held per worker")
    max_image_pixels: int = Field(178_956_970, ge=1, description="larger images fail")
    max_image_bytes: Bytes = Field(2**28, description="larger files fail")
    fetch_concurrency: int = Field(
        32, ge=1, description="images fetched at once from one host or store, per worker"
    )
    fetch_timeout: Seconds = Field(60.0, description="for one answer of a host or store")
    allow_private_hosts: bool = Field(
        False, description="image URLs may name hosts that are not on the public internet"
    )
    allow_roots: Annotated[list[str], BeforeValidator(_as_list), AfterValidator(_absolute)] = Field(
        default_factory=list, description="folders below which local images must be"
    )
    start_timeout: Seconds = Field(1800.0, description="until a worker is ready")
    stall_timeout: Seconds = Field(900.0, description="without any progress of a busy worker")
    notify_url: Annotated[str, AfterValidator(notify_url_from)] | None = Field(
        None,
        exclude=True,  # a secret: it does not go into run.json
        repr=False,
        description="http(s) address that gets the summary as JSON when the run ends; a secret",
    )

    _variables: tuple[str, ...] = PrivateAttr(())

    @property
    def variables(self) -> tuple[str, ...]:
        """The environment variables that the spec names by ``${NAME}``; no part of its values."""
        return self._variables

    def name_variables(self, names: Iterable[str]) -> None:
        self._variables = tuple(sorted(names))


def spec_from(
    values: dict[str, Any],
    *,
    where: str,
    problems: Sequence[tuple[Address, str]] = (),
    origin: Callable[[Address], str] = lambda address: "",
) -> JobSpec:
    """The spec that these values describe; all problems with their addresses in one UsageError.

    ``problems`` were found before, and stand for whatever else is wrong at their addresses;
    ``origin`` says which file an address is in, if not in ``where``.
    """
    lines = [f"{said} @ {_dotted(address)}{origin(address)}" for address, said in problems]
    told = {address for address, _ in problems}
    spec: JobSpec | None = None
    try:
        spec = JobSpec.model_validate(values)
    except ValidationError as error:
        found = [item for item in error.errors() if item["loc"] not in told]
        lines += [f"{_problem(item)}{origin(item['loc'])}" for item in found]
    if spec is not None and not lines:
        return spec
    count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
    raise UsageError("\n  ".join([f"{count} in {where}", *lines]))


def _dotted(address: Iterable[str | int]) -> str:
    return ".".join(map(str, address))


def _problem(item: Any) -> str:
    *path, last = item["loc"] or ("",)
    address = _dotted(path)
    if item["type"] == "extra_forbidden":
        close = get_close_matches(str(last), _section(path).model_fields, n=1)
        meant = f" (did you mean {close[0]!r}?)" if close else ""
        return f"unknown key {last!r}{meant}" + (f" @ {address}" if address else "")
    if item["type"] == "missing":
        return f"missing key {last!r}" + (f" @ {address}" if address else "")
    expected = _EXPECTED.get(item["type"])
    if expected is None:
        said = item["msg"].removeprefix("Value error, ").replace("Input should be", "expected", 1)
        said = said.replace("greater than or equal to", "at least")
        said = said.replace("less than or equal to", "at most")
        expected = f"{said[:1].lower()}{said[1:]}"
    found = "" if item["loc"][0] in SECRET else f", got {_found(item.get('input'))}"
    return f"{expected}{found} @ {_dotted(item['loc'])}"


def _found(value: object) -> str:
    if isinstance(value, dict | list) and value:
        return "keys with values" if isinstance(value, dict) else "a list"
    return _short(value, 60)


_WHOLE, _NUMBER, _YES_NO = "expected a whole number", "expected a number", "expected true or false"
_EXPECTED = {
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_parsing_size": _WHOLE,
    "int_from_float": _WHOLE,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "bool_type": _YES_NO,
    "bool_parsing": _YES_NO,
    "string_type": "expected text",
    "list_type": "expected a list",
    "too_short": "expected at least one",
    "dict_type": "expected keys with values",
    "model_type": "expected keys with values",
    "model_attributes_type": "expected keys with values",
}


def _section(path: list[Any]) -> type[Section]:
    sections: dict[str, type[Section]] = {
        "tasks": TaskSpec,
        "engine": EngineSpec,
        "sampling": SamplingSpec,
    }
    return sections.get(str(path[0]), JobSpec) if path else JobSpec


def check_same_ask(
    stored: dict[str, Any], now: dict[str, Any], *, retry_with: str, manifest: str | None = None
) -> None:
    """Raises FingerprintMismatch, naming each field, unless both asked the model the same.

    ``manifest``: what changed in it, in place of its identity."""
    changed = sorted(key for key in stored.keys() | now.keys() if stored.get(key) != now.get(key))
    if not changed:
        return
    lines = [
        f"manifest: {manifest}"
        if key == "manifest" and manifest is not None
        else f"{key}: was {_short(stored.get(key))}, now {_short(now.get(key))}"
        for key in changed
    ]
    raise FingerprintMismatch(
        "\n  ".join(
            ["this output holds answers to another question; these changed:", *lines],
        ),
        hint=f"keep both: {retry_with}\n  -> or start anew: the same command with --overwrite",
    )


def _short(value: object, length: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."
