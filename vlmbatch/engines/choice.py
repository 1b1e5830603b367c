"""``--engine auto``: which engine runs a model here, and why."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from vlmbatch.engines import vllm_probe
from vlmbatch.engines.own_code import adapter_for
from vlmbatch.errors import UsageError


def choose_engine(config: Mapping[str, Any]) -> tuple[str, str]:
    """(vllm or transformers, the reason) for a model with this config.json.

    vLLM, where it is installed, finds a device, and knows the model's architecture as one that
    takes images; else transformers. Moondream is for transformers: vLLM takes Moondream 2 for
    Moondream 3, and has no boxes of either.
    """
    has_transformers = bool(find_spec("torch") and find_spec("transformers"))
    own = adapter_for(config)
    if has_transformers and own is not None and not own.generates:
        return "transformers", "only the code that the model brings gives its boxes"
    if vllm_probe.is_installed():
        architectures = tuple(map(str, config.get("architectures") or ()))
        found = vllm_probe.probe(architectures)
        known = architectures[0] if architectures else "no architecture"
        if found.problem is None and architectures:
            return "vllm", f"vLLM {found.version} on {found.device} knows {known}"
        reason = found.problem or f"config.json names {known}"
        if has_transformers:
            return "transformers", f"vLLM is installed, but {reason}"
        raise UsageError(f"vLLM is installed, but {reason}", hint=_INSTALL)
    if has_transformers:
        return "transformers", "vLLM is not installed"
    raise UsageError("no engine is installed that can run a model", hint=_INSTALL)


_INSTALL = "pip install 'vlmbatch[transformers]', or --engine echo to try the pipeline"
