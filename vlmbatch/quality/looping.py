"""Degenerate generation: one phrase over and over, back to back.

What people write repeats as well (lists, tables, refrains), so a phrase must come the more often
the shorter it is: ``TIMES``. Only words with a letter count as words: columns of numbers, rules
and dotted lines are no loops. The figures are set by the corpus in tests/quality/.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from vlmbatch.quality.words import words_of

TIMES = {1: 12, 2: 8, 3: 6}
"""Words of the phrase: how often it must come in a row to be a loop."""
TIMES_LONG = 4
"""The same for longer phrases."""
LONGEST = 64
"""Words of the longest phrase that is looked for, numbers included."""
_STRETCH = min(words * times for words, times in [*TIMES.items(), (4, TIMES_LONG)])
"""A loop is at least so many words long."""

_SYLLABLES = re.compile(r"(?=\w*[^\W\d_])(\w{1,8}?)\1{15,}")
"""Within one word: hahahaha..., 16 times and more."""
_LONG_WORD = 32


@dataclass(frozen=True, slots=True)
class Loop:
    phrase: str
    times: int


def loop_in(text: str) -> Loop | None:
    """The first loop with the shortest phrase, or None."""
    words = words_of(text)
    if _may_loop(words) and (found := _repeated_phrase(words)):
        return found
    for word in words if max(map(len, words), default=0) >= _LONG_WORD else ():
        if len(word) >= _LONG_WORD and (match := _SYLLABLES.search(word)):
            return Loop(match[1], len(match[0]) // len(match[1]))
    return None


def _may_loop(words: list[str]) -> bool:
    """Whether there is a stretch in which every word is one that comes TIMES_LONG times: quick to
    tell, and false for most texts."""
    if len(words) - len(set(words)) < _STRETCH - TIMES_LONG:
        return False
    counts = Counter(words)
    run = 0
    for word in words:
        run = run + 1 if counts[word] >= TIMES_LONG else 0
        if run >= _STRETCH:
            return True
    return False


def _repeated_phrase(words: list[str]) -> Loop | None:
    """A stretch with period p is one where each word is the same as the one p before it."""
    for period in range(1, min(LONGEST, len(words) // TIMES_LONG) + 1):
        shortest = (TIMES_LONG - 1) * period
        run = 0
        for at, (word, later) in enumerate(zip(words, words[period:], strict=False)):
            if word == later:
                run += 1
                continue
            if run >= shortest and (loop := _loop(words, at - run, period, run)):
                return loop
            run = 0
        if run >= shortest and (loop := _loop(words, len(words) - period - run, period, run)):
            return loop
    return None


def _loop(words: list[str], start: int, period: int, run: int) -> Loop | None:
    """The loop that begins there, if it is one: ``run`` words are the same ``period`` later."""
    phrase = words[start : start + period]
    times = run // period + 1
    lettered = sum(any(map(str.isalpha, word)) for word in phrase)
    if not lettered or times < TIMES.get(lettered, TIMES_LONG):
        return None
    return Loop(" ".join(phrase), times)
