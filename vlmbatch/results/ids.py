"""Whether the ids of a finished run are all different: one warning with the count, if not."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc

from vlmbatch.results.output import Output

MAX_ROWS = 2**23
"""So many rows are looked at: 8 bytes each."""
BUCKETS = 64
"""Hashes are kept in so many lists, so that only a small one is sorted at a time."""


def repeated_ids(output: Output, max_rows: int = MAX_ROWS) -> int:
    """Rows whose id an earlier row has too, among the first ``max_rows`` rows of the parts.

    Ids are compared by 64-bit hashes, so that memory does not grow with their length.
    """
    buckets = [array("q") for _ in range(BUCKETS)]
    for identity in islice(_ids(output), max_rows):
        number = hash(identity)
        buckets[number % BUCKETS].append(number)
    return sum(_repeated(bucket) for bucket in buckets)


def _repeated(hashes: array[int]) -> int:
    numbers = pa.Array.from_buffers(pa.int64(), len(hashes), [None, pa.py_buffer(hashes)])
    return len(hashes) - int(pc.count_distinct(numbers).as_py())


def _ids(output: Output) -> Iterator[str]:
    """The id of each row once: that of its first result."""
    parts = output.view().parts
    for number in sorted(parts):
        for batch in parts[number].batches(columns=["id", "request", "sample"]):
            first = pc.and_(pc.equal(batch["request"], 0), pc.equal(batch["sample"], 0))
            yield from batch["id"].filter(first).to_pylist()
