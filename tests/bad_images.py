"""Real files, good and bad, and what a run must make of each: ``make_images(folder)``."""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

SIZE = (12, 8)
GOOD = "ok"


@dataclass(frozen=True)
class ImageCase:
    """A value of the ``image`` column, and what its row must become."""

    image: str | None
    status: str
    """``ok``, or the error code of the failed row."""
    says: str = ""
    """What the failed row's message must hold."""
    size: tuple[int, int] | None = SIZE
    """Upright, of a good row."""


def broken_page(table: Any, path: Path, *, rows: int, group: int) -> None:
    """Writes Parquet in groups of ``rows``, then over a page of one; its footer is whole."""
    pq.write_table(table, path, row_group_size=rows, compression="zstd")
    column = pq.read_metadata(path).row_group(group).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * 24)


def make_images(folder: Path) -> list[ImageCase]:
    """Writes the files; no two cases name the same one."""
    folder.mkdir(parents=True, exist_ok=True)
    return [*_odd_but_fine(folder), *_bad_files(folder), *_not_files(folder)]


def _odd_but_fine(folder: Path) -> list[ImageCase]:
    picture = Image.new("RGB", SIZE, "red")

    def saved(image: Image.Image, name: str, **how: object) -> str:
        image.save(folder / name, **how)
        return name

    rotated = Image.Exif()
    rotated[0x0112] = 6
    absolute = folder / "absolute.png"
    picture.save(absolute)
    (folder / "a folder").mkdir(exist_ok=True)
    (folder / "link.png").unlink(missing_ok=True)
    (folder / "link.png").symlink_to("absolute.png")
    names = [
        saved(picture, "plain.jpg"),
        saved(Image.new("I;16", SIZE, 40_000), "16-bit.png"),
        saved(picture.convert("P"), "palette.gif"),
        saved(picture.convert("CMYK"), "cmyk.jpg"),
        saved(Image.new("RGBA", SIZE, (255, 0, 0, 100)), "rgba.png"),
        saved(picture.convert("LA"), "grey-alpha.png"),
        saved(picture.convert("1"), "one-bit.tif"),
        saved(picture, "jpeg-named.png", format="JPEG"),
        saved(picture, "no extension", format="WEBP"),
        saved(picture, "a folder/with spaces.png"),
        saved(picture, "线—é🎉.png"),
        saved(picture, "new\nline.png"),
        saved(picture, "100%25 #1?.png"),
        str(absolute),
        "link.png",
        "./a folder/../plain.jpg",
        absolute.as_uri(),
    ]
    return [
        *(ImageCase(name, GOOD) for name in names),
        ImageCase(saved(picture, "rotated.jpg", exif=rotated), GOOD, size=(8, 12)),
        ImageCase(saved(Image.new("RGB", (500, 1)), "flat.png"), GOOD, size=(500, 1)),
        ImageCase(saved(Image.new("RGB", (1, 500)), "thin.png"), GOOD, size=(1, 500)),
        ImageCase(saved(Image.new("L", (1, 1)), "dot.png"), GOOD, size=(1, 1)),
    ]


def _bad_files(folder: Path) -> list[ImageCase]:
    picture = Image.effect_noise((64, 64), 50)
    picture.save(folder / "noise.jpg")
    picture.save(folder / "noise.png")
    jpeg, png = (folder / "noise.jpg").read_bytes(), (folder / "noise.png").read_bytes()
    files = [
        ("zero.jpg", b"", "image_unreadable", "empty (0 bytes)"),
        ("truncated.jpg", jpeg[: len(jpeg) // 2], "image_unreadable", "truncated"),
        ("truncated.png", png[: len(png) // 2], "image_unreadable", "truncated"),
        ("header only.jpg", jpeg[:20], "image_unreadable", ""),
        ("text.jpg", b"<html>404 Not Found</html>", "image_unreadable", "<html>"),
        ("zeros.jpg", bytes(5_000), "image_unreadable", "not an image"),
        ("checksum.png", _with_bad_checksum(png), "image_unreadable", "broken"),
        ("vector.svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "image_unreadable", "an SVG"),
        ("huge header.png", _png_header(200_000, 200_000), "image_too_large", "200000 x 200000"),
    ]
    for name, data, _, _ in files:
        (folder / name).write_bytes(data)
    return [ImageCase(name, code, says) for name, _, code, says in files]


def _not_files(folder: Path) -> list[ImageCase]:
    (folder / "folder.png").mkdir(exist_ok=True)
    if not (folder / "fifo.jpg").exists():
        os.mkfifo(folder / "fifo.jpg")
    for name, target in (("dangling.png", "gone.png"), ("loop.png", "loop.png")):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
    return [
        ImageCase("missing.png", "image_missing", "missing.png"),
        ImageCase("no/such/folder/x.png", "image_missing", "no/such/folder/x.png"),
        ImageCase("plain.jpg/x.png", "image_missing", "plain.jpg/x.png"),
        ImageCase("dangling.png", "image_missing", "dangling.png"),
        ImageCase("loop.png", "image_missing", "loop.png"),
        ImageCase("x" * 300, "image_missing", "name too long"),
        ImageCase("nul\0byte.png", "image_missing", "not a path"),
        ImageCase("folder.png", "image_unreadable", "a folder"),
        ImageCase("fifo.jpg", "image_unreadable", "a pipe"),
        ImageCase("/dev/zero", "image_unreadable", "device"),
        ImageCase("data:image/png;base64,%%%", "image_unreadable", "base64"),
        ImageCase("data:no comma", "image_unreadable", "comma"),
        ImageCase("https://user:secret@127.0.0.1/x.png?key=s3cr3t", "image_forbidden", "https:"),
        ImageCase("http://[::1]/x.png", "image_forbidden", "not a public address"),
        ImageCase("ftp://bucket/x.png", "image_forbidden", "ftp:"),
        ImageCase("gopher://x/y", "image_forbidden", "gopher:"),
        ImageCase("file://elsewhere/x.png", "image_forbidden", "another host"),
        ImageCase("", "bad_row", "empty"),
        ImageCase(None, "bad_row", "null"),
    ]


def _with_bad_checksum(png: bytes) -> bytes:
    """One byte flipped in the middle of the pixels."""
    middle = len(png) // 2
    return png[:middle] + bytes([png[middle] ^ 0xFF]) + png[middle + 1 :]


def _png_header(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes that promises far more pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100))
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", size) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
