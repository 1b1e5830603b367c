"""Shares and their intervals, and when two texts are the same answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmbatch.evaluation.scores import DETECTED, Score, wilson
from vlmbatch.evaluation.texts import RULES


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        (5, 10, 0.2366, 0.7634),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
    ],
)  # the last: Newcombe, Statistics in Medicine 17 (1998), table I
def test_the_interval_is_wilsons(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(0, 1000), st.integers(1, 1000))
def test_the_share_is_inside_of_its_interval(right: int, n: int) -> None:
    right = min(right, n)
    low, high = wilson(right, n)
    assert 0 <= low <= right / n + 1e-12
    assert right / n - 1e-12 <= high <= 1
    assert wilson(n - right, n) == pytest.approx((1 - high, 1 - low))


def test_precision_of_nothing_is_undefined() -> None:
    score = Score(DETECTED, n=2, boxes_wanted=3)
    assert (score.precision, score.recall, score.f1) == (None, 0.0, 0.0)
    assert score.to_json()["precision"] is None
    assert "precision undefined, recall 0.00 %" in score.as_text("detect")


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (" The  Red-Car. ", "red car"),
        ("Two", "2"),
        ("none", "0"),
        ("100,978", "100978"),
        ("3.5 km", "3.5 km"),
        ("dont", "don't"),
        ("Don’t!", "don't"),
        ("the girl's hat", "girl's hat"),
        ("2:50 p.m.", "2:50 pm"),
        ("black, white & gray", "black white gray"),
        ("naïve_Öl", "naïve öl"),
    ],
)
def test_the_vqa_rule_is_as_described(text: str, plain: str) -> None:
    assert RULES["vqa"](text) == plain


@given(text=st.text(max_size=30))
def test_a_rule_changes_its_own_result_no_more(text: str) -> None:
    for rule in RULES.values():
        assert rule(rule(text)) == rule(text)


def test_exact_only_trims() -> None:
    assert RULES["exact"](" Yes.\n") == "Yes."
