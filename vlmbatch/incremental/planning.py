"""What a start of an incremental run has to do: its generation, planned before any work."""

from __future__ import annotations

import heapq
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from operator import itemgetter
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from vlmbatch.answering import reach_of
from vlmbatch.errors import UsageError
from vlmbatch.images.versions import Versions
from vlmbatch.incremental.ids import BATCH_ROWS, TONIGHT, TRANSIENT, Ids
from vlmbatch.intervals import Intervals
from vlmbatch.job import JobSpec
from vlmbatch.manifest import Columns, Manifest, images
from vlmbatch.manifest.identities import identities
from vlmbatch.manifest.manifest import stored_schema
from vlmbatch.records import Range
from vlmbatch.results.gathering import gather_all
from vlmbatch.results.generations import (
    AGAIN,
    TABLE,
    Generation,
    Kind,
    Selection,
    delete_late,
    name_of,
    newest_epoch,
    numbers,
    open_selection,
    read_generation,
    write_generation,
)
from vlmbatch.results.output import Output
from vlmbatch.results.retry import ranges_of
from vlmbatch.results.store import Store
from vlmbatch.run_file import RunFile
from vlmbatch.storage import scheme_of
from vlmbatch.terminal import say

MANY = 1_000_000
NAMES = 1000
"""So many rows are looked at for names that are relative."""


@dataclass(frozen=True)
class Wanted:
    """What may be asked again. ``codes``: of failed results, empty means all; asked less often than
    ``max_attempts``. ``new``: and what is not answered yet."""

    codes: tuple[str, ...]
    max_attempts: int | None
    changed: bool = False
    new: bool = True


def night_of(job: JobSpec) -> Wanted:
    """What a start of this job wants."""
    return Wanted(TRANSIENT, job.max_attempts, job.detect_changes)


@dataclass(frozen=True)
class Began:
    """A generation that is planned. ``number``: None where there was nothing to write down."""

    number: int | None
    selection: Selection

    def pending(self, width: int, part_rows: int) -> list[Range]:
        """Output rows, ascending; those that are asked again in ranges of at most ``width``."""
        added = self.selection.generation.added
        again = self.selection.rows_of(*AGAIN)
        ranges = ranges_of(again, width, part_rows, apart=Intervals(added))
        return sorted([*added, *ranges], key=lambda rows: rows.first)


def check_same_ids(stored: RunFile, manifest: Manifest, columns: Columns) -> None:
    """Raises UsageError where ids come from a column now, and did not before, or the reverse: no
    row would be known again, and all be asked anew."""
    before = stored.spec.columns.get("id", "id")
    if (before in stored_schema(stored.manifest).names) == columns.has_id:
        return
    had, has = ("had no", "has one") if columns.has_id else ("had a", "has none")
    raise UsageError(
        f"the manifest {had} column of ids ({before!r}) before, and tonight's {has}: no row would "
        "be known again",
        hint="with --incremental, let every manifest have it, or none: see --column id=NAME; or "
        "give another -o",
    )


def check_same_folder(before: str, manifest: Manifest, columns: Columns) -> None:
    """Raises UsageError where rows are known by names that mean other images than they did: those
    relative to the manifest's folder, which is another one than ``before``."""
    named = columns.has_id and manifest.files[0].format != images.NAME  # whose ids are its paths
    if named or manifest.folder == before:
        return
    some = next(identities(manifest, columns, limit=NAMES, images=True), None)
    for names in [] if some is None else some["images"].to_pylist():
        for name in names or ():
            if name is not None and scheme_of(name) is None and not name.startswith("/"):
                raise UsageError(
                    f"{name} is another image than before: the manifest was in {before}, and is in "
                    f"{manifest.folder} now",
                    hint="with --incremental, give rows an id column, or images their whole "
                    "address; or give the folder above both, and --include for a part of it",
                )


