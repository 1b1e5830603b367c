"""Which rows go to which worker. Pure logic: no Ray, no I/O, no clock.

Rows are pending, leased or done. Pending rows are kept as *stretches* that begin where a file or a
row group begins, so that a worker goes on in the file that it has open. A worker gets the next
range of its own stretch, then the first fresh one, then half of what another worker's has left.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from vlmbatch.intervals import Intervals
from vlmbatch.records import Range

STRIKES = 2
"""So many deaths make a range suspect, and a row of a suspect range guilty."""
STRETCH_LEASES = 4
"""A stretch has at least so many leases: small files and row groups are put together."""


class Mode(StrEnum):
    """How a lease is run."""

    NORMAL = "normal"
    CAREFUL = "careful"
    """Row by row, nothing else in flight, each row committed: finds the row that kills."""
    CONDEMNED = "condemned"
    """Not run at all: the row killed twice and becomes engine_crash."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Rows that one worker may work on."""

    number: int
    rows: Range
    mode: Mode = Mode.NORMAL


@dataclass(slots=True)
class _Stretch:
    """Pending rows [first, stop) that one worker reads through. With strikes, it was one lease, and
    is leased again as it was."""

    first: int
    stop: int
    strikes: int = 0


@dataclass(slots=True)
class _Held:
    lease: Lease
    left: Intervals
    """Its rows that are not committed yet."""
    strikes: int = 0
    """How often its rows were held by a worker that died; in careful mode, its first row alone."""


@dataclass(slots=True)
class _Suspect:
    """A range with two strikes, to be run row by row. ``first_row_strikes``: how often its first
    row has killed since."""

    rows: Range
    first_row_strikes: int = 0


