"""The output is a dataset at any moment: what people read Parquet with reads the finished parts,
while the run goes on and after it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pyarrow.dataset
import pytest

from tests.harness import Command, assert_whole, echo, parts, quiz, until, vlmbatch

PART_ROWS = 12


def with_pyarrow(output: Path, cache: Path) -> list[int]:
    from vlmbatch.results.schema import RESULT_SCHEMA

    dataset = pyarrow.dataset.dataset(str(output), format="parquet")
    assert dataset.schema.equals(RESULT_SCHEMA)
    rows: list[int] = dataset.to_table()["row"].to_pylist()
    return rows


def with_pandas(output: Path, cache: Path) -> list[int]:
    import pandas

    frame = pandas.read_parquet(output)
    assert list(frame.columns) == names()
    return [int(row) for row in frame["row"]]


def with_datasets(output: Path, cache: Path) -> list[int]:
    import datasets

    loaded = datasets.load_dataset(str(output), split="train", cache_dir=str(cache))
    assert loaded.features.arrow_schema.names == names()
    return list(loaded["row"])


def with_duckdb(output: Path, cache: Path) -> list[int]:
    import duckdb

    with duckdb.connect() as connection:
        found = connection.sql(f"FROM read_parquet('{output}/*.parquet')")
        assert found.columns == names()
        return [row for (row,) in found.select("row").fetchall()]


def with_polars(output: Path, cache: Path) -> list[int]:
    import polars

    frame = polars.read_parquet(output / "*.parquet")
    assert frame.columns == names()
    assert frame.schema["boxes"] == polars.List(
        polars.Struct(
            {
                "label": polars.String,
                **dict.fromkeys(("x1", "y1", "x2", "y2", "score"), polars.Float32),
            }
        )
    )
    return frame["row"].to_list()


def names() -> list[str]:
    from vlmbatch.results.schema import RESULT_SCHEMA

    return RESULT_SCHEMA.names


READERS: list[Callable[[Path, Path], list[int]]] = [
    with_pyarrow,
    with_pandas,
    with_datasets,
    with_duckdb,
    with_polars,
]


@pytest.mark.filterwarnings("default")  # theirs
def test_readers_of_parquet_read_the_output_at_any_moment(tmp_path: Path) -> None:
    made = quiz(tmp_path, 20 * PART_ROWS)
    output = tmp_path / "out"
    slow = echo(delay=0.2, capacity=4, hang_rows=made.rows - 1)  # it does not end by itself
    options = [*made.options, "-o", output, f"--part-rows={PART_ROWS}", "--checkpoint-rows=4"]
    whole = [row for row, texts in enumerate(made.answers) for _ in texts]
    with Command("run", *options, *slow) as command:
        until(lambda: len(parts(output)) >= 2, "two parts")
        for number, read in enumerate(READERS):
            there = len(parts(output))
            rows = read(output, tmp_path / f"cache-{number}")
            assert len(set(rows)) >= there * PART_ROWS, read.__name__
            assert len(set(rows)) % PART_ROWS == 0, read.__name__
            assert rows == whole[: len(rows)], read.__name__
        command.signal(signal.SIGKILL)
        assert command.wait().exit_code == -signal.SIGKILL  # it went on until now
    assert vlmbatch("run", *options).exit_code == 0
    assert_whole(output, made.answers, ids=made.ids)
    for number, read in enumerate(READERS):
        assert read(output, tmp_path / f"cache-after-{number}") == whole, read.__name__
