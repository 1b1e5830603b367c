"""CogVLM: ``build_conversation_input_ids``, then ``generate`` (README of THUDM/CogVLM).

The family words the whole question in the checkpoint's template, so the code is told ``base``, its
template that adds nothing. Its tokenizer is Vicuna's, which the checkpoints do not hold.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmbatch.engines.own_code import Args
from vlmbatch.engines.own_code.generating import Generation
from vlmbatch.engines.own_code.loading import Checkpoint
from vlmbatch.records import IMAGE, Completion, Request

TOKENIZER = "lmsys/vicuna-7b-v1.5"


def load(checkpoint: Checkpoint, args: Args) -> CogVLM:
    folder = Path(checkpoint.source.model)
    has_one = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    other = args.tokenizer or (None if has_one else TOKENIZER)
    return CogVLM(checkpoint, checkpoint.model(), checkpoint.tokenizer(other))


class CogVLM:
    images = 1

    def __init__(self, checkpoint: Checkpoint, model: Any, tokenizer: Any) -> None:
        self._checkpoint, self._model, self._tokenizer = checkpoint, model, tokenizer
        self._generation = Generation(model, tokenizer)

    def prepare(self, request: Request) -> dict[str, Any]:
        made = self._model.build_conversation_input_ids(
            self._tokenizer,
            query=request.prompt.replace(IMAGE, ""),
            history=[],
            images=[image.pixels for image in request.images],
            template_version="base",
        )
        names = ("input_ids", "token_type_ids", "attention_mask")
        return {**{name: made[name].unsqueeze(0) for name in names}, "images": made["images"]}

    def answer(
        self, prepared: dict[str, Any], request: Request, is_over: Callable[[], bool]
    ) -> Completion:
        placed, sampling = self._checkpoint.placed, request.sampling
        start = prepared["input_ids"].shape[1]
        inputs = {name: placed(value) for name, value in prepared.items() if name != "images"}
        output = self._model.generate(
            **inputs,
            images=[[placed(image) for image in prepared["images"]]],
            stopping_criteria=self._generation.stopping(sampling, start, is_over),
            **self._generation.config(sampling),
        )
        return self._generation.completion(output[0, start:].tolist(), sampling, start)
