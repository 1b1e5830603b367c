"""What vlmbatch costs where the data lies: planning, loading images, reading a manifest.

(a) planning: a fresh process opens a manifest of ten million rows in a thousand Parquet files and
    has the first lease ready; then ``vlmbatch run --limit 1`` on it. Seconds, rows/s, peak memory.
(b) images: the loader of a worker against a loop that opens, reads and decodes with Pillow in a
    thread pool, with as many images in flight, from the local disk and from SeaweedFS on loopback.
    Each round measures all ways, in turn; the ratios are of one round's rates.
(c) manifest: requests and bytes per row group, as a proxy before the server counts them, where
    leases and row groups are of one size.

    python benchmarks/storage.py --write                        (make storage, about 5 minutes)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.engine_overhead import make_pictures
from tests.s3 import S3Server, seaweedfs
from tests.s3_faults import FaultProxy

HERE = Path(__file__).parent
GROUPS = 4
"""Row groups per file of (a)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=1000, help="of (a), 10,000 rows each")
    parser.add_argument("--images", type=int, default=500, help="of (b)")
    parser.add_argument("--rounds", type=int, default=5, help="of (b)")
    parser.add_argument("--only", choices=["planning", "images", "manifest"])
    parser.add_argument("--write", action="store_true", help="to storage.json")
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan:
        print(json.dumps(plan(options.plan)))
        return
    table: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    with tempfile.TemporaryDirectory(prefix="vlmbatch-storage-") as name:
        folder = Path(name)
        if options.only in (None, "planning"):
            table["planning"] = measure_planning(folder / "planning", options.files)
            say(table["planning"])
        if options.only in (None, "images", "manifest"):
            with seaweedfs(folder / "s3", volumes=64) as server, server.in_environment():
                if options.only in (None, "images"):
                    table["images"] = measure_images(
                        folder / "images", server, options.images, options.rounds
                    )
                if options.only in (None, "manifest"):
                    table["manifest"] = measure_manifest(folder / "manifest", server)
                    say(table["manifest"])
    text = json.dumps(table, indent=1) + "\n"
    print(text)
    if options.write:
        (HERE / "storage.json").write_text(text)


def say(what: Any) -> None:
    print(what if isinstance(what, str) else json.dumps(what), file=sys.stderr, flush=True)


# (a)


def measure_planning(folder: Path, files: int) -> dict[str, Any]:
    manifest, rows = folder / "manifest", 10_000
    manifest.mkdir(parents=True)
    for number in range(files):
        first = number * rows
        names = [f"images/{row:08d}.jpg" for row in range(first, first + rows)]
        table = pa.table({"image": names, "id": [f"photo-{name}" for name in names]})
        pq.write_table(table, manifest / f"{number:05d}.parquet", row_group_size=rows // GROUPS)
    planned = json.loads(child(sys.executable, __file__, "--plan", str(manifest))[0])
    assert planned["rows"] == files * rows, planned
    (folder / "manifest" / "images").mkdir()
    make_pictures(folder / "one", 1)[0].rename(folder / "manifest" / "images" / "00000000.jpg")
    words = [sys.executable, "-m", "vlmbatch", "run", str(manifest), "--engine", "echo"]
    words += ["--limit", "1", "-o", str(folder / "out"), "--json"]
    started = time.monotonic()
    said, peak = child(*words)
    seconds = time.monotonic() - started
    assert json.loads(said)["ok"] == 1, said
    return {
        "rows": planned["rows"],
        "files": files,
        "row_groups": files * GROUPS,
        "seconds": round(planned["seconds"], 2),
        "rows_per_second": round(planned["rows"] / planned["seconds"]),
        "peak_mb": planned["peak_mb"],
        "run_of_one_row": {"seconds": round(seconds, 1), "peak_mb_of_any_process": peak},
    }


def plan(manifest: str) -> dict[str, Any]:
    """In a process of its own: until the first lease could go to a worker."""
    from vlmbatch.manifest import open_manifest
    from vlmbatch.records import Range
    from vlmbatch.scheduler import Scheduler

    started = time.perf_counter()
    opened = open_manifest([manifest])
    scheduler = Scheduler(
        [Range(0, opened.rows)],
        lease_rows=256,
        part_rows=65_536,
        boundaries=list(opened.boundaries()),
    )
    assert scheduler.next_lease("worker")
    json.dumps(opened.to_json())  # goes into run.json
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"rows": opened.rows, "seconds": seconds, "peak_mb": round(peak / 1024)}


