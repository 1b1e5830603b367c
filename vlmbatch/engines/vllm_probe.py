"""What the vLLM that is installed here can do, without importing it into this process.

Importing vLLM takes ten seconds and several hundred megabytes, and may claim a GPU: nothing for the
driver. Its arguments are read from its source; whether it can run a model is asked in a process of
its own: ``python -m vlmbatch.engines.vllm_probe ARCHITECTURE ...`` prints a Vllm as JSON.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PROBE_SECONDS = 300.0
_REGISTRY, _MODELS = "model_executor/models/registry.py", "_MULTIMODAL_MODELS"
_ARGUMENTS, _CLASSES = "engine/arg_utils.py", ("EngineArgs", "AsyncEngineArgs")


@dataclass(frozen=True, slots=True)
class Vllm:
    """``device``: cuda, cpu, ...; empty where vLLM finds nothing to run on. ``problem``: why it
    cannot be used at all, or not with the model."""

    version: str = ""
    device: str = ""
    problem: str | None = None


def is_installed() -> bool:
    return find_spec("vllm") is not None


@cache
def arguments() -> tuple[str, ...]:
    """The fields of its AsyncEngineArgs; empty if they cannot be told: it is not installed, or its
    source looks different."""
    found = find_spec("vllm")
    if found is None or found.origin is None:
        return ()
    try:
        tree = ast.parse((Path(found.origin).parent / _ARGUMENTS).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ()
    classes = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name in _CLASSES)
    fields = (field for each in classes for field in each.body if isinstance(field, ast.AnnAssign))
    return tuple(field.target.id for field in fields if isinstance(field.target, ast.Name))


@cache
def image_architectures() -> frozenset[str]:
    """The classes (``architectures`` of config.json) that it runs on images by code of its own;
    empty if they cannot be told."""
    found = find_spec("vllm")
    if found is None or found.origin is None:
        return frozenset()
    try:
        tree = ast.parse((Path(found.origin).parent / _REGISTRY).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return frozenset()
    named = (n for n in tree.body if isinstance(n, ast.Assign))
    for node in named:
        if ast.unparse(node.targets[0]) == _MODELS and isinstance(node.value, ast.Dict):
            keys = (key for key in node.value.keys if isinstance(key, ast.Constant))
            return frozenset(str(key.value) for key in keys)
    return frozenset()


@cache
def probe(architectures: tuple[str, ...] = ()) -> Vllm:
    """Ask; ``problem`` is also about a model of these architectures (config.json's list)."""
    command = [sys.executable, "-m", "vlmbatch.engines.vllm_probe", *architectures]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=environment,
            stdin=subprocess.DEVNULL,
            timeout=PROBE_SECONDS,
        )
        return Vllm(**json.loads(done.stdout.strip().splitlines()[-1]))
    except (subprocess.TimeoutExpired, ValueError, IndexError, OSError):
        return Vllm(problem="it is installed, but cannot be imported here")


def _look(architectures: list[str]) -> Vllm:
    try:
        import vllm
        from vllm import ModelRegistry
        from vllm.platforms import current_platform
    except Exception as error:  # half of an installation fails in many ways
        return Vllm(problem=f"importing it fails: {_first_line(error)}")
    version, device = str(vllm.__version__), str(current_platform.device_type)
    problem = None if device else "it finds no device to run on"
    for name in architectures if problem is None else ():
        if name not in ModelRegistry.models:
            problem = f"it does not know the architecture {name}"
            continue
        try:
            inspected = ModelRegistry.models[name].inspect_model_cls()
        except Exception as error:
            problem = f"its {name} cannot be imported: {_last_line(error)}"
            continue
        if inspected.supports_multimodal:
            return Vllm(version, device)
        problem = f"its {name} takes no images"
    return Vllm(version, device, problem)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _last_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[-1]


if __name__ == "__main__":
    print(json.dumps(asdict(_look(sys.argv[1:]))))
