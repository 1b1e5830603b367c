"""Which language the texts are in, as far as py3langid can tell: the extra ``quality``."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vlmbatch.quality.base import EXAMPLES, Answers, Example, Measure, Metric
from vlmbatch.quality.measures.scripts import shares_of

SAMPLE = 100_000
"""So many texts of a task are judged, spread over all: a text takes about 0.1 ms."""
SURE = 0.5
"""Below this probability a text's language is not known: most are too short to tell."""
MISSING = "languages are not told apart without py3langid: pip install 'vlmbatch[quality]'"

_GOLDEN = 2654435761
"""2^32 over the golden ratio: multiples of it spread evenly (Knuth, TAOCP 3, 6.4)."""


class Languages(Measure):
    """``language.XX``: of the texts whose language can be told, those in it, by ISO 639-1 code.
    ``other_language``: those not in the one that most are in."""

    names: tuple[str, ...] = ()

    def __init__(self, results: int) -> None:
        """``results``: about how many will come."""
        self._judge = _judge()
        self._threshold = min(1.0, SAMPLE / max(1, results)) * 2**32
        self._judged = 0
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[Example]] = {}
        if self._judge is not None:
            self.names, self.families = ("other_language",), ("language.",)

    def add(self, answers: Answers) -> None:
        if self._judge is None:
            return
        said = answers.said
        for at, (row, text) in enumerate(zip(said.column("row"), said.texts, strict=True)):
            if row * _GOLDEN % 2**32 >= self._threshold:
                continue
            self._judged += 1
            language, probability = self._judge(text)
            if probability < SURE:
                continue
            self._counts[language] += 1
            if self._counts[language] <= EXAMPLES:
                self._examples.setdefault(language, []).append(said.example(at))

    def metrics(self) -> list[Metric]:
        if self._judge is None:
            return []
        return shares_of("language", self._counts, self._examples)

    def lines(self) -> list[tuple[str, str]]:
        if self._judge is None:
            return [("languages", MISSING)]
        if self._judged and not self._counts:
            return [("languages", f"none of {self._judged:,} texts is long enough to tell")]
        return []

    def details(self) -> dict[str, Any]:
        if self._judge is None:
            return {"languages": None}
        return {"languages": {"judged": self._judged, "told": self._counts.total()}}


def _judge() -> Any:
    """text -> (language, its probability); None where the library is not installed."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        return None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True).classify
