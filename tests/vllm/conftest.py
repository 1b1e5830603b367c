"""Tests on the real vLLM, run by `make test-vllm` in an environment of their own."""

import os
from importlib.util import find_spec

import pytest

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here: make test-vllm", allow_module_level=True)

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_itemcollected(item: pytest.Item) -> None:
    """vLLM and what it imports warn of their own deprecations."""
    item.add_marker(pytest.mark.filterwarnings("default"))
