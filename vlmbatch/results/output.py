"""An output folder: what is committed in it, and gathering shards into parts.

The output is the checkpoint. For each row the file with the highest epoch wins, then the lowest
first row, then the longest; so late writes, overlapping ranges and repeated commits do no harm.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
    Patched,
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
    patched_since: int | None = None
    """Parts note which of their rows the start of this epoch asked again."""

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
            patched = View({} if part is None else {number: part}, patches)
            part = write_part(
                self.store,
                number,
                _merged(bases, patches, rows),
                schema=self.schema,
                run=self.run,
                epoch=max(file.epoch for file in [*bases, *patches]),
                rows=rows,
                patched=patched.patched(self.patched_since),
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

    def results(
        self,
        window: Range | None = None,
        columns: Sequence[str] | None = None,
        *,
        view: View | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Every committed result in manifest order, gathered or not.

        ``columns``: only these; ``row``, ``request`` and ``sample`` must be among them.
        """
        view = self.view() if view is None else view
        for number in view.numbers(self.part_rows):
            inside = self.part_range(number)
            if window is not None:
                if window.stop <= inside.first or inside.stop <= window.first:
                    continue
                inside = Range(max(inside.first, window.first), min(inside.stop, window.stop))
            bases, patches = view.files_of(number, self.part_range(number))
            yield from _merged(bases, patches, inside, columns)

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

    def patched(self, since: int | None) -> Patched | None:
        """The rows that the start of this epoch asked again: patches of later ones are a reparse's,
        of older answers."""
        if since is None:
            return None
        rows = Intervals(
            shard.rows for shard in self.shards if shard.patch and shard.epoch == since
        )
        for part in self.parts.values():
            if part.patched is not None and part.patched.since == since:
                for each in part.patched.rows:
                    rows.add(each)
        return Patched(since, tuple(rows))

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
    bases: list[ResultFile],
    patches: list[ResultFile],
    window: Range,
    columns: Sequence[str] | None = None,
) -> Iterator[pa.RecordBatch]:
    patch = _patch_of(patches, window, columns)
    for file, rows in winners(bases, window):
        for batch in file.batches(rows, columns):
            yield from [batch] if patch is None else _patched(batch, patch, window.first)


@dataclass(frozen=True, slots=True)
class _Patch:
    """``results``: the newest replacement of each result, with its ``_key``, and the ``_anchor``
    beside which it goes: the key of the result that it replaces, or that of the row's first.
    ``anew``: rows of which no older result stays."""

    results: pa.Table
    anew: pa.Array


def _patch_of(
    patches: list[ResultFile], window: Range, columns: Sequence[str] | None
) -> _Patch | None:
    tables = []
    nothing: pa.Array = pa.array([], pa.int64())
    seen = anew = of_anew = nothing
    for file in sorted(patches, key=lambda f: -f.epoch):
        batches = list(file.batches(window, columns))
        if not batches:
            continue
        table = pa.Table.from_batches(batches).replace_schema_metadata()
        table = table.append_column("_key", _keys(table, window.first))
        table = table.filter(pc.invert(pc.is_in(table["row"], value_set=anew)))
        rows = pa.array(file.anew(), pa.int64())
        keys_anew = table.filter(pc.is_in(table["row"], value_set=rows))["_key"]
        of_anew = pa.concat_arrays([of_anew, keys_anew.combine_chunks()])
        anew = pa.concat_arrays([anew, rows])
        tables.append(table.filter(pc.invert(pc.is_in(table["_key"], value_set=seen))))
        seen = pa.concat_arrays([seen, table["_key"].combine_chunks()])
    if not tables:
        return None
    table = pa.concat_tables(tables).combine_chunks()
    # As elsewhere, what was asked again replaces a result, and adds none.
    is_anew = pc.is_in(table["row"], value_set=anew)
    stays = pc.or_(pc.invert(is_anew), pc.is_in(table["_key"], value_set=of_anew))
    table, is_anew = table.filter(stays), is_anew.filter(stays)
    first = _key(table["row"], window.first)
    anchor = pc.if_else(is_anew, first, table["_key"])
    return _Patch(table.append_column("_anchor", anchor), anew)


def _patched(batch: pa.RecordBatch, patch: _Patch, first: int) -> list[pa.RecordBatch]:
    """The batch with those of its results replaced that the patch has."""
    keys = _keys(batch, first)
    new = patch.results.filter(pc.is_in(patch.results["_anchor"], value_set=keys))
    replaced = pc.or_(
        pc.is_in(keys, value_set=patch.results["_key"].combine_chunks()),
        pc.is_in(batch["row"], value_set=patch.anew),
    )
    if not new.num_rows and not pc.any(replaced).as_py():
        return [batch]
    kept = pa.Table.from_batches([batch]).append_column("_key", keys)
    kept = kept.filter(pc.invert(replaced)).replace_schema_metadata()
    both = pa.concat_tables([kept, new.drop_columns("_anchor")])
    merged = both.sort_by("_key").drop_columns("_key").combine_chunks()
    return list(merged.to_batches())


def _keys(batch: pa.RecordBatch | pa.Table, first: int) -> Any:
    """(row, request, sample) as one int64 that sorts alike; rows count from ``first``."""
    requests = pc.multiply(batch["request"].cast(pa.int64()), 2**16)
    keys = pc.add(pc.add(_key(batch["row"], first), requests), batch["sample"].cast(pa.int64()))
    return keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys


def _key(rows: Any, first: int) -> Any:
    """Of the first result of each row."""
    return pc.multiply(pc.subtract(rows, first), 2**40)


def check_ours(store: Store) -> None:
    """Raises OutputNotOurs where the folder holds something that vlmbatch did not write."""
    store.check_place()
    found = [entry.name for entry in store.entries()]
    if found and OURS not in found:
        raise OutputNotOurs(
            f"{store.place} holds something else ({', '.join(found[:3])}), and no {OURS}/",
            hint="give an empty or new folder with -o",
        )
