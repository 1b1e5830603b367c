"""What an output holds is what its files say by the rules of DESIGN.md, whatever lies in it.

``Twin`` is the slow and obvious form: all files as dicts, and the rules applied row by row.
"""

import random
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.strategies import counted, result
from vlmbatch.errors import ErrorCode, OutputNotOurs
from vlmbatch.intervals import Intervals
from vlmbatch.records import Range, Result
from vlmbatch.results.files import Patched, list_parts, list_shards, write_part, write_shard
from vlmbatch.results.gathering import Gatherer, gather_all
from vlmbatch.results.output import Output, check_ours
from vlmbatch.results.retry import FailedResults
from vlmbatch.results.schema import RESULT_SCHEMA, to_batch
from vlmbatch.results.store import LocalStore

PART = 8
ROWS = 20
Key = tuple[int, int, int]


@dataclass(frozen=True)
class File:
    epoch: int
    rows: Range
    content: dict[Key, Result]
    patch: bool = False
    anew: frozenset[int] = frozenset()
    """Rows of a patch that have all their results in it."""

    def covers(self, row: int) -> bool:
        return self.rows.first <= row < self.rows.stop


@dataclass
class Twin:
    parts: dict[int, File] = field(default_factory=dict)
    shards: list[File] = field(default_factory=list)

    def committed(self) -> set[int]:
        files = [f for f in [*self.parts.values(), *self.shards] if not f.patch]
        return {row for row in range(ROWS) for f in files if f.covers(row)}

    def fresh(self, number: int) -> list[File]:
        """The part's shards that are neither in it nor too late for it."""
        part = self.parts.get(number)
        inside = [f for f in self.shards if f.rows.first // PART == number]
        return [f for f in inside if part is None or f.epoch > part.epoch or not within(f, part)]

    def row(self, row: int) -> dict[Key, Result]:
        part, fresh = self.parts.get(row // PART), self.fresh(row // PART)
        bases = [f for f in [part, *fresh] if f is not None and not f.patch and f.covers(row)]
        if not bases:
            return {}
        best = min(bases, key=lambda f: (-f.epoch, f.rows.first, -len(f.rows)))
        found = {key: value for key, value in best.content.items() if key[0] == row}
        for patch in sorted((f for f in fresh if f.patch), key=lambda f: f.epoch):
            mine = {key: value for key, value in patch.content.items() if key[0] == row}
            if row in patch.anew:
                found = {}
            found |= {key: v for key, v in mine.items() if key in found or row in patch.anew}
        return found

    def results(self) -> list[Result]:
        return [value for row in range(ROWS) for _, value in sorted(self.row(row).items())]

    def gather(self, number: int) -> None:
        fresh = self.fresh(number)
        if fresh:
            part = self.parts.get(number)
            files = [part, *fresh] if part else fresh
            stop = max(f.rows.stop for f in files if not f.patch)
            rows = Range(number * PART, stop)
            content = {
                k: v for row in range(rows.first, rows.stop) for k, v in self.row(row).items()
            }
            self.parts[number] = File(max(f.epoch for f in files), rows, content)
        self.shards = [f for f in self.shards if f.rows.first // PART != number]


def within(a: File, b: File) -> bool:
    return b.rows.first <= a.rows.first and a.rows.stop <= b.rows.stop


def keys_of(row: int) -> list[Key]:
    """One to four results per row: the same for every file."""
    return [
        (row, request, sample)
        for request in range(1 + row % 2)
        for sample in range(1 + row % 3 // 2)
    ]


class Story:
    """Starts, commits, late writes, retries, gathers and crashes, on disk and in the twin."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.store = LocalStore(folder)
        self.store.make()
        self.output = Output(self.store, "beef", PART, RESULT_SCHEMA)
        self.twin = Twin()
        self.epoch = 0
        self.writes = 0
        self.pending: dict[int, set[int]] = {}
        self.start()

    def start(self) -> None:
        """Another driver start: its workers write only what is not committed by now."""
        self.epoch += 1
        self.pending[self.epoch] = set(range(ROWS)) - self.twin.committed()

    def commit(self, epoch: int) -> None:
        """A shard of this epoch: of the newest one, or a late write of an older one."""
        pending = sorted(self.pending.get(epoch, ()))
        if not pending:
            return
        first = self.random.choice(pending)
        stop = first + 1
        while stop in pending and stop % PART and self.random.random() < 0.8:
            stop += 1
        keys = [key for row in range(first, stop) for key in keys_of(row)]
        self._write(epoch, Range(first, stop), keys)

    def retry(self) -> None:
        """Another start that asks some results again."""
        self.start()
        self.pending[self.epoch] = set()
        for number in range(ROWS // PART + 1):
            there = [r for r in sorted(self.twin.committed()) if r // PART == number]
            anew = {row for row in there if self.random.random() < 0.2}
            keys = [
                key for row in there for key in keys_of(row)
                if row not in anew and self.random.random() < 0.3
            ]  # fmt: skip
            for row in anew:  # more requests than it had, or fewer
                keys += [(row, request, 0) for request in range(self.random.randint(1, 4))]
            if keys:
                keys.sort()
                rows = Range(keys[0][0], keys[-1][0] + 1)
                self._write(self.epoch, rows, keys, patch=True, anew=anew)

    def _write(
        self,
        epoch: int,
        rows: Range,
        keys: list[Key],
        *,
        patch: bool = False,
        anew: Collection[int] = (),
    ) -> None:
        self.writes += 1
        said = f"write {self.writes} of epoch {epoch}"
        content = {
            key: result(*key, said, self.random.choice([None, None, ErrorCode.ENGINE_FAILED]))
            for key in keys
        }
        batch = to_batch(list(content.values()), model="demo", schema=RESULT_SCHEMA)
        write_shard(
            self.store, batch, run="beef", epoch=epoch, rows=rows, patch=patch, anew=sorted(anew)
        )
        twin = self.twin.shards  # a file of the same name is replaced
        twin[:] = [f for f in twin if (f.epoch, f.rows, f.patch) != (epoch, rows, patch)]
        twin.append(File(epoch, rows, content, patch, frozenset(anew)))

    def gather(self, *, crash: bool) -> None:
        """Of a part without gaps; a crash leaves some of the shards behind."""
        number = self.random.randrange(ROWS // PART + 1)
        there = sorted(r for r in self.twin.committed() if r // PART == number)
        if not there or there != list(range(number * PART, there[-1] + 1)):
            return
        if crash:
            aside = self.store.folder.with_suffix(".aside")
            shutil.copytree(self.store.shards, aside)
            left = [f for f in self.twin.shards if self.random.random() < 0.7]
        self.output.gather(number)
        self.twin.gather(number)
        if crash:
            for f in left:
                name = shard_name(f)
                if not (self.store.shards / name).exists():
                    shutil.copy(aside / name, self.store.shards / name)
                    self.twin.shards.append(f)
            shutil.rmtree(aside)

    def stranger(self) -> None:
        """A shard of another run."""
        row = self.random.randrange(ROWS)
        batch = to_batch([result(row, 0, 0, "stranger", None)], model="x", schema=RESULT_SCHEMA)
        write_shard(self.store, batch, run="dead", epoch=99, rows=Range(row, row + 1))

    def check(self) -> None:
        view = self.output.view()
        committed = {r for rows in view.committed for r in range(rows.first, rows.stop)}
        assert committed == self.twin.committed()
        expected = self.twin.results()
        assert said(self.output.results()) == as_said(expected)
        assert self.output.counts() == counted(expected)
        first = self.random.randrange(ROWS)
        window = Range(first, self.random.randint(first + 1, ROWS + 5))
        inside = [r for r in expected if window.first <= r.row < window.stop]
        assert said(self.output.results(window)) == as_said(inside)
        columns = ["text", "row", "request", "sample"]  # in an order that the files have not
        some = [b for b in self.output.results(window, columns) for b in b.to_pylist()]
        whole = [b for b in self.output.results(window) for b in b.select(columns).to_pylist()]
        assert some == whole


def shard_name(f: File) -> str:
    patch = "-patch" if f.patch else ""
    return f"beef-{f.epoch:04d}-{f.rows.first:012d}-{f.rows.stop - 1:012d}{patch}.arrow"


def said(batches) -> list[tuple]:
    names = ["row", "request", "sample", "text", "raw", "status", "error"]
    return [
        (*[record[name] for name in names[:-1]], (record["error"] or {}).get("message"))
        for batch in batches
        for record in batch.select(names).to_pylist()
    ]


def as_said(results: list[Result]) -> list[tuple]:
    return [
        (
            r.row,
            r.request,
            r.sample,
            r.answer and r.answer.text,
            r.completion and r.completion.text,
            "ok" if r.ok else "failed",
            r.failure and r.failure.message,
        )
        for r in results
    ]


@examples(max_examples=25)
@given(st.integers(0, 2**32))
def test_any_story_of_commits_retries_crashes_and_late_writes_ends_as_the_rules_say(seed):
    with tempfile.TemporaryDirectory() as folder:
        story = Story(Path(folder) / "out", seed)
        for _ in range(20):
            match story.random.choice(
                ["commit"] * 5 + ["late", "start", "retry", "gather", "crash", "x"]
            ):
                case "commit":
                    story.commit(story.epoch)
                case "late":
                    story.commit(story.random.randint(1, story.epoch))
                case "start":
                    story.start()
                case "retry":
                    story.retry()
                case "gather":
                    story.gather(crash=False)
                case "crash":
                    story.gather(crash=True)
                case "x":
                    story.stranger()
            if story.random.random() < 0.3:
                story.check()
        story.output.delete_strays()
        assert {file.run for file in list_shards(story.store)} <= {"beef"}
        story.check()


@pytest.fixture
def output(tmp_path):
    store = LocalStore(tmp_path / "out")
    store.make()
    return Output(store, "beef", 10_000, RESULT_SCHEMA)


def commit(output, rows: Range, said: str, *, epoch=1, patch=None, code=None, requests=1) -> None:
    """A shard with each row's requests, or a patch with the keys named."""
    keys = [(row, request) for row in range(rows.first, rows.stop) for request in range(requests)]
    results = [result(*key, 0, said, code) for key in (patch or keys)]
    batch = to_batch(results, model="demo", schema=output.schema)
    write_shard(output.store, batch, run="beef", epoch=epoch, rows=rows, patch=bool(patch))


def texts(output) -> list[str]:
    return [text for batch in output.results() for text in batch["text"].to_pylist()]


def test_the_highest_epoch_wins_then_the_lowest_first_row_then_the_longest(output):
    commit(output, Range(0, 10), "old")
    commit(output, Range(2, 5), "new", epoch=2)
    assert texts(output) == ["old"] * 2 + ["new"] * 3 + ["old"] * 5
    commit(output, Range(1, 4), "lower", epoch=2)
    assert texts(output) == ["old"] + ["lower"] * 3 + ["new"] + ["old"] * 5
    commit(output, Range(1, 5), "longer", epoch=2)
    assert texts(output) == ["old"] + ["longer"] * 4 + ["old"] * 5


def test_a_patch_replaces_single_results_wherever_batches_end(output):
    rows, requests = 6_000, 3
    commit(output, Range(0, rows), "first", requests=requests)
    output.gather(0)
    ends = range(0, rows * requests, 4096)  # where the part's batches begin
    patched = sorted(
        {divmod(end + d, requests) for end in ends for d in (-1, 0, 1) if end + d >= 0}
    )
    patched = [*patched, (rows - 1, requests - 1)]
    commit(output, Range(0, rows), "again", epoch=2, patch=patched)
    before = said(output.results())
    output.gather(0)
    assert list_shards(output.store) == []
    table = pq.read_table(output.store.folder / "part-00000.parquet")
    assert said(table.to_batches()) == before == said(output.results())
    keys = list(zip(table["row"].to_pylist(), table["request"].to_pylist(), strict=True))
    assert keys == [(row, request) for row in range(rows) for request in range(requests)]
    found = {
        key for key, text in zip(keys, table["text"].to_pylist(), strict=True) if text == "again"
    }
    assert found == set(patched)


def test_an_older_patch_does_not_undo_a_newer_one(output):
    commit(output, Range(0, 3), "first")
    commit(output, Range(0, 3), "third", epoch=3, patch=[(1, 0)])
    commit(output, Range(0, 3), "second", epoch=2, patch=[(1, 0), (2, 0)])
    assert texts(output) == ["first", "third", "second"]
    output.gather(0)
    commit(output, Range(0, 3), "late", epoch=2, patch=[(0, 0)])
    assert texts(output) == ["first", "third", "second"]
    output.gather(0)
    assert texts(output) == ["first", "third", "second"]
    assert list_shards(output.store) == []


def test_a_patch_of_rows_that_nobody_committed_adds_nothing(output):
    commit(output, Range(0, 3), "lost", epoch=2, patch=[(1, 0)])
    assert texts(output) == []
    assert output.counts().rows == 0
    assert not output.view().committed


def test_a_short_part_grows_when_rows_are_added(output):
    commit(output, Range(0, 100), "first")
    assert output.gather(0).rows == Range(0, 100)
    commit(output, Range(100, 150), "more", epoch=2)
    part = output.gather(0)
    assert (part.rows, part.epoch) == (Range(0, 150), 2)
    assert texts(output) == ["first"] * 100 + ["more"] * 50
    assert output.gather(0) is None
    assert output.view().epoch == 2


def test_a_crash_between_writing_a_part_and_deleting_its_shards_does_no_harm(output):
    for first in range(0, 100, 10):
        commit(output, Range(first, first + 10), f"shard {first}")
    before, counts = texts(output), output.counts()
    view, store = output.view(), output.store
    paths = [store.folder / shard.name for shard in view.shards]
    kept = [(path, path.read_bytes()) for path in paths]
    output.gather(0)
    for path, data in kept:
        path.write_bytes(data)
    assert (texts(output), output.counts()) == (before, counts)
    assert output.gather(0) is None, "nothing new in them"
    assert list_shards(store) == []
    assert (texts(output), output.counts()) == (before, counts)


def test_others_read_the_parts_at_any_moment(output):
    commit(output, Range(0, 5), "a")
    output.gather(0)
    commit(output, Range(5, 9), "b")
    assert pq.read_table(output.store.folder).num_rows == 5
    assert pa.Table.from_batches(output.results()).num_rows == 9


def test_failed_results_are_found_by_code_and_in_ranges_of_one_part(tmp_path):
    store = LocalStore(tmp_path / "out")
    store.make()
    output = Output(store, "beef", 10, RESULT_SCHEMA)
    for first in (0, 10, 20):
        commit(output, Range(first, first + 10), "fine", requests=2)
    output.gather(1)
    wrong = [(3, 1), (4, 0), (9, 0), (10, 0), (10, 1), (25, 1)]
    for number in range(3):
        inside = [key for key in wrong if key[0] // 10 == number]
        code = ErrorCode.BAD_ROW if number == 2 else ErrorCode.ENGINE_TIMEOUT
        window = output.part_range(number)
        commit(output, window, "no", epoch=2, patch=inside, code=code)
    every = FailedResults(output, set())
    assert list(every.rows()) == [3, 4, 9, 10, 25]
    assert list(every.ranges(100)) == [Range(3, 10), Range(10, 11), Range(25, 26)]
    assert list(every.ranges(2)) == [Range(3, 5), Range(9, 10), Range(10, 11), Range(25, 26)]
    assert [set(every.attempts(row)) for row in (3, 10, 5, 25)] == [
        {(1, 0)},
        {(0, 0), (1, 0)},
        set(),
        {(1, 0)},
    ]
    assert list(FailedResults(output, {"bad_row"}).rows()) == [25]
    assert list(FailedResults(output, {"engine_crash"}).ranges(10)) == []


def test_a_part_of_another_run_is_not_read(output):
    commit(output, Range(0, 5), "mine")
    batch = to_batch([result(0, 0, 0, "other", None)], model="x", schema=output.schema)
    write_part(
        output.store, 7, iter([batch]), schema=output.schema, run="dead", epoch=9, rows=Range(0, 1)
    )
    assert texts(output) == ["mine"] * 5


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    check_ours(LocalStore(tmp_path / "new"))
    check_ours(LocalStore(tmp_path))
    (tmp_path / "thesis.docx").write_text("years of work")
    with pytest.raises(OutputNotOurs, match=r"holds something else \(thesis\.docx\)"):
        check_ours(LocalStore(tmp_path))
    with pytest.raises(OutputNotOurs, match="is a file, not a folder"):
        check_ours(LocalStore(tmp_path / "thesis.docx"))
    LocalStore(tmp_path).make()
    check_ours(LocalStore(tmp_path))


def test_a_part_that_may_be_patched_in_this_start_waits_for_its_end(output):
    """A patch that came after its part was written in the same epoch would be taken for a late
    one, and lost."""
    output = replace(output, part_rows=16, patched_since=2)
    commit(output, Range(0, 10), "first")
    output.gather(0)
    gatherer = Gatherer(output, Intervals())
    commit(output, Range(10, 16), "new", epoch=2)
    gatherer.committed(Range(10, 16))
    commit(output, Range(16, 32), "new", epoch=2)
    gatherer.committed(Range(16, 32))
    gatherer.go_on()
    gatherer.close()
    assert [part.rows for part in list_parts(output.store)] == [Range(0, 10), Range(16, 32)]
    commit(output, Range(3, 4), "patched", epoch=2, patch=[(3, 0)])
    gather_all(output, whole_only=False)
    assert texts(output) == ["first"] * 3 + ["patched"] + ["first"] * 6 + ["new"] * 22
    assert output.view().patched(2) == Patched(2, (Range(3, 4),))
    assert output.view().patched(3) == Patched(3, ())
