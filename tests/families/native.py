"""Tiny checkpoints that are taught answers in their family's syntax, and asked by real runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from tests.families.test_contract import step_of
from tests.harness import picture, read_results, run_json, vlmbatch, write_manifest
from tests.tiny_models.teaching import teach
from vlmbatch.families import Family, entry_named, family_for
from vlmbatch.families.base import BOX_TASKS
from vlmbatch.grounding import Box, Size
from vlmbatch.job import TaskSpec
from vlmbatch.models import resolve_model
from vlmbatch.records import LoadedImage, Request, Row, Sampling, TaskKind
from vlmbatch.tasks import make_task, requests_of

PICTURES = {
    Size(64, 48): "firebrick",
    Size(40, 90): "limegreen",
    Size(200, 100): "mediumblue",
    Size(33, 33): "gold",
}
TEXTS = {TaskKind.CAPTION: "a red cup", TaskKind.VQA: "two", TaskKind.OCR: "STOP"}


@dataclass(frozen=True)
class Native:
    """A checkpoint of a family, and what is particular about it."""

    build: Callable[[Path], Path]
    family: str
    said: Mapping[TaskKind, str] = field(default_factory=dict)
    """What it is taught to say where that is not just TEXTS."""
    prompt: Callable[[str], str] = lambda text: text
    """All that its processor makes of a text; its image is one token, or none if none was in it."""
    decoded: Callable[[str], str] = lambda text: text
    """An answer as it is decoded."""
    rate: float = 1e-2
    """How fast it is taught."""


def boxed(number: int, size: Size) -> Box:
    """Another box for every picture."""
    return Box(
        "cup",
        size.width * (0.1 + 0.05 * number),
        size.height * 0.2,
        size.width * 0.7,
        size.height * (0.6 + 0.05 * number),
    )


def seen(family: Family, size: Size, colour: str) -> LoadedImage:
    """A picture of one colour as the loader hands it over."""
    target = family.target(size)
    pixels = family.prepare(Image.new("RGB", (target.width, target.height), colour))
    return LoadedImage(pixels, size, f"{size}")


def specs(family: Family) -> list[TaskSpec]:
    return [
        TaskSpec(name=kind, question="how many?", phrase="cup", labels=["cup"])
        for kind in entry_named(family.name).tasks
    ]


def lessons(native: Native, family: Family) -> list[tuple[Request, str]]:
    """Of every picture and task: the request as a run makes it, and the answer."""
    found = []
    tasks = [make_task(spec) for spec in specs(family)]
    for number, (size, colour) in enumerate(PICTURES.items()):
        image = seen(family, size, colour)
        row = Row(0, "", (), {})
        for request in requests_of(row, tasks, family, system=None, sampling=Sampling()):
            text = native.said.get(request.kind) or TEXTS.get(request.kind)
            answer = text or family.write([boxed(number, size)], image=image)
            found.append((replace(request, images=(image,)), answer))
    return found


def check(native: Native, folder: Path) -> None:
    """One run with all tasks: prompts cost what the family says, answers are read as meant."""
    model = native.build(folder / "model")
    family = family_for(resolve_model(str(model)).config)
    assert family.name == native.family
    taught = lessons(native, family)
    teach(model, taught, family=family, rate=native.rate)
    results = run(model, family, folder)
    assert run_json(folder / "out")["job"]["family"] == native.family
    assert len(results) == len(taught)
    for result, (request, answer) in zip(results, taught, strict=True):
        (image,) = request.images
        assert (result["status"], result["error"]) == ("ok", None), result
        assert result["finish_reason"] == "stop"
        beside = text_tokens(native, model, family, request)
        assert result["prompt_tokens"] == beside + family.image_tokens(image.size), result
        expected = native.decoded(answer)
        for stop in family.stop:
            expected = expected.partition(stop)[0]
        assert result["raw"].strip() == expected.strip()
        if request.kind in BOX_TASKS:
            assert result["text"] is None
            number = list(PICTURES).index(image.size)
            near(result["boxes"], boxed(number, image.size), step_of(family, image.size))
        else:
            assert result["text"] == TEXTS[request.kind]
            assert result["boxes"] is None


def run(model: Path, family: Family, folder: Path) -> list[dict[str, Any]]:
    """The results of all tasks of the family about all pictures; the family is not named."""
    pictures = [picture(size.width, size.height, colour) for size, colour in PICTURES.items()]
    manifest = write_manifest(folder / "pictures.parquet", {"image": pictures})
    tasks = [word for spec in specs(family) for word in ("-t", spec.name)]
    options = ["--question", "how many?", "--phrase", "cup", "--labels", "cup"]
    wanted = {"vqa": options[:2], "ground": options[2:4], "detect": options[4:]}
    asked = [word for name in tasks[1::2] for word in wanted.get(name, [])]
    engine = ["--engine", "transformers", "--max-tokens", "80", "--dtype", "float32"]
    done = vlmbatch("run", manifest, *tasks, *asked, "-m", model, "-o", folder / "out", *engine)
    assert done.exit_code == 0, done
    return read_results(folder / "out").to_pylist()


def near(boxes: Sequence[dict[str, Any]], meant: Box, step: tuple[float, float]) -> None:
    """One box, and no edge of it is further off than a step of the family's grid."""
    (box,) = boxes
    assert box["label"] == meant.label
    for name, limit in zip(("x1", "y1", "x2", "y2"), step * 2, strict=True):
        assert abs(box[name] - getattr(meant, name)) <= limit * 1.001, (box, meant)


def text_tokens(native: Native, model: Path, family: Family, request: Request) -> int:
    """What the request's prompt costs beside the image."""
    checkpoint = loaded(model)
    checkpoint.frame = family.frame
    text = checkpoint.render(request)
    placeholder = 1 if checkpoint._image_token else 0
    return len(checkpoint._tokenizer(native.prompt(text))["input_ids"]) - placeholder


@lru_cache(maxsize=1)
def loaded(model: Path) -> Any:
    """The checkpoint as the engine loads it."""
    from vlmbatch.engines.transformers import Source, load

    return load(Source(str(model), None, False), "float32", "cpu")
