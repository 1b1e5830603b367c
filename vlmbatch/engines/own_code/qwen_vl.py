"""Qwen-VL and Qwen-VL-Chat: the image is a path in the prompt, ``<img>PATH</img>``.

Its code opens that file, so each image is written to a temporary one (README of Qwen-VL).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vlmbatch.engines.own_code import Args
from vlmbatch.engines.own_code.generating import Generation
from vlmbatch.engines.own_code.loading import Checkpoint
from vlmbatch.records import IMAGE, Completion, LoadedImage, Request

FIRST = "Picture 1: "
"""What the chat model's prompt has before its image; the next one is ``Picture 2: ``."""


def load(checkpoint: Checkpoint, args: Args) -> QwenVL:
    return QwenVL(checkpoint, checkpoint.model(), checkpoint.tokenizer())


@dataclass(frozen=True, slots=True)
class Prepared:
    files: list[Any]
    """The images; a file is gone when it is closed."""
    inputs: dict[str, Any]


class QwenVL:
    images = 16

    def __init__(self, checkpoint: Checkpoint, model: Any, tokenizer: Any) -> None:
        self._checkpoint, self._model, self._tokenizer = checkpoint, model, tokenizer
        ends = [getattr(tokenizer, name, None) for name in ("eod_id", "im_end_id", "im_start_id")]
        self._generation = Generation(model, tokenizer, ends)

    def prepare(self, request: Request) -> Prepared:
        files = [_written(image) for image in request.images]
        text = _with_paths(request.prompt, [file.name for file in files])
        made = self._tokenizer(text, return_tensors="pt")
        names = ("input_ids", "attention_mask")
        return Prepared(files, {name: made[name] for name in names if name in made})

    def answer(
        self, prepared: Prepared, request: Request, is_over: Callable[[], bool]
    ) -> Completion:
        sampling, start = request.sampling, prepared.inputs["input_ids"].shape[1]
        try:
            output = self._model.generate(
                **{name: self._checkpoint.placed(each) for name, each in prepared.inputs.items()},
                stopping_criteria=self._generation.stopping(sampling, start, is_over),
                **self._generation.config(sampling),
            )
        finally:
            for file in prepared.files:
                file.close()
        return self._generation.completion(output[0, start:].tolist(), sampling, start)


def _written(image: LoadedImage) -> Any:
    file = tempfile.NamedTemporaryFile(prefix="vlmbatch-", suffix=".png")  # noqa: SIM115
    image.pixels.save(file, "PNG", compress_level=1)
    file.flush()
    return file


def _with_paths(prompt: str, paths: list[str]) -> str:
    """The images at their mark; before a prompt without one."""
    tags = [f"<img>{path}</img>" for path in paths]
    if IMAGE not in prompt:
        return "".join(tags) + prompt
    if FIRST + IMAGE in prompt:
        tags[1:] = [f"\nPicture {n}: {tag}" for n, tag in enumerate(tags[1:], 2)]
    return prompt.replace(IMAGE, "".join(tags), 1)
