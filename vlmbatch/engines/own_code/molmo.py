"""Molmo 1: ``processor.process``, then ``generate_from_batch`` (its model card).

The family words the whole prompt, so the processor is told to add nothing to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlmbatch.engines.own_code import Args
from vlmbatch.engines.own_code.generating import Generation
from vlmbatch.engines.own_code.loading import Checkpoint
from vlmbatch.records import IMAGE, Completion, Request

END = "<|endoftext|>"


def load(checkpoint: Checkpoint, args: Args) -> Molmo:
    return Molmo(checkpoint, checkpoint.model(), checkpoint.processor())


class Molmo:
    images = 16

    def __init__(self, checkpoint: Checkpoint, model: Any, processor: Any) -> None:
        self._checkpoint, self._model, self._processor = checkpoint, model, processor
        end = processor.tokenizer.get_vocab().get(END)
        self._generation = Generation(model, processor.tokenizer, [end])

    def prepare(self, request: Request) -> dict[str, Any]:
        made = self._processor.process(
            images=[image.pixels for image in request.images],
            text=request.prompt.replace(IMAGE, ""),
            message_format="none",
            always_start_with_space=False,
        )
        return {name: value.unsqueeze(0) for name, value in made.items()}

    def answer(
        self, prepared: dict[str, Any], request: Request, is_over: Callable[[], bool]
    ) -> Completion:
        from transformers import GenerationConfig

        sampling, start = request.sampling, prepared["input_ids"].shape[1]
        output = self._model.generate_from_batch(
            {name: self._checkpoint.placed(value) for name, value in prepared.items()},
            GenerationConfig(use_cache=True, stop_strings=END, **self._generation.config(sampling)),
            tokenizer=self._processor.tokenizer,
            stopping_criteria=self._generation.stopping(sampling, start, is_over),
        )
        return self._generation.completion(output[0, start:].tolist(), sampling, start)
