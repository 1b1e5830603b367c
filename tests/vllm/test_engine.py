"""One engine, asked directly: what each kind of request does, and that none is lost."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

import pytest
from PIL import Image, ImageDraw

from vlmbatch.engines.vllm import VllmEngine
from vlmbatch.errors import ErrorCode, RequestFailed
from vlmbatch.grounding import Size
from vlmbatch.job import spec_from
from vlmbatch.models import demo_path
from vlmbatch.records import Completion, LoadedImage, Request, Sampling, Structure, TaskKind

COLOURS = ("red", "blue", "yellow")
CAPTION = "Describe the image briefly."
CACHE_GB = 2 / 1024
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"enum": [1, 2]}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
GREEDY = Sampling(max_tokens=20)


class Running:
    """A started engine on an event loop of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        settings = {"enforce_eager": "true", "block_size": "32", "mm_processor_cache_gb": CACHE_GB}
        job = spec_from(
            {
                "manifest": ["unused.parquet"],
                "model": "demo",
                "tasks": [{"name": "formed", "prompt": CAPTION, "json_schema": SCHEMA}],
                "engine": {
                    "name": "vllm",
                    "max_model_len": 512,
                    "max_num_seqs": 32,
                    "args": settings,
                },
            },
            where="the test",
        )

        async def start() -> VllmEngine:
            engine = VllmEngine(job, str(demo_path()))
            await engine.start()
            return engine

        self.engine = self._wait(start())

    def ask(self, requests: Sequence[Request]) -> list[Completion | BaseException]:
        """All at once."""

        async def together() -> list[Completion | BaseException]:
            asked = (self.engine.generate(request) for request in requests)
            return await asyncio.gather(*asked, return_exceptions=True)

        return self._wait(together())

    def answer(self, request: Request) -> Completion:
        (found,) = self.ask([request])
        assert isinstance(found, Completion), found
        return found

    def close(self) -> None:
        self._wait(self.engine.close())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=280)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    running = Running()
    yield running
    running.close()


def picture(number: int, colour: str = "red") -> LoadedImage:
    """A rectangle, in a place and on a ground that belong to this number alone."""
    pixels = Image.new("RGB", (64, 64), (200 + number % 50, 200 + number // 50 % 50, 230))
    x, y = number % 30, number // 30 % 30
    ImageDraw.Draw(pixels).rectangle([x, y, x + 24, y + 18], fill=colour)
    return LoadedImage(pixels, Size(64, 64), f"test-{colour}-{number}")


def request(
    row: int,
    image: LoadedImage,
    prompt: str = CAPTION,
    *,
    number: int = 0,
    sampling: Sampling = GREEDY,
    structure: Structure | None = None,
) -> Request:
    return Request(
        row=row,
        request=number,
        sample=0,
        task="caption",
        kind=TaskKind.CAPTION,
        prompt=prompt,
        question=None,
        images=(image,),
        sampling=sampling,
        structure=structure,
    )


def test_3000_images_through_a_cache_of_2_mb(running: Running) -> None:
    """48 KB each: the cache holds forty of them. Every one is answered, and by what it shows."""
    short = Sampling(max_tokens=4)
    asked = [request(i, picture(i, COLOURS[i % 3]), sampling=short) for i in range(3000)]
    found = running.ask(asked)
    lost = [each for each in found if not isinstance(each, Completion)]
    assert not lost, lost[:3]
    named = [COLOURS[i % 3] in found[i].text for i in range(3000)]
    assert sum(named) >= 2900, sum(named)  # the model is good at colours, not perfect


def test_a_request_too_long_fails_alone(running: Running) -> None:
    """Also where its image was never seen before, and is asked about again right after it."""
    before = running.answer(request(0, picture(1)))
    fresh = picture(99_000)
    long = request(1, fresh, "what is the color of the shape? " * 100)
    found = running.ask([request(0, picture(1)), long, request(1, fresh, number=1)])
    assert isinstance(found[1], RequestFailed)
    assert found[1].failure.code == ErrorCode.PROMPT_TOO_LONG
    assert re.search(r"is \d+ tokens long .* takes 511", found[1].failure.message)
    assert found[0] == before
    assert isinstance(found[2], Completion), found[2]
    assert "red" in found[2].text


def test_an_answer_is_held_to_its_form(running: Running) -> None:
    long = Sampling(max_tokens=60)
    as_json = Structure(json_schema=json.dumps(SCHEMA))
    value = json.loads(
        running.answer(request(0, picture(5), sampling=long, structure=as_json)).text
    )
    assert value["colour"] in ("red", "blue")
    assert value["count"] in (1, 2)
    choices = Structure(choices=("purple", "orange"))
    assert running.answer(request(0, picture(5), structure=choices)).text in ("purple", "orange")
    regex = Structure(regex="[0-9]{3}-[a-c]")
    chosen = running.answer(request(0, picture(5), structure=regex)).text
    assert re.fullmatch("[0-9]{3}-[a-c]", chosen), chosen


def test_how_tokens_are_picked(running: Running) -> None:
    image = picture(7)

    def text(**how: Any) -> str:
        return running.answer(request(0, image, sampling=Sampling(**how))).text

    exact = running.answer(request(0, image, sampling=Sampling(max_tokens=20, min_tokens=20)))
    assert exact.completion_tokens == 20
    assert exact.finish_reason == "length"
    greedy = running.answer(request(0, image))
    assert greedy.finish_reason == "stop"
    assert greedy.prompt_tokens
    assert "rectangle" in greedy.text
    assert "rectangle" not in text(max_tokens=20, stop=("rectangle",))
    hot = {"max_tokens": 20, "temperature": 2.0}
    assert text(**hot, seed=1) == text(**hot, seed=1)
    assert len({text(**hot, seed=seed) for seed in range(8)}) > 4
    forced = {"max_tokens": 40, "min_tokens": 40}
    assert text(**forced) != text(**forced, repetition_penalty=2.0)


def test_five_questions_share_their_image(running: Running) -> None:
    """Each image goes through the processor once; four of five questions find all whole blocks
    of the image's part of the prompt (64 tokens of it) computed."""
    questions = (
        "what shape is in the image?",
        "what is the color of the shape?",
        "is there a circle?",
        "is there a red shape?",
        "does the image contain a rectangle?",
    )
    rows = 40
    before = dict(running.engine.counters)
    asked = [
        request(row, picture(50_000 + row), question, number=i)
        for row in range(rows)
        for i, question in enumerate(questions)
    ]
    assert all(isinstance(each, Completion) for each in running.ask(asked))
    counted = {name: n - before.get(name, 0) for name, n in running.engine.counters.items()}
    assert counted["prompts"] == 5 * rows
    assert counted["processed_images"] == rows
    assert counted["cached_prompt_tokens"] >= 4 * 64 * rows