def begin_generation(
    output: Output, run_file: RunFile, manifest: Manifest, columns: Columns, wanted: Wanted
) -> Began:
    """Plans what this start does, and writes it down before anything is asked. Only the holder of
    the lock may.

    Every start plans anew, from what is answered: what one that was killed had planned, and has
    not answered, is planned again, in the rows that it left empty.
    """
    store = output.store
    if manifest.rows >= MANY:
        say(f"comparing the ids of {manifest.rows:,} rows with those that are answered")
    there = numbers(store)
    if there:
        delete_late(store, read_generation(store, there[-1]))
    undone = _undone(output, store, there)
    if undone:
        _forget(store, there[-1], undone)
    gather_all(replace(output, patched_since=newest_epoch(store)), whole_only=False)
    with tempfile.TemporaryDirectory(prefix="vlmbatch-plan-") as folder:
        path = Path(folder) / "generation.arrow"
        new = Generation(run_file.run, run_file.epoch, manifest.identity)
        tonight = _tonight(manifest, columns, run_file.spec)
        looks = run_file.spec.detect_changes
        earlier = [open_selection(store, number) for number in there] if looks else []
        generation = plan_generation(path, new, wanted, output, tonight, earlier)
        if not generation.counts:
            return Began(None, Selection(pa.BufferReader(path.read_bytes())))
        number = there[-1] + 1 if there else 1
        store.write(name_of(number), lambda temporary: _copy(path, temporary))
    return Began(number, open_selection(store, number))


def to_ask(
    output: Output | None, manifest: Manifest, columns: Columns, job: JobSpec, wanted: Wanted
) -> list[Range]:
    """The manifest rows that a start would ask about now, ascending. Writes nothing there."""
    earlier: list[Selection] = []
    undone: set[int] = set()
    if output is not None:
        there = numbers(output.store)
        undone = _undone(output, output.store, there)
        if wanted.changed:
            earlier = [open_selection(output.store, number) for number in there]
    with tempfile.TemporaryDirectory(prefix="vlmbatch-plan-") as folder:
        path = Path(folder) / "generation.arrow"
        tonight = _tonight(manifest, columns, job)
        new = Generation("", 0, manifest.identity)
        plan_generation(path, new, wanted, output, tonight, earlier, undone)
        return Selection(pa.memory_map(str(path))).positions()


def located(output: Output, manifest: Manifest, columns: Columns) -> Selection:
    """Where the manifest has the rows of an incremental output now, by their ids; the rows that it
    has no more are left out."""
    with Ids() as ids, tempfile.NamedTemporaryFile(prefix="vlmbatch-rows-") as file:
        ids.compare(output, (_unversioned(batch) for batch in identities(manifest, columns)))
        path = Path(file.name)
        write_generation(path, Generation("", 0, manifest.identity), ids.located())
        return Selection(pa.memory_map(str(path)))  # which outlives the name of the file


def _unversioned(batch: pa.RecordBatch) -> pa.RecordBatch:
    nothing = pa.nulls(batch.num_rows, pa.string())
    return pa.record_batch([batch["position"], batch["id"], nothing], schema=TONIGHT)


def _tonight(manifest: Manifest, columns: Columns, job: JobSpec) -> Iterator[pa.RecordBatch]:
    """(position, id, version); versions are null where nobody looks at them."""
    found = identities(manifest, columns, limit=job.limit, images=job.detect_changes)
    if not job.detect_changes:
        yield from map(_unversioned, found)
        return
    with Versions(base=manifest.folder, reach=reach_of(job)) as versions:
        for batch in found:
            known = pa.array(versions.of(batch["images"].to_pylist()), pa.string())
            yield pa.record_batch([batch["position"], batch["id"], known], schema=TONIGHT)


def _undone(output: Output, store: Store, there: list[int]) -> set[int]:
    """Rows with changed images that the newest start had planned, and did not come to."""
    if not there or not read_generation(store, there[-1]).counts.get("changed"):
        return set()
    last = open_selection(store, there[-1])
    changed = set(last.rows_of(Kind.CHANGED))
    done = output.view().patched(last.generation.epoch)
    for rows in () if done is None else done.rows:
        changed.difference_update(range(rows.first, rows.stop))
    return changed


