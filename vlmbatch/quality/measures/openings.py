"""Answers that begin with something else than the answer."""

from __future__ import annotations

from vlmbatch.quality.base import Answers, Measure, Metric, Share
from vlmbatch.quality.wordings import ABOUT_IMAGE, CHATTER, preamble_of, refusal_in


class Refusals(Measure):
    """``refusals``: of the texts, those that begin with "I'm sorry, but I cannot" and the like."""

    names = ("refusals",)

    def __init__(self) -> None:
        self._refusals = Share("refusals")

    def add(self, answers: Answers) -> None:
        said = answers.said
        found = [at for at, text in enumerate(said.texts) if refusal_in(text)]
        self._refusals.add(len(said), found, said)

    def metrics(self) -> list[Metric]:
        return [self._refusals.metric()]


class Preambles(Measure):
    """``preambles``: of the texts, those that begin with ``preambles.chatter`` ("Sure! Here is a
    caption:") or ``preambles.about_image`` ("The image shows")."""

    names = ("preambles", f"preambles.{CHATTER}", f"preambles.{ABOUT_IMAGE}")

    def __init__(self) -> None:
        self._any = Share("preambles")
        self._kinds = {kind: Share(f"preambles.{kind}") for kind in (CHATTER, ABOUT_IMAGE)}

    def add(self, answers: Answers) -> None:
        said = answers.said
        for share in (self._any, *self._kinds.values()):
            share.of += len(said)
        for at, text in enumerate(said.texts):
            preamble = preamble_of(text)
            if preamble is not None:
                self._any.hit(said, at)
                self._kinds[preamble.kind].hit(said, at)

    def metrics(self) -> list[Metric]:
        kinds = [share.metric() for share in self._kinds.values()]
        words = {CHATTER: "chatter", ABOUT_IMAGE: "about the image"}
        note = ", ".join(
            f"{words[kind]} {share.count:,}" for kind, share in self._kinds.items() if share.count
        )
        return [self._any.metric(note), *kinds]
