"""The same rows in every format, and how the simplest reader reads them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.harness import picture
from vlmbatch.manifest import Manifest, RowStream, open_manifest
from vlmbatch.manifest.columns import choose_columns
from vlmbatch.records import Range, Row

TEXTS = [
    "plain",
    "with, comma",
    'with "quotes"',
    "über\nzwei Zeilen",
    "线",
    "",
    " ",
    "[1",
    "x\r\ny",
]


def record(n: int) -> dict[str, Any]:
    return {"image": f"pictures/{n}.png", "id": f"row {n}", "note": f"{n}: {TEXTS[n % len(TEXTS)]}"}


def write_jsonl(path: Path, rows: range) -> None:
    with path.open("wb") as file:
        for n in rows:
            file.write(json.dumps(record(n), ensure_ascii=n % 2 == 0).encode() + b"\n")
            file.write(b"\n" * (n % 7 == 0) + b" \r\n" * (n % 11 == 0))  # blank lines are no rows


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip())


def write_csv(path: Path, rows: range, delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["id", "note", "image"], delimiter=delimiter)
        writer.writeheader()
        for n in rows:
            writer.writerow(record(n))
            file.write("\n" * (n % 7 == 0))


def read_csv(path: Path, delimiter: str = ",") -> Iterator[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        yield from csv.DictReader(file, delimiter=delimiter)


def write_parquet(path: Path, rows: range) -> None:
    schema = pa.schema([(name, pa.string()) for name in ("image", "id", "note")])
    table = pa.Table.from_pylist([record(n) for n in rows], schema)
    pq.write_table(table, path, row_group_size=400)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_tar(path: Path, rows: range) -> None:
    with tarfile.open(path, "w") as tar:
        for n in rows:
            folder = "long/" * (30 * (n % 5 == 0))  # a name that needs more than one header
            add(tar, f"{folder}{n:05d}.jpg", picture(format="JPEG", width=n % 40 + 1))
            add(tar, f"{folder}{n:05d}.json", json.dumps({"note": record(n)["note"]}).encode())
            if n % 3 == 0:
                add(tar, f"{folder}{n:05d}.txt", f"caption {n}\n".encode())


def read_tar(path: Path) -> Iterator[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, ending = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None
            row = found.setdefault(key, {"id": key, "txt": None})
            data = file.read()
            if ending == "jpg":
                row["image"] = data
            else:
                row.update(json.loads(data) if ending == "json" else {"txt": data.decode().strip()})
    yield from found.values()


def zipped(write: Callable[[Path, range], None]) -> Callable[[Path, range], None]:
    def written(path: Path, rows: range) -> None:
        write(path, rows)
        data = path.read_bytes()
        if path.suffix == ".gz":  # two members, as some tools write it
            middle = len(data) // 3
            path.write_bytes(gzip.compress(data[:middle]) + gzip.compress(data[middle:]))
        else:
            parts = [
                pa.Codec("zstd").compress(half, asbytes=True) for half in (data[:99], data[99:])
            ]
            path.write_bytes(b"".join(parts))

    return written


def stream(manifest: Manifest, *wanted: str) -> RowStream:
    return RowStream(manifest, choose_columns(manifest.schema, {}, wanted, where="here"))


def rows_of(*paths: object, wanted: Iterable[str] = ()) -> list[Row]:
    """All rows of a manifest."""
    manifest = open_manifest([str(path) for path in paths])
    return list(stream(manifest, *wanted).rows(Range(0, manifest.rows))) if manifest.rows else []
