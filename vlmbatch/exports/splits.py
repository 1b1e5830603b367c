"""Into which split a row goes: by its image, so that no image is in two.

Rows that share an image, directly or through other rows, are a group, and go where one of its
images does.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from vlmbatch.errors import UsageError
from vlmbatch.records import ImageRef


class Splits:
    """Shares of the images, by a hash of the image."""

    def __init__(self, text: str | None) -> None:
        """``train=0.9,val=0.1``; None: all is ``train``. Raises UsageError."""
        self.shares = [("train", 1.0)] if text is None else _shares(text)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.shares]

    def at(self, number: int) -> str:
        """Where an image, or a group, goes whose number (64 bits) this is."""
        place = number / 2**64
        for name, share in self.shares:
            if place < share:
                return name
            place -= share
        return self.shares[-1][0]


def number_of(image: ImageRef) -> int:
    """64 bits that are the same for the same content, or for the same name."""
    content = image.data if image.data is not None else (image.uri or "").encode()
    return xxhash.xxh3_64_intdigest(content)


class Groups:
    """The images of rows that have several, joined where rows share one.

    Holds 16 bytes for each image while rows come, about 100 while they are joined, and 16 for each
    different one at the end.
    """

    def __init__(self, rows: Iterable[Sequence[ImageRef]] = ()) -> None:
        firsts, images = array("Q"), array("Q")  # of each row, its first image beside all
        for row in rows:
            numbers = dict.fromkeys(map(number_of, row))
            images.extend(numbers)
            firsts.extend([next(iter(numbers))] * len(numbers))
        self._images = _sorted(images)
        self._groups = _joined(self._images, firsts, images)

    def of(self, image: ImageRef) -> int:
        """The number by which the image's row goes to a split: the image's own where no row that
        has several has it."""
        number = number_of(image)
        at = bisect_left(self._images, number)
        is_known = at < len(self._images) and self._images[at] == number
        return self._groups[at] if is_known else number


def _joined(known: array[int], firsts: array[int], images: array[int]) -> array[int]:
    """Of each known image, the number of its group: that of one of its rows' first images.

    Which one does not depend on the order of the rows; a row that shares no image goes by its
    first one. It is chosen by the low half of the numbers, since the high half decides where it
    goes: the least number would draw large groups to the first split.
    """
    heads, others = _places(known, firsts), _places(known, images)
    parents = array("I", range(len(known)))

    def root_of(at: int) -> int:
        while parents[at] != at:
            parents[at] = parents[parents[at]]
            at = parents[at]
        return at

    for one, other in zip(heads, others, strict=True):
        low, high = sorted((root_of(one), root_of(other)))
        parents[high] = low
    chosen: array[int] = array("Q", bytes(8 * len(known)))
    is_chosen = bytearray(len(known))
    for head in heads:
        root, number = root_of(head), known[head]
        if not is_chosen[root] or _low_half_first(number) < _low_half_first(chosen[root]):
            chosen[root], is_chosen[root] = number, 1
    return array("Q", (chosen[root_of(at)] for at in range(len(known))))


def _low_half_first(number: int) -> int:
    return (number & 0xFFFFFFFF) << 32 | number >> 32


def _sorted(numbers: array[int]) -> array[int]:
    """Each once."""
    if not numbers:
        return numbers
    found = _arrow(numbers)
    found = found.take(pc.array_sort_indices(found))
    is_new = pc.not_equal(found[1:], found[:-1])  # a hash table would take many times as much
    later = found[1:].filter(is_new)
    different = array("Q", [found[0].as_py()])
    different.frombytes(memoryview(later.buffers()[1])[: 8 * len(later)])
    return different


def _places(known: array[int], numbers: array[int]) -> memoryview[int]:
    """Where each is among the known ones."""
    found = pc.index_in(_arrow(numbers), value_set=_arrow(known))
    return memoryview(found.buffers()[1]).cast("i")[: len(numbers)]


def _arrow(numbers: array[int]) -> pa.Array:
    return pa.Array.from_buffers(pa.uint64(), len(numbers), [None, pa.py_buffer(numbers)])


def _shares(text: str) -> list[tuple[str, float]]:
    shares = []
    for item in text.split(","):
        name, _, number = item.strip().partition("=")
        try:
            share = float(number)
        except ValueError:
            share = 0.0
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_]*", name) or not 0 < share <= 1:
            raise UsageError(
                f"--split {text!r}: {item.strip()!r} is no NAME=SHARE",
                hint="as in --split train=0.9,val=0.1",
            )
        shares.append((name, share))
    total = sum(share for _, share in shares)
    if abs(total - 1) > 1e-6 or len({name for name, _ in shares}) < len(shares):
        raise UsageError(
            f"--split {text!r}: the shares of different names must add up to 1, not {total:g}",
            hint="as in --split train=0.9,val=0.1",
        )
    return shares
