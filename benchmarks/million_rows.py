"""A manifest of many rows with tiny inline images through the echo engine: rate and memory.

Prints JSON: rows/s, and for the driver and the worker the peak of resident memory, at 20 % of the
rows and at the end. ``make million`` writes benchmarks/million_rows.json.

``--s3``: manifest (four files) and output are on an S3 server, SeaweedFS on loopback; a proxy
before it counts the requests. ``make million-s3`` writes benchmarks/million_rows_s3.json.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

HERE = Path(__file__).parent
STATUS = "__vlmbatch/status.json"
FILES = 4
"""Of the manifest on S3."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--s3", action="store_true", help="manifest and output on an S3 server")
    parser.add_argument("--write", action="store_true", help="to million_rows.json or ..._s3.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = (measure_s3 if options.s3 else measure)(Path(folder), options.rows)
    text = json.dumps(figures, indent=1)
    print(text)
    if options.write:
        name = "million_rows_s3.json" if options.s3 else "million_rows.json"
        (HERE / name).write_text(text + "\n")


def measure(folder: Path, rows: int, *options: str) -> dict[str, Any]:
    manifest, output = folder / "tiny.parquet", folder / "out"
    write_manifest(manifest, range(rows))
    figures = run(
        [str(manifest), "-o", str(output), *options], rows, lambda: (output / STATUS).read_text()
    )
    counted = sum(pq.read_metadata(p).num_rows for p in output.glob("part-*.parquet"))
    return {**figures, "rows_in_parts": counted}


def measure_s3(folder: Path, rows: int, *options: str) -> dict[str, Any]:
    """Raises AssertionError unless the parts hold each row once, in order."""
    from tests.s3 import seaweedfs
    from tests.s3_faults import FaultProxy

    # A volume for each bucket, and room for manifest, shards and parts: some 300 bytes a row.
    with seaweedfs(folder / "s3", volumes=16 + rows // 50_000) as server:
        fs, bucket = server.fs(), server.new_bucket()
        for number in range(FILES):
            path = folder / f"{number}.parquet"
            write_manifest(path, range(number * rows // FILES, (number + 1) * rows // FILES))
            fs.put_file(str(path), f"{bucket}/in/{path.name}")
        with FaultProxy(server) as proxy:
            words = [f"s3://{bucket}/in", "-o", f"s3://{bucket}/out", *options]
            figures = run(
                words,
                rows,
                lambda: fs.cat_file(f"{bucket}/out/{STATUS}").decode(),
                {**os.environ, **proxy.environment},
            )
            requests = proxy.operations
        parts = sorted(fs.glob(f"{bucket}/out/part-*.parquet"))
        next_row = 0
        for part in parts:
            with fs.open(part, "rb") as file:
                found = pq.read_table(file, columns=["row", "id", "status"])
            numbers = range(next_row, next_row + found.num_rows)
            assert found["row"].to_pylist() == list(numbers), part
            assert found["id"].to_pylist() == [str(n) for n in numbers], part
            assert found["status"].unique().to_pylist() == ["ok"], part
            next_row = numbers.stop
        assert next_row == rows, f"{next_row:,} rows of {rows:,}"
        return {
            **figures,
            "rows_in_parts": next_row,
            "parts": len(parts),
            "objects_of_the_output": len(fs.find(f"{bucket}/out")),
            "requests": dict(sorted(requests.items())),
            "requests_per_thousand_rows": round(1000 * requests.total() / rows, 2),
        }


def run(
    options: list[str],
    rows: int,
    status: Callable[[], str],
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """``vlmbatch run`` with the echo engine; ``status`` reads its status.json."""
    command = [sys.executable, "-m", "vlmbatch", "run", *options, "--engine", "echo", "--json"]
    early: dict[str, int] = {}
    peaks: dict[str, int] = {}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as driver:
        while driver.poll() is None:
            time.sleep(0.5)
            peaks.update(_peaks(driver.pid))
            if not early and _rows_done(status) >= 0.2 * rows:
                early = dict(peaks)
        assert driver.stdout is not None
        summary = json.loads(driver.stdout.read())
    return {
        "rows": rows,
        "ok": summary["ok"],
        "rows_per_second": summary["rows_per_second"],
        "seconds": summary["seconds"],
        "peak_mb_at_20_percent": {name: round(peak / 2**20) for name, peak in early.items()},
        "peak_mb": {name: round(peak / 2**20) for name, peak in peaks.items()},
        "growth_after_20_percent": {
            name: round(peaks[name] / early[name], 3) for name in early if name in peaks
        },
    }


def write_manifest(path: Path, rows: range) -> None:
    """Hugging Face image structs with 8 x 8 px PNGs inside, and an id."""
    pictures = []
    for shade in range(256):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (shade, 255 - shade, shade // 2)).save(buffer, "PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("id", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(rows.start, rows.stop, 50_000):
            numbers = range(start, min(rows.stop, start + 50_000))
            columns = {
                "image": [pictures[n % 256] for n in numbers],
                "id": [str(n) for n in numbers],
            }
            writer.write_table(pa.table(columns, schema=schema))


def _peaks(driver: int) -> dict[str, int]:
    """Peak resident bytes (VmHWM) of the driver and its worker, from /proc."""
    found = {"driver": _peak(driver)}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _parent(int(entry.name)) == driver:
            found["worker"] = _peak(int(entry.name))
    return {name: peak for name, peak in found.items() if peak}


def _peak(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def _rows_done(status: Callable[[], str]) -> int:
    try:
        return int(json.loads(status())["rows_done"])
    except (OSError, ValueError, KeyError):
        return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
