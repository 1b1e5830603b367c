"""Shards and parts say in their names and footers what they hold."""

import json
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.strategies import codes, counted, result
from vlmbatch.errors import ErrorCode, RunStopped
from vlmbatch.grounding import Box, Point, Size
from vlmbatch.records import Answer, Completion, Range, Result
from vlmbatch.results.files import (
    Counting,
    Counts,
    list_parts,
    list_shards,
    write_part,
    write_shard,
)
from vlmbatch.results.schema import RESULT_SCHEMA, result_schema, to_batch
from vlmbatch.results.store import LocalStore


@pytest.fixture
def store(tmp_path):
    store = LocalStore(tmp_path / "out")
    store.make()
    return store


def batch_of(*results: Result, schema: pa.Schema = RESULT_SCHEMA) -> pa.RecordBatch:
    return to_batch(results, model="demo", schema=schema)


ROWS = st.lists(st.lists(codes(), min_size=1, max_size=3), min_size=1, max_size=12)


def results_of(rows: list[list[ErrorCode | None]], first: int = 0) -> list[Result]:
    return [
        result(first + i, request, 0, f"r{i}", code)
        for i, requests in enumerate(rows)
        for request, code in enumerate(requests)
    ]


@examples(max_examples=150)
@given(ROWS, st.sets(st.integers(0, 36)))
def test_counting_does_not_depend_on_where_batches_end(rows, cuts):
    results = results_of(rows)
    batch, counting, last = batch_of(*results), Counting(), 0
    for cut in sorted({min(c, len(results)) for c in cuts} | {len(results)}):
        counting.add(batch.slice(last, cut - last))
        last = cut
    assert counting.counts == counted(results)


@examples(max_examples=50)
@given(ROWS, ROWS)
def test_counts_add_up_and_survive_json(one, two):
    a, b = counted(results_of(one)), counted(results_of(two, first=100))
    both = counted(results_of(one) + results_of(two, first=100))
    total = Counts.from_json(json.loads(json.dumps(a.to_json())))
    total.add(b)
    assert total == both
    assert total.minus(b) == a


def test_a_shard_says_by_its_name_what_it_covers_and_by_its_footer_what_it_holds(store):
    results = results_of([[None, ErrorCode.BAD_ROW], [None], [ErrorCode.ENGINE_CRASH]], first=40)
    counts = write_shard(store, batch_of(*results), run="beef", epoch=3, rows=Range(40, 43))
    (shard,) = list_shards(store)
    assert shard.name == "__vlmbatch/shards/beef-0003-000000000040-000000000042.arrow"
    assert (shard.run, shard.epoch, shard.rows) == ("beef", 3, Range(40, 43))
    assert not shard.patch
    assert not shard.is_part
    assert shard.counts() == counts == counted(results)
    assert pa.Table.from_batches(shard.batches())["id"].to_pylist() == [r.id for r in results]
    window = pa.Table.from_batches(shard.batches(Range(41, 42)))
    assert window["row"].to_pylist() == [41]
    assert list(shard.batches(Range(90, 91))) == []


def test_a_patch_is_told_from_a_shard_of_the_same_rows(store):
    batch = batch_of(*results_of([[None]]))
    write_shard(store, batch, run="beef", epoch=1, rows=Range(0, 1))
    write_shard(store, batch, run="beef", epoch=1, rows=Range(0, 1), patch=True)
    assert [file.patch for file in list_shards(store)] == [True, False]


def test_a_part_holds_its_metadata_and_several_row_groups(store):
    results = results_of([[None, None]] * 20_000)
    batch = batch_of(*results)
    pieces = (batch.slice(i, 777) for i in range(0, batch.num_rows, 777))
    part = write_part(
        store, 2, pieces, schema=batch.schema, run="beef", epoch=4, rows=Range(0, 20_000)
    )
    assert part.name == "part-00002.parquet"
    assert list_parts(store) == [part]
    assert part.counts() == counted(results)
    assert pq.read_metadata(store.folder / part.name).num_row_groups > 1
    assert (
        pq.read_table(store.folder / part.name).to_batches()[0].schema.names == RESULT_SCHEMA.names
    )
    rows = [row for b in part.batches(Range(8_190, 8_200)) for row in b["row"].to_pylist()]
    assert rows == [row for row in range(8_190, 8_200) for _ in range(2)]


