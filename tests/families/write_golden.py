"""Writes golden_prompts.json: how every family words every task, and what an image costs.

python -m tests.families.write_golden
"""

import json
from pathlib import Path

from vlmbatch.catalogue import SIZES
from vlmbatch.families import ENTRIES, Entry
from vlmbatch.records import IMAGE, TaskKind
from vlmbatch.tasks import Ask

GOLDEN = Path(__file__).parent / "golden_prompts.json"
ASKS = {
    "caption": Ask(TaskKind.CAPTION),
    "caption, detailed": Ask(TaskKind.CAPTION, style="detailed"),
    "vqa": Ask(TaskKind.VQA, question="What colour is the bus?"),
    "ground": Ask(TaskKind.GROUND, question="the red bus", labels=("the red bus",)),
    "detect, one label": Ask(TaskKind.DETECT, question='["bus"]', labels=("bus",)),
    "detect": Ask(TaskKind.DETECT, question='["bus", "stop sign"]', labels=("bus", "stop sign")),
    "ocr": Ask(TaskKind.OCR),
    "ocr, detailed": Ask(TaskKind.OCR, style="detailed"),
}


def golden() -> str:
    return json.dumps({e.name: _of(e) for e in ENTRIES}, indent=1, ensure_ascii=False) + "\n"


def _of(entry: Entry) -> dict[str, object]:
    family = entry.make({})
    return {
        "whole prompts": family.raw,
        "prompts": {
            name: family.word(ask).replace(IMAGE, "<image>")
            for name, ask in ASKS.items()
            if ask.kind in entry.tasks
        },
        "image tokens": {f"{s.width}x{s.height}": family.image_tokens(s) for s in SIZES},
    }


if __name__ == "__main__":
    GOLDEN.write_text(golden(), encoding="utf-8")
