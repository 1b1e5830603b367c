"""``--drop`` and ``--max-per-label``: what the measures of ``vlmbatch quality`` would leave out."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vlmbatch.errors import UsageError
from vlmbatch.exports.pictures import Pictures
from vlmbatch.exports.pieces import Destination, Piece
from vlmbatch.exports.selection import Drop, Selection
from vlmbatch.exports.source import Source
from vlmbatch.quality.filters import (
    DUPLICATES,
    FILTERS,
    NEAR,
    Doomed,
    Unwanted,
    duplicates,
    near,
    over_limit,
    without_preamble,
)
from vlmbatch.quality.images import ImageHash, hash_of
from vlmbatch.quality.measures import is_prose

_SIDE = 64
"""Pixels: JPEGs are decoded no larger than this needs."""


def checked_filters(names: Sequence[str]) -> list[str]:
    """Raises UsageError for a name that is none."""
    unknown = [name for name in names if name not in FILTERS]
    if unknown:
        raise UsageError(
            f"--drop knows no {', '.join(map(repr, unknown))}", hint=f"it has: {', '.join(FILTERS)}"
        )
    return sorted(set(names), key=FILTERS.index)


def quality_drops(
    source: Source,
    destination: Destination,
    selection: Callable[[Sequence[Drop]], Selection],
    pictures: Callable[[], AbstractContextManager[Pictures]],
    *,
    names: Sequence[str],
    max_per_label: int | None,
) -> list[Drop]:
    """In the order in which they are asked: what an earlier one leaves out is no later one's first.

    ``selection``: with these drops after all else that is left out. What depends on other results
    takes a pass over the results each, near duplicates one over the images; the destination keeps
    what was found until the export has ended.
    """
    found: list[Drop] = []
    by_itself = frozenset(names) - {DUPLICATES, NEAR}
    if by_itself:
        found.append(Unwanted(by_itself, source.tasks))

    def left() -> Iterator[pa.RecordBatch]:
        chosen = selection(found)
        for number in source.parts:
            for batch in source.batches(number):
                yield chosen.kept(batch)

    def kept(name: str, find: Callable[[], Doomed]) -> None:
        found.append(_remembered(destination, name, find))

    if DUPLICATES in names:
        kept("duplicates", lambda: duplicates(left(), source.tasks))
    if NEAR in names:
        kept("near", lambda: near(_hashes(source, selection(found), pictures)))
    if max_per_label is not None:
        kept("labels", lambda: over_limit(left(), source.tasks, max_per_label))
    return found


def stripped(source: Source, batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with texts that begin with the answer itself (--strip-preambles)."""
    columns = (batch[name].to_pylist() for name in ("task", "text"))
    texts = [
        without_preamble(text) if text and is_prose(source.tasks[task]) else text
        for task, text in zip(*columns, strict=True)
    ]
    at = batch.schema.get_field_index("text")
    return batch.set_column(at, batch.schema.field(at), pa.array(texts, pa.string()))


def _remembered(destination: Destination, name: str, find: Callable[[], Doomed]) -> Doomed:
    """What an earlier start of this export found, or what is found now."""
    file = f"{Piece.KEPT}/doomed-{name}.parquet"
    if (destination.place / file).exists():
        return Doomed.from_table(pq.read_table(destination.place / file))
    doomed = find()
    (destination.place / file).parent.mkdir(parents=True, exist_ok=True)
    destination.store.write(file, lambda temporary: pq.write_table(doomed.table, temporary))
    return doomed


def _hashes(
    source: Source, selection: Selection, pictures: Callable[[], AbstractContextManager[Pictures]]
) -> Iterator[tuple[int, ImageHash]]:
    """Of each row that is left, its first image's; images that cannot be had have none: they are
    reported when they are exported."""
    with pictures() as fetching:
        for number in source.parts:
            examples = source.with_images(source.examples(number, selection), fetched=True)
            for example, error in fetching.of((example, refs[:1]) for example, refs in examples):
                if error is None and example.images[0].data is not None:
                    found = _hash_in(example.images[0].data)
                    if found is not None:
                        yield example.row, found


def _hash_in(data: bytes) -> ImageHash | None:
    """None where the image is broken behind its header, which is all that was read of it."""
    try:
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", (_SIDE, _SIDE))
        return hash_of(image)
    except Exception:  # Pillow's plugins raise what they like
        return None
