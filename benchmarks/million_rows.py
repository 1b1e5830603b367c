"""A manifest of many rows with tiny inline images through the echo engine: rate and memory.

Prints JSON: rows/s, and for the driver and the worker the peak of resident memory, at 20 % of the
rows and at the end. ``make million`` writes benchmarks/million_rows.json.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--write", action="store_true", help="write benchmarks/million_rows.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options.rows)
    text = json.dumps(figures, indent=1)
    print(text)
    if options.write:
        (HERE / "million_rows.json").write_text(text + "\n")


def measure(folder: Path, rows: int, *options: str) -> dict[str, Any]:
    manifest, output = folder / "tiny.parquet", folder / "out"
    write_manifest(manifest, rows)
    command = [sys.executable, "-m", "vlmbatch", "run", str(manifest), "--engine", "echo"]
    command += options
    early: dict[str, int] = {}
    peaks: dict[str, int] = {}
    command += ["-o", str(output), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as driver:
        while driver.poll() is None:
            time.sleep(0.5)
            peaks.update(_peaks(driver.pid))
            if not early and _rows_done(output) >= 0.2 * rows:
                early = dict(peaks)
        assert driver.stdout is not None
        summary = json.loads(driver.stdout.read())
    return {
        "rows": rows,
        "ok": summary["ok"],
        "rows_in_parts": sum(pq.read_metadata(p).num_rows for p in output.glob("part-*.parquet")),
        "rows_per_second": summary["rows_per_second"],
        "seconds": summary["seconds"],
        "peak_mb_at_20_percent": {name: round(peak / 2**20) for name, peak in early.items()},
        "peak_mb": {name: round(peak / 2**20) for name, peak in peaks.items()},
        "growth_after_20_percent": {
            name: round(peaks[name] / early[name], 3) for name in early if name in peaks
        },
    }


def write_manifest(path: Path, rows: int) -> None:
    """Hugging Face image structs with 8 x 8 px PNGs inside, and an id."""
    pictures = []
    for shade in range(256):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (shade, 255 - shade, shade // 2)).save(buffer, "PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("id", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 50_000):
            numbers = range(start, min(rows, start + 50_000))
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


def _rows_done(output: Path) -> int:
    try:
        return int(json.loads((output / "__vlmbatch" / "status.json").read_text())["rows_done"])
    except (OSError, ValueError, KeyError):
        return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