def test_a_part_of_many_one_row_shards_is_written_in_linear_time(store):
    batch = batch_of(*results_of([[None]] * 4_000))
    pieces = (batch.slice(i, 1) for i in range(batch.num_rows))
    before = time.process_time()
    write_part(store, 0, pieces, schema=batch.schema, run="beef", epoch=1, rows=Range(0, 4_000))
    assert time.process_time() - before < 10
    assert list_parts(store)[0].counts().rows == 4_000


def test_other_files_are_no_shards_and_no_parts(store):
    for name in ("a.txt", "beef-1-2.arrow", "beef-0001-000000000000-000000000001.arrow.tmp"):
        (store.shards / name).write_bytes(b"")
    for name in ("part-1.parquet", "party.parquet", "part-00000.parquet.crc"):
        (store.folder / name).write_bytes(b"")
    assert list_shards(store) == []
    assert list_parts(store) == []
    assert list_shards(LocalStore(store.folder / "nowhere")) == []


@pytest.mark.parametrize("content", [b"", b"no parquet at all", None])
def test_a_part_that_is_none_of_ours_is_named(store, content):
    path = store.folder / "part-00000.parquet"
    if content is None:
        pq.write_table(pa.table({"a": [1]}), path)
    else:
        path.write_bytes(content)
    with pytest.raises(RunStopped, match=f"{path.name} is not a result file of vlmbatch") as caught:
        list_parts(store)
    assert "move it" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"ARROW1 but not really"])
def test_a_shard_that_cannot_be_read_is_named(store, content):
    path = store.shards / "beef-0001-000000000000-000000000001.arrow"
    path.write_bytes(content)
    (shard,) = list_shards(store)
    with pytest.raises(RunStopped, match=path.name):
        shard.counts()


def test_a_result_keeps_all_it_knows(store):
    full = Result(
        row=1,
        id="ü",
        task="detect",
        request=2,
        sample=3,
        question='["a"]',
        answer=Answer("t", (Box("a", 0.5, 1, 2, 3, 0.25),), (Point("p", 4, 5),)),
        json="{}",
        completion=Completion("<raw>", "length", 5, 6),
        image="a.png",
        images=("a.png", None),
        image_size=Size(10, 20),
        model_image_size=Size(5, 10),
        attempts=1000,
        carried={"shop": "s"},
    )
    bare = Result(row=2, id="x", task="ocr", request=0, answer=Answer(boxes=()))
    schema = result_schema([pa.field("shop", pa.string(), nullable=False)])
    write_shard(store, batch_of(full, bare, schema=schema), run="a", epoch=1, rows=Range(1, 3))
    (batch,) = list_shards(store)[0].batches()
    first, second = batch.to_pylist()
    assert first == {
        "row": 1,
        "id": "ü",
        "task": "detect",
        "request": 2,
        "sample": 3,
        "question": '["a"]',
        "text": "t",
        "boxes": [{"label": "a", "x1": 0.5, "y1": 1, "x2": 2, "y2": 3, "score": 0.25}],
        "points": [{"label": "p", "x": 4, "y": 5}],
        "json": "{}",
        "raw": "<raw>",
        "finish_reason": "length",
        "prompt_tokens": 5,
        "completion_tokens": 6,
        "image": "a.png",
        "images": ["a.png", None],
        "image_width": 10,
        "image_height": 20,
        "model_image_width": 5,
        "model_image_height": 10,
        "model": "demo",
        "status": "ok",
        "error": None,
        "attempts": 127,
        "shop": "s",
    }
    assert (second["boxes"], second["points"], second["shop"]) == ([], None, None)
