"""Asks a model in this process, worded and read by its family."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from vlmbatch.engines import make_engine
from vlmbatch.engines.base import Engine
from vlmbatch.families import entry_named, family_for
from vlmbatch.grounding import Size
from vlmbatch.job import EngineSpec, JobSpec
from vlmbatch.models import resolve_model
from vlmbatch.records import Completion, LoadedImage, Request, TaskKind
from vlmbatch.tasks import Ask

RED, BLUE, GREEN = (20, 10, 80, 60), (120, 40, 180, 90), (10, 100, 60, 180)
"""Rectangles, in pixels: x1, y1, x2, y2, the last two exclusive."""

ASKS = (
    Ask(TaskKind.CAPTION),
    Ask(TaskKind.VQA, question="which colour?"),
    Ask(TaskKind.GROUND, question="the blue one", labels=("the blue one",)),
)


def picture(size: tuple[int, int], **rectangles: tuple[int, int, int, int]) -> Image.Image:
    image = Image.new("RGB", size, "white")
    for colour, (x1, y1, x2, y2) in rectangles.items():
        pure = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}[colour]
        ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), fill=pure)
    return image


def engine_of(folder: Path, **args: str) -> Engine:
    found = resolve_model(str(folder))
    job = JobSpec(
        manifest="m",
        output="o",
        model=str(folder),
        engine=EngineSpec(name="transformers", args=args),
        trust_remote_code=True,
    )
    family = family_for(found.config, model_id=folder.name)
    return make_engine(job, {"path": found.path, "config": found.config, "hub": False}, family)


def ask(engine: Engine, *requests: Request) -> list[Completion | BaseException]:
    async def answers() -> list[Completion | BaseException]:
        await engine.start()
        try:
            asked = (engine.generate(request) for request in requests)
            return await asyncio.gather(*asked, return_exceptions=True)
        finally:
            await engine.close()

    return asyncio.run(answers())


def request(prompt: str, *pixels: Image.Image, **more: Any) -> Request:
    pixels = pixels or (picture((200, 100), red=RED, blue=BLUE),)
    images = tuple(
        LoadedImage(each, Size(*each.size), key=str(at)) for at, each in enumerate(pixels)
    )
    kind = more.pop("kind", TaskKind.VQA)
    return Request(0, 0, 0, str(kind), kind, prompt, prompt, images=images, **more)


def answers_of(folder: Path) -> list[Any]:
    """To ``ASKS``, as far as the family has them: texts, and boxes or points as tuples."""
    family = family_for(resolve_model(str(folder)).config, model_id=folder.name)
    asks = [each for each in ASKS if each.kind in entry_named(family.name).tasks]
    asked = [request(family.word(each), kind=each.kind, labels=each.labels) for each in asks]
    return [
        _told(family.read(each.kind, _text(answer), labels=each.labels, image=each.images[0]))
        for each, answer in zip(asked, ask(engine_of(folder), *asked), strict=True)
    ]


def _text(answer: Completion | BaseException) -> str:
    if isinstance(answer, BaseException):
        raise answer
    return answer.text


def _told(answer: Any) -> str | Sequence[Sequence[Any]]:
    if answer.points:
        return [(p.label, p.x, p.y) for p in answer.points]
    if answer.boxes is not None:
        return [(b.label, b.x1, b.y1, b.x2, b.y2) for b in answer.boxes]
    return str(answer.text)
