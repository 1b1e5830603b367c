"""Boxes as bare lists of numbers between words: ``the cat is at [10, 20, 300, 400]``."""

from __future__ import annotations

import re

from vlmbatch.families.json_boxes import Found, plain_numbers, wide
from vlmbatch.grounding import Box

_LIST = re.compile(r"[\[(<]([^][()<>]*+)[\])>]")
_BETWEEN_CORNERS = re.compile(r"[\s,]{0,4}")
_PHRASE_END = re.compile(r"[][()<>{}.,:;!?|*`\"\n：，。；！？、【】（）]")
_TRAILING = " \t\r\n[]()<>{}.,:;!?|*`\"'-：，。；！？、【】（）"
_LABEL_CHARS = 80


def find_lists(text: str, default: str, labels: tuple[str, ...]) -> Found:
    """The fours of numbers in brackets of any kind: one, several in a row, or as two pairs.

    Each is labelled ``default``, or else by the words before it: the label asked for that stands
    there, or what follows the last punctuation mark. Lists without words between share a label.
    """
    found = Found([], [])
    label, end = default, 0
    corner: tuple[float, ...] = ()
    plain = wide(text)
    for match in _LIST.finditer(plain):
        numbers = plain_numbers(match[1])
        if not numbers or (len(numbers) != 2 and len(numbers) % 4):
            continue
        start, before = match.start(), end
        end = match.end()
        if corner and len(numbers) == 2 and _BETWEEN_CORNERS.fullmatch(plain, before, start):
            numbers = corner + numbers
        elif not default:
            label = _label(text[max(before, start - _LABEL_CHARS) : start], labels) or label
        corner = numbers if len(numbers) == 2 else ()
        for i in range(0, len(numbers) - 3, 4):
            found.boxes.append(Box(label, *numbers[i : i + 4]))
    return found


def _label(before: str, labels: tuple[str, ...]) -> str:
    folded = before.casefold()
    ends = ((_end(folded, name.casefold()), len(name), name) for name in labels)
    end, _, label = max(ends, default=(0, 0, ""))
    return label if end > 0 else _PHRASE_END.split(before.rstrip(_TRAILING))[-1].strip()


def _end(text: str, name: str) -> int:
    """Where the name ends that stands last in the text, as words of its own; 0 if it does not."""
    at = text.rfind(name)
    while at >= 0:
        end = at + len(name)
        if not _is_letter(text[at - 1 : at]) and not _is_letter(text[end : end + 1].strip("s")):
            return end
        at = text.rfind(name, 0, end - 1)
    return 0


def _is_letter(character: str) -> bool:
    """Of a script that puts spaces between words."""
    return character.isascii() and character.isalnum()
