"""How answers are picked, as a user sees it: several samples, answers that are cut, attempts."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness import (
    OURS,
    EchoLog,
    Finished,
    assert_whole,
    echo,
    meta_of,
    parts,
    picture,
    read_results,
    vlmbatch,
    write_manifest,
)
from vlmbatch.records import Sampling
from vlmbatch.truncation import LOOP_CHARS, loops, sampling_after

WORDS = "one two three four five six seven eight nine ten eleven twelve"


def ask(folder: Path, replies: Sequence[Any], *options: str, **faults: Any) -> Finished:
    """Captions that the echo engine answers with these, into out/, with a JSON summary."""
    columns = {"id": [f"id{i}" for i in range(len(replies))], "reply": replies}
    manifest = write_manifest(folder / "m.parquet", columns)
    args = echo(reply_from="reply", truncate="true", log=folder / "log", **faults)
    return vlmbatch("run", manifest, *args, "-o", folder / "out", "--json", *options)


def column(folder: Path, name: str) -> list[Any]:
    found: list[Any] = read_results(folder / "out")[name].to_pylist()
    return found


# several samples


def test_every_request_is_answered_so_many_times(tmp_path: Path) -> None:
    answers = [[f"{i}.{j}.{n}" for j in range(1 + i % 2) for n in range(3)] for i in range(20)]
    asked = [[f"{i}.{j}?" for j in range(1 + i % 2)] for i in range(20)]
    replies = [[texts[j : j + 3] for j in range(0, len(texts), 3)] for texts in answers]
    manifest = write_manifest(tmp_path / "m.parquet", {"questions": asked, "reply": replies})
    faults = echo(reply_from="reply", log=tmp_path / "log", flaky_rows="3")
    options = ["-t", "vqa", "--part-rows=8", "--num-samples=3", "--temperature=0.7", "--json"]
    words = ["run", manifest, *faults, "-o", tmp_path / "out", *options]
    ended = vlmbatch(*words)
    assert ended.exit_code == 0, ended
    assert (ended.json["ok"], ended.json["requests"]) == (20, 3 * 30)
    assert_whole(tmp_path / "out", answers, samples=3)
    assert sorted((a.row, a.request, a.sample) for a in EchoLog(tmp_path / "log").lines()) == [
        (row, j, n) for row in range(20) for j in range(1 + row % 2) for n in range(3)
    ]
    again = vlmbatch(*words)
    assert (again.exit_code, again.json["skipped"]) == (0, 20), again
    refused = vlmbatch(*words, "--num-samples=2")
    assert "sampling.num_samples: was 3, now 2" in refused.stderr, refused


def test_of_several_samples_only_the_failed_ones_are_asked_again(tmp_path: Path) -> None:
    replies = [[["yes", "maybe", "no"]], [["no", "no", "yes"]]]
    options = ["--choices=yes,no", "--num-samples=3", "--temperature=1"]
    ended = ask(tmp_path, replies, *options, "--max-failure-rate=1")
    assert ended.exit_code == 0, ended
    assert (ended.json["failed"], ended.json["failures"]) == (1, {"schema_mismatch": 1})
    before = len(EchoLog(tmp_path / "log"))
    assert vlmbatch("retry", tmp_path / "out").exit_code == 0
    (line,) = EchoLog(tmp_path / "log").lines()[before:]
    assert (line.row, line.request, line.sample) == (0, 0, 1)
    assert column(tmp_path, "attempts") == [1, 2, 1, 1, 1, 1]
    assert column(tmp_path, "sample") == [0, 1, 2, 0, 1, 2]


def test_a_row_that_cannot_be_asked_fails_once_per_sample(tmp_path: Path) -> None:
    columns = {"image": [picture(), None], "questions": [["a?", None], ["b?"]]}
    manifest = write_manifest(tmp_path / "m.parquet", columns)
    options = ["-t", "vqa", "--num-samples=2", "--temperature=1", "--max-failure-rate=1"]
    ended = vlmbatch("run", manifest, *echo(), "-o", tmp_path / "out", *options)
    assert ended.exit_code == 0, ended
    found = read_results(tmp_path / "out").to_pylist()
    assert [(r["row"], r["request"], r["sample"], r["status"]) for r in found] == [
        *[(0, 0, 0, "ok"), (0, 0, 1, "ok"), (0, 1, 0, "failed"), (0, 1, 1, "failed")],
        *[(1, 0, 0, "failed"), (1, 0, 1, "failed")],
    ]
    assert [r["attempts"] for r in found] == [1, 1, 0, 0, 0, 0]


def test_a_row_that_kills_its_worker_fails_once_per_sample(tmp_path: Path) -> None:
    options = ["--num-samples=2", "--temperature=1", "--max-failure-rate=1"]
    ended = ask(tmp_path, ["a", "b", "c"], *options, crash_rows="1")
    assert ended.exit_code == 0, ended
    assert ended.json["failures"] == {"engine_crash": 2}
    assert column(tmp_path, "text") == ["a", "a", None, None, "c", "c"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-samples=3"], "--num-samples 3 at temperature 0 gives the same answer 3 times"),
        (["--num-samples=0"], "expected at least 1, got 0 @ sampling.num_samples"),
        (["--min-tokens=9", "--max-tokens=8"], "--min-tokens 9 is more than --max-tokens 8"),
        (["--stop="], "--stop is empty"),
        (["--repetition-penalty=0"], "sampling.repetition_penalty"),
    ],
)
def test_sampling_that_makes_no_sense_is_exit_code_2(
    tmp_path: Path, options: list[str], message: str
) -> None:
    ended = ask(tmp_path, ["a"], *options)
    assert (ended.exit_code, ended.stdout) == (2, ""), ended
    assert message in ended.stderr
    assert not (tmp_path / "out").exists()


# answers that are cut


def test_a_cut_answer_is_kept_and_says_so(tmp_path: Path) -> None:
    ended = ask(tmp_path, [WORDS, "one two three"], "--max-tokens=3")
    assert ended.exit_code == 0, ended
    assert ended.json["truncated"] == 1
    assert column(tmp_path, "text") == ["one two three"] * 2
    assert column(tmp_path, "finish_reason") == ["length", "stop"]


def test_a_cut_answer_fails_if_that_is_wanted(tmp_path: Path) -> None:
    options = ["--max-tokens=3", "--on-truncation=fail", "--max-failure-rate=0.5"]
    ended = ask(tmp_path, [WORDS, "one two three"], *options)
    assert ended.exit_code == 0, ended
    assert ended.json["failures"] == {"truncated": 1}
    cut, whole = read_results(tmp_path / "out").to_pylist()
    assert whole["text"] == "one two three"
    assert (cut["text"], cut["raw"], cut["finish_reason"]) == (None, "one two three ", "length")
    assert cut["error"] == {
        "code": "truncated",
        "stage": "generate",
        "message": "the answer was cut after 3 tokens (--max-tokens 3)",
    }
    assert vlmbatch("retry", tmp_path / "out", "--codes=truncated").exit_code == 0


def test_a_cut_answer_is_asked_again_with_more_tokens(tmp_path: Path) -> None:
    loop = "so it goes on and " * 40
    replies = [WORDS, f"{WORDS} {WORDS}", "short", loop, "a b c d e"]
    ended = ask(tmp_path, replies, "--max-tokens=4", "--on-truncation=retry", flaky_rows="0")
    assert ended.exit_code == 0, ended
    cut = " ".join(f"{WORDS} {WORDS}".split()[:16])
    texts = column(tmp_path, "text")
    assert texts[:3] == [WORDS, cut, "short"]
    assert texts[3].split() == loop.split()[:16]
    assert column(tmp_path, "finish_reason") == ["stop", "length", "stop", "length", "stop"]
    assert column(tmp_path, "attempts") == [4, 3, 1, 3, 2]
    assert ended.json["attempts"] == {"1": 1, "2": 1, "3": 2, "4": 1}
    assert meta_of(parts(tmp_path / "out")[0])["counts"]["attempts"] == ended.json["attempts"]
    text = ask(tmp_path, replies, "--max-tokens=4", "--on-truncation=retry", "--overwrite")
    assert text.json["attempts"] == {"1": 1, "2": 1, "3": 3}


def test_an_answer_that_loops_gets_no_more_tokens(tmp_path: Path) -> None:
    ended = ask(tmp_path, ["so it goes on " * 99], "--max-tokens=50", "--on-truncation=retry")
    assert ended.exit_code == 0, ended
    (result,) = read_results(tmp_path / "out").to_pylist()
    assert (result["attempts"], result["finish_reason"]) == (3, "length")
    assert len(result["raw"].split()) == 50


def test_a_cut_answer_is_checked_before_it_is_read(tmp_path: Path) -> None:
    options = ["--max-tokens=2", "--choices=one two three", "--max-failure-rate=1"]
    for how, codes in [
        ("fail", {"truncated": 1}),
        ("keep", {"schema_mismatch": 1}),
        ("retry", {}),
    ]:
        again = ["--overwrite", f"--on-truncation={how}"]
        ended = ask(tmp_path, ["one two three"], *options, *again)
        assert (ended.exit_code, ended.json["failures"]) == (0, codes), ended


def test_the_summary_says_what_needed_more_attempts(tmp_path: Path) -> None:
    replies = [*["a b c d e"] * 12, WORDS, "a"]
    columns = {"id": list(map(str, range(14))), "reply": replies}
    manifest = write_manifest(tmp_path / "m.parquet", columns)
    options = ["--max-tokens=3", "--on-truncation=retry", "-o", tmp_path / "out"]
    ended = vlmbatch("run", manifest, *echo(reply_from="reply", truncate="true"), *options)
    assert ended.exit_code == 0, ended
    assert "\n  12 answers needed 2 attempts, 1 needed 3\n" in ended.stdout
    again = vlmbatch("run", manifest, *echo(reply_from="reply", truncate="true"), *options)
    assert "attempts" not in again.stdout


def test_sampling_after_a_cut() -> None:
    sampling = Sampling(max_tokens=100)
    assert sampling_after(sampling, "a picture of") == Sampling(max_tokens=200)
    assert sampling_after(sampling, "ha " * 50) == Sampling(max_tokens=100, repetition_penalty=1.1)
    again = sampling_after(Sampling(repetition_penalty=1.1), "ha " * 50)
    assert again.repetition_penalty == 1.2
    assert sampling_after(Sampling(repetition_penalty=0.5), "ha " * 50).repetition_penalty == 1.1


@given(st.text(max_size=200), st.text(min_size=1, max_size=60), st.integers(0, 59))
def test_a_tail_that_repeats_is_a_loop(before: str, unit: str, rest: int) -> None:
    times = max(3, -(-LOOP_CHARS // len(unit)))
    assert loops(before + unit * times + unit[: rest % len(unit)])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "ha ha ha ha",
        WORDS * 2,
        "".join(f"{n}. a picture\n" for n in range(200)),
        "ab" * 100 + "and then it ends in another way",
    ],
)
def test_other_tails_are_none(text: str) -> None:
    assert not loops(text)


@pytest.mark.parametrize("text", ["ab" * 10**6, "a" * 2047 + "b" + "a" * 10**6, "aab" * 10**5])
def test_long_texts_are_looked_at_in_no_time(text: str) -> None:
    before = time.process_time()
    loops(text)
    assert time.process_time() - before < 0.5


# attempts and starvation


def test_attempts_of_a_retry_add_up(tmp_path: Path) -> None:
    ended = ask(tmp_path, ["a b c", "a", "a"], "--choices=a", "--max-failure-rate=1")
    assert ended.json["attempts"] == {"1": 3}, ended
    for attempts in ("2", "3"):
        ended = vlmbatch("retry", tmp_path / "out", "--json")
        assert ended.json["attempts"] == {attempts: 1}, ended
    counts = meta_of(parts(tmp_path / "out")[0])["counts"]
    assert counts["attempts"] == {"1": 2, "3": 1}


@pytest.mark.parametrize(
    ("rows", "capacity", "least", "most"), [(120, 2, 0.0, 0.5), (80, 100, 1.0, 1.0)]
)
def test_the_summary_says_how_long_the_engine_starved(
    tmp_path: Path, rows: int, capacity: int, least: float, most: float
) -> None:
    """An engine that takes two at once has always enough; one that takes 100 never gets that."""
    ended = ask(tmp_path, ["a"] * rows, delay=0.03, capacity=capacity)
    assert ended.exit_code == 0, ended
    assert least <= ended.json["engine_starved"] <= most, ended
    status = json.loads((tmp_path / "out" / OURS / "status.json").read_text())
    assert status["engine_starved"] == ended.json["engine_starved"]


def test_a_run_that_asks_nothing_starves_nothing(tmp_path: Path) -> None:
    ask(tmp_path, ["a"])
    ended = ask(tmp_path, ["a"])
    assert ended.exit_code == 0, ended
    assert ended.json["engine_starved"] is None
    assert ended.json["attempts"] == {}
    assert Counter(column(tmp_path, "attempts")) == {1: 1}