def _forget(store: Store, number: int, undone: set[int]) -> None:
    """So that nobody takes the new images of these rows for answered."""
    selection = open_selection(store, number)
    rows = pa.array(sorted(undone), pa.int64())
    kept = (
        batch.filter(pc.invert(pc.is_in(batch["row"], value_set=rows)))
        for batch in selection.batches()
    )
    generation = selection.generation
    store.write(name_of(number), lambda path: write_generation(path, generation, kept))


def _copy(source: Path, path: Path) -> None:
    shutil.copyfile(source, path)


def plan_generation(
    path: Path,
    generation: Generation,
    wanted: Wanted,
    output: Output | None,
    tonight: Iterator[pa.RecordBatch],
    selections: Iterable[Selection] = (),
    undone: Iterable[int] = (),
) -> Generation:
    """Writes what is to do to ``path``, and returns what the file says of itself.

    ``generation`` has the run, the epoch and the manifest's identity; see Ids.compare for the rest.
    """
    with Ids() as ids:
        ids.compare(output, tonight, selections, undone)
        ids.choose_again(wanted.codes, wanted.max_attempts)
        if wanted.changed:
            ids.choose_changed()
        counts = ids.counts("again")
        free = _Free(output)
        if wanted.new:
            ids.choose_new()
            counts |= ids.counts("fresh")
            # What was to be filled by a start that was cut short stays no gap.
            counts[Kind.GONE] = max(0, free.gaps - sum(ids.counts("fresh").values()))
        added = free.first(sum(n for kind, n in counts.items() if kind not in (*AGAIN, Kind.SEEN)))
        generation = replace(
            generation,
            added=tuple(added),
            rows=max([free.end, *(rows.stop for rows in added)]),
            counts={kind.name.lower(): n for kind, n in sorted(counts.items()) if n},
            codes=tuple(wanted.codes),
            max_attempts=wanted.max_attempts,
        )
        fresh = _placed(ids.fresh(), added) if wanted.new else iter(())
        by_row = heapq.merge(_entries(ids.again()), fresh, key=itemgetter(0))
        write_generation(path, generation, _batched(by_row))
    return generation


class _Free:
    """The rows of the output that have no results: gaps, and all from its end on."""

    def __init__(self, output: Output | None) -> None:
        committed = Intervals() if output is None else output.view().committed
        self.end = max((rows.stop for rows in committed), default=0)
        self._gaps = committed.missing(Range(0, self.end)) if self.end else []
        self.gaps = sum(map(len, self._gaps))

    def first(self, count: int) -> list[Range]:
        """The lowest so many of them."""
        found = []
        for rows in self._gaps:
            if count:
                found.append(Range(rows.first, min(rows.stop, rows.first + count)))
                count -= len(found[-1])
        return [*found, Range(self.end, self.end + count)] if count else found


Entry = tuple[int, int | None, int, int, str | None]


def _placed(
    fresh: Iterator[tuple[int, int, Kind, str | None]], added: list[Range]
) -> Iterator[Entry]:
    """(row, position, rows, kind, version): the new rows in the places for them, in order; where
    there are too few, the rest of the places is for rows that are gone."""
    position, count, kind, version = 0, 0, Kind.GONE, None
    for place in added:
        row = place.first
        while row < place.stop:
            if not count:
                position, count, kind, version = next(fresh, (0, place.stop - row, Kind.GONE, None))
            some = min(count, place.stop - row)
            yield row, None if kind is Kind.GONE else position, some, int(kind), version
            row, position, count = row + some, position + some, count - some


def _entries(batches: Iterator[pa.RecordBatch]) -> Iterator[Entry]:
    for batch in batches:
        yield from zip(*(batch[name].to_pylist() for name in TABLE.names), strict=True)


def _batched(entries: Iterator[Entry]) -> Iterator[pa.RecordBatch]:
    while some := list(islice(entries, BATCH_ROWS)):
        columns = zip(*some, strict=True)
        arrays = [pa.array(each, field.type) for each, field in zip(columns, TABLE, strict=True)]
        yield pa.record_batch(arrays, schema=TABLE)
