"""From a job to vLLM's engine arguments, and what is wrong with those that a user gave."""

from __future__ import annotations

import argparse
import json
from difflib import get_close_matches
from typing import Any

from vlmbatch.engines.vllm_probe import arguments
from vlmbatch.errors import EngineStartError, UsageError
from vlmbatch.job import EngineSpec, JobSpec

NAMED = {
    "model": "-m",
    "revision": "--revision",
    "trust_remote_code": "--trust-remote-code",
    "dtype": "--dtype",
    "max_model_len": "--max-model-len",
    "max_num_seqs": "--max-num-seqs",
    "gpu_memory_utilization": "--gpu-memory-utilization",
    "quantization": "--quantization",
    "kv_cache_dtype": "--kv-cache-dtype",
    "enable_lora": "--lora",
    "tensor_parallel_size": "--gpus-per-worker",
}
"""Arguments that are said by an option of ours."""

REFUSED = {
    "distributed_executor_backend": "vlmbatch places the engine's processes itself",
    "hf_token": "it would be stored in run.json; set HF_TOKEN in the environment instead",
    "renderer_num_workers": "more than one loses requests while vLLM's image cache is on",
    "runner": "answers are all that is wanted here",
    "data_parallel_size": "more --workers are what that is for",
    "pipeline_parallel_size": "an engine has the GPUs of --gpus-per-worker, as tensor parallel",
}

OPERATIONAL = (
    "async_scheduling",
    "block_size",
    "compilation_config",
    "cpu_offload_gb",
    "disable_custom_all_reduce",
    "disable_log_stats",
    "download_dir",
    "enable_chunked_prefill",
    "enable_log_requests",
    "enable_prefix_caching",
    "enforce_eager",
    "kv_cache_memory_bytes",
    "limit_mm_per_prompt",
    "long_prefill_token_threshold",
    "max_num_batched_tokens",
    "max_parallel_loading_workers",
    "mm_encoder_tp_mode",
    "mm_processor_cache_gb",
    "mm_processor_cache_type",
    "mm_shm_cache_max_object_size_mb",
    "num_gpu_blocks_override",
    "optimization_level",
    "performance_mode",
    "safetensors_load_strategy",
    "scheduling_policy",
    "shutdown_timeout",
    "skip_mm_profiling",
    "use_tqdm_on_load",
)
"""Arguments that change speed and memory, and answers at most by rounding."""

CPU_MEMORY = 0.4
"""Share of the memory, at most, where vLLM runs on the CPU."""

MANY_IMAGES = 16
"""Images per prompt that the engine prepares for where a row may have several."""


def check(engine: EngineSpec) -> None:
    """Raises UsageError for an argument that vLLM does not have, or that has an option of its own,
    and for an adapter that is none.

    Where vLLM is not installed (a driver on a node without GPUs) its names are checked by workers.
    """
    if engine.lora is not None:
        lora_rank(engine.lora)
    for key in map(_field, engine.args):
        if key in NAMED:
            raise UsageError(
                f"--engine-arg {key}: it has an option of its own", hint=f"give {NAMED[key]}"
            )
        if key in REFUSED:
            raise UsageError(f"--engine-arg {key} is not taken: {REFUSED[key]}")
    known = arguments()
    for key in engine.args if known else ():
        if _field(key) not in known:
            message, hint = _unknown(key, known)
            raise UsageError(message, hint=hint)


def engine_args(job: JobSpec, model: str, *, revision: str | None, many_images: bool) -> Any:
    """vLLM's AsyncEngineArgs for the job. Raises EngineStartError for an argument that is none."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    engine = job.engine
    given = {
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "gpu_memory_utilization": engine.gpu_memory_utilization,
        "quantization": engine.quantization,
        "kv_cache_dtype": engine.kv_cache_dtype,
    }
    values: dict[str, Any] = {
        "model": model,
        "revision": revision,
        "trust_remote_code": job.trust_remote_code,
        "tensor_parallel_size": job.gpus_per_worker,
        "limit_mm_per_prompt": {"image": MANY_IMAGES if many_images else 1, "video": 0, "audio": 0},
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        **_of_device(engine),
        **{name: value for name, value in given.items() if value is not None},
    }
    if any(task.json_schema is not None for task in job.tasks):
        # Between tokens, JSON allows any whitespace: where small models get lost for ever.
        values["structured_outputs_config"] = {
            "backend": "xgrammar",
            "disable_any_whitespace": True,
        }
    if job.gpus_per_worker > 1:
        # In a Ray actor vLLM would choose Ray, and look for GPUs that this very actor holds.
        values["distributed_executor_backend"] = "mp"
    if engine.lora is not None:
        values |= {"enable_lora": True, "max_lora_rank": lora_rank(engine.lora)}
    return AsyncEngineArgs(**{**values, **_parsed(engine.args)})


def lora_rank(folder: str) -> int:
    """The rank of an adapter, from its adapter_config.json, as vLLM wants it: one of its steps."""
    try:
        with open(f"{folder}/adapter_config.json", encoding="utf-8") as file:
            rank = int(json.load(file)["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--lora {folder} is no adapter: its adapter_config.json cannot be read ({error})",
            hint="name the folder that peft's save_pretrained wrote",
        ) from None
    return next((step for step in (8, 16, 32, 64, 128, 256, 320, 512) if step >= rank), rank)


def _of_device(engine: EngineSpec) -> dict[str, Any]:
    """Defaults that depend on what vLLM runs on: ``auto`` is the weights' own dtype on a GPU, and
    float32 on the CPU, whose memory is not vLLM's alone."""
    from vllm.platforms import current_platform

    if current_platform.device_type != "cpu":
        return {"dtype": engine.dtype}
    dtype = "float32" if engine.dtype == "auto" else engine.dtype
    return {"dtype": dtype, "gpu_memory_utilization": CPU_MEMORY}


def _parsed(args: dict[str, str]) -> dict[str, Any]:
    """The arguments' texts as vLLM's own command line would read them."""
    if not args:
        return {}
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(add_help=False))
    actions = {action.dest: action for action in parser._actions}
    parsed = {}
    for key, text in args.items():
        action = actions.get(_field(key))
        if action is None:
            message, hint = _unknown(key, tuple(actions))
            raise EngineStartError(message, hint=hint)
        try:
            parsed[action.dest] = _value(action, text)
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise EngineStartError(f"--engine-arg {key}={text}: {error}") from None
    return parsed


def _value(action: argparse.Action, text: str) -> Any:
    if action.nargs == 0:  # a flag
        if text.lower() not in ("true", "false"):
            raise ValueError("expected true or false")
        return text.lower() == "true"
    kind = action.type if callable(action.type) else str
    if action.nargs in ("+", "*"):
        return [kind(item) for item in text.split(",")]
    value = kind(text)
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"expected one of {', '.join(map(str, action.choices))}")
    return value


def _field(key: str) -> str:
    return key.replace("-", "_")


def _unknown(key: str, known: tuple[str, ...]) -> tuple[str, str | None]:
    close = get_close_matches(_field(key), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "see `vllm serve --help`"
    return f"vLLM has no engine argument {key!r}", hint
