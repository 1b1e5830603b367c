"""The batcher, with a model that repeats prompts (no torch) and fails where it is told to."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmbatch.engines.batcher import Batcher, BatchTooLarge
from vlmbatch.errors import EngineDead, ErrorCode, RequestFailed, Stage, failed
from vlmbatch.records import Completion, Request, Sampling, TaskKind

Outcome = Completion | BaseException


class Repeats:
    """Answers a prompt with itself, a batch at a time; writes down every batch that it answered.

    A prompt that begins with unreadable, long, breaks or kills makes its whole batch raise; a shy
    one is answered only when it is alone.
    """

    def __init__(self, largest: int = 1000) -> None:
        self.batches: list[list[str]] = []
        self.largest = largest
        self.prepared = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def prepare(self, requests: Sequence[Request]) -> list[str]:
        prompts = [request.prompt for request in requests]
        self.prepared.set()
        if any(prompt.startswith("unreadable") for prompt in prompts):
            raise ValueError("an unreadable prompt\nand a long story")
        if any(prompt.startswith("long") for prompt in prompts):
            raise failed(ErrorCode.PROMPT_TOO_LONG, Stage.PROMPT, "too long")
        return prompts

    def answer(
        self, prepared: list[str], is_over: Callable[[], bool]
    ) -> Sequence[Completion | None]:
        while not self.go_on.wait(timeout=0.01):
            if is_over():
                return []
        if len(prepared) > self.largest:
            raise BatchTooLarge("out of memory")
        if any(prompt.startswith("breaks") for prompt in prepared):
            raise RuntimeError("broken")
        if any(prompt.startswith("kills") for prompt in prepared):
            raise EngineDead("killed")
        self.batches.append(prepared)
        alone = len(prepared) == 1
        return [
            Completion(prompt, "stop") if alone or not prompt.startswith("shy") else None
            for prompt in prepared
        ]


@given(
    prompts=st.lists(
        st.sampled_from(["good", "unreadable", "long", "breaks", "shy"]), min_size=1, max_size=25
    ),
    batch_size=st.integers(1, 9),
    largest=st.integers(1, 9),
)
def test_every_request_gets_its_own_outcome_once(
    prompts: list[str], batch_size: int, largest: int
) -> None:
    prompts = [f"{prompt} {number}" for number, prompt in enumerate(prompts)]
    model = Repeats(largest)
    outcomes = asyncio.run(outcomes_of(model, prompts, batch_size))
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        if prompt.startswith(("good", "shy")):
            assert outcome == Completion(prompt, "stop")
        else:
            assert isinstance(outcome, RequestFailed)
            assert outcome.failure.code == (
                ErrorCode.PROMPT_TOO_LONG if prompt.startswith("long") else ErrorCode.ENGINE_FAILED
            )
    good = [prompt for batch in model.batches for prompt in batch if prompt.startswith("good")]
    assert sorted(good) == sorted(prompt for prompt in prompts if prompt.startswith("good"))


def test_failures_are_one_line_and_name_their_stage() -> None:
    unreadable, breaks = asyncio.run(outcomes_of(Repeats(), ["unreadable", "breaks"], 2))
    assert isinstance(unreadable, RequestFailed)
    assert unreadable.failure.stage is Stage.PROMPT
    assert unreadable.failure.message == "ValueError: an unreadable prompt"
    assert isinstance(breaks, RequestFailed)
    assert breaks.failure.stage is Stage.GENERATE
    assert breaks.failure.message == "RuntimeError: broken"


def test_batches_are_full_and_hold_prompts_of_like_length() -> None:
    model = Repeats()
    prompts = ["x" * (1 + number * 7 % 16) for number in range(16)]
    asyncio.run(outcomes_of(model, prompts, 4))
    assert [len(batch) for batch in model.batches] == [4, 4, 4, 4]
    spread = sum(max(map(len, batch)) - min(map(len, batch)) for batch in model.batches)
    assert spread <= 4 * 5


def test_only_requests_of_a_group_share_a_batch() -> None:
    async def scenario() -> list[Outcome]:
        batcher = Batcher(model, 4, lambda request: request.prompt[0])
        outcomes = await gathered(batcher, prompts)
        await batcher.close()
        return outcomes

    model = Repeats()
    prompts = [f"{'ab'[number % 3 == 0]}{number}" for number in range(18)]
    assert asyncio.run(scenario()) == [Completion(prompt, "stop") for prompt in prompts]
    assert all(len({prompt[0] for prompt in batch}) == 1 for batch in model.batches)
    assert sorted(len(batch) for batch in model.batches) == [2, 4, 4, 4, 4]


def test_the_oldest_request_is_in_the_next_batch_however_odd_it_is() -> None:
    model = Repeats()
    asyncio.run(outcomes_of(model, ["x", "y" * 999, *("z" * 5 for _ in range(20))], 4))
    assert "y" * 999 in model.batches[1]


def test_requests_with_other_sampling_are_in_other_batches() -> None:
    async def scenario() -> None:
        batcher = Batcher(model, 8)
        await asyncio.gather(
            *(batcher.generate(ask(f"{number % 2}", seed=number % 2)) for number in range(6))
        )
        await batcher.close()

    model = Repeats()
    asyncio.run(scenario())
    assert sorted(model.batches) == [["0"] * 3, ["1"] * 3]


def test_a_full_batch_is_prepared_while_another_is_answered() -> None:
    async def scenario() -> None:
        batcher = Batcher(model, 2)
        model.go_on.clear()
        first = [asyncio.create_task(batcher.generate(ask(f"{number}"))) for number in range(2)]
        await asyncio.to_thread(model.prepared.wait)
        model.prepared.clear()
        second = [asyncio.create_task(batcher.generate(ask(f"{number}"))) for number in range(2)]
        assert await asyncio.to_thread(model.prepared.wait, 10)
        assert model.batches == []
        model.go_on.set()
        await asyncio.gather(*first, *second)
        await batcher.close()

    model = Repeats()
    asyncio.run(scenario())


def test_memory_that_ran_out_halves_the_batches_from_then_on() -> None:
    model = Repeats(largest=3)
    outcomes = asyncio.run(outcomes_of(model, [f"{number}" for number in range(40)], 16))
    assert all(isinstance(outcome, Completion) for outcome in outcomes)
    assert all(len(batch) <= 2 for batch in model.batches)


@pytest.mark.parametrize("size", [1, 4])
def test_a_dead_engine_fails_everything_with_its_reason(size: int) -> None:
    async def scenario() -> list[Outcome]:
        batcher = Batcher(model, size)
        outcomes = await gathered(batcher, ["kills", *"abcdefgh"])
        outcomes += await gathered(batcher, ["later"])
        await batcher.close()
        return outcomes

    model = Repeats()
    for outcome in asyncio.run(scenario()):
        assert isinstance(outcome, EngineDead)
        assert outcome.message == "killed"


def test_cancelled_requests_are_not_asked() -> None:
    async def scenario() -> None:
        batcher = Batcher(model, 1)
        model.go_on.clear()
        tasks = [asyncio.create_task(batcher.generate(ask(f"{number}"))) for number in range(6)]
        await asyncio.to_thread(model.prepared.wait)
        for task in (tasks[0], tasks[4]):
            task.cancel()
        await asyncio.wait([tasks[0], tasks[4]])
        model.go_on.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        await batcher.close()

    model = Repeats()
    asyncio.run(scenario())
    answered = [prompt for batch in model.batches for prompt in batch]
    assert "4" not in answered
    assert all(int(a) < int(b) for a, b in pairwise(answered))
    assert answered[-1] == "5"


def test_close_ends_a_running_batch_and_may_be_called_twice() -> None:
    async def scenario() -> list[Outcome]:
        batcher = Batcher(model, 2)
        model.go_on.clear()
        waiting = asyncio.create_task(gathered(batcher, list("abcdefgh")))
        await asyncio.to_thread(model.prepared.wait)
        await batcher.close()
        await batcher.close()
        return await waiting

    model = Repeats()
    for outcome in asyncio.run(scenario()):
        assert isinstance(outcome, EngineDead)
        assert outcome.message == "the engine was closed"
    assert not [t for t in threading.enumerate() if t.name.startswith("vlmbatch-")]


def ask(prompt: str, seed: int | None = None) -> Request:
    request = Request(
        row=0, request=0, sample=0, task="t", kind=TaskKind.TEXT, prompt=prompt, question=None
    )
    return replace(request, sampling=Sampling(seed=seed))


async def outcomes_of(model: Repeats, prompts: Sequence[str], batch_size: int) -> list[Outcome]:
    batcher = Batcher(model, batch_size)
    outcomes = await gathered(batcher, prompts)
    await batcher.close()
    return outcomes


async def gathered(batcher: Batcher[list[str]], prompts: Sequence[str]) -> list[Outcome]:
    asked = [batcher.generate(ask(prompt)) for prompt in prompts]
    return list(await asyncio.gather(*asked, return_exceptions=True))
