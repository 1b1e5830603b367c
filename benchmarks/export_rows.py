"""An output of many rows, whose images are files, as training data: rows/s and memory.

The output is written by the product's own code, without asking an engine. Prints JSON;
``make export-bench`` writes benchmarks/export_rows.json.
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

import pyarrow as pa
import pyarrow.parquet as pq

from vlmbatch.records import Range
from vlmbatch.results.files import write_part
from vlmbatch.results.schema import result_schema
from vlmbatch.results.store import open_store
from vlmbatch.run_file import read_run_file

HERE = Path(__file__).parent
FORMATS = ("sharegpt", "llava", "jsonl")
AT_ONCE = 4096
TEXT = "A wooden table with a bowl of red apples, next to a window through which the sun shines. "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument(
        "--pairs", action="store_true", help="rows of two images, ten in a chain, with --split"
    )
    parser.add_argument("--write", action="store_true", help="write benchmarks/export_rows.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = make_output(Path(folder), options.rows, pairs=options.pairs)
        more = ["--split", "train=0.9,val=0.1"] if options.pairs else []
        figures: dict[str, Any] = {"rows": options.rows, "cpus": os.cpu_count()}
        for form in options.formats:
            figures[form] = measure(output, Path(folder) / form, form, *more)
    text = json.dumps(figures, indent=1)
    print(text)
    if options.write:
        (HERE / "export_rows.json").write_text(text + "\n")


def measure(output: Path, place: Path, form: str, *more: str) -> dict[str, Any]:
    """Of one export in a process of its own."""
    command = [sys.executable, "-m", "vlmbatch", "export", str(output), str(place), "--to", form]
    command += more
    began = time.monotonic()
    before = os.times()
    peak = 0
    with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE) as process:
        while process.poll() is None:
            peak = max(peak, _peak(process.pid))
            time.sleep(0.2)
        assert process.stdout is not None
        summary = json.loads(process.stdout.read())
    after = os.times()
    assert process.returncode == 0, summary
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    return {
        "rows": summary["rows"],
        "records": sum(summary["records"].values()),
        "seconds": round(time.monotonic() - began, 1),
        "rows_per_second": summary["rows_per_second"],
        "cpu_seconds": round(cpu, 1),
        "peak_mb": round(peak / 2**20),
        "megabytes": round(sum(p.stat().st_size for p in place.glob("*.json*")) / 1e6),
    }


def _peak(pid: int) -> int:
    """Peak resident bytes since the program began; rusage would count what it was forked from."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def make_output(folder: Path, rows: int, *, pairs: bool = False) -> Path:
    """Two answers about each of so many paths, or pairs of them."""
    manifest, output = folder / "manifest.parquet", folder / "out"
    numbers = range(rows)
    columns: dict[str, list[Any]] = {"image": [path_of(n) for n in numbers]}
    if pairs:
        columns["image"] = [pair_of(n) for n in numbers]
    columns["id"] = [f"photo-{n}" for n in numbers]
    columns["question"] = ["What is on the table?"] * rows
    pq.write_table(pa.table(columns), manifest, row_group_size=50_000)
    command = [sys.executable, "-m", "vlmbatch", "run", str(manifest), "-t", "caption", "-t", "vqa"]
    command += ["--engine", "echo", "-o", str(output), "--prepare"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    store = open_store(output)
    run_file = read_run_file(store)
    assert run_file is not None
    schema = result_schema()
    for number, first in enumerate(range(0, rows, run_file.part_rows)):
        part = Range(first, min(rows, first + run_file.part_rows))
        batches = results(part, schema, pairs=pairs)
        write_part(store, number, batches, schema=schema, run=run_file.run, epoch=1, rows=part)
    return output


def path_of(number: int) -> str:
    return f"photos/{number % 1000:03d}/{number:08d}.jpg"


def pair_of(row: int) -> list[str]:
    """Its second image is the first one of the next row, but for every tenth."""
    chain, place = divmod(row, 10)
    return [path_of(chain * 11 + place), path_of(chain * 11 + place + 1)]


def results(part: Range, schema: pa.Schema, *, pairs: bool) -> Iterator[pa.RecordBatch]:
    for first in range(part.first, part.stop, AT_ONCE):
        rows = range(first, min(part.stop, first + AT_ONCE))
        twice = [row for row in rows for _ in range(2)]
        count = len(twice)
        columns: dict[str, list[Any]] = {field.name: [None] * count for field in schema}
        columns |= {
            "row": twice,
            "id": [f"photo-{row}" for row in twice],
            "task": ["caption", "vqa"] * len(rows),
            "request": [0, 1] * len(rows),
            "sample": [0] * count,
            "question": [None, "What is on the table?"] * len(rows),
            "text": [TEXT * 3, "A bowl of apples."] * len(rows),
            "raw": [TEXT * 3, "A bowl of apples."] * len(rows),
            "finish_reason": ["stop"] * count,
            "prompt_tokens": [100] * count,
            "completion_tokens": [60, 6] * len(rows),
            "image": [pair_of(row)[0] if pairs else path_of(row) for row in twice],
            "images": [pair_of(row) if pairs else None for row in twice],
            "image_width": [1024] * count,
            "image_height": [768] * count,
            "model": ["echo"] * count,
            "status": ["ok"] * count,
            "attempts": [1] * count,
        }
        arrays = [pa.array(columns[field.name], type=field.type) for field in schema]
        yield pa.RecordBatch.from_arrays(arrays, schema=schema)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
