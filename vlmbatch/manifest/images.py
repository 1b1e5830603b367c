"""Images themselves as a manifest: a folder of them, a glob; one row each, in the order of paths.

The listing is the manifest. It is kept in pieces of PIECE_ROWS paths, packed, so that a worker
unpacks what it reads.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import xxhash

from vlmbatch.errors import ManifestError
from vlmbatch.manifest.files import ManifestFile, Place, changed

NAME = "images"
CALLED = "images (.jpg, .png, ...)"
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".avif", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".qoi", ".heic", ".heif"),
)
"""Those that cannot be decoded are rows too, which fail."""
PIECE_ROWS = 16_384
SCHEMA = pa.schema([("image", pa.string()), ("id", pa.string())])


def look_at(place: Place) -> tuple[ManifestFile, pa.Schema]:
    return listed({place.name: place.size})[0], SCHEMA


def listed(sizes: Mapping[str, int]) -> list[ManifestFile]:
    """The manifest of images with these paths (relative to its folder) and sizes in bytes."""
    names = sorted(sizes)
    pieces = []
    for first in range(0, len(names), PIECE_ROWS):
        piece = names[first : first + PIECE_ROWS]
        digest = xxhash.xxh3_128()
        for name in piece:
            digest.update(f"{name}\0{sizes[name]}\n".encode())
        pieces.append(
            ManifestFile(
                piece[0],
                sum(sizes[name] for name in piece),
                digest.hexdigest(),
                len(piece),
                NAME,
                tuple(range(0, len(piece), 1024)),
                listing=_packed(piece),
            )
        )
    return pieces


def names_of(file: ManifestFile) -> list[str]:
    """The paths of a piece of the listing."""
    names: list[str] = json.loads(zlib.decompress(base64.b64decode(file.listing)))
    return names


def check(place: Place, file: ManifestFile) -> None:
    """A worker looks for the first image only: any other that is gone is its row's failure."""
    if file.rows and place.is_local and not os.path.exists(place.path):
        raise changed(place.path)


def records(
    place: Place,
    file: ManifestFile,
    first: int,
    columns: Sequence[str],
    schema: pa.Schema,
    asked: Collection[str],
) -> Iterator[tuple[dict[str, Any], str | None]]:
    for name in names_of(file)[first:]:
        yield {"image": name, "id": os.path.splitext(name)[0]}, None


def check_is_whole(files: Sequence[ManifestFile], sizes: Mapping[str, int]) -> list[ManifestFile]:
    """The same listing with the sizes that the images have now; ManifestError names one that is
    gone."""
    names = [name for file in files for name in names_of(file)]
    gone = [name for name in names if name not in sizes]
    if gone:
        more = f", and {len(gone) - 1:,} more" if len(gone) > 1 else ""
        raise ManifestError(
            f"images of this run are gone: {gone[0]}{more}",
            hint="restore them, or start anew with --overwrite",
        )
    return listed({name: sizes[name] for name in names})


def _packed(names: list[str]) -> str:
    return base64.b64encode(zlib.compress(json.dumps(names).encode(), 6)).decode()
