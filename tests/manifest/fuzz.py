"""Reads broken Parquet files, given by seeds: one line for each, ``SEED error|rows N failed M``.

python -m tests.manifest.fuzz FOLDER FIRST STOP
"""

from __future__ import annotations

import io
import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vlmbatch.errors import VlmbatchError
from vlmbatch.manifest import RowStream, open_manifest
from vlmbatch.manifest.columns import choose_columns
from vlmbatch.records import Range

ROWS = 60


def whole(chance: random.Random) -> bytes:
    """A small file with images, lists, numbers and nulls, in some compression."""
    table = pa.table(
        {
            "image": [bytes([n]) * 50 if n % 9 else None for n in range(ROWS)],
            "labels": [["a", "b"] * (n % 4) for n in range(ROWS)],
            "note": [f"note {n}" if n % 5 else None for n in range(ROWS)],
            "n": list(range(ROWS)),
        }
    )
    file = io.BytesIO()
    pq.write_table(
        table,
        file,
        row_group_size=chance.choice([7, 25, 100]),
        compression=chance.choice(["none", "snappy", "zstd", "gzip"]),
        use_dictionary=chance.random() < 0.5,
        data_page_version=chance.choice(["1.0", "2.0"]),
    )
    return file.getvalue()


def mutated(seed: int) -> bytes:
    """Bytes changed, pieces taken out, doubled or moved, the end cut; in data or in the footer."""
    chance = random.Random(seed)
    data = bytearray(whole(chance))
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for _ in range(chance.choice([1, 1, 2, 5, 20])):
        first, stop = (4, footer) if chance.random() < 0.5 else (footer, len(data) - 4)
        at = chance.randrange(first, max(first + 1, min(stop, len(data))))
        match chance.randrange(6):
            case 0 | 1 | 2:
                value = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
                data[min(at, len(data) - 1)] = value
            case 3:
                data[at : at + chance.randrange(1, 30)] = chance.randbytes(chance.randrange(30))
            case 4:
                size = chance.randrange(1, 200)
                data[at:at] = data[at : at + size]
            case 5 if chance.random() < 0.2:
                del data[at:]
    return bytes(data)


def outcome(path: Path) -> str:
    """Read in ranges, as a worker does, and again from the middle."""
    try:
        manifest = open_manifest([str(path)])
        columns = choose_columns(manifest.schema, {}, ["note", "n"], where=path.name)
        rows = RowStream(manifest, columns)
        found = failed = 0
        limit = min(manifest.rows, 10 * ROWS)
        for first in range(0, limit, 16):
            for row in rows.rows(Range(first, min(first + 16, limit))):
                found += 1
                failed += row.problem is not None
        if limit:
            list(rows.rows(Range(limit // 2, limit)))
    except VlmbatchError as error:
        fine = "\n" not in error.message and path.name in error.message
        return "error" if fine else f"said {error.message!r}"
    return f"rows {found} failed {failed}"


def main() -> None:
    folder, first, stop = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    for seed in range(first, stop):
        path = folder / f"{seed}.parquet"
        path.write_bytes(mutated(seed))
        print(seed, end=" ", flush=True)  # if this is the last word, this seed killed the process
        print(outcome(path), flush=True)
        path.unlink()


if __name__ == "__main__":
    main()
