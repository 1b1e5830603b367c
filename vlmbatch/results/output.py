"""An output folder: what is committed in it, and gathering shards into parts.

The output is the checkpoint. For each row the file with the highest epoch wins, then the lowest
first row, then the longest; so late writes, overlapping ranges and repeated commits do no harm.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vlmbatch.errors import OutputNotOurs
from vlmbatch.intervals import Intervals
from vlmbatch.records import Range
from vlmbatch.results.files import (
    Counting,
    Counts,
    ResultFile,
    counts_of,
    list_parts,
    list_shards,
    write_part,
)
from vlmbatch.results.store import OURS, Store

LOOKS = 20


@dataclass(frozen=True)
class Output:
    """The results of one run, in its folder."""

    store: Store
    run: str
    part_rows: int
    schema: pa.Schema

    def part_range(self, number: int) -> Range:
        return Range(number * self.part_rows, (number + 1) * self.part_rows)

    def view(self) -> View:
        """What is committed at this moment, from listings and footers."""
        shards = [file for file in list_shards(self.store) if file.run == self.run]
        parts = {
            file.rows.first // self.part_rows: file
            for file in list_parts(self.store)
            if file.run == self.run
        }
        return View(parts, shards)

    def gather(self, number: int, view: View | None = None) -> ResultFile | None:
        """Write part ``number`` anew from it and its shards, then delete these.

        Returns the part, or None where there was nothing to do: no shard adds to it. The rows must
        be committed from the part's start without a gap.
        """
        view = self.view() if view is None else view
        window = self.part_range(number)
        part = view.parts.get(number)
        shards = view.shards_in(window)
        fresh = [shard for shard in shards if not _superseded(shard, part)]
        if fresh:
            bases = [file for file in [part, *fresh] if file is not None and not file.patch]
            patches = [file for file in fresh if file.patch]
            rows = Range(window.first, max(file.rows.stop for file in bases))
            part = write_part(
                self.store,
                number,
                _merged(bases, patches, rows),
                schema=self.schema,
                run=self.run,
                epoch=max(file.epoch for file in [*bases, *patches]),
                rows=rows,
                # A holder whose lease has expired meanwhile must not undo the next one's work.
                replaces=view.parts[number].tag if number in view.parts else "",
            )
        self.store.delete(shard.name for shard in shards)
        return part if fresh else None

    def gather_if_gapless(self, number: int, *, whole_only: bool, view: View | None = None) -> None:
        """``gather``, where the part's rows are committed without a gap; the last may be short.

        ``whole_only``: not yet where rows lack at its end, unless it has been written before.
        """
        view = self.view() if view is None else view
        window = self.part_range(number)
        inside = view.committed.within(window)
        gapless = len(inside) == 1 and inside[0].first == window.first
        if gapless and (not whole_only or number in view.parts or inside[0] == window):
            self.gather(number, view)

    def delete_strays(self) -> None:
        """Delete shards and parts of other runs. Only the holder of the lock may."""
        files = [*list_shards(self.store), *list_parts(self.store)]
        self.store.delete(file.name for file in files if file.run != self.run)

    def results(self, window: Range | None = None) -> Iterator[pa.RecordBatch]:
        """Every committed result in manifest order, gathered or not."""
        view = self.view()
        for number in view.numbers(self.part_rows):
            inside = self.part_range(number)
            if window is not None:
                if window.stop <= inside.first or inside.stop <= window.first:
                    continue
                inside = Range(max(inside.first, window.first), min(inside.stop, window.stop))
            bases, patches = view.files_of(number, self.part_range(number))
            yield from _merged(bases, patches, inside)

    def counts(self) -> Counts:
        """What all committed results hold; footers suffice where no file overlaps or patches.

        May be asked while a run goes on: where a shard has gone into its part, it looks again.
        """
        for _ in range(LOOKS - 1):
            with suppress(FileNotFoundError):
                return self._counts()
        return self._counts()

    def _counts(self) -> Counts:
        total = Counts()
        from_footers: list[ResultFile] = []
        view = self.view()
        for number in view.numbers(self.part_rows):
            window = self.part_range(number)
            bases, patches = view.files_of(number, window)
            segments = list(winners(bases, window))
            whole = {file.name for file, rows in segments if rows == file.rows}
            if not patches and len(whole) == len(segments):
                from_footers += [file for file, _ in segments]
            else:
                counting = Counting()
                for batch in _merged(bases, patches, window):
                    counting.add(batch)
                total.add(counting.counts)
        for counts in counts_of(self.store, from_footers):
            total.add(counts)
        return total


def schema_of(store: Store) -> pa.Schema | None:
    """The columns of the results that are there; None where there are none."""
    for file in [*list_parts(store), *list_shards(store)]:
        for batch in file.batches():
            return batch.schema.remove_metadata()
    return None


@dataclass(frozen=True)
class View:
    """The files of a run at one moment."""

    parts: dict[int, ResultFile]
    shards: list[ResultFile]

    @property
    def committed(self) -> Intervals:
        """The rows that have their results."""
        return Intervals(
            file.rows for file in [*self.parts.values(), *self.shards] if not file.patch
        )

    @property
    def epoch(self) -> int:
        return max((file.epoch for file in [*self.parts.values(), *self.shards]), default=0)

    def shards_in(self, window: Range) -> list[ResultFile]:
        return [s for s in self.shards if window.first <= s.rows.first < window.stop]

    def numbers(self, part_rows: int) -> list[int]:
        """The parts that have any committed row, ascending."""
        return sorted({*self.parts, *(shard.rows.first // part_rows for shard in self.shards)})

    def files_of(self, number: int, window: Range) -> tuple[list[ResultFile], list[ResultFile]]:
        """(files that cover rows, patches) of one part, without those that it supersedes."""
        part = self.parts.get(number)
        fresh = [s for s in self.shards_in(window) if not _superseded(s, part)]
        bases = [*([part] if part else []), *(s for s in fresh if not s.patch)]
        return bases, [s for s in fresh if s.patch]


def _superseded(shard: ResultFile, part: ResultFile | None) -> bool:
    """Whether the shard's results are in the part already, or came too late for it."""
    return (
        part is not None
        and shard.epoch <= part.epoch
        and part.rows.first <= shard.rows.first
        and shard.rows.stop <= part.rows.stop
    )


