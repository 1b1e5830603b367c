"""Answers that were cut at their limit: how they are asked again."""

from __future__ import annotations

from dataclasses import replace

from vlmbatch.records import Sampling

MORE_TRIES = 2
"""So often a cut answer is asked again."""
TAIL_CHARS = 4096
LOOP_CHARS = 40
LOOP_TIMES = 3
"""A text loops if it ends with so many times the same, over so many characters at least."""


def sampling_after(sampling: Sampling, cut: str) -> Sampling:
    """How to ask again for an answer that was cut after this text: with twice the tokens, or where
    it only repeats itself, with a higher repetition penalty."""
    if loops(cut):
        penalty = max(1.1, round(sampling.repetition_penalty + 0.1, 6))
        return replace(sampling, repetition_penalty=penalty)
    return replace(sampling, max_tokens=2 * sampling.max_tokens)


def loops(text: str) -> bool:
    """Whether the text's tail repeats a unit, the last time perhaps in part. Linear.

    Read backwards, the tail is a beginning; the prefix function of Knuth, Morris and Pratt gives
    the smallest period of each beginning.
    """
    tail = text[-TAIL_CHARS:][::-1]
    borders = [0] * len(tail)
    for end in range(1, len(tail)):
        border = borders[end - 1]
        while border and tail[end] != tail[border]:
            border = borders[border - 1]
        borders[end] = border + (tail[end] == tail[border])
        length = end + 1
        if length >= max(LOOP_CHARS, LOOP_TIMES * (length - borders[end])):
            return True
    return False
