"""MiniCPM-V and MiniCPM-o up to 4.5: ``chat`` (their model cards).

``chat`` returns text without its tokens and takes only some settings, so the ``generate`` of its
language model is given the settings of the request, and its tokens are read there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from vlmbatch.engines.own_code import Args
from vlmbatch.engines.own_code.generating import Generation
from vlmbatch.engines.own_code.loading import Checkpoint
from vlmbatch.records import IMAGE, Completion, Request


def load(checkpoint: Checkpoint, args: Args) -> MiniCPM:
    more = {}
    if "init_audio" in _parameters(checkpoint):  # MiniCPM-o: only its eyes are used
        more = {"init_audio": False, "init_tts": False}
    model = checkpoint.model("AutoModel", **more)
    return MiniCPM(checkpoint, model, checkpoint.tokenizer())


class MiniCPM:
    images = 16

    def __init__(self, checkpoint: Checkpoint, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._generation = Generation(model.llm, tokenizer)
        takes = inspect.signature(model.chat).parameters
        self._more: dict[str, Any] = {}
        if "processor" in takes:  # left out, it would be loaded without the pinned revision
            self._more["processor"] = checkpoint.processor()
        if "context" in takes:  # MiniCPM-V 1 and 2
            self._more["context"] = None
        self._generate = model.llm.generate
        model.llm.generate = self._watched
        self._settings: dict[str, Any] = {}
        self._output: Any = None
        self._prompt_tokens = 0

    def prepare(self, request: Request) -> Any:
        """The message; all else is done by ``chat``."""
        text = request.prompt.replace(IMAGE, "")
        pixels = [image.pixels for image in request.images]
        if len(pixels) == 1:
            return pixels[0], text
        return None, [*pixels, text]

    def answer(self, prepared: Any, request: Request, is_over: Callable[[], bool]) -> Completion:
        image, content = prepared
        sampling, self._output = request.sampling, None
        self._settings = {
            **self._generation.config(sampling),
            "stopping_criteria": self._generation.stopping(sampling, 0, is_over),
        }
        system = {} if request.system is None else {"system_prompt": request.system}
        self._model.chat(
            image=image,
            msgs=[{"role": "user", "content": content}],
            tokenizer=self._tokenizer,
            sampling=sampling.temperature > 0,
            max_new_tokens=sampling.max_tokens,
            **system,
            **self._more,
        )
        ids = self._output[0].tolist()
        return self._generation.completion(ids, sampling, self._prompt_tokens)

    def _watched(self, *args: Any, **kwargs: Any) -> Any:
        """``generate`` of the language model: from embeddings, so it returns new tokens only."""
        self._prompt_tokens = kwargs["inputs_embeds"].shape[1]
        ends = kwargs.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        self._generation.ends = sorted(
            {*self._generation.ends, *(e for e in ends if e is not None)}
        )
        settings = {**self._settings, "eos_token_id": self._generation.ends}
        self._output = self._generate(*args, **{**kwargs, **settings})
        return self._output


def _parameters(checkpoint: Checkpoint) -> set[str]:
    """Settings of the checkpoint's config."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.path, **checkpoint.options)
    return set(config.to_dict())
