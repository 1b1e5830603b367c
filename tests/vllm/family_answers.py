"""Asks tiny checkpoints on vLLM, one engine after another in this process; writes JSON lines.

    python -m tests.vllm.family_answers FOLDER ANSWERS NAME...

A line has the checkpoint's ``name`` and either ``error``, why its engine does not start, or the
``architecture`` that vLLM runs it as, and its ``answers``: by row and task, the text and the tokens
of the prompt. ``seconds``: until the engine was ready.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from tests import tiny_models_video as tiny
from vlmbatch.engines.vllm import VllmEngine
from vlmbatch.errors import EngineStartError
from vlmbatch.families import entry_named, family_for
from vlmbatch.families.base import Family
from vlmbatch.grounding import Size
from vlmbatch.job import spec_from
from vlmbatch.models import resolve_model
from vlmbatch.records import LoadedImage, Request, Sampling


async def asked(folder: Path) -> dict[str, Any]:
    started = time.monotonic()
    settings = {"enforce_eager": "true", "block_size": "32"}
    values = {
        "manifest": ["unused.parquet"],
        "model": str(folder),
        "tasks": [{"name": "caption"}],
        "engine": {"name": "vllm", "max_model_len": 1024, "max_num_seqs": 8, "args": settings},
    }
    engine = VllmEngine(spec_from(values, where="the test"), str(folder))
    try:
        await engine.start()
    except EngineStartError as error:
        await engine.close()
        return {"name": folder.name, "error": str(error)}
    seconds = time.monotonic() - started
    requests = requests_of(family_for(resolve_model(str(folder)).config))
    completions = await asyncio.gather(*map(engine.generate, requests))
    architecture = engine._model_class.__name__
    await engine.close()
    answers = [
        {"row": r.row, "task": r.task, "text": c.text, "prompt_tokens": c.prompt_tokens}
        for r, c in zip(requests, completions, strict=True)
    ]
    facts = {"architecture": architecture, "seconds": round(seconds, 1), "answers": answers}
    return {"name": folder.name, **facts}


def requests_of(family: Family) -> list[Request]:
    """Every task about every picture, as the loader would hand it over."""
    requests = []
    for row, picture in enumerate(tiny.pictures()):
        size = Size(*picture.size)
        given = family.target(size)
        pixels = family.prepare(picture.resize((given.width, given.height)))
        image = LoadedImage(pixels, size, f"picture-{row}")
        for number, ask in enumerate(tiny.asks(entry_named(family.name).tasks)):
            requests.append(
                Request(
                    *(row, number, 0, ask.kind.value, ask.kind, family.word(ask), None),
                    images=(image,),
                    labels=ask.labels,
                    sampling=Sampling(max_tokens=96),
                )
            )
    return requests


def main() -> None:
    import tests.vllm.quick_start  # noqa: F401

    folder, answers = Path(sys.argv[1]), Path(sys.argv[2])
    with answers.open("w") as file:
        for name in sys.argv[3:]:
            file.write(json.dumps(asyncio.run(asked(folder / name))) + "\n")


if __name__ == "__main__":  # vLLM's processes import this module again
    main()
