"""The pace at an endpoint: up with its answers, down by half when it groans."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from vlmbatch.engines.pace import FIRST_LIMIT, LONGEST_WAIT, Pace, backoff


def on_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


async def answers(pace: Pace, count: int) -> None:
    for _ in range(count):
        async with pace.turn():
            pace.answered()


def test_it_begins_small_and_grows_to_the_most() -> None:
    async def test() -> None:
        pace = Pace(64)
        assert pace.limit == FIRST_LIMIT
        await answers(pace, 100)
        assert pace.limit == 64

    on_a_loop(test)


def test_a_burst_of_refusals_halves_it_once() -> None:
    async def test() -> None:
        pace = Pace(64)
        await answers(pace, 100)
        turns = [pace.turn() for _ in range(64)]
        given_turns = [await turn.__aenter__() for turn in turns]
        for turn in given_turns:
            pace.slow_down(turn, wait=0.0)
        for turn in turns:
            await turn.__aexit__(None, None, None)
        assert pace.limit == 32
        async with pace.turn() as later:
            pace.slow_down(later, wait=0.0)
        assert pace.limit == 16

    on_a_loop(test)


def test_above_half_of_what_was_too_much_it_grows_by_one_per_round() -> None:
    async def test() -> None:
        pace = Pace(64)
        await answers(pace, 100)
        async with pace.turn() as turn:
            pace.slow_down(turn, wait=0.0)
        await answers(pace, 32)
        assert 32.9 < pace.limit < 33.1

    on_a_loop(test)


def test_one_alone_tries_the_way_to_an_endpoint_that_was_down() -> None:
    async def test() -> None:
        pace = Pace(64)
        async with pace.turn() as turn:
            pace.slow_down(turn, wait=0.0, to_one=True)
        assert pace.limit == 1
        await answers(pace, 3)
        assert pace.limit == FIRST_LIMIT / 2
        assert pace.silent == 0

    on_a_loop(test)


def test_a_pause_holds_for_those_that_wait_and_for_those_that_come() -> None:
    async def test() -> None:
        pace = Pace(4)
        order: list[str] = []

        async def one(name: str) -> None:
            async with pace.turn():
                order.append(name)

        async with pace.turn() as turn:
            pace.slow_down(turn, wait=0.2)
        asyncio.get_running_loop().call_later(0.1, order.append, "in the pause")
        await asyncio.gather(one("a"), one("b"), one("c"))
        assert order == ["in the pause", "a", "b", "c"]

    on_a_loop(test)


@given(
    most=st.integers(1, 9),
    events=st.lists(st.sampled_from(["answer", "groan", "gone", "cancel"]), max_size=40),
)
def test_no_more_are_out_than_the_limit_and_no_turn_is_lost(most: int, events: list[str]) -> None:
    async def test() -> None:
        pace, highest = Pace(most), 0

        async def one(event: str) -> None:
            nonlocal highest
            async with pace.turn() as turn:
                highest = max(highest, pace.out)
                await asyncio.sleep(0)
                match event:
                    case "answer":
                        pace.answered()
                    case "groan":
                        pace.slow_down(turn, wait=0.0)
                    case "gone":
                        pace.slow_down(turn, wait=0.0, to_one=True)
                    case "cancel":
                        raise asyncio.CancelledError

        tasks = [asyncio.create_task(one(event)) for event in events]
        for task, event in zip(tasks, events, strict=True):
            if event == "cancel" and len(tasks) % 2:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert highest <= most
        assert pace.out == 0
        assert 1 <= pace.limit <= most

    on_a_loop(test)


@given(st.integers(0, 100_000))
def test_a_wait_is_never_longer_than_the_longest(failures: int) -> None:
    assert 0.25 <= backoff(failures) <= 1.5 * LONGEST_WAIT
