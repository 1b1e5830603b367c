"""What the transformers that is installed here can run, by its own registry.

The registry is read and not imported: importing it brings torch, and that takes seconds.
"""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_REGISTRY = "models/auto/modeling_auto.py"
_NAME = "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"


def is_installed() -> bool:
    return find_spec("transformers") is not None


@cache
def image_text_types() -> frozenset[str]:
    """The model types (config.json) that it makes texts of images with; empty if it cannot be
    told: it is not installed, or its registry looks different."""
    found = find_spec("transformers")
    if found is None or found.origin is None:
        return frozenset()
    try:
        tree = ast.parse((Path(found.origin).parent / _REGISTRY).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return frozenset()
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == _NAME for target in targets):
            pairs = (n for n in ast.walk(node) if isinstance(n, ast.Tuple) and n.elts)
            firsts = (n.elts[0] for n in pairs)
            return frozenset(
                n.value for n in firsts if isinstance(n, ast.Constant) and isinstance(n.value, str)
            )
    return frozenset()
