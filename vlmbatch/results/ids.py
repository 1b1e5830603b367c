"""Whether the ids of a finished run are all different: one warning with the count, if not."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlmbatch.results.output import Output

MAX_ROWS = 2**23
"""So many rows are looked at: 8 bytes each, and as many again to sort them."""


def repeated_ids(output: Output, max_rows: int = MAX_ROWS) -> int:
    """Rows whose id an earlier row has too, among the first ``max_rows`` rows of the parts.

    Ids are compared by 64-bit hashes, so that memory does not grow with their length.
    """
    hashes = array("q")
    for ids in _ids(output):
        hashes.extend(map(hash, ids))
        if len(hashes) >= max_rows:
            del hashes[max_rows:]
            break
    numbers = pa.Array.from_buffers(pa.int64(), len(hashes), [None, pa.py_buffer(hashes)])
    ordered = numbers.take(pc.sort_indices(numbers))
    return int(pc.sum(pc.equal(ordered[1:], ordered[:-1])).as_py() or 0)


def _ids(output: Output) -> Iterator[list[str]]:
    """The id of each row once: that of its first result."""
    parts = output.view().parts
    for number in sorted(parts):
        with pq.ParquetFile(parts[number].path, pre_buffer=False, buffer_size=2**20) as source:
            columns = ["id", "request", "sample"]
            for batch in source.iter_batches(batch_size=16_384, columns=columns):
                first = pc.and_(pc.equal(batch["request"], 0), pc.equal(batch["sample"], 0))
                yield batch["id"].filter(first).to_pylist()
