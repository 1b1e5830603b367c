"""Lets the CUDA build of torchvision, the only one in the registries, import beside a CPU torch.

Its Python files register fakes for operators that its library would declare, and that library does
not load here. They are declared, without code behind them, when torchvision is imported: enough for
image processors, which use none of them. A process that never imports it pays nothing. For tests
only: put this folder and the one with torchvision on PYTHONPATH (see tests/tiny_models_video.py).
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

_POOLS = ("roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d")
_NAMES = ("nms", "qnms", "qroi_align", *_POOLS, *(f"_{name}_backward" for name in _POOLS))
_library: Any = None  # what it declares is forgotten with it


def _declare() -> None:
    global _library
    import torch

    _library = torch.library.Library("torchvision", "DEF")
    for name in _NAMES:
        _library.define(f"{name}(Tensor input) -> Tensor")


class _BeforeTorchvision:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                _declare()
                execute(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _BeforeTorchvision)  # type: ignore[arg-type]
