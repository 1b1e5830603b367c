"""The engine for models with their own code: one request at a time, as that code takes them."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from vlmbatch.engines.batcher import Batcher, one_line
from vlmbatch.engines.own_code import Args, OwnCode
from vlmbatch.engines.own_code.loading import Checkpoint
from vlmbatch.engines.transformers import BatchedEngine, Source, load_with, translated
from vlmbatch.errors import EngineStartError, ErrorCode, Stage, failed
from vlmbatch.records import Completion, Request


class Adapter(Protocol):
    """One kind of model, loaded. ``prepare`` may run while another request is being answered."""

    images: int
    """The most images that a request may have."""

    def prepare(self, request: Request) -> Any:
        """The input of ``answer``, on the CPU; the model itself is not touched."""

    def answer(self, prepared: Any, request: Request, is_over: Callable[[], bool]) -> Completion:
        """May return anything as soon as ``is_over()``."""


class OwnCodeEngine(BatchedEngine):
    """Runs a checkpoint through the entry points of its own code, one request at a time."""

    capacity = 2
    """One request is answered, the next one prepared."""

    def __init__(
        self,
        model: str,
        kind: OwnCode,
        args: Args,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        requirements: tuple[str, ...] = (),
    ) -> None:
        super().__init__(dtype, device)
        self._source = Source(model, revision, trust_remote_code=True)
        self._kind, self._args = kind, args
        self._requirements = requirements

    async def start(self) -> None:
        model = await asyncio.to_thread(lambda: load_with(self._load, self._source, *self._wanted))
        self._model, self._batcher = model, Batcher(model, 1)

    def _load(self, source: Source, dtype: str, device: str) -> _OneByOne:
        module = import_module(f"vlmbatch.engines.own_code.{self._kind.module}")
        try:
            with tempfile.TemporaryDirectory(prefix="vlmbatch-") as scratch:
                checkpoint = Checkpoint(source, dtype, device, Path(scratch))
                adapter: Adapter = module.load(checkpoint, self._args)
        except EngineStartError:
            raise
        except Exception as error:
            raise self._in_its_code(error) or error from None
        return _OneByOne(adapter, dtype, device)

    def _in_its_code(self, error: Exception) -> EngineStartError | None:
        """What to say if it was the checkpoint's code that raised this, with the place."""
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "transformers_modules" in Path(frame.filename).parts]
        if not own or isinstance(error, MemoryError):
            return None
        where = f"{Path(own[-1].filename).name}, line {own[-1].lineno}"
        hint = "the whole log tells more; was the code written for other versions of its libraries?"
        if self._requirements:
            hint = f"its authors wrote it for {', '.join(self._requirements)}"
        version = getattr(sys.modules.get("transformers"), "__version__", "?")
        return EngineStartError(
            f"the own code of {self._source} fails under transformers {version} ({where}): "
            f"{one_line(error)}",
            hint=hint,
        )


class _Prepared:
    __slots__ = ("inputs", "request")

    def __init__(self, inputs: Any, request: Request) -> None:
        self.inputs, self.request = inputs, request


class _OneByOne:
    """An adapter as the batcher sees it."""

    def __init__(self, adapter: Adapter, dtype: str, device: str) -> None:
        self.dtype, self.device = dtype, device
        self._adapter = adapter

    def prepare(self, requests: Sequence[Request]) -> _Prepared:
        (request,) = requests
        if (images := len(request.images)) > self._adapter.images:
            raise failed(
                ErrorCode.BAD_ROW,
                Stage.PROMPT,
                f"the model takes {self._adapter.images} image, and this row has {images}",
            )
        return _Prepared(self._adapter.prepare(request), request)

    def answer(self, prepared: _Prepared, is_over: Callable[[], bool]) -> Sequence[Completion]:
        import torch

        request = prepared.request
        if request.sampling.seed is not None:
            torch.manual_seed(request.sampling.seed)
        try:
            with torch.inference_mode():
                return [self._adapter.answer(prepared.inputs, request, is_over)]
        except Exception as error:
            raise translated(error, self.device, 1) from None
