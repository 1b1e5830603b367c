"""Pending rows are handed out until they are committed, whoever dies; only killers are condemned.

``Simulation`` plays driver and workers: it asks for leases, commits, dies, and checks each step.
"""

import random
import time
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.strategies import disjoint_ranges, union
from vlmbatch.records import Range
from vlmbatch.scheduler import STRETCH_LEASES, STRIKES, Lease, Mode, Scheduler

ROWS = 300
GRIDS = st.tuples(st.integers(1, 40), st.integers(1, 120), st.sets(st.integers(0, ROWS)))
"""(lease_rows, part_rows, boundaries)"""


class Simulation:
    """Workers with two leases each, over a scheduler. ``kills``: whether a row kills its worker."""

    def __init__(
        self,
        pending: list[Range],
        *,
        lease_rows: int,
        part_rows: int,
        boundaries: set[int] = frozenset(),
        kills: Callable[[int], bool] = lambda row: False,
        seed: int = 0,
    ) -> None:
        self.scheduler = Scheduler(
            pending, lease_rows=lease_rows, part_rows=part_rows, boundaries=sorted(boundaries)
        )
        self.rows = union(pending)
        self.lease_rows, self.part_rows = lease_rows, part_rows
        self.kills = kills
        self.random = random.Random(seed)
        self.leases: dict[str, list[Lease]] = {}
        self.next_row: dict[int, int] = {}
        self.committed: Counter[int] = Counter()
        self.condemned: set[int] = set()
        self.handed_out: list[Lease] = []
        self.deaths = 0
        self.started = 0

    def worker(self) -> str:
        self.started += 1
        name = f"w{self.started}"
        self.leases[name] = []
        return name

    def fill(self, name: str) -> None:
        while len(self.leases[name]) < 2 and self.ask(name) is not None:
            pass

    def ask(self, name: str) -> Lease | None:
        mine = self.leases[name]
        lease = self.scheduler.next_lease(name)
        if lease is None:
            return None
        self._check(lease, mine)
        mine.append(lease)
        self.handed_out.append(lease)
        self.next_row[lease.number] = lease.rows.first
        assert self.scheduler.leases_of(name) == mine
        return lease

    def _check(self, lease: Lease, mine: list[Lease]) -> None:
        first, stop = lease.rows.first, lease.rows.stop
        rows = set(range(first, stop))
        assert rows <= self.rows, "only what is pending"
        assert not rows & self.committed.keys(), "nothing that is committed"
        held = [lease for leases in self.leases.values() for lease in leases]
        assert not any(rows & set(range(self.next_row[h.number], h.rows.stop)) for h in held)
        assert len(rows) <= self.lease_rows
        assert first // self.part_rows == (stop - 1) // self.part_rows, "within one part"
        assert all(h.mode is Mode.NORMAL for h in mine), "a suspect runs alone"
        if lease.mode is not Mode.NORMAL:
            assert not mine, "a suspect comes to an idle worker"
        if lease.mode is Mode.CONDEMNED:
            assert len(rows) == 1
            self.condemned |= rows

    def commit(self, name: str, lease: Lease, stop: int | None = None) -> None:
        """Commit the lease up to a row, or whole."""
        rows = Range(self.next_row[lease.number], stop or lease.rows.stop)
        self.scheduler.committed(name, rows)
        self.committed.update(range(rows.first, rows.stop))
        self.next_row[lease.number] = rows.stop
        if rows.stop == lease.rows.stop:
            self.leases[name].remove(lease)
        assert self.scheduler.leases_of(name) == self.leases[name]
        left = sum(h.rows.stop - self.next_row[h.number] for h in self.leases[name])
        assert self.scheduler.left_of(name) == left

    def die(self, name: str, *, strike: bool = True) -> None:
        self.deaths += 1
        del self.leases[name]
        self.scheduler.died(name, strike=strike)

    def work(self, name: str) -> None:
        """Run what the worker has, as a worker does; it may die of it."""
        for lease in list(self.leases[name]):
            if lease.mode is Mode.NORMAL:
                if any(self.kills(row) for h in self.leases[name] for row in self.left(h)):
                    if self.random.random() < 0.3:
                        self.commit_prefix(name, lease)
                    return self.die(name)
                self.commit(name, lease)
            else:
                for row in self.left(lease):
                    if lease.mode is Mode.CAREFUL and self.kills(row):
                        return self.die(name)
                    self.commit(name, lease, row + 1)
        return None

    def left(self, lease: Lease) -> range:
        return range(self.next_row[lease.number], lease.rows.stop)

    def commit_prefix(self, name: str, lease: Lease) -> None:
        """What is finished before the first row that kills (a shard may end before its lease)."""
        alive = []
        for row in self.left(lease):
            if self.kills(row):
                break
            alive.append(row)
        if alive:
            self.commit(name, lease, self.random.choice(alive) + 1)

    def run(self, workers: int, *, most_deaths: int) -> None:
        """Until all is done, with a new worker for each that dies."""
        for _ in range(workers):
            self.worker()
        turns = 0
        while not self.scheduler.done:
            name = self.random.choice(list(self.leases))
            self.fill(name)
            self.work(name)
            if len(self.leases) < workers:
                self.worker()
            assert self.deaths <= most_deaths
            turns += 1
            assert turns < 100_000, "it ends"
        assert set(self.committed) == self.rows
        assert set(self.committed.values()) <= {1}
        assert self.scheduler.next_lease("another") is None