def winners(files: Iterable[ResultFile], window: Range) -> Iterator[tuple[ResultFile, Range]]:
    """Which file gives which rows, ascending: the best file takes its rows first."""
    taken = Intervals()
    segments = []
    for file in sorted(files, key=lambda f: (-f.epoch, f.rows.first, -len(f.rows))):
        first, stop = max(file.rows.first, window.first), min(file.rows.stop, window.stop)
        if first < stop:
            segments += [(file, rows) for rows in taken.missing(Range(first, stop))]
            taken.add(Range(first, stop))
    yield from sorted(segments, key=lambda segment: segment[1].first)


def _merged(
    bases: list[ResultFile], patches: list[ResultFile], window: Range
) -> Iterator[pa.RecordBatch]:
    patch = _patch_table(patches, window)
    for file, rows in winners(bases, window):
        for batch in file.batches(rows):
            yield from [batch] if patch is None else _patched(batch, patch, window.first)


def _patch_table(patches: list[ResultFile], window: Range) -> pa.Table | None:
    """The newest replacement of each result, with its ``_key``."""
    tables = []
    seen: pa.Array = pa.array([], pa.int64())
    for file in sorted(patches, key=lambda f: -f.epoch):
        batches = list(file.batches(window))
        if not batches:
            continue
        table = pa.Table.from_batches(batches)
        keys = _keys(table, window.first)
        new = pc.invert(pc.is_in(keys, value_set=seen))
        tables.append(table.append_column("_key", keys).filter(new))
        seen = pa.concat_arrays([seen, keys])
    if not tables:
        return None
    return pa.concat_tables([t.replace_schema_metadata() for t in tables]).combine_chunks()


def _patched(batch: pa.RecordBatch, patch: pa.Table, first: int) -> list[pa.RecordBatch]:
    """The batch with those of its results replaced that the patch has."""
    keys = _keys(batch, first)
    hit = pc.is_in(patch["_key"], value_set=keys)
    if not pc.any(hit).as_py():
        return [batch]
    kept = pa.Table.from_batches([batch]).append_column("_key", keys)
    kept = kept.filter(pc.invert(pc.is_in(keys, value_set=patch["_key"].combine_chunks())))
    both = pa.concat_tables([kept.replace_schema_metadata(), patch.filter(hit)])
    merged = both.sort_by("_key").drop_columns("_key").combine_chunks()
    return list(merged.to_batches())


def _keys(batch: pa.RecordBatch | pa.Table, first: int) -> Any:
    """(row, request, sample) as one int64 that sorts alike; rows count from ``first``."""
    rows = pc.multiply(pc.subtract(batch["row"], first), 2**40)
    requests = pc.multiply(batch["request"].cast(pa.int64()), 2**16)
    keys = pc.add(pc.add(rows, requests), batch["sample"].cast(pa.int64()))
    return keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys


def check_ours(store: Store) -> None:
    """Raises OutputNotOurs where the folder holds something that vlmbatch did not write."""
    store.check_place()
    found = [entry.name for entry in store.entries()]
    if found and OURS not in found:
        raise OutputNotOurs(
            f"{store.place} holds something else ({', '.join(found[:3])}), and no {OURS}/",
            hint="give an empty or new folder with -o",
        )
