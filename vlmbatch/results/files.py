"""Shard and part files: their names, and the metadata from which everything is summed up."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlmbatch.errors import RunStopped
from vlmbatch.records import Range
from vlmbatch.results.store import FOOTER_BYTES, SHARDS, Store

_KEY = b"vlmbatch"
_T = TypeVar("_T")
_R = TypeVar("_R")
_PART = re.compile(r"part-(\d{5,})\.parquet")
_SHARD = re.compile(r"([0-9a-f]+)-(\d+)-(\d+)-(\d+)(-patch)?\.arrow")


@dataclass(slots=True)
class Counts:
    """What a set of results holds. ``failed_rows``: rows with at least one failed result."""

    rows: int = 0
    failed_rows: int = 0
    requests: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    truncated: int = 0
    attempts: Counter[int] = field(default_factory=Counter)
    """Calls of the engine: results that needed so many, of those that needed any."""

    def add(self, other: Counts) -> None:
        self.rows += other.rows
        self.failed_rows += other.failed_rows
        self.requests += other.requests
        self.failures += other.failures
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.truncated += other.truncated
        self.attempts += other.attempts

    def minus(self, other: Counts) -> Counts:
        return Counts(
            self.rows - other.rows,
            self.failed_rows - other.failed_rows,
            self.requests - other.requests,
            self.failures - other.failures,
            self.prompt_tokens - other.prompt_tokens,
            self.completion_tokens - other.completion_tokens,
            self.truncated - other.truncated,
            self.attempts - other.attempts,
        )

    def too_many_failed(self, rate: float) -> bool:
        """Whether a larger share of the rows than ``rate`` has failed."""
        return self.failed_rows > rate * self.rows

    def to_json(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__slots__}
        attempts = {str(number): count for number, count in sorted(self.attempts.items())}
        # asdict() breaks on a Counter
        return {**values, "failures": dict(self.failures), "attempts": attempts}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Counts:
        known = {name: value[name] for name in cls.__slots__ if name in value}
        failures = Counter(value.get("failures", {}))
        attempts = Counter({int(n): count for n, count in value.get("attempts", {}).items()})
        return cls(**{**known, "failures": failures, "attempts": attempts})


class Counting:
    """Counts batches of results that come in row order."""

    def __init__(self) -> None:
        self.counts = Counts()
        self._last_row = self._last_failed = -1

    def add(self, batch: pa.RecordBatch | pa.Table) -> None:
        if batch.num_rows == 0:
            return
        counts = self.counts
        rows = batch["row"]
        failed = pc.equal(batch["status"], "failed")
        distinct = pc.unique(rows)
        counts.rows += len(distinct) - int(distinct[0].as_py() == self._last_row)
        self._last_row = distinct[-1].as_py()
        counts.requests += batch.num_rows
        failed_rows = pc.unique(pc.filter(rows, failed))
        if len(failed_rows):
            counts.failed_rows += len(failed_rows)
            counts.failed_rows -= int(failed_rows[0].as_py() == self._last_failed)
            self._last_failed = failed_rows[-1].as_py()
            errors = pc.filter(batch["error"], failed)
            codes = pc.struct_field(errors, "code")
            counts.failures.update(str(code) for code in codes.to_pylist())
        counts.prompt_tokens += pc.sum(batch["prompt_tokens"]).as_py() or 0
        counts.completion_tokens += pc.sum(batch["completion_tokens"]).as_py() or 0
        counts.truncated += pc.sum(pc.equal(batch["finish_reason"], "length")).as_py() or 0
        asked = pc.value_counts(pc.filter(batch["attempts"], pc.greater(batch["attempts"], 0)))
        counts.attempts.update({each["values"]: each["counts"] for each in asked.to_pylist()})


@dataclass(frozen=True, slots=True)
class Patched:
    """Which rows of a part were asked again by the start of epoch ``since``."""

    since: int
    rows: tuple[Range, ...]

    def to_json(self) -> dict[str, Any]:
        return {"since": self.since, "rows": [[rows.first, rows.stop] for rows in self.rows]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Patched:
        return cls(value["since"], tuple(Range(first, stop) for first, stop in value["rows"]))


@dataclass(frozen=True, slots=True)
class ResultFile:
    """A shard or a part, known by its name and, for a part, by its metadata.

    ``patch``: holds only results that replace some of its range, and covers no row by itself.
    """

    name: str
    run: str
    epoch: int
    rows: Range
    patch: bool = False
    patched: Patched | None = field(default=None, kw_only=True, compare=False)
    store: Store = field(kw_only=True, compare=False, repr=False)
    tag: str = field(default="", kw_only=True, compare=False, repr=False)

    @property
    def is_part(self) -> bool:
        return self.name.endswith(".parquet")

    def counts(self) -> Counts:
        """From the file's metadata; its footer is all that is read."""
        return Counts.from_json(_meta_of(self.store, self.name, self.tag)["counts"])

    def anew(self) -> list[int]:
        """Of a patch: the rows of which it has all results, in place of all that they had."""
        rows: list[int] = _meta_of(self.store, self.name, self.tag).get("anew", [])
        return rows

    def batches(
        self, window: Range | None = None, columns: Sequence[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """The results of these rows in (row, request, sample) order, a few thousand at a time.

        ``columns``: only these; with a ``window``, ``row`` must be among them.
        """
        if self.is_part:
            with self.store.ranged(self.name) as file:
                source = pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
                batches: Iterable[pa.RecordBatch] = source.iter_batches(
                    batch_size=4096, columns=columns, use_threads=False
                )
                for batch in batches:
                    yield from _inside(_only(batch, columns), window)
        else:
            with self.store.whole(self.name) as file:
                reader = pa.ipc.open_file(file)
                for i in range(reader.num_record_batches):
                    yield from _inside(_only(reader.get_batch(i), columns), window)


def _only(batch: pa.RecordBatch, columns: Sequence[str] | None) -> pa.RecordBatch:
    return batch if columns is None else batch.select(list(columns))


def _inside(batch: pa.RecordBatch, window: Range | None) -> Iterator[pa.RecordBatch]:
    if window is not None:
        rows = batch["row"]
        mask = pc.and_(
            pc.greater_equal(rows, window.first),
            pc.less(rows, window.stop),
        )
        batch = batch.filter(mask)
    if batch.num_rows:
        yield batch


def write_shard(
    store: Store,
    batch: pa.RecordBatch,
    *,
    run: str,
    epoch: int,
    rows: Range,
    patch: bool = False,
    anew: Sequence[int] = (),
) -> Counts:
    """Commit these results. Returns what the shard holds. ``anew``: see ResultFile."""
    counting = Counting()
    counting.add(batch)
    name = f"{run}-{epoch:04d}-{rows.first:012d}-{rows.stop - 1:012d}"
    more = {"anew": list(anew)} if anew else {}
    meta = _meta_json(run, epoch, rows, counting.counts, more)
    schema = batch.schema.with_metadata({_KEY: meta.encode()})

    def build(temporary: Path) -> None:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(batch)

    store.write(f"{SHARDS}/{name}{'-patch' if patch else ''}.arrow", build)
    return counting.counts


def write_part(
    store: Store,
    number: int,
    batches: Iterator[pa.RecordBatch],
    *,
    schema: pa.Schema,
    run: str,
    epoch: int,
    rows: Range,
    patched: Patched | None = None,
    replaces: str | None = None,
) -> ResultFile:
    """Write part ``number`` from results in order; memory is bounded by a row group.

    ``replaces``: as of Store.write."""
    name = f"part-{number:05d}.parquet"

    def build(temporary: Path) -> None:
        counting = Counting()
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for table in _row_groups(batches, schema):
                counting.add(table)
                writer.write_table(table)
            more = {} if patched is None else {"patched": patched.to_json()}
            meta = _meta_json(run, epoch, rows, counting.counts, more)
            writer.add_key_value_metadata({_KEY.decode(): meta})

    store.write(name, build, replaces=replaces)
    return ResultFile(name, run, epoch, rows, store=store)


def _row_groups(
    batches: Iterator[pa.RecordBatch], schema: pa.Schema, *, rows: int = 16_384, size: int = 2**25
) -> Iterator[pa.Table]:
    held: list[pa.RecordBatch] = []
    held_rows = held_bytes = 0
    for batch in batches:
        held.append(batch)
        held_rows += batch.num_rows
        held_bytes += batch.nbytes
        if held_rows >= rows or held_bytes >= size:
            yield pa.Table.from_batches(held, schema=schema)
            held, held_rows, held_bytes = [], 0, 0
    if held:
        yield pa.Table.from_batches(held, schema=schema)


def is_part_name(name: str) -> bool:
    return _PART.fullmatch(name) is not None


def list_parts(store: Store) -> list[ResultFile]:
    """The parts, by number; their footers are read."""
    entries = [entry for entry in store.entries() if is_part_name(entry.name)]
    metas = _each(store, lambda entry: _meta_of(store, entry.name, entry.tag), entries)
    return [
        ResultFile(
            entry.name,
            meta["run"],
            meta["epoch"],
            Range(meta["first"], meta["stop"]),
            patched=Patched.from_json(meta["patched"]) if "patched" in meta else None,
            store=store,
            tag=entry.tag,
        )
        for entry, meta in zip(entries, metas, strict=True)
    ]


def list_shards(store: Store) -> list[ResultFile]:
    """The shards; only names are read."""
    found = []
    for entry in store.entries(SHARDS):
        match = _SHARD.fullmatch(entry.name)
        if match:
            rows = Range(int(match[3]), int(match[4]) + 1)
            name, patch = f"{SHARDS}/{entry.name}", bool(match[5])
            shard = ResultFile(
                name, match[1], int(match[2]), rows, patch, store=store, tag=entry.tag
            )
            found.append(shard)
    return found


def part_numbered(store: Store, number: int) -> ResultFile | None:
    """That part as it is now; None where there is none."""
    name = f"part-{number:05d}.parquet"
    try:
        meta = _meta_of(store, name)
    except FileNotFoundError:
        return None
    rows = Range(meta["first"], meta["stop"])
    return ResultFile(name, meta["run"], meta["epoch"], rows, store=store)


def counts_of(store: Store, files: Sequence[ResultFile]) -> list[Counts]:
    """What each file holds, from their footers."""
    return _each(store, ResultFile.counts, files)


def _each(store: Store, read: Callable[[_T], _R], files: Sequence[_T]) -> list[_R]:
    if store.parallel == 1 or len(files) < 2:
        return list(map(read, files))
    with ThreadPoolExecutor(min(store.parallel, len(files))) as threads:
        return list(threads.map(read, files))


def _meta_json(run: str, epoch: int, rows: Range, counts: Counts, more: dict[str, Any]) -> str:
    meta = {"run": run, "epoch": epoch, "first": rows.first, "stop": rows.stop}
    return json.dumps({**meta, "counts": counts.to_json(), **more})


def _meta_of(store: Store, name: str, tag: str = "") -> dict[str, Any]:
    known = store.footers.get((name, tag))
    if known is not None:
        return known
    try:
        with store.ranged(name, block=FOOTER_BYTES) as file:
            if name.endswith(".parquet"):
                metadata = pq.read_metadata(file).metadata
            else:
                metadata = pa.ipc.open_file(file).schema.metadata
        if _KEY not in (metadata or {}):
            raise ValueError("its metadata does not say so")
        meta: dict[str, Any] = json.loads(metadata[_KEY])
    except FileNotFoundError:
        raise  # gathered meanwhile
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RunStopped(
            f"{store.at(name)} is not a result file of vlmbatch ({error})",
            hint="move it out of the output folder, and run again",
        ) from None
    if tag:
        store.footers[name, tag] = meta
    return meta
