"""How each family of models is asked, and how its answers are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmbatch.errors import UsageError
from vlmbatch.families import (
    aya,
    cogvlm,
    deepseek_vl,
    deepseek_vl2,
    demo,
    florence2,
    fuyu,
    gemma,
    generic,
    glm,
    idefics3,
    internvl,
    kimi,
    kosmos2,
    llama,
    llava,
    minicpm,
    molmo,
    moondream,
    paligemma,
    phi,
    pixtral,
    qwen,
    yi_vl,
)
from vlmbatch.families.base import Entry, Family
from vlmbatch.families.own import entry_in_file, installed_entries

__all__ = ["ENTRIES", "FAMILIES", "Entry", "Family", "entry_named", "entry_of", "family_for"]

_MODULES = (
    demo,
    yi_vl,  # before llava: its config says that it is one
    pixtral,  # before llava: a Pixtral's model_type may be "llava"
    llava,
    deepseek_vl,
    kosmos2,
    fuyu,
    paligemma,
    florence2,
    idefics3,
    llama,
    aya,
    qwen,
    internvl,
    glm,
    kimi,
    gemma,
    minicpm,
    deepseek_vl2,
    phi,
    molmo,
    moondream,
    cogvlm,
    generic,  # last: it takes any model
)

ENTRIES: tuple[Entry, ...] = tuple(entry for module in _MODULES for entry in module.ENTRIES)
"""All families; the first that matches a model is the model's."""

FAMILIES = tuple(entry.name for entry in ENTRIES)


def family_for(
    config: Mapping[str, Any],
    name: str | None = None,
    model_id: str = "",
    *,
    box_space: str | None = None,
) -> Family:
    """The family of a model's config.json, or the one that was asked for by name.

    ``model_id`` is the Hub id or folder of the model, ``box_space`` another reading of its boxes.
    Raises UsageError for a name or a reading that is not known.
    """
    return made(entry_of(config, model_id, name), config, box_space)


def made(entry: Entry, config: Mapping[str, Any], box_space: str | None = None) -> Family:
    """The entry's family for a model. Raises UsageError for a reading that it does not have."""
    family = entry.make(config)
    if box_space is not None:
        if box_space not in entry.box_spaces:
            known = ", ".join(entry.box_spaces)
            raise UsageError(
                f"family {entry.name!r} has no reading {box_space!r} of its boxes",
                hint=f"it has: {known}" if known else "it has only one",
            )
        family.space = entry.box_spaces[box_space]  # type: ignore[attr-defined]
    return family


def entry_of(config: Mapping[str, Any], model_id: str = "", name: str | None = None) -> Entry:
    """The one of this name, if any; else the first that matches, installed packages' before ours.
    The last, generic, takes any model."""
    if name is not None:
        return entry_named(name)
    if "vlmbatch_family" in config:
        return entry_named(str(config["vlmbatch_family"]))
    last_part = model_id.rstrip("/").rpartition("/")[2].lower()
    entries = (*installed_entries(), *ENTRIES)
    return next(entry for entry in entries if entry.matches(config, last_part))


def entry_named(name: str) -> Entry:
    """``name``: a family's, or the path of a file that defines one (``*.py``), which is executed.

    Raises UsageError where there is none, or the file is broken.
    """
    if name.endswith(".py"):
        return entry_in_file(name)
    for entry in (*ENTRIES, *installed_entries()):
        if entry.name == name:
            return entry
    known = (*FAMILIES, *(entry.name for entry in installed_entries()))
    raise UsageError(
        f"unknown family {name!r}",
        hint=f"known: {', '.join(known)}, or the path of a family file (*.py)",
    )
