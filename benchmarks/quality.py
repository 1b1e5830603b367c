"""`vlmbatch quality` over ten million rows: rate and peak memory.

python benchmarks/quality.py [--rows N] [--tasks caption,detect] [--write]

The results are written as parts, without a run: captions of 6 to 14 words, each unlike
all others, and boxes. Then the command is run as a user runs it, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlmbatch.records import Range
from vlmbatch.results.files import write_part
from vlmbatch.results.schema import RESULT_SCHEMA
from vlmbatch.results.store import LocalStore
from vlmbatch.run_file import read_run_file

PART = 65_536
BATCH = 8192
FIGURES = Path(__file__).with_suffix(".json")


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--rows", type=int, default=10_000_000)
    options.add_argument("--tasks", default="caption,detect")
    options.add_argument("--write", action="store_true", help=f"keep the figures in {FIGURES.name}")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = {
            task: measured(Path(folder) / task, task, given.rows) for task in given.tasks.split(",")
        }
    print(json.dumps(figures, indent=1))
    if given.write:
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")


def measured(output: Path, task: str, rows: int) -> dict[str, float]:
    make_output(output, task, rows)
    command = [sys.executable, "-m", "vlmbatch", "quality", str(output), "--json"]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    found = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    assert found["results"] == rows
    seconds = time.monotonic() - started
    return {
        "rows": rows,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "rows_per_second": round(rows / seconds),
        "peak_mb": round(usage.ru_maxrss / 1024),
    }


def make_output(output: Path, task: str, rows: int) -> None:
    """A folder as a run leaves it."""
    manifest = output.with_suffix(".parquet")
    pq.write_table(pa.table({"image": ["a.png"]}), manifest)
    prepare = ["run", str(manifest), "-t", task, "--engine", "echo", "--prepare", "--labels", "cat"]
    prepare = prepare if task == "detect" else prepare[:-2]
    command = [sys.executable, "-m", "vlmbatch", *prepare, "-o", str(output)]
    subprocess.run(command, check=True, capture_output=True)
    store = LocalStore(output)
    run_file = read_run_file(store)
    assert run_file is not None
    for number in range(-(-rows // PART)):
        window = Range(number * PART, min(rows, (number + 1) * PART))
        batches = make_batches(task, window)
        write_part(
            store, number, batches, schema=RESULT_SCHEMA, run=run_file.run, epoch=1, rows=window
        )


def make_batches(task: str, rows: Range) -> Iterator[pa.RecordBatch]:
    chance = random.Random(rows.first)
    words = [f"{chance.getrandbits(32):x}" for _ in range(1000)]
    captions = [" ".join(chance.choices(words, k=chance.randint(6, 14))) for _ in range(2000)]
    for first in range(rows.first, rows.stop, BATCH):
        count = min(BATCH, rows.stop - first)
        numbers = pa.array(range(first, first + count), pa.int64())
        names = pc.cast(numbers, pa.string())
        texts = pa.array(chance.choices(captions, k=count))
        texts = pc.binary_join_element_wise(texts, names, " ")
        box = {"label": "cat", "x1": 10.0, "y1": 20.0, "x2": 200.0, "y2": 220.0}
        boxes = [[box] * chance.randint(0, 4) for _ in range(count)]
        columns = {
            "row": numbers,
            "id": names,
            "task": pa.array([task] * count),
            "request": pa.array([0] * count, pa.int32()),
            "sample": pa.array([0] * count, pa.int16()),
            "text": texts if task == "caption" else pa.nulls(count, pa.string()),
            "raw": texts,
            "finish_reason": pa.array(["stop"] * count),
            "image": pc.binary_join_element_wise(names, ".jpg", ""),
            "image_width": pa.array([640] * count, pa.int32()),
            "image_height": pa.array([480] * count, pa.int32()),
            "model": pa.array(["model@1"] * count),
            "status": pa.array(["ok"] * count),
            "attempts": pa.array([1] * count, pa.int8()),
        }
        if task == "detect":
            columns["boxes"] = pa.array(boxes, RESULT_SCHEMA.field("boxes").type)
        arrays = [
            columns[field.name] if field.name in columns else pa.nulls(count, field.type)
            for field in RESULT_SCHEMA
        ]
        yield pa.RecordBatch.from_arrays(arrays, schema=RESULT_SCHEMA)


if __name__ == "__main__":
    main()
