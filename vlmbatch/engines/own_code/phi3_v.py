"""Phi-3-vision and Phi-3.5-vision: numbered images in the chat template (their model cards)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlmbatch.engines.own_code import Args
from vlmbatch.engines.own_code.generating import Generation
from vlmbatch.engines.own_code.loading import Checkpoint
from vlmbatch.records import IMAGE, Completion, Request


def load(checkpoint: Checkpoint, args: Args) -> Phi3V:
    model = checkpoint.model(_attn_implementation="eager")  # else its code wants flash-attn
    return Phi3V(checkpoint, model, checkpoint.processor())


class Phi3V:
    images = 16

    def __init__(self, checkpoint: Checkpoint, model: Any, processor: Any) -> None:
        self._checkpoint, self._model, self._processor = checkpoint, model, processor
        self._generation = Generation(model, processor.tokenizer)

    def prepare(self, request: Request) -> dict[str, Any]:
        marks = "".join(f"<|image_{n}|>\n" for n in range(1, len(request.images) + 1))
        user = marks + request.prompt.replace(IMAGE, "")
        messages = [{"role": "user", "content": user}]
        if request.system is not None:
            messages.insert(0, {"role": "system", "content": request.system})
        prompt = self._processor.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        images = [image.pixels for image in request.images]
        return dict(self._processor(prompt, images, return_tensors="pt"))

    def answer(
        self, prepared: dict[str, Any], request: Request, is_over: Callable[[], bool]
    ) -> Completion:
        sampling, start = request.sampling, prepared["input_ids"].shape[1]
        output = self._model.generate(
            **{name: self._checkpoint.placed(value) for name, value in prepared.items()},
            stopping_criteria=self._generation.stopping(sampling, start, is_over),
            **self._generation.config(sampling),
        )
        return self._generation.completion(output[0, start:].tolist(), sampling, start)
