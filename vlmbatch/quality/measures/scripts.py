"""Which script the texts are written in."""

from __future__ import annotations

import re
from collections import Counter

from vlmbatch.quality.base import EXAMPLES, Answers, Example, Measure, Metric

# Blocks of the Unicode standard that most letters of a script lie in.
_BLOCKS = {
    "latin": "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff",
    "greek": "\u0370-\u03ff\u1f00-\u1fff",
    "cyrillic": "\u0400-\u052f",
    "hebrew": "\u0590-\u05ff",
    "arabic": "\u0600-\u06ff\u0750-\u077f\u08a0-\u08ff",
    "devanagari": "\u0900-\u097f",
    "bengali": "\u0980-\u09ff",
    "tamil": "\u0b80-\u0bff",
    "telugu": "\u0c00-\u0c7f",
    "thai": "\u0e00-\u0e7f",
    "kana": "\u3040-\u30ff",
    "hangul": "\u1100-\u11ff\uac00-\ud7af",
    "han": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff",
}
_LETTERS = {name: re.compile(f"[{block}]") for name, block in _BLOCKS.items()}


def script_of(text: str) -> str | None:
    """The script of most of its letters; ``other`` for one not known here; None without letters.

    Japanese mixes Han and kana: text with kana is ``kana``.
    """
    if text.isascii():
        return "latin" if _LETTERS["latin"].search(text) else None
    if not any(map(str.isalpha, text)):
        return None
    counts = {name: len(letters.findall(text)) for name, letters in _LETTERS.items()}
    if counts["kana"]:
        counts["kana"] += counts.pop("han")
    most = max(counts, key=lambda name: counts[name])
    return most if counts[most] else "other"


class Scripts(Measure):
    """``script.NAME``: of the texts with letters, those mostly in that script. ``other_script``:
    those not in the one that most are in."""

    names = ("other_script",)
    families = ("script.",)

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[Example]] = {}

    def add(self, answers: Answers) -> None:
        said = answers.said
        for at, text in enumerate(said.texts):
            script = script_of(text)
            if script is None:
                continue
            self._counts[script] += 1
            if self._counts[script] <= EXAMPLES:
                self._examples.setdefault(script, []).append(said.example(at))

    def metrics(self) -> list[Metric]:
        return shares_of("script", self._counts, self._examples)


def shares_of(what: str, counts: Counter[str], examples: dict[str, list[Example]]) -> list[Metric]:
    """``other_WHAT``, then ``WHAT.NAME`` for each that came, the most frequent first."""
    of = counts.total()
    if not of:
        return [Metric(f"other_{what}", None, 0, 0)]
    (main, most), *others = counts.most_common()
    odd = [example for name, _ in others for example in examples[name]]
    note = ", ".join(f"{name} {count / of:.1%}" for name, count in counts.most_common(5))
    return [
        Metric(f"other_{what}", (of - most) / of, of - most, of, note, tuple(odd[:EXAMPLES])),
        *(
            Metric(f"{what}.{name}", count / of, count, of)
            for name, count in [(main, most), *others]
        ),
    ]
