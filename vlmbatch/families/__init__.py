"""How each family of models is asked, and how its answers are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmbatch.errors import UsageError
from vlmbatch.families.base import Family
from vlmbatch.families.demo import Demo
from vlmbatch.families.generic import Generic, Idefics3

__all__ = ["FAMILIES", "Family", "family_for"]

FAMILIES = ("demo", "generic", "idefics3")


def family_for(config: Mapping[str, Any], name: str | None = None) -> Family:
    """The family of a model's config.json, or the one that was asked for by name."""
    name = name or _family_name(config)
    vision = config.get("vision_config") or {}
    match name:
        case "demo":
            return Demo(int(vision.get("image_size", 64)))
        case "idefics3":
            return Idefics3(int(vision.get("image_size", 512)))
        case "generic":
            return Generic()
        case _:
            raise UsageError(f"unknown family {name!r}", hint=f"known: {', '.join(FAMILIES)}")


def _family_name(config: Mapping[str, Any]) -> str:
    if "vlmbatch_family" in config:
        return str(config["vlmbatch_family"])
    return "idefics3" if config.get("model_type") in ("idefics3", "smolvlm") else "generic"
