"""Texts as measures compare and cut them."""

from __future__ import annotations

import re
import unicodedata

import xxhash

# Scripts that write words without spaces between them: each letter counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_OUTSIDE = "!?.,;:\"'()[]{}<>|*#`~=_+-\u2013\u2014\u2026\u201c\u201d\u2018\u2019\u3002\u3001\uff0c"


def normalised(text: str) -> str:
    """The same for texts that differ in case, spacing, or punctuation at their ends only."""
    return " ".join(text.casefold().split()).strip(_OUTSIDE + " ")


def hash_of(text: str) -> int:
    """64 bits of the normalised text."""
    return xxhash.xxh3_64_intdigest(normalised(text).encode(errors="replace"))


def words_of(text: str) -> list[str]:
    """Lower-case words without the punctuation around them; what is only punctuation is none."""
    if text.isascii():
        found = text.lower().split()
    else:
        found = _WORD.findall(unicodedata.normalize("NFKC", text).lower())
    return [word for each in found if (word := each.strip(_OUTSIDE))]
