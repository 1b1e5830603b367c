"""A logits processor for vLLM that kills the process which computes a prompt with a marker in it:
what a row does that makes CUDA fail."""

from __future__ import annotations

import os
import signal
from typing import Any

from transformers import AutoTokenizer
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

MARKER = "deadly"


class Poison(LogitsProcessor):
    """Changes nothing; looks at every prompt that begins to be answered."""

    def __init__(self, config: Any, device: Any, is_pin_memory: bool) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(config.model_config.tokenizer)

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: Any) -> Any:
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        for _, _, prompt, _ in batch_update.added if batch_update else ():
            if MARKER in self._tokenizer.decode(prompt or []):
                os.kill(os.getpid(), signal.SIGKILL)
