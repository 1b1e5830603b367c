"""The transformers engine: any image-text-to-text checkpoint, on a GPU or on the CPU.

The only module that imports torch and transformers, and it does so when an engine starts.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vlmbatch.engines.batcher import Batcher, BatchTooLarge, one_line
from vlmbatch.errors import EngineDead, EngineStartError, ErrorCode, Stage, failed
from vlmbatch.records import IMAGE, Completion, Request, Sampling

BATCH_ON_CPU, BATCH_ON_GPU = 16, 32
DTYPES = ("float32", "bfloat16", "float16")
HUB_SECONDS = 10

Loaded = TypeVar("Loaded")

END_OF_TURN = ("<end_of_utterance>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>")
"""Ends a chat turn wherever it exists as a token, whatever generation_config.json says."""

PLACE_IMAGES_THEMSELVES = (
    "Blip2Processor",
    "Florence2Processor",
    "FuyuProcessor",
    "InstructBlipProcessor",
    "Kosmos2Processor",
)
"""Processors that put the images into a raw prompt (transformers 5.19: each one's __call__)."""

SHIFTED_BY_PADDING = ("kosmos-2",)
"""Model types whose answers change with padding (measured on transformers 5.19): only equal prompts
share a batch. Whatever its size, an image is as many tokens to them."""

NOT_FOR_GENERATE = ("labels",)
"""What processors return for training (transformers 5.19: PaliGemmaProcessor)."""

TOKENS_AROUND_STOP = 8
"""An answer's end is looked at with so many tokens more than its longest stop text has bytes."""

TOKEN_IDS = (
    "bos_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
)
"""All that is kept of generation_config.json; how to sample is said by the request."""


class BatchedEngine:
    """What engines share that answer in batches, with a model that a thread of theirs loads.

    ``_batcher`` and ``_model`` (which knows its ``dtype`` and ``device``) are set by ``start``.
    """

    def __init__(self, dtype: str, device: str | None) -> None:
        self._wanted = (dtype, device)
        self._model: Any = None
        self._batcher: Batcher[Any] | None = None

    async def generate(self, request: Request) -> Completion:
        if self._batcher is None:
            raise EngineDead("the engine was not started")
        return await self._batcher.generate(request)

    async def close(self) -> None:
        if self._batcher is not None:
            await self._batcher.close()
        self._model = None

    @property
    def dtype(self) -> str:
        """``float32``, ``bfloat16`` or ``float16``; before the start, what was asked for."""
        return str(self._model.dtype) if self._model else self._wanted[0]

    @property
    def device(self) -> str | None:
        """``cpu``, ``cuda``, ``mps``, ...; before the start, what was asked for."""
        return str(self._model.device) if self._model else self._wanted[1]


class TransformersEngine(BatchedEngine):
    """Runs a checkpoint with ``generate`` of transformers, in batches of requests that fit.

    ``model`` is a local folder or a Hub id. Greedy answers do not depend on the batch (exactly so
    in float32, nearly so in half precision). Sampled answers can be reproduced with a seed only at
    batch size 1: the seed is set once per batch, so a request's draws depend on its neighbours.

    ``frame`` and ``text_of`` are those of the model's family.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        batch_size: int | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        frame: str | None = None,
        text_of: Callable[[Sequence[str]], str] | None = None,
    ) -> None:
        super().__init__(dtype, device)
        self._source = Source(model, revision, trust_remote_code)
        self._frame, self._text_of = frame, text_of
        self._batch_size = batch_size
        self.capacity = 2 * (batch_size or BATCH_ON_GPU)

    async def start(self) -> None:
        checkpoint = await asyncio.to_thread(load, self._source, *self._wanted)
        default = BATCH_ON_CPU if checkpoint.device == "cpu" else BATCH_ON_GPU
        batch_size = self._batch_size or default
        self.capacity = 2 * batch_size  # one batch is answered, the next one prepared
        self._model = checkpoint
        checkpoint.frame, checkpoint.text_of = self._frame, self._text_of
        self._batcher = Batcher(checkpoint, batch_size, checkpoint.group)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a checkpoint comes from. A folder's revision only names its content."""

    model: str
    revision: str | None
    trust_remote_code: bool

    @property
    def is_folder(self) -> bool:
        return Path(self.model).is_dir()

    def __str__(self) -> str:
        named = self.is_folder or self.revision is None
        return self.model if named else f"{self.model} at {self.revision}"


def load(source: Source, dtype: str, device: str | None) -> _Checkpoint:
    """The checkpoint, ready to answer. Whatever goes wrong is an EngineStartError."""
    return load_with(_load, source, dtype, device)


def load_with(
    loading: Callable[[Source, str, str], Loaded], source: Source, dtype: str, device: str | None
) -> Loaded:
    """What ``loading`` makes of the checkpoint with the dtype and the device that were asked for,
    or that are best. Whatever goes wrong is an EngineStartError."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise EngineStartError(
            f"the transformers engine cannot be imported: {one_line(error)}",
            hint="pip install 'vlmbatch[transformers]'",
        ) from None
    _check_folder(source.model)
    device = device or best_device()
    dtype = best_dtype(device) if dtype == "auto" else dtype
    if dtype not in DTYPES:
        raise EngineStartError(
            f"unknown dtype '{dtype}'", hint=f"one of: auto, {', '.join(DTYPES)}"
        )
    try:
        return loading(source, dtype, device)
    except EngineStartError:
        raise
    except Exception as error:
        raise _start_error(source, device, error) from None


def best_device() -> str:
    """``cuda``, else ``mps``, else ``cpu``."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def best_dtype(device: str) -> str:
    """Half precision on an accelerator; on the CPU float32, however the weights are stored."""
    import torch

    if device == "cpu":
        return "float32"
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    try:
        torch.ones(1, dtype=torch.bfloat16, device=device)
    except (RuntimeError, TypeError):
        return "float16"
    return "bfloat16"


def _load(source: Source, dtype: str, device: str) -> _Checkpoint:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor, __version__
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    options: dict[str, Any] = {
        "revision": None if source.is_folder else source.revision,
        "trust_remote_code": source.trust_remote_code,
        "local_files_only": source.is_folder or not _hub_answers(source),
    }
    processor: Any = AutoProcessor.from_pretrained(source.model, **options)
    if getattr(processor, "image_processor", None) is None:
        raise EngineStartError(
            f"{source} does not take images", hint="name a vision-language model with -m"
        )
    # An environment of the family's own may have version 4, which calls it torch_dtype.
    options["torch_dtype" if __version__.startswith("4.") else "dtype"] = getattr(torch, dtype)
    model, report = AutoModelForImageTextToText.from_pretrained(
        source.model, output_loading_info=True, **options
    )
    if missing := sorted(report["missing_keys"]):
        raise EngineStartError(
            f"{source} lacks {len(missing)} weights that the model needs: {missing[0]}, ...",
            hint="the checkpoint is incomplete, or made for another version of transformers",
        )
    return _Checkpoint(processor, model.eval().to(device), dtype, device)


def _check_folder(model: str) -> None:
    """Say so at once where a folder was meant and is not there; Hub ids pass."""
    looks_local = model.startswith(("/", ".", "~")) or model.count("/") > 1
    folder = Path(model)
    if looks_local and not folder.is_dir():
        problem = f"no such folder: {model}"
    elif folder.is_dir() and not (folder / "config.json").is_file():
        problem = f"no config.json in the model folder {model}"
    else:
        return
    raise EngineStartError(problem, hint="name a model folder or a Hub id with -m")


def _hub_answers(source: Source) -> bool:
    """Whether the Hub can be asked now; else only its local cache is read.

    Asked once, for transformers itself tries each absent file for 30 seconds.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(source.model, revision=source.revision, timeout=HUB_SECONDS)
    except Exception:  # network, refusal, offline mode: its HTTP library changes between versions
        return False
    return True


def _start_error(source: Source, device: str, error: Exception) -> EngineStartError:
    """One line and the way out, for the ways in which loading is known to fail."""
    said = str(error)
    if _is_out_of_memory(error):
        return EngineStartError(
            f"{source} does not fit into the memory of {device}",
            hint="name a smaller model with -m, or give the worker more memory",
        )
    if "torchvision" in said or "video_processor" in said.lower():
        return EngineStartError(
            f"the processor of {source} needs torchvision, which does not work here",
            hint="pip install the torchvision that belongs to this torch",
        )
    if "trust_remote_code" in said:
        return EngineStartError(
            f"{source} brings its own code", hint="--trust-remote-code with a pinned --revision"
        )
    if isinstance(error, ImportError):
        return EngineStartError(
            f"{source} needs a library that is not installed: {one_line(error)}"
        )
    if "does not recognize this architecture" in said or "Unrecognized" in said:
        import transformers

        return EngineStartError(
            f"transformers {transformers.__version__} cannot run {source} as a model of images "
            "and text",
            hint="upgrade transformers, or name another model with -m",
        )
    if isinstance(error, OSError):
        return EngineStartError(
            f"cannot load {source}: {one_line(error)}",
            hint="name a local model folder with -m, or -m demo",
        )
    return EngineStartError(f"cannot load {source}: {one_line(error)}")


@dataclass(frozen=True, slots=True)
class _Inputs:
    """A batch as the model takes it, on the CPU. ``lengths``: prompt tokens without padding."""

    tensors: Mapping[str, Any]
    lengths: Sequence[int]
    sampling: Sampling


class _Checkpoint:
    """A loaded model and its processor: from requests to tensors, and from tensors to text."""

    def __init__(self, processor: Any, model: Any, dtype: str, device: str) -> None:
        self.dtype, self.device = dtype, device
        self._processor, self._model = processor, model
        self._tokenizer = processor.tokenizer
        self.frame: str | None = None
        self.text_of: Callable[[Sequence[str]], str] | None = None
        self._shifted_by_padding = model.config.model_type in SHIFTED_BY_PADDING
        self._encodes = bool(model.config.is_encoder_decoder)
        self._tokenizer.padding_side = "right" if self._encodes else "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._decoder = copy.deepcopy(self._tokenizer)  # decodes while the other one encodes
        text_config = model.config.get_text_config()
        self._context: int | None = getattr(text_config, "max_position_embeddings", None)
        self._token_ids = self._take_over_generation_config()
        self._takes_parts = self._template_takes_parts()

    def group(self, request: Request) -> str:
        """Requests of other groups do not share its batch."""
        return request.prompt if self._shifted_by_padding else ""

    def prepare(self, requests: Sequence[Request]) -> _Inputs:
        texts = [self.render(request) for request in requests]
        options: dict[str, Any] = {"text": texts, "padding": True, "return_tensors": "pt"}
        if requests[0].images:
            options["images"] = [[image.pixels for image in r.images] for r in requests]
        bos = self._tokenizer.bos_token
        if self._template is not None and bos and texts[0].startswith(bos):
            options["add_special_tokens"] = False  # the template has put it there already
        tensors = dict(self._processor(**options))
        for name in NOT_FOR_GENERATE:
            tensors.pop(name, None)
        lengths = tensors["attention_mask"].sum(dim=1).tolist()
        if (longest := max(lengths)) > self._room_for_prompt:
            raise failed(
                ErrorCode.PROMPT_TOO_LONG,
                Stage.PROMPT,
                f"the prompt is {longest} tokens long with its images; "
                f"the model takes {self._room_for_prompt}",
            )
        return _Inputs(tensors, lengths, requests[0].sampling)

    def render(self, request: Request) -> str:
        """The prompt as text: the chat template's, or where there is none, the family's frame."""
        images = len(request.images)
        whole = request.prompt
        if IMAGE not in whole and self._template is None:
            whole = (self.frame or IMAGE + "{text}").replace("{text}", whole)
        if IMAGE in whole:
            return whole.replace(IMAGE, self._image_token * images, 1)
        messages = []
        if request.system is not None:
            messages.append({"role": "system", "content": self._content(request.system)})
        messages.append({"role": "user", "content": self._content(request.prompt, images)})
        return self._render(messages)

    def answer(self, inputs: _Inputs, is_over: Callable[[], bool]) -> Sequence[Completion | None]:
        import torch

        sampling, most = inputs.sampling, self._most_new_tokens(inputs, max(inputs.lengths))
        start = 1 if self._encodes else inputs.tensors["input_ids"].shape[1]

        def stopped(ids: Any, *_: Any, **__: Any) -> Any:
            if sampling.stop and not is_over():
                return torch.tensor(self._at_stop(ids, start, sampling.stop), device=ids.device)
            return torch.full((len(ids),), is_over(), dtype=torch.bool, device=ids.device)

        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        try:
            with torch.inference_mode():
                output = self._model.generate(
                    **{name: self._placed(value) for name, value in inputs.tensors.items()},
                    generation_config=self._generation_config(sampling, most),
                    stopping_criteria=[stopped],
                    logits_processor=self._penalties(inputs),
                )
            rows = output[:, start:].tolist()
        except Exception as error:
            raise translated(error, self.device, len(inputs.lengths)) from None
        return [
            self._completion(
                row,
                length,
                stop=sampling.stop,
                cut=most < self._most_new_tokens(inputs, length),
            )
            for row, length in zip(rows, inputs.lengths, strict=True)
        ]

    def _at_stop(self, ids: Any, start: int, stop: Sequence[str]) -> list[bool]:
        """Of each answer, whether its end holds one of these texts; ``start``: the first token."""
        most = max(len(text.encode()) for text in stop) + TOKENS_AROUND_STOP
        tails = ids[:, max(start, ids.shape[1] - most) :].tolist()
        return [any(text in tail for text in stop) for tail in map(self._text, tails)]

    def _penalties(self, inputs: _Inputs) -> list[Callable[[Any, Any], Any]]:
        """The repetition penalty, on what stands in the prompt and in the answer.

        As in transformers, but blind to padding: an answer must not depend on its neighbours.
        """
        import torch

        penalty, real = inputs.sampling.repetition_penalty, inputs.tensors["attention_mask"] > 0

        def penalise(ids: Any, scores: Any) -> Any:
            counts = ids < scores.shape[-1]  # images may have ids that no answer can have
            if not self._encodes:
                counts[:, : real.shape[1]] &= real.to(ids.device)
            ids = torch.where(counts, ids, ids[:, -1:])
            found = scores.gather(1, ids)
            found = torch.where(found < 0, found * penalty, found / penalty)
            return scores.scatter(1, ids, found)

        return [] if penalty == 1 else [penalise]

    def _completion(
        self, ids: list[int], length: int, *, stop: Sequence[str] = (), cut: bool
    ) -> Completion | None:
        """None where the model was stopped earlier than it would have been alone (``cut``)."""
        ends = [at for at, token in enumerate(ids) if token in self._stops]
        kept = ids[: ends[0]] if ends else ids
        text = self._text(kept)
        if stops := [at for at in map(text.find, stop) if at >= 0]:
            tokens = len(self._without_padding(kept))
            return Completion(text[: min(stops)], "stop", length, tokens)
        if not ends and cut:
            return None
        if ends:
            text = self._text(self._without_padding(kept))
        return Completion(
            text=text,
            finish_reason="stop" if ends else "length",
            prompt_tokens=length,
            completion_tokens=ends[0] + 1 if ends else len(ids),
        )

    def _text(self, ids: list[int]) -> str:
        if self.text_of is not None:
            return self.text_of([token or "" for token in self._decoder.convert_ids_to_tokens(ids)])
        text = self._decoder.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)

    def _without_padding(self, ids: list[int]) -> list[int]:
        while ids and ids[-1] == self._tokenizer.pad_token_id:
            ids = ids[:-1]
        return ids

    @property
    def _room_for_prompt(self) -> float:
        if self._context is None:
            return float("inf")
        return self._context if self._encodes else self._context - 1

    def _most_new_tokens(self, inputs: _Inputs, length: int) -> int:
        if self._context is None:
            return inputs.sampling.max_tokens
        left = self._context - (1 if self._encodes else length)
        return min(inputs.sampling.max_tokens, left)

    def _placed(self, value: Any) -> Any:
        """On the model's device, floating point in its dtype; some processors give lists."""
        import torch

        if isinstance(value, (list, tuple)):
            return [self._placed(item) for item in value]
        if not isinstance(value, torch.Tensor):
            return value
        if value.is_floating_point():
            return value.to(self.device, self._model.dtype)
        return value.to(self.device)

    def _take_over_generation_config(self) -> dict[str, Any]:
        """The checkpoint's token ids; its sampling parameters are forgotten.

        They would leak into every call, for generate() fills in what a call leaves open.
        """
        from transformers import GenerationConfig

        own = self._model.generation_config
        eos = own.eos_token_id
        stops = {*(eos if isinstance(eos, list) else [eos]), self._tokenizer.eos_token_id}
        vocabulary = self._tokenizer.get_vocab()
        stops |= {vocabulary.get(token) for token in END_OF_TURN}
        self._stops = sorted(token for token in stops if token is not None)
        self._model.generation_config = GenerationConfig()
        kept = {name: getattr(own, name, None) for name in TOKEN_IDS}
        kept["pad_token_id"] = self._tokenizer.pad_token_id
        kept["eos_token_id"] = self._stops or None
        return kept

    def _generation_config(self, sampling: Sampling, most: int) -> Any:
        from transformers import GenerationConfig

        how: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            how = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": 0,
            }
        if sampling.min_tokens:
            how["min_new_tokens"] = min(sampling.min_tokens, most)
        return GenerationConfig(max_new_tokens=most, **how, **self._token_ids)

    @property
    def _template(self) -> Any:
        return self._processor.chat_template or self._tokenizer.chat_template

    @property
    def _image_token(self) -> str:
        """What stands for one image in a raw prompt."""
        if type(self._processor).__name__ in PLACE_IMAGES_THEMSELVES:
            return ""
        token = getattr(self._processor, "image_token", None)
        return str(token or getattr(self._tokenizer, "image_token", None) or "<image>")

    def _content(self, text: str, images: int = 0) -> Any:
        if self._takes_parts:
            return [{"type": "image"}] * images + [{"type": "text", "text": text}]
        return self._image_token * images + text

    def _render(self, messages: list[dict[str, Any]]) -> str:
        text = self._processor.apply_chat_template(
            messages,
            chat_template=None if self._processor.chat_template else self._tokenizer.chat_template,
            add_generation_prompt=True,
            tokenize=False,
        )
        return str(text)

    def _template_takes_parts(self) -> bool:
        """Whether the chat template wants content in parts (image, text), or as one string.

        A template of a language model writes the parts out as they are in Python, or breaks.
        """
        if self._template is None:
            return False
        parts = [{"type": "image"}, {"type": "text", "text": "?"}]
        try:
            return "'type'" not in self._render([{"role": "user", "content": parts}])
        except Exception:
            return False


def translated(error: Exception, device: str, requests: int) -> Exception:
    """A failure of generate() in the batcher's words."""
    if _is_out_of_memory(error):
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return BatchTooLarge(
            f"out of memory on {device} with {requests} request(s) in the batch: "
            "smaller images or fewer new tokens may fit"
        )
    if type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error):
        return EngineDead(f"{device} is in an error state: {one_line(error)}")
    return error


def _is_out_of_memory(error: Exception) -> bool:
    """On any device: torch.OutOfMemoryError says "out of memory", the CPU's allocator this."""
    said = str(error).lower()
    return (
        isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said
    )
