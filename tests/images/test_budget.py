"""The byte budget: never above its total, first come first served, nothing lost on cancel."""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmbatch.images.budget import ByteBudget


async def settle() -> None:
    """Lets every task run until it waits for another."""
    for _ in range(20):
        await asyncio.sleep(0)


def waiting(budget: ByteBudget, size: int) -> asyncio.Task:
    return asyncio.create_task(budget.reserve(size))


def test_what_fits_is_granted_at_once_and_the_rest_waits():
    async def scene():
        budget = ByteBudget(100)
        first = await budget.reserve(60)
        second = waiting(budget, 50)
        await settle()
        assert not second.done()
        first.resize(50)
        await settle()
        assert second.done()
        assert budget.held == 100

    asyncio.run(scene())


def test_small_requests_do_not_overtake_a_large_one():
    async def scene():
        budget = ByteBudget(100)
        first = await budget.reserve(60)
        large, small = waiting(budget, 90), waiting(budget, 10)
        await settle()
        assert not small.done()
        first.release()
        await settle()
        assert large.done()
        assert small.done()

    asyncio.run(scene())


def test_a_request_above_the_total_runs_alone():
    async def scene():
        budget = ByteBudget(100)
        first = await budget.reserve(1)
        huge, next_one = waiting(budget, 500), waiting(budget, 1)
        await settle()
        assert not huge.done()
        first.release()
        await settle()
        assert huge.done()
        assert not next_one.done()
        (await huge).resize(99)
        await settle()
        assert next_one.done()

    asyncio.run(scene())


def test_release_counts_once():
    async def scene():
        budget = ByteBudget(100)
        other = await budget.reserve(10)
        with await budget.reserve(50) as reservation:
            assert budget.held == 60
            reservation.release()
            reservation.release()
        assert budget.held == other.size == 10

    asyncio.run(scene())


def test_a_reservation_cannot_grow():
    async def scene():
        reservation = await ByteBudget(100).reserve(10)
        for size in (11, -1):
            with pytest.raises(ValueError):
                reservation.resize(size)
        with pytest.raises(ValueError):
            await ByteBudget(100).reserve(-1)

    asyncio.run(scene())


def test_a_cancelled_waiter_makes_way_for_those_behind():
    async def scene():
        budget = ByteBudget(100)
        held = await budget.reserve(60)
        large, small = waiting(budget, 90), waiting(budget, 10)
        await settle()
        large.cancel()
        await settle()
        assert small.done()
        assert budget.held == 70
        held.release()
        assert budget.held == 10

    asyncio.run(scene())


def test_cancelled_in_the_moment_of_the_grant():
    async def scene():
        budget = ByteBudget(100)
        held = await budget.reserve(100)
        first, second = waiting(budget, 80), waiting(budget, 80)
        await settle()
        held.release()  # grants to first, which has not run yet
        first.cancel()
        await settle()
        assert first.cancelled()
        assert second.done()
        assert budget.held == 80

    asyncio.run(scene())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), total=st.integers(1, 100))
def test_any_interleaving_keeps_the_total_and_ends_with_nothing_held(seed: int, total: int):
    rng = random.Random(seed)
    live: dict[int, int] = {}

    async def use(budget: ByteBudget, number: int, size: int) -> None:
        with await budget.reserve(size) as reservation:
            live[number] = size
            try:
                for _ in range(rng.randrange(4)):
                    assert sum(live.values()) <= budget.held  # some are granted and not yet awake
                    assert budget.held <= total or len([s for s in live.values() if s]) <= 1
                    await asyncio.sleep(0)
                live[number] = rng.randint(0, size)
                reservation.resize(live[number])
                await asyncio.sleep(0)
            finally:
                del live[number]

    async def scene() -> None:
        budget = ByteBudget(total)
        tasks = []
        for number in range(rng.randint(1, 30)):
            tasks.append(asyncio.create_task(use(budget, number, rng.randint(0, total * 3 // 2))))
            if rng.random() < 0.3:
                await asyncio.sleep(0)
            if rng.random() < 0.3:
                rng.choice(tasks).cancel()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert all(r is None or isinstance(r, asyncio.CancelledError) for r in results), results
        assert budget.held == 0

    asyncio.run(scene())


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 150), max_size=20), cancelled=st.sets(st.integers(0, 19)))
def test_whoever_waits_is_served_in_the_order_of_coming(sizes: list[int], cancelled: set[int]):
    served = []

    async def use(budget: ByteBudget, number: int, size: int) -> None:
        with await budget.reserve(size):
            served.append(number)
            await asyncio.sleep(0)

    async def scene() -> None:
        budget = ByteBudget(100)
        with await budget.reserve(150):
            tasks = [asyncio.create_task(use(budget, *pair)) for pair in enumerate(sizes)]
            await settle()
            for number in cancelled & set(range(len(sizes))):
                tasks[number].cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert budget.held == 0

    asyncio.run(scene())
    assert served == [number for number in range(len(sizes)) if number not in cancelled]
