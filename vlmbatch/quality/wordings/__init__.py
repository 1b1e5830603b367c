"""How models say no, and how they begin before they say anything.

The wordings lie in the text files beside this module, by language; they are made from what
instruction-tuned models answer. How often they err is measured in tests/quality/test_openings.py.

A line is one wording: a regular expression that matches at the beginning of an answer in small
letters, with plain apostrophes. A space stands for any white space, ``...`` for up to 80 characters
of the same sentence, ``{name}`` for what a line ``name = ...`` of the same language said. ``#``
begins a comment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

CHATTER, ABOUT_IMAGE, REFUSALS = "chatter", "about_image", "refusals"

_QUIET = r"[\s\"'“”«»„*_#>:;,.!?¡¿()\[\]-]*"
"""What may stand before the first word."""
_REST = r"[^.!?。！？।؟\n]{0,80}?"
_LOOKED_AT = 400
"""Characters of an answer's beginning."""


@dataclass(frozen=True, slots=True)
class Preamble:
    """``kind``: CHATTER ("Sure! Here is a caption:") or ABOUT_IMAGE ("The image shows"); the
    preamble is the first ``length`` characters of the text."""

    kind: str
    length: int


def refusal_in(text: str) -> str | None:
    """The words at the beginning with which the model refuses, or None."""
    match = _pattern(REFUSALS).match(_beginning(text))
    return None if match is None else match[0].strip()


def preamble_of(text: str) -> Preamble | None:
    """What stands before the answer itself, or None. Chatter goes first where there is both."""
    beginning = _beginning(text)
    for kind in (CHATTER, ABOUT_IMAGE):
        match = _pattern(kind).match(beginning)
        if match is not None:
            return Preamble(kind, match.end())
    return None


def languages(kind: str) -> list[str]:
    """Those whose wordings are known, ISO 639-1."""
    return list(_read(kind))


def _beginning(text: str) -> str:
    """As long as it was: a capital that is two small letters stays."""
    start = text[:_LOOKED_AT]
    small = start.lower()
    if len(small) != len(start):
        small = "".join(low if len(low := letter.lower()) == 1 else letter for letter in start)
    return small.replace("\u2019", "'")


@cache
def _pattern(kind: str) -> re.Pattern[str]:
    wordings = "|".join(line for lines in _read(kind).values() for line in lines)
    return re.compile(f"{_QUIET}(?:{wordings})")


def _read(kind: str) -> dict[str, list[str]]:
    """Patterns by language."""
    found: dict[str, list[str]] = {}
    names: dict[str, str] = {}
    text = (files(__name__) / f"{kind}.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        line = line.partition("#")[0].strip()
        if section := re.fullmatch(r"\[(\w+)\]", line):
            lines = found.setdefault(section[1], [])
            names = {}
        elif name := re.match(r"([a-z]+) = ", line):
            names[name[1]] = f"(?:{_expanded(line[name.end() :], names)})"
        elif line:
            lines.append(_expanded(line, names))
    return found


def _expanded(line: str, names: dict[str, str]) -> str:
    line = re.sub(r"\{([a-z]+)\}", lambda name: names[name[1]], line)
    return line.replace("...", _REST).replace(" ", r"\s+")
