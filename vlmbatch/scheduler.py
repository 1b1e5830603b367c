"""Which rows go to which worker. Pure logic: no Ray, no I/O, no clock.

Rows are pending, leased or done. Pending rows are kept as *stretches* that begin where a file or a
row group begins, so that a worker goes on in the file that it has open. A worker gets the next
range of its own stretch, then a fresh stretch, then half of what another worker's stretch has left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from vlmbatch.intervals import Intervals
from vlmbatch.records import Range

STRIKES = 2
"""So many deaths make a range suspect, and a row of a suspect range guilty."""


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
    """Pending rows [first, stop) that one worker reads through; ``owner`` has the stream open."""

    first: int
    stop: int
    owner: str | None = None


@dataclass(slots=True)
class _Held:
    lease: Lease
    left: Intervals
    """Its rows that are not committed yet."""
    first_row_strikes: int = 0
    """In careful mode: how often the lease's first row has killed before."""


@dataclass(slots=True)
class _Suspect:
    """A range with two strikes, to be run row by row. ``first_row_strikes``: see _Held."""

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
        self._stretches = [_Stretch(rows.first, rows.stop) for rows in _cut(pending, boundaries)]
        self._held: dict[str, list[_Held]] = {}
        self._strikes: dict[Range, int] = {}
        self._suspects: list[_Suspect] = []
        self._number = 0

    @property
    def done(self) -> bool:
        """Every row is committed."""
        return not (self._stretches or self._suspects or any(self._held.values()))

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
        rows = self._take(worker)
        return None if rows is None else self._lease(worker, rows, Mode.NORMAL)

    def committed(self, worker: str, rows: Range) -> None:
        """These rows of the worker's leases are on disk."""
        kept = []
        for held in self._held.get(worker, []):
            held.left.remove(rows)
            if held.left:
                kept.append(held)
            else:
                self._strikes.pop(held.lease.rows, None)
        self._held[worker] = kept

    def died(self, worker: str, *, strike: bool = True) -> None:
        """The worker is gone: its rows are pending again, each of its ranges with a strike."""
        for held in self._held.pop(worker, []):
            rest = list(held.left)
            if held.lease.mode is Mode.NORMAL:
                self._return_normal(held, rest, strike)
            elif rest:
                self._return_suspect(held, rest, strike)
        for stretch in self._stretches:
            if stretch.owner == worker:
                stretch.owner = None

    def _return_normal(self, held: _Held, rest: list[Range], strike: bool) -> None:
        strikes = self._strikes.pop(held.lease.rows, 0) + int(strike)
        for rows in rest:
            if strikes >= STRIKES:
                self._suspects.append(_Suspect(rows))
            else:
                self._give_back(rows)
                if strikes:
                    self._strikes[rows] = strikes

    def _return_suspect(self, held: _Held, rest: list[Range], strike: bool) -> None:
        """Rows run one after another: the first one left is the one that was running."""
        first = rest[0].first
        before = held.first_row_strikes if first == held.lease.rows.first else 0
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

    def _take(self, worker: str) -> Range | None:
        stretch = (
            next((s for s in self._stretches if s.owner == worker), None)
            or next((s for s in self._stretches if s.owner is None), None)
            or self._half_of_the_longest()
        )
        if stretch is None:
            return None
        stretch.owner = worker
        part_end = (stretch.first // self._part_rows + 1) * self._part_rows
        stop = min(stretch.first + self._lease_rows, stretch.stop, part_end)
        for struck in self._strikes:  # a range with a strike is leased again as it was
            if struck.first == stretch.first:
                stop = min(stop, struck.stop)
            elif stretch.first < struck.first < stop:
                stop = struck.first
        rows = Range(stretch.first, stop)
        stretch.first = stop
        if stretch.first == stretch.stop:
            self._stretches.remove(stretch)
        return rows

    def _half_of_the_longest(self) -> _Stretch | None:
        if not self._stretches:
            return None
        longest = max(self._stretches, key=lambda s: s.stop - s.first)
        rows = longest.stop - longest.first
        if rows <= self._lease_rows:
            return longest
        middle = longest.stop - rows // 2
        half = _Stretch(middle, longest.stop)
        longest.stop = middle
        self._stretches.insert(self._stretches.index(longest) + 1, half)
        return half

    def _give_back(self, rows: Range) -> None:
        at = next(
            (i for i, s in enumerate(self._stretches) if s.first > rows.first),
            len(self._stretches),
        )
        self._stretches.insert(at, _Stretch(rows.first, rows.stop))


def _cut(pending: Iterable[Range], boundaries: Sequence[int]) -> Iterable[Range]:
    """The pending ranges, cut where a file or row group begins."""
    cuts = iter(sorted(boundaries))
    cut = next(cuts, None)
    for rows in pending:
        first = rows.first
        while cut is not None and cut < rows.stop:
            if cut > first:
                yield Range(first, cut)
                first = cut
            cut = next(cuts, None)
        yield Range(first, rows.stop)
