"""Moondream 2 and 3: ``caption``, ``query``, ``detect`` and ``point`` of its own code.

An image is encoded once for all that is asked about it: the questions of a row come one after the
other. Boxes come as objects and are passed on as JSON.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from vlmbatch.engines.own_code import Args
from vlmbatch.engines.own_code.loading import Checkpoint
from vlmbatch.errors import EngineStartError
from vlmbatch.records import Completion, LoadedImage, Request, TaskKind

METHODS = ("encode_image", "caption", "query", "detect", "point")
LENGTHS = {"caption short": "short", "caption": "normal"}
"""What the family's words for a caption mean."""
MOST_OBJECTS = 50
"""The default of its code."""
KEPT_ENCODINGS = 2
"""One takes about 0.15 GB (keys and values of 730 positions in every layer, in half precision)."""


def load(checkpoint: Checkpoint, args: Args) -> Moondream:
    from transformers import PreTrainedModel

    if not hasattr(PreTrainedModel, "all_tied_weights_keys"):
        # Transformers 5 sets it in post_init(), which Moondream's code does not call.
        PreTrainedModel.all_tied_weights_keys = {}
    model = checkpoint.model()
    if lacking := [name for name in METHODS if not hasattr(type(model), name)]:
        raise EngineStartError(
            f"the code of {checkpoint.source} has no {lacking[0]}()",
            hint="take a later --revision: moondream2 has it since 2025-01-09",
        )
    return Moondream(model, points=args.points)


class Moondream:
    images = 1

    def __init__(self, model: Any, *, points: bool) -> None:
        self._model, self._points = model, points
        self._tokenizer = getattr(getattr(model, "model", None), "tokenizer", None)
        self._encoded: OrderedDict[str, Any] = OrderedDict()

    def prepare(self, request: Request) -> LoadedImage:
        return request.images[0]

    def answer(
        self, prepared: LoadedImage, request: Request, is_over: Callable[[], bool]
    ) -> Completion:
        image = self._encoding_of(prepared)
        if request.kind in (TaskKind.GROUND, TaskKind.DETECT):
            return self._objects(image, request.labels)
        sampling = request.sampling
        settings = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
        }
        length = LENGTHS.get(request.prompt) if request.kind is TaskKind.CAPTION else None
        if length is not None:
            said = self._model.caption(image, length=length, settings=settings)
            text = said if isinstance(said, str) else said["caption"]  # Moondream 3 gives the text
        else:
            text = self._model.query(image, request.prompt, settings=settings)["answer"]
        return self._completion(text, request)

    def _encoding_of(self, image: LoadedImage) -> Any:
        if image.key not in self._encoded:
            self._encoded[image.key] = self._model.encode_image(image.pixels)
            while len(self._encoded) > KEPT_ENCODINGS:
                self._encoded.popitem(last=False)
        self._encoded.move_to_end(image.key)
        return self._encoded[image.key]

    def _objects(self, image: Any, labels: tuple[str, ...]) -> Completion:
        method, name = (self._model.detect, "objects")
        if self._points:
            method, name = (self._model.point, "points")
        found, cut = [], False
        for label in labels:
            objects = method(image, label, settings={"max_objects": MOST_OBJECTS})[name]
            cut = cut or len(objects) >= MOST_OBJECTS
            found += [{**each, "label": label} for each in objects]
        text = json.dumps(found, ensure_ascii=False)
        return Completion(text, "length" if cut else "stop")

    def _completion(self, text: str, request: Request) -> Completion:
        """Its code tells neither why it ended nor how many tokens there were: they are counted."""
        stops = [at for at in map(text.find, request.sampling.stop) if at >= 0]
        if self._tokenizer is None:
            return Completion(text[: min(stops)] if stops else text, "stop")
        tokens = len(self._tokenizer.encode(text).ids)
        if stops:
            return Completion(text[: min(stops)], "stop", None, tokens)
        ended = tokens < request.sampling.max_tokens
        return Completion(text, "stop" if ended else "length", None, tokens)
