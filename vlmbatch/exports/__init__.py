"""What users take out of an output: ``vlmbatch export OUTPUT --to FORMAT DEST``."""

from __future__ import annotations

FORMATS = ("openai-batch",)
"""Each is one module, imported when asked: ``openai_batch`` for ``openai-batch``."""
