"""When two texts are the same answer.

``exact``: after trimming. ``vqa``: after what visualqa.org/evaluation.html says is done to answers
before they are compared: lower case; full stops off, except in decimals; number words as digits
("none" as 0); no articles; the apostrophe of n't put in where it lacks; punctuation but ' and : a
space, a comma between digits nothing. (Other contractions than n't stay as they are. VQA's own
score, which wants an answer of three annotators, is another thing than being one of the answers.)
"""

from __future__ import annotations

import re
from collections.abc import Callable

_STOPS = re.compile(r"\.(?!\d)")
_COMMAS = re.compile(r"(?<=\d),(?=\d)")
_PUNCTUATION = re.compile(r"[^\w\s':.]|_")
_NOT = re.compile(
    r"\b(ai|are|ca|could|did|does|do|had|has|have|is|might|must|need|ought|sha|should|was|were|wo"
    r"|would)nt\b"
)
_ARTICLES = frozenset(["a", "an", "the"])
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}


def exact(text: str) -> str:
    return text.strip()


def vqa(text: str) -> str:
    plain = _COMMAS.sub("", text.lower().replace("’", "'"))
    plain = _STOPS.sub("", _PUNCTUATION.sub(" ", plain))
    words = (_NUMBERS.get(word, word) for word in plain.split())
    return _NOT.sub(r"\1n't", " ".join(word for word in words if word not in _ARTICLES))


RULES: dict[str, Callable[[str], str]] = {"exact": exact, "vqa": vqa}
