"""Models that bring their own code (--trust-remote-code): which there are, and what they take.

Each has a module here that calls its code's entry points as its authors do; ``engine`` runs them.
Nothing is imported here that needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmbatch.engines import transformers_probe
from vlmbatch.engines.arguments import parsed
from vlmbatch.errors import UsageError
from vlmbatch.job import EngineSpec, SamplingSpec


@dataclass(frozen=True, slots=True)
class OwnCode:
    """What an adapter can pass on to the code that it calls."""

    module: str
    """Of this package."""
    classes: tuple[str, ...]
    """By which a config.json names it: ``architectures``, or the classes in ``auto_map``."""
    args: tuple[str, ...] = ()
    """Which of ``Args`` it takes."""
    system: bool = False
    generates: bool = True
    """It calls ``generate`` of transformers, so every sampling setting reaches it."""


@dataclass(frozen=True, slots=True)
class Args:
    """``--engine-arg key=value`` of these models."""

    tokenizer: str | None = None
    """CogVLM: a folder or a Hub id, where the checkpoint has no tokenizer of its own."""
    points: bool = False
    """Moondream: ground and detect are answered with points (``point``) instead of boxes."""


ADAPTERS = (
    OwnCode("moondream", ("HfMoondream",), args=("points",), generates=False),
    OwnCode("cogvlm", ("CogVLMForCausalLM",), args=("tokenizer",)),
    OwnCode("qwen_vl", ("QWenLMHeadModel",)),
    OwnCode("molmo", ("MolmoForCausalLM",)),
    OwnCode("phi3_v", ("Phi3VForCausalLM",), system=True),
    OwnCode("minicpm_v", ("MiniCPMV", "MiniCPMO"), system=True),
)

IN_OTHER_REPOSITORIES = ("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM", "LlavaQwenForCausalLM")
"""Classes of LLaVA's own repository and its forks (Yi-VL): code that is not on the Hub."""


def adapter_for(config: Mapping[str, Any]) -> OwnCode | None:
    """The adapter of a model with this config.json, if it has one."""
    names = _classes(config)
    if config.get("model_type") == "qwen" and "visual" not in config:
        return None  # the first text models have the same class
    return next((a for a in ADAPTERS if not names.isdisjoint(a.classes)), None)


def adapted_classes() -> tuple[str, ...]:
    """All classes that an adapter calls."""
    return tuple(name for adapter in ADAPTERS for name in adapter.classes)


def check(
    model: Mapping[str, Any],
    engine: EngineSpec,
    *,
    trusted: bool,
    sampling: SamplingSpec,
    system: str | None,
) -> None:
    """Raises UsageError for a model (as run.json keeps it) whose code may not run, or which cannot
    do what is asked; for ``transformers`` only, the other engines have their own ways."""
    config, name = model["config"], model["label"].partition("@")[0]
    names = _classes(config)
    for other in IN_OTHER_REPOSITORIES:
        if other in names:
            raise UsageError(
                f"{name} is in the form of another repository ({other}), whose code is not part of "
                "the checkpoint",
                hint="name a checkpoint that was converted for transformers",
            )
    known = config.get("model_type") in transformers_probe.image_text_classes()
    adapter = adapter_for(config)
    if not trusted and (adapter is not None or (_brings_code(config) and not known)):
        pinned = f" --revision {model['revision']}" if model["hub"] else ""
        raise UsageError(
            f"{name} brings its own code, and that runs only where it is trusted",
            hint=f"after reading that code: --trust-remote-code{pinned}",
        )
    args = parse_args(engine.args)
    given = [key for key in ("tokenizer", "points") if getattr(args, key)]
    for key in given:
        if adapter is None or key not in adapter.args:
            raise UsageError(f"--engine-arg {key} is nothing that {name} takes")
    if adapter is None:
        return
    if system is not None and not adapter.system:
        raise UsageError(f"--system is nothing that the code of {name} takes", hint="leave it out")
    if not adapter.generates and (sampling.min_tokens or sampling.repetition_penalty != 1):
        setting = "--min-tokens" if sampling.min_tokens else "--repetition-penalty"
        raise UsageError(
            f"{setting} is nothing that the code of {name} takes",
            hint="it takes --temperature, --top-p and --max-tokens",
        )


def parse_args(args: Mapping[str, str]) -> Args:
    """Raises UsageError for an unknown argument, or a value that cannot be read."""

    def parse(key: str, value: str) -> Any:
        if key == "tokenizer":
            return value
        if value.lower() not in ("true", "false"):
            raise ValueError(f"expected true or false, got {value!r}")
        return value.lower() == "true"

    return parsed("transformers", Args, args, parse)


def _brings_code(config: Mapping[str, Any]) -> bool:
    return bool(_auto_map(config).keys() - {"AutoConfig"})


def _classes(config: Mapping[str, Any]) -> set[str]:
    """The names of its classes, from ``architectures`` and from ``auto_map``'s ``file.Class``."""
    named = config.get("architectures")
    names = set(map(str, named)) if isinstance(named, list) else set()
    for target in _auto_map(config).values():
        for each in target if isinstance(target, list) else [target]:
            names.add(str(each).rpartition(".")[2])
    return names


def _auto_map(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("auto_map")
    return found if isinstance(found, Mapping) else {}
