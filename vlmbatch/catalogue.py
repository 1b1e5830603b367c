"""What ``vlmbatch models`` says: the families, and how one model will be asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmbatch.engines import transformers_probe, vllm_probe
from vlmbatch.engines.own_code import adapted_classes
from vlmbatch.families import ENTRIES, Entry, entry_of
from vlmbatch.families.own import installed_entries
from vlmbatch.grounding import Size
from vlmbatch.models import DEMO, resolve_model
from vlmbatch.records import IMAGE, TaskKind
from vlmbatch.tasks import PLACEHOLDERS, Ask

NOT_INSTALLED = "not installed"
SIZES = (Size(640, 480), Size(1920, 1080))
"""Of which the image tokens are told."""

ASKS = {
    "caption": Ask(TaskKind.CAPTION),
    "caption, detailed": Ask(TaskKind.CAPTION, style="detailed"),
    **{str(kind): ask for kind, ask in PLACEHOLDERS.items()},
}


def describe_families() -> list[dict[str, Any]]:
    """One entry per family, in the order in which they are tried."""
    return [
        {
            "family": entry.name,
            "models": ", ".join(entry.checkpoints),
            "tasks": ", ".join(entry.tasks),
            "boxes": entry.boxes or "none",
            "evidence": entry.evidence,
            "own_code": entry.own_code,
            "requirements": ", ".join(entry.requirements),
            **_engines_of(entry),
            "note": entry.note,
        }
        for entry in (*installed_entries(), *ENTRIES)
    ]


def describe_model(name: str, family: str | None = None) -> dict[str, Any]:
    """Where the model is, its family, the engines that know it, and how each task is worded.

    A prompt is the user's turn of the model's chat template; that of a model without one is whole,
    ``<image>`` stands where the image goes.
    """
    found = resolve_model(name, None)
    entry = entry_of(found.config, name, family)
    chosen = entry.make(found.config)
    return {
        "model": name,
        "path": found.path,
        "revision": found.revision,
        "family": chosen.name,
        "boxes": entry.boxes or "none",
        "box_spaces": ", ".join(entry.box_spaces),
        "evidence": entry.evidence,
        "note": entry.note,
        "prompt_form": "whole" if chosen.raw else "chat template",
        "prompts": {
            task: chosen.word(ask).replace(IMAGE, "<image>")
            for task, ask in ASKS.items()
            if ask.kind in entry.tasks
        },
        "image_tokens": {
            f"{size.width}x{size.height}": chosen.image_tokens(size) for size in SIZES
        },
        "engines": _engines(found.config),
    }


def _engines_of(entry: Entry) -> dict[str, str]:
    """Which of its models the libraries that are installed here have, by their own registries:
    model types of transformers, classes of vLLM."""
    classes = transformers_probe.image_text_classes()
    if entry.name == DEMO:  # it is known by its config.json, and not by its type
        types = ["idefics3"]
    elif entry is ENTRIES[-1]:
        types = []
    else:
        ids = [checkpoint.rpartition("/")[2].lower() for checkpoint in entry.checkpoints]
        ids = [each for each in ids if not entry.matches({}, each)]  # else the name says it all
        types = [t for t in classes if any(entry.matches({"model_type": t}, i) for i in ids)]
    own = not set(adapted_classes()).isdisjoint(entry.architectures)
    by_transformers = [*sorted(types), *(["its own code"] if own else [])]
    named = {*(classes[t] for t in types if t in classes), *entry.architectures}
    by_vllm = sorted(named & vllm_probe.image_architectures())
    any_other = "any" if entry is ENTRIES[-1] else "no"
    return {
        "transformers": ", ".join(by_transformers) or any_other
        if transformers_probe.is_installed()
        else NOT_INSTALLED,
        "vllm": ", ".join(by_vllm) or any_other if vllm_probe.is_installed() else NOT_INSTALLED,
    }


def _engines(config: Mapping[str, Any]) -> dict[str, str]:
    """What each engine that is installed here says about the model."""
    kind, in_transformers = config.get("model_type"), NOT_INSTALLED
    if transformers_probe.is_installed():
        known = kind in transformers_probe.image_text_classes()
        in_transformers = "yes" if known else f"does not know the model type {kind}"
    in_vllm = NOT_INSTALLED
    if vllm_probe.is_installed():
        architectures = config.get("architectures")
        names = architectures if isinstance(architectures, list) else []
        in_vllm = vllm_probe.probe(tuple(map(str, names))).problem or "yes"
    return {"transformers": in_transformers, "vllm": in_vllm}