def child(*words: str) -> tuple[str, int]:
    """(what it printed, the most memory in MB that it or one of its children had)."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(words, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(words)}: exit code {process.returncode}\n{err.read()[-3000:]}")
        return out.read(), round(usage.ru_maxrss / 1024)


# (b)


def measure_images(folder: Path, server: S3Server, images: int, rounds: int) -> dict[str, Any]:
    paths = make_pictures(folder / "pictures", images)
    bucket = server.new_bucket()
    server.fs().put([str(path) for path in paths], [f"{bucket}/{path.name}" for path in paths])
    places = {
        "local": [str(path) for path in paths],
        "s3": [f"s3://{bucket}/{path.name}" for path in paths],
    }
    ways: dict[str, Callable[[list[str]], float]] = {"loop": by_loop, "vlmbatch": by_loader}
    seconds: dict[str, dict[str, list[float]]] = {}
    cpu: dict[str, dict[str, list[float]]] = {}
    for place, uris in places.items():
        for measured in ways.values():
            measured(uris[:50])  # connections, and the page cache
        each = seconds[place] = {way: [] for way in ways}
        work = cpu[place] = {way: [] for way in ways}
        for number in range(rounds):
            for way in sorted(ways, reverse=bool(number % 2)):
                started = time.process_time()
                each[way].append(ways[way](uris))
                work[way].append(time.process_time() - started)
                say(f"{place} round {number + 1} {way:<9} {images / each[way][-1]:7.1f} images/s")
    return {
        "images": images,
        "bytes_per_image": round(statistics.mean(path.stat().st_size for path in paths)),
        "rounds": rounds,
        "in_flight": IN_FLIGHT,
        **{
            place: {
                "images_per_second": {
                    way: round(statistics.median(images / s for s in each[way]), 1) for way in ways
                },
                "vlmbatch_over_loop": ratio(each["loop"], each["vlmbatch"]),
                # Says more than the rates where others use the machine as well.
                "cpu_ms_per_image": {
                    way: round(1000 * statistics.median(cpu[place][way]) / images, 2)
                    for way in ways
                },
            }
            for place, each in seconds.items()
        },
    }


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    each = [a / b for a, b in zip(over, under, strict=True)]
    return {
        "median": round(statistics.median(each), 3),
        "least": round(min(each), 3),
        "most": round(max(each), 3),
    }


IN_FLIGHT = 32
"""Rows that a worker loads at once."""


def by_loop(uris: list[str]) -> float:
    """What one would write by hand; threads, because both reading and decoding let go of the
    interpreter."""
    import fsspec
    from PIL import Image

    fs, _ = fsspec.core.url_to_fs(uris[0])

    def size_of(uri: str) -> tuple[int, int]:
        with fs.open(uri, "rb") as file:
            with Image.open(file) as picture:
                return picture.convert("RGB").size

    started = time.perf_counter()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        sizes = list(pool.map(size_of, uris))
    seconds = time.perf_counter() - started
    assert all(width > 500 for width, _ in sizes)
    return seconds


def by_loader(uris: list[str]) -> float:
    """As a worker does it: the images of each row loaded, then let go."""
    return asyncio.run(_by_loader(uris))


async def _by_loader(uris: list[str]) -> float:
    from vlmbatch.images.load import ImageLoader, ImageMemory, Limits
    from vlmbatch.records import ImageRef

    with ThreadPoolExecutor(8) as threads:
        loader = ImageLoader(
            base=str(Path(uris[0]).parent),
            memory=ImageMemory(2**30),
            executor=threads,
            limits=Limits(),
            target=None,
        )
        turns = asyncio.Semaphore(IN_FLIGHT)

        async def load(uri: str) -> int:
            async with turns:
                with await loader.load([ImageRef(uri=uri)]) as loaded:
                    return loaded.images[0].pixels.width

        started = time.perf_counter()
        widths = await asyncio.gather(*map(load, uris))
        seconds = time.perf_counter() - started
        await loader.close()
    assert all(width > 500 for width in widths)
    return seconds


# (c)


def measure_manifest(folder: Path, server: S3Server) -> dict[str, Any]:
    """Four files of eight row groups of 256 rows, 4 KB each row: leases of 256 rows."""
    files, groups, rows = 4, 8, 256
    folder.mkdir()
    picture = small_picture()
    bucket = server.new_bucket()
    for number in range(files):
        count = groups * rows
        table = pa.table(
            {
                "image": [picture] * count,
                "answer": [os.urandom(2048).hex() for _ in range(count)],
            }
        )
        path = folder / f"{number}.parquet"
        pq.write_table(table, path, row_group_size=rows, compression="none")
        server.fs().put_file(str(path), f"{bucket}/in/{number}.parquet")
    return {
        "files": files,
        "row_groups": files * groups,
        "row_group_bytes": round(
            statistics.mean(stop - start for _, start, stop in row_groups(folder))
        ),
        **{
            f"{workers} worker{'s' if workers > 1 else ''}": read_by(
                workers, folder, server, bucket, files * groups, rows
            )
            for workers in (1, 2)
        },
    }


def small_picture() -> bytes:
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


def read_by(
    workers: int, folder: Path, server: S3Server, bucket: str, groups: int, rows: int
) -> dict[str, Any]:
    with FaultProxy(server) as proxy:
        words = [sys.executable, "-m", "vlmbatch", "run", f"s3://{bucket}/in/", "-t", "caption"]
        words += ["--engine", "echo", "--engine-arg", "reply_from=answer", "--executor", "local"]
        words += ["--workers", str(workers), "--checkpoint-rows", str(rows), "--json"]
        words += ["-o", str(folder / f"out-{workers}")]
        with proxy.in_environment():
            said, _ = child(*words)
        assert json.loads(said)["ok"] == groups * rows, said
    counted = [(key, *span) for key, span in read_spans(proxy, folder)]
    times = []
    requests = []
    for name, start, stop in row_groups(folder):
        overlaps = [
            min(stop, end) - max(start, first)
            for key, first, end in counted
            if key.endswith(name) and first < stop and start < end
        ]
        times.append(sum(overlaps) / (stop - start))
        requests.append(len(overlaps))
    return {
        "requests": proxy.operations,
        "bytes": sum(proxy.sent.values()),
        "requests_per_row_group": round(statistics.mean(requests), 2),
        "times_each_byte_is_read": {
            "mean": round(statistics.mean(times), 3),
            "most": round(max(times), 3),
        },
    }


def row_groups(folder: Path) -> Iterator[tuple[str, int, int]]:
    """(file, first byte, byte after the last) of each row group."""
    for path in sorted(folder.glob("*.parquet")):
        metadata = pq.read_metadata(path)
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            chunks = [group.column(i) for i in range(group.num_columns)]
            starts = [
                min(c.data_page_offset, c.dictionary_page_offset or c.data_page_offset)
                for c in chunks
            ]
            ends = [s + c.total_compressed_size for s, c in zip(starts, chunks, strict=True)]
            yield path.name, min(starts), max(ends)


def read_spans(proxy: FaultProxy, folder: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """(key, [first byte, byte after the last)) of each GET of a manifest file."""
    for each in proxy.log:
        if each.request.operation == "GET" and each.request.key.endswith(".parquet"):
            first = 0
            if each.request.range:
                wanted = each.request.range.removeprefix("bytes=").partition("-")
                size = (folder / Path(each.request.key).name).stat().st_size
                first = int(wanted[0]) if wanted[0] else size - int(wanted[2])
            yield each.request.key, (first, first + each.sent)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
