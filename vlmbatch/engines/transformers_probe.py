"""What the transformers that is installed here can run, by its own registry.

The registry is read and not imported: importing it brings torch, and that takes seconds.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_REGISTRY = "models/auto/modeling_auto.py"
_NAME = "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"


def is_installed() -> bool:
    return find_spec("transformers") is not None


@cache
def image_text_classes() -> Mapping[str, str]:
    """The class of each model type (config.json) that it makes texts of images with; empty if it
    cannot be told: it is not installed, or its registry looks different."""
    found = find_spec("transformers")
    if found is None or found.origin is None:
        return {}
    try:
        tree = ast.parse((Path(found.origin).parent / _REGISTRY).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == _NAME for target in targets):
            pairs = [n.elts for n in ast.walk(node) if isinstance(n, ast.Tuple)]
            texts = [[e.value for e in pair if isinstance(e, ast.Constant)] for pair in pairs]
            return {str(each[0]): str(each[1]) for each in texts if len(each) == 2}
    return {}