@examples(max_examples=200)
@given(disjoint_ranges(ROWS), GRIDS, st.integers(1, 4), st.integers(0, 2**32))
def test_whoever_dies_and_whenever_every_row_is_committed_once(pending, grid, workers, seed):
    lease_rows, part_rows, boundaries = grid
    played = Simulation(
        pending, lease_rows=lease_rows, part_rows=part_rows, boundaries=boundaries, seed=seed
    )
    chance = played.random
    names = [played.worker() for _ in range(workers)]
    for _ in range(60):  # a rough time
        name = chance.choice(names)
        match chance.choice(["ask", "ask", "commit", "prefix", "die", "leave"]):
            case "ask" if len(played.leases[name]) < 3:
                played.ask(name)
            case "commit" if played.leases[name]:
                careful = played.leases[name][0].mode is not Mode.NORMAL
                played.commit(name, played.leases[name][0 if careful else -1])
            case "prefix" if played.leases[name]:
                played.commit_prefix(name, chance.choice(played.leases[name]))
            case "die" | "leave" as how:
                played.die(name, strike=how == "die")
                names[names.index(name)] = played.worker()
    played.run(workers, most_deaths=played.deaths)


@examples(max_examples=150)
@given(
    st.sampled_from([0, ROWS // 2, ROWS - 1]) | st.integers(0, ROWS - 1),
    GRIDS,
    st.integers(1, 4),
    st.integers(0, 2**32),
)
def test_the_one_row_that_kills_is_condemned_and_no_other(poison, grid, workers, seed):
    lease_rows, part_rows, boundaries = grid
    played = Simulation(
        [Range(0, ROWS)],
        lease_rows=lease_rows,
        part_rows=part_rows,
        boundaries=boundaries,
        kills=lambda row: row == poison,
        seed=seed,
    )
    played.run(workers, most_deaths=2 * STRIKES)
    assert played.condemned == {poison}
    assert played.deaths == 2 * STRIKES


@examples(max_examples=100)
@given(
    st.sets(st.integers(0, ROWS - 1), max_size=8), GRIDS, st.integers(1, 4), st.integers(0, 2**32)
)
def test_several_rows_that_kill_are_all_found_in_a_bounded_number_of_deaths(
    poison, grid, workers, seed
):
    lease_rows, part_rows, boundaries = grid
    played = Simulation(
        [Range(0, ROWS)],
        lease_rows=lease_rows,
        part_rows=part_rows,
        boundaries=boundaries,
        kills=lambda row: row in poison,
        seed=seed,
    )
    played.run(workers, most_deaths=2 * STRIKES * len(poison))
    assert played.condemned == poison


def test_a_worker_that_leaves_without_blame_makes_nobody_a_suspect():
    played = Simulation([Range(0, 100)], lease_rows=10, part_rows=100)
    for _ in range(3 * STRIKES):
        name = played.worker()
        played.fill(name)
        played.die(name, strike=False)
    played.run(1, most_deaths=played.deaths)
    assert {lease.mode for lease in played.handed_out} == {Mode.NORMAL}


def test_a_suspect_waits_until_its_worker_is_idle():
    played = Simulation([Range(0, 100)], lease_rows=10, part_rows=100)
    busy = played.worker()
    played.fill(busy)
    for _ in range(STRIKES):
        name = played.worker()
        assert played.ask(name).rows == Range(60, 70)
        played.die(name)
    assert played.ask(busy).mode is Mode.NORMAL, "it has rows in flight"
    idle = played.worker()
    lease = played.ask(idle)
    assert (lease.mode, lease.rows) == (Mode.CAREFUL, Range(60, 70))
    assert played.ask(idle) is None, "nothing runs beside a suspect"
    played.commit(idle, lease)
    assert played.ask(idle).mode is Mode.NORMAL


def test_a_row_that_kills_once_while_run_alone_is_tried_again():
    played = Simulation([Range(0, 10)], lease_rows=10, part_rows=10)
    for _ in range(STRIKES + 1):
        name = played.worker()
        played.ask(name)
        played.die(name)
    played.run(1, most_deaths=played.deaths)
    assert not played.condemned


def test_deaths_at_different_rows_are_not_added_up():
    played = Simulation([Range(0, 10)], lease_rows=10, part_rows=10)
    for committed in (0, 0, 0, 1, 1, 1):  # twice in all, then once at each of four rows run alone
        name = played.worker()
        lease = played.ask(name)
        if committed:
            played.commit(name, lease, lease.rows.first + committed)
        played.die(name)
    assert not played.condemned
    assert played.ask(played.worker()).mode is Mode.CAREFUL


def test_a_struck_range_is_leased_again_as_it_was():
    played = Simulation([Range(0, 1000)], lease_rows=100, part_rows=1000)
    first = played.worker()
    played.fill(first)
    held = [lease.rows for lease in played.leases[first]]
    played.commit(first, played.leases[first][0], 30)
    played.die(first)
    other = played.worker()
    assert [played.ask(other).rows for _ in held] == [Range(30, 100), Range(100, 200)]


def test_one_worker_goes_through_the_rows_in_their_order():
    pending = [Range(3, 1000), Range(1005, 1500)]
    played = Simulation(pending, lease_rows=16, part_rows=100, boundaries=set(range(0, 1500, 37)))
    name = played.worker()
    rows = []
    while (lease := played.ask(name)) is not None:
        rows += range(lease.rows.first, lease.rows.stop)
        played.commit(name, lease)
    assert rows == sorted(union(pending))


def test_of_one_huge_stretch_every_worker_gets_about_the_same():
    played = Simulation([Range(0, 3_000)], lease_rows=10, part_rows=1_000)
    names = [played.worker() for _ in range(3)]
    rows: Counter[str] = Counter()
    while not played.scheduler.done:  # in lockstep: all are equally fast
        for name in names:
            lease = played.ask(name)
            if lease is not None:
                rows[name] += len(lease.rows)
                played.commit(name, lease)
    assert sum(rows.values()) == 3_000
    assert max(rows.values()) - min(rows.values()) <= 50


def test_the_last_rows_of_a_slow_worker_go_to_those_that_wait():
    played = Simulation([Range(0, 100)], lease_rows=10, part_rows=100)
    slow, fast = played.worker(), played.worker()
    assert played.ask(slow).rows == Range(0, 10)
    while (lease := played.ask(fast)) is not None:
        played.commit(fast, lease)
    played.commit(slow, played.leases[slow][0])
    assert played.scheduler.done


def test_each_worker_reads_files_of_its_own_and_small_ones_are_put_together():
    lease, stretch = 10, 10 * STRETCH_LEASES
    boundaries = {0, 3, 5, stretch, stretch + 7, 2 * stretch}
    played = Simulation(
        [Range(0, 3 * stretch)], lease_rows=lease, part_rows=1000, boundaries=boundaries
    )
    names = [played.worker() for _ in range(3)]
    assert [played.ask(n).rows.first for n in names] == [0, stretch, 2 * stretch]
    assert [played.ask(n).rows.first for n in names] == [10, stretch + 10, 2 * stretch + 10]
    assert {len(lease.rows) for lease in played.handed_out} == {10}


@pytest.mark.parametrize("workers", [1, 3])
def test_a_million_rows_in_forty_thousand_row_groups_are_handed_out_in_a_second(workers):
    scheduler = Scheduler(
        [Range(0, 1_000_000)],
        lease_rows=256,
        part_rows=65_536,
        boundaries=range(0, 1_000_000, 25),
    )
    before, leases = time.process_time(), 0
    for number in range(300):  # deaths leave struck ranges behind
        for _ in range(2):
            scheduler.next_lease(f"dead{number}")
        scheduler.died(f"dead{number}", strike=number % 2 == 0)
    while not scheduler.done:
        for number in range(workers):
            lease = scheduler.next_lease(f"w{number}")
            if lease is not None:
                scheduler.committed(f"w{number}", lease.rows)
                leases += 1
    assert time.process_time() - before < 2
    assert leases < 1.5 * 1_000_000 / 256


def test_where_it_is_known_only_the_rows_being_computed_are_struck():
    scheduler = Scheduler([Range(0, 100)], lease_rows=50, part_rows=100)
    for name, computing in (("first", [10, 11, 12, 40]), ("second", [11, 12, 40, 60])):
        while scheduler.next_lease(name) is not None:
            pass
        scheduler.committed(name, Range(20, 30))  # answered, in the middle of a lease
        scheduler.died(name, suspects=computing)
    found = {}
    while (lease := scheduler.next_lease("third")) is not None:
        found[lease.rows] = lease.mode
        scheduler.committed("third", lease.rows)
    careful = [rows for rows, mode in found.items() if mode is Mode.CAREFUL]
    assert sorted(careful, key=lambda rows: rows.first) == [Range(11, 13), Range(40, 41)]
    assert union(found) == set(range(100)) - set(range(20, 30))
    assert scheduler.done


@examples(max_examples=150)
@given(st.integers(0, ROWS - 1), st.integers(1, 40), st.integers(1, 60), st.integers(1, 100))
def test_a_row_that_kills_the_engine_makes_suspects_of_its_neighbours_in_flight_only(
    poison, lease_rows, in_flight, part_rows
):
    """The engine computes ``in_flight`` rows at once, in order; what it answered is committed."""
    scheduler = Scheduler([Range(0, ROWS)], lease_rows=lease_rows, part_rows=part_rows)
    deaths, careful, condemned = 0, 0, set()
    while not scheduler.done:
        assert deaths <= 2 * STRIKES
        name = f"w{deaths}"
        rows = []
        while len(rows) < 2 * max(lease_rows, in_flight):
            lease = scheduler.next_lease(name)
            if lease is None:
                break
            rows += range(lease.rows.first, lease.rows.stop)
            if lease.mode is not Mode.NORMAL:
                break
        if lease is not None and lease.mode is Mode.CONDEMNED:
            condemned |= set(rows)
            scheduler.committed(name, lease.rows)
        elif lease is not None and lease.mode is Mode.CAREFUL:
            for row in rows:
                careful += 1
                if row == poison:
                    deaths += 1
                    scheduler.died(name, suspects=[row])
                    break
                scheduler.committed(name, Range(row, row + 1))
        else:
            at = rows.index(poison) if poison in rows else len(rows)
            answered = rows[: max(0, at - in_flight + 1)] if at < len(rows) else rows
            for row in answered:
                scheduler.committed(name, Range(row, row + 1))
            if at < len(rows):
                deaths += 1
                scheduler.died(name, suspects=rows[len(answered) : at + 1])
    assert condemned == {poison}
    assert deaths == 2 * STRIKES
    assert careful <= STRIKES + in_flight
