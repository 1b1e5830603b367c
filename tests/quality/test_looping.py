"""Loops are found, and what people write is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vlmbatch.quality.looping import LONGEST, TIMES, TIMES_LONG, loop_in
from vlmbatch.quality.words import words_of

NATURAL = (Path(__file__).parent / "natural.txt").read_text(encoding="utf-8").split("\n---\n")
WORDS = sorted({word for text in NATURAL for word in words_of(text) if any(map(str.isalpha, word))})

words = st.sampled_from(WORDS)
phrases = st.lists(words, min_size=2, max_size=12).filter(lambda found: len(set(found)) > 1)


@pytest.mark.parametrize("text", NATURAL, ids=lambda text: " ".join(text.split()[:4]))
def test_lists_tables_and_refrains_are_no_loops(text: str) -> None:
    assert loop_in(text) is None


@given(st.lists(st.sampled_from(NATURAL), min_size=1, max_size=4, unique=True))
def test_nor_are_several_of_them_on_one_page(texts: list[str]) -> None:
    assert loop_in("\n\n".join(texts)) is None


@given(phrases, st.sampled_from(NATURAL), st.sampled_from([" ", ", ", ". ", "\n"]))
def test_a_phrase_eight_times_is_a_loop_wherever_it_stands(
    phrase: list[str], before: str, between: str
) -> None:
    text = " ".join(phrase)
    looping = between.join([text] * 8)
    for whole in (looping, f"{before} {looping}", f"{looping} {before}", f"{looping} {text[:-1]}"):
        assert loop_in(whole) is not None


@given(st.lists(words, min_size=1, max_size=20), st.data())
def test_so_many_times_and_no_fewer(phrase: list[str], data: st.DataObject) -> None:
    count = len(phrase)
    # none that is itself a shorter phrase over and over
    assume(not any(count % n == 0 and phrase == phrase[:n] * (count // n) for n in range(1, count)))
    times = TIMES.get(count, TIMES_LONG)
    assert loop_in(" ".join(phrase * times)) is not None
    few = data.draw(st.integers(1, times - 1))
    found = loop_in(" ".join(phrase * few))
    assert found is None or len(words_of(found.phrase)) < count  # inside of the phrase


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("a red car " * 9, "a red car"),
        ("The man wears a hat. " * 5, "the man wears a hat"),
        ("一只猫" * 9, "一 只 猫"),
        ("no " * 20, "no"),
        ("ha" * 40, "ha"),
        ("<td>x y</td> 1 2 " * 10, "td>x y</td 1 2"),
        ("a b c d e f g h i j k " * 4, "a b c d e f g h i j k"),
    ],
)
def test_the_phrase_is_shown(text: str, phrase: str) -> None:
    loop = loop_in(text)
    assert loop is not None
    assert loop.phrase == phrase


def test_the_longest_phrase_that_is_looked_for() -> None:
    assert loop_in(" ".join([f"word{n}" for n in range(LONGEST)] * TIMES_LONG)) is not None
    assert loop_in(" ".join([f"word{n}" for n in range(LONGEST + 1)] * TIMES_LONG)) is None
