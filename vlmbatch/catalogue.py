"""What ``vlmbatch models`` says: the families, and how one model will be asked."""

from __future__ import annotations

from typing import Any

from vlmbatch.families import FAMILIES, family_for
from vlmbatch.models import resolve_model
from vlmbatch.records import TaskKind
from vlmbatch.tasks import Ask

_FOR = {
    "demo": ("demo", "location tokens <loc_0> to <loc_64>, xyxy", "tested"),
    "idefics3": ("SmolVLM, Idefics3", "JSON 0 to 1000, xyxy (a guess: not trained)", "unverified"),
    "generic": ("any other with a chat template", "JSON 0 to 1000, xyxy (a guess)", "unverified"),
}


def describe_families() -> list[dict[str, Any]]:
    return [
        {"family": name, "models": _FOR[name][0], "boxes": _FOR[name][1], "evidence": _FOR[name][2]}
        for name in FAMILIES
    ]


def describe_model(name: str) -> dict[str, Any]:
    """Where the model is, its family, and the wording of each task."""
    found = resolve_model(name, None)
    family = family_for(found.config)
    asks = {
        "caption": Ask(TaskKind.CAPTION),
        "caption, detailed": Ask(TaskKind.CAPTION, style="detailed"),
        "vqa": Ask(TaskKind.VQA, question="{question}"),
        "ground": Ask(TaskKind.GROUND, question="{phrase}", labels=("{phrase}",)),
        "detect": Ask(TaskKind.DETECT, labels=("{label}", "{label}")),
        "ocr": Ask(TaskKind.OCR),
    }
    return {
        "model": name,
        "path": found.path,
        "revision": found.revision,
        "family": family.name,
        "boxes": _FOR[family.name][1],
        "prompts": {task: family.word(ask) for task, ask in asks.items()},
    }
