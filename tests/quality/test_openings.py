"""Refusals and preambles, counted on labelled lists: how many are found, how many are right."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmbatch.quality.filters import reason_of, without_preamble
from vlmbatch.quality.wordings import ABOUT_IMAGE, CHATTER, preamble_of, refusal_in

HERE = Path(__file__).parent


def lines(name: str) -> dict[str, list[str]]:
    """The answers of a list, seen and unseen."""
    found: dict[str, list[str]] = {}
    for line in (HERE / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            current = found.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            current.append(line)
    return found


def measured(detector, wanted: str, others: str, part: str) -> tuple[float, float]:
    """(precision, recall); what it errs on is printed."""
    positive, negative = lines(wanted)[part], lines(others)[part]
    assert len(positive) >= 14
    assert len(negative) >= 14
    missed = [text for text in positive if not detector(text)]
    wrong = [text for text in negative if detector(text)]
    found = len(positive) - len(missed)
    precision, recall = found / (found + len(wrong)), found / len(positive)
    print(f"\n{wanted} ({part}): precision {precision:.3f}, recall {recall:.3f}")
    print("\n".join([*(f"  missed: {text}" for text in missed), *(f"  wrong: {t}" for t in wrong)]))
    return precision, recall


@pytest.mark.parametrize("part", ["seen", "unseen"])
def test_refusals_are_told_from_captions_that_sound_like_them(part: str) -> None:
    precision, recall = measured(refusal_in, "refusals.txt", "ordinary.txt", part)
    assert precision >= 0.95
    assert recall >= {"seen": 0.97, "unseen": 0.75}[part]


@pytest.mark.parametrize("part", ["seen", "unseen"])
def test_preambles_are_told_from_captions_that_sound_like_them(part: str) -> None:
    precision, recall = measured(preamble_of, "preambles.txt", "direct.txt", part)
    assert precision >= 0.95
    assert recall >= {"seen": 0.97, "unseen": 0.75}[part]


@pytest.mark.parametrize(
    ("text", "kind", "rest"),
    [
        ("Sure! Here is a caption: a dog runs", CHATTER, "A dog runs"),
        ("The image shows a red car.", ABOUT_IMAGE, "A red car."),
        ("Sure! The image shows a red car.", CHATTER, "A red car."),  # both go
        ("**Caption:** A man", CHATTER, "A man"),
        ("In this image, we can see İzmir.", ABOUT_IMAGE, "İzmir."),
        ("这张图片展示了一座桥。", ABOUT_IMAGE, "了一座桥。"),
        ("The image shows", ABOUT_IMAGE, "The image shows"),  # nothing would be left
    ],
)
def test_preambles_can_be_taken_off(text: str, kind: str, rest: str) -> None:
    preamble = preamble_of(text)
    assert preamble is not None
    assert preamble.kind == kind
    assert without_preamble(text) == rest


@pytest.mark.parametrize(
    "text",
    [t for part in ("seen", "unseen") for t in lines("direct.txt")[part]],
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert reason_of(text) is None
    assert without_preamble(text) == text


def test_one_answer_can_be_judged_by_itself() -> None:
    refusal = "I'm sorry, but I can't help with that."
    assert reason_of(refusal) == "refusal"
    assert reason_of(refusal, ["loops"]) is None
    assert reason_of("a red car " * 9) == "loop"
    assert reason_of("Sure! A cat.") == "preamble"
    assert reason_of("A cat", finish_reason="length") == "truncated"
    assert reason_of("A cat", ["loops"], finish_reason="length") is None
