"""A night with nothing new: how long an incremental start takes to see that all ids are answered,
and its peak of memory; by rows of the manifest, with an id column and without.

The answered output is written by this script, in the runner's own files, because to answer so many
rows is not the point. ``make nights`` writes benchmarks/nights.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from vlmbatch.manifest import open_manifest
from vlmbatch.manifest.columns import choose_columns
from vlmbatch.manifest.identities import identities
from vlmbatch.records import Range
from vlmbatch.results.files import write_part
from vlmbatch.results.schema import RESULT_SCHEMA
from vlmbatch.results.store import LocalStore

HERE = Path(__file__).parent
PART_ROWS = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000_000])
    parser.add_argument("--folder", type=Path, help="where the tables go; about 150 bytes per row")
    parser.add_argument("--write", action="store_true", help="write benchmarks/nights.json")
    options = parser.parse_args()
    nights = []
    for rows in options.rows:
        for with_ids in (True, False):
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                nights.append(night(Path(folder), rows, with_ids))
            print(json.dumps(nights[-1]), flush=True)
    if options.write:
        text = json.dumps({"cores": os.cpu_count(), "nights": nights}, indent=1)
        (HERE / "nights.json").write_text(text + "\n")


def night(folder: Path, rows: int, with_ids: bool) -> dict[str, Any]:
    manifest, output = folder / "tonight.parquet", folder / "out"
    columns = "'photos/2026/' || (i * 7919) || '.jpg' AS image"
    if with_ids:
        columns += ", 'photo-' || (i * 7919) AS id"
    with duckdb.connect() as database:
        table = f"SELECT {columns} FROM range({rows}) t(i)"
        database.execute(f"COPY ({table}) TO '{manifest}' (ROW_GROUP_SIZE 122880)")
    words = ["run", str(manifest), "-t", "caption", "--incremental", "--engine", "echo"]
    words += ["-o", str(output), f"--part-rows={PART_ROWS}", "--max-failure-rate=1", "--json"]
    _command(*words, "--limit=1")  # no such photo: a failed row, which no later night asks again
    _answer(manifest, output, rows)
    began = time.monotonic()
    summary, peak = _command(*words)
    seconds = time.monotonic() - began
    assert (summary["rows"], summary["skipped"]) == (rows, rows), summary
    return {
        "rows": rows,
        "ids": "a column" if with_ids else "hashes of the images' names",
        "seconds": round(seconds, 1),
        "rows_per_second": round(rows / seconds),
        "peak_mb": round(peak / 2**20),
    }


def _answer(manifest: Path, output: Path, rows: int) -> None:
    """Parts with an answer for every row."""
    run = json.loads((output / "__vlmbatch/run.json").read_text())
    store = LocalStore(output)
    table = open_manifest([str(manifest)])
    columns = choose_columns(table.schema, {}, (), where="")
    results = _results(identities(table, columns))
    held: list[pa.RecordBatch] = []
    for number in range(-(-rows // PART_ROWS)):
        inside = Range(number * PART_ROWS, min((number + 1) * PART_ROWS, rows))
        while sum(map(len, held)) < len(inside):
            held.append(next(results))
        part = pa.Table.from_batches(held)
        held = part.slice(len(inside)).to_batches()
        some = iter(part.slice(0, len(inside)).to_batches())
        write_part(store, number, some, schema=RESULT_SCHEMA, run=run["run"], epoch=1, rows=inside)


def _results(ids: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in ids:
        rows = batch.num_rows
        known = {
            "row": batch["position"],
            "id": batch["id"],
            "task": pa.repeat("caption", rows),
            "request": pa.repeat(pa.scalar(0, pa.int32()), rows),
            "sample": pa.repeat(pa.scalar(0, pa.int16()), rows),
            "text": pa.repeat("a photo", rows),
            "raw": pa.repeat("a photo", rows),
            "model": pa.repeat("echo", rows),
            "status": pa.repeat("ok", rows),
            "attempts": pa.repeat(pa.scalar(1, pa.int8()), rows),
        }
        arrays = [known.get(field.name, pa.nulls(rows, field.type)) for field in RESULT_SCHEMA]
        yield pa.record_batch(
            [array.cast(field.type) for array, field in zip(arrays, RESULT_SCHEMA, strict=True)],
            schema=RESULT_SCHEMA,
        )


def _command(*words: str) -> tuple[dict[str, Any], int]:
    """(its summary, the peak of its resident memory in bytes)."""
    command = [sys.executable, "-m", "vlmbatch", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0
    return json.loads(said), usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