class Scheduler:
    """Hands out leases, takes commits and deaths, and knows when all is done."""

    def __init__(
        self,
        pending: Iterable[Range],
        *,
        lease_rows: int,
        part_rows: int,
        boundaries: Sequence[int] = (),
    ) -> None:
        self._lease_rows = lease_rows
        self._part_rows = part_rows
        cut = _cut(pending, boundaries, STRETCH_LEASES * lease_rows)
        self._fresh = [_Stretch(rows.first, rows.stop) for rows in cut]
        self._fresh.sort(key=_descending)  # the first one is popped from the end
        self._reading: dict[str, _Stretch] = {}
        self._held: dict[str, list[_Held]] = {}
        self._suspects: list[_Suspect] = []
        self._number = 0

    @property
    def done(self) -> bool:
        """Every row is committed."""
        return not (self._fresh or self._reading or self._suspects or any(self._held.values()))

    def leases_of(self, worker: str) -> list[Lease]:
        return [held.lease for held in self._held.get(worker, [])]

    def left_of(self, worker: str) -> int:
        """How many leased rows of the worker are not committed."""
        return sum(held.left.rows for held in self._held.get(worker, []))

    def next_lease(self, worker: str) -> Lease | None:
        """The next rows for this worker, or None if there are none (for now)."""
        mine = self._held.setdefault(worker, [])
        if any(held.lease.mode is not Mode.NORMAL for held in mine):
            return None  # a suspect runs alone
        if self._suspects and not mine:
            return self._lease_suspect(worker)
        stretch = self._stretch_for(worker)
        if stretch is None:
            return None
        return self._lease(worker, self._cut_off(worker, stretch), Mode.NORMAL, stretch.strikes)

    def committed(self, worker: str, rows: Range) -> None:
        """These rows of the worker's leases are on disk."""
        kept = []
        for held in self._held.get(worker, []):
            held.left.remove(rows)
            if held.left:
                kept.append(held)
        self._held[worker] = kept

    def died(
        self, worker: str, *, strike: bool = True, suspects: Collection[int] | None = None
    ) -> None:
        """The worker is gone: its rows are pending again, each of its ranges with a strike; only
        those of ``suspects`` where it is known which rows were being computed."""
        for held in self._held.pop(worker, []):
            rest = list(held.left)
            if held.lease.mode is not Mode.NORMAL:
                if rest:
                    self._return_suspect(held, rest, strike)
            elif strike and suspects is not None:
                rows_of = (Range(row, row + 1) for row in suspects)
                struck = Intervals(row for row in rows_of if held.left.covers(row))
                self._return_normal(list(struck), held.strikes + 1)
                for rows in struck:
                    held.left.remove(rows)
                self._return_normal(list(held.left), held.strikes)
            else:
                self._return_normal(rest, held.strikes + int(strike))
        if worker in self._reading:
            self._put_back(self._reading.pop(worker))

    def _return_normal(self, rest: list[Range], strikes: int) -> None:
        for rows in rest:
            if strikes >= STRIKES:
                self._suspects.append(_Suspect(rows))
            else:
                self._put_back(_Stretch(rows.first, rows.stop, strikes))

    def _return_suspect(self, held: _Held, rest: list[Range], strike: bool) -> None:
        """Rows run one after another: the first one left is the one that was running."""
        first = rest[0].first
        before = held.strikes if first == held.lease.rows.first else 0
        struck = int(strike and held.lease.mode is Mode.CAREFUL)
        self._suspects.insert(0, _Suspect(Range(first, rest[-1].stop), before + struck))

    def _lease_suspect(self, worker: str) -> Lease:
        suspect = self._suspects.pop(0)
        first = suspect.rows.first
        if suspect.first_row_strikes < STRIKES:
            return self._lease(worker, suspect.rows, Mode.CAREFUL, suspect.first_row_strikes)
        if len(suspect.rows) > 1:
            self._suspects.insert(0, _Suspect(Range(first + 1, suspect.rows.stop)))
        return self._lease(worker, Range(first, first + 1), Mode.CONDEMNED, STRIKES)

    def _lease(self, worker: str, rows: Range, mode: Mode, strikes: int = 0) -> Lease:
        self._number += 1
        lease = Lease(self._number, rows, mode)
        self._held[worker].append(_Held(lease, Intervals([rows]), strikes))
        return lease

    def _stretch_for(self, worker: str) -> _Stretch | None:
        """The stretch that the worker reads on in, by now its own."""
        if worker not in self._reading:
            stretch = self._fresh.pop() if self._fresh else self._half_of_the_longest()
            if stretch is None:
                return None
            self._reading[worker] = stretch
        return self._reading[worker]

    def _cut_off(self, worker: str, stretch: _Stretch) -> Range:
        """The next lease's rows, taken from the worker's stretch."""
        part_end = (stretch.first // self._part_rows + 1) * self._part_rows
        rows = Range(stretch.first, min(stretch.first + self._lease_rows, stretch.stop, part_end))
        stretch.first = rows.stop
        if stretch.first == stretch.stop:
            del self._reading[worker]
        return rows

    def _half_of_the_longest(self) -> _Stretch | None:
        if not self._reading:
            return None
        owner, longest = max(self._reading.items(), key=lambda item: item[1].stop - item[1].first)
        rows = longest.stop - longest.first
        if rows <= self._lease_rows:
            return self._reading.pop(owner)
        middle = longest.stop - rows // 2
        half = _Stretch(middle, longest.stop)
        longest.stop = middle
        return half

    def _put_back(self, stretch: _Stretch) -> None:
        insort(self._fresh, stretch, key=_descending)


def _descending(stretch: _Stretch) -> int:
    return -stretch.first


def _cut(pending: Iterable[Range], boundaries: Sequence[int], at_least: int) -> Iterator[Range]:
    """The pending ranges, cut where a file or row group begins, not into pieces that are shorter
    than ``at_least``; the last piece of a range may be."""
    cuts = iter(sorted(boundaries))
    cut = next(cuts, None)
    for rows in pending:
        first = rows.first
        while cut is not None and cut < rows.stop:
            if cut >= first + at_least:
                yield Range(first, cut)
                first = cut
            cut = next(cuts, None)
        yield Range(first, rows.stop)
