"""Images that look the same: a perceptual hash, and who is near whom.

The hash is a dHash (Krawetz 2013, "Kind of like that"): whether each cell of a coarse grid is
brighter than the next one, across and down, 64 bits each; and the mean colour, because plain
drawings in different colours have the same edges. Scaling, recompression and small changes of
brightness or of a corner leave it (how often: tests/quality/test_images.py); crops, rotations,
mirrors and palettes of few colours do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
from PIL import Image

from vlmbatch.quality.scratch import Scratch

DISTANCE = 4
"""Of 128 bits, so many may differ between two images that look the same."""
COLOUR = 8
"""So far apart may red, green and blue of the mean colour be, of 255."""
_STEP = 1
"""A neighbour that is brighter by no more than this is not: noise in flat areas is no edge."""
_GRID = 8


@dataclass(frozen=True, slots=True)
class ImageHash:
    """``across`` and ``down``: 64 bits each. ``colour``: the mean red, green and blue, 0 to 255."""

    across: int
    down: int
    colour: tuple[int, int, int]

    def is_near(self, other: ImageHash) -> bool:
        """Whether the two look the same."""
        bits = (self.across ^ other.across).bit_count() + (self.down ^ other.down).bit_count()
        colours = zip(self.colour, other.colour, strict=True)
        return bits <= DISTANCE and all(abs(a - b) <= COLOUR for a, b in colours)


def hash_of(image: Image.Image) -> ImageHash:
    """Of an upright image. Transparent pixels count with the colour that they hide."""
    image = image.convert("RGB")
    image = image.resize((4 * _GRID, 4 * _GRID), Image.Resampling.BOX, reducing_gap=2.0)
    grey = image.convert("L")
    wide = grey.resize((_GRID + 1, _GRID), Image.Resampling.BOX)
    tall = grey.resize((_GRID, _GRID + 1), Image.Resampling.BOX)
    tall = tall.transpose(Image.Transpose.TRANSPOSE)
    red, green, blue = image.resize((1, 1), Image.Resampling.BOX).tobytes()
    return ImageHash(_brighter(wide.tobytes()), _brighter(tall.tobytes()), (red, green, blue))


def _brighter(cells: bytes) -> int:
    """A bit for each of _GRID + 1 cells in a row but the last: brighter than the next."""
    bits = 0
    for at in range(len(cells) - 1):
        if (at + 1) % (_GRID + 1):
            bits = bits << 1 | (cells[at] > cells[at + 1] + _STEP)
    return bits


_BANDS = DISTANCE + 1
"""Two hashes that differ in DISTANCE bits are the same in one of so many groups of bits at least:
only those are compared with each other."""
_HASHES = pa.schema(
    [
        pa.field("row", pa.int64()),
        pa.field("across", pa.int64()),
        pa.field("down", pa.int64()),
        *(pa.field(name, pa.int32()) for name in ("red", "green", "blue")),
    ]
)
_KEPT = 4096


def near_duplicates(hashes: Iterable[tuple[int, ImageHash]]) -> Iterator[tuple[int, int]]:
    """(row, an earlier row whose image looks the same), ascending by row, for each row but the
    first of those that look the same. ``hashes``: (row, its image's hash); rows do not repeat.

    The earlier row is one that is not left out itself: a chain of small differences does not make
    its ends the same. Hashes lie in DuckDB; in memory are those that are left out for being near,
    not the same. Time grows with the square of the images that agree in a whole band, a fifth
    of the hash.
    """
    with Scratch({"hashes": _HASHES}) as scratch:
        waiting = []
        for row, found in hashes:
            waiting.append(_record(row, found))
            if len(waiting) >= _KEPT:
                scratch.add("hashes", pa.Table.from_pylist(waiting, schema=_HASHES))
                waiting = []
        scratch.add("hashes", pa.Table.from_pylist(waiting, schema=_HASHES))
        near: dict[int, int] = {}
        for pairs in scratch.stream(_NEAR):
            for row, earlier in pairs:
                if row not in near and earlier not in near:
                    near[row] = earlier
        left = iter(sorted(near.items()))
        waits = next(left, None)
        for pairs in scratch.stream(_SAME):
            for row, earlier in pairs:
                while waits is not None and waits[0] < row:
                    yield waits
                    waits = next(left, None)
                yield row, near.get(earlier, earlier)
        while waits is not None:
            yield waits
            waits = next(left, None)


def _record(row: int, found: ImageHash) -> dict[str, int]:
    red, green, blue = found.colour
    signed = {"across": _signed(found.across), "down": _signed(found.down)}
    return {"row": row, **signed, "red": red, "green": green, "blue": blue}


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _band(band: int) -> str:
    """SQL for a band: bits that are no neighbours, as neighbours in an image are alike. A bit of
    ``across`` and the same bit of ``down`` are never in one band."""
    across = sum(1 << bit for bit in range(64) if bit % _BANDS == band)
    down = sum(1 << bit for bit in range(64) if (bit + 64) % _BANDS == band)
    return f"(across & {_signed(across)}) | (down & {_signed(down)}) as band{band}"


_HASH = "across, down, red, green, blue"
_FIRST = f"select min(row) as row, {_HASH}, {', '.join(map(_band, range(_BANDS)))} from hashes"
_ALIKE = " union ".join(
    "select b.row as row, a.row as earlier from firsts a join firsts b "
    f"on a.band{band} = b.band{band} and a.row < b.row "
    "where bit_count(xor(a.across, b.across)) + bit_count(xor(a.down, b.down)) <= "
    f"{DISTANCE} and abs(a.red - b.red) <= {COLOUR} and abs(a.green - b.green) <= {COLOUR} "
    f"and abs(a.blue - b.blue) <= {COLOUR}"
    for band in range(_BANDS)
)
_NEAR = (
    f"with firsts as materialized ({_FIRST} group by {_HASH}) "
    f"select * from ({_ALIKE}) order by row, earlier"
)
_SAME = (
    f"select row, earlier from (select row, min(row) over (partition by {_HASH}) as earlier "
    "from hashes) where row > earlier order by row"
)
