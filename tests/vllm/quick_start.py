"""Imported by a process before it starts vLLM's engines: the second and later ones start quickly.

vLLM on the CPU spawns two processes an engine, which import everything again, and one more to look
at each new architecture. Here they are forked from a process that has imported it all, and the
architecture is looked at in this one. It changes nothing about what an engine computes; how vLLM
starts by itself is what the other tests and ``make test-vllm-families`` see.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import vllm.model_executor.models.registry as registry
import vllm.v1.engine.utils as core_starter
import vllm.v1.executor.multiproc_executor as worker_starter

PRELOADED = (
    __name__,
    "transformers.models.auto.modeling_auto",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.worker.cpu_worker",
)

_clean = multiprocessing.get_context("forkserver")
_clean.set_forkserver_preload(list(PRELOADED))


def _called(function: Callable[[], Any]) -> Any:
    return function()


core_starter.get_mp_context = lambda: _clean  # of a process without threads
worker_starter.get_mp_context = lambda: multiprocessing.get_context("fork")  # of the core, early
registry._run_in_subprocess = _called
