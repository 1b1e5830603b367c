"""Small files that promise, or hold, far more than memory: refused, and nothing is allocated.

Each is decoded in a process of its own whose address space ends soon above what it has.
"""

import io
import struct
import subprocess
import sys
import zlib
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

MIB = 2**20
ROOM = 256 * MIB
"""Address space for one decode of at most MAX_PIXELS."""
MAX_PIXELS = 4_000_000

SCRIPT = f"""
import resource, sys
from vlmbatch.errors import RequestFailed
from vlmbatch.grounding import Size
from vlmbatch.images.decode import decode, header
data = open(sys.argv[1], "rb").read()
page = int(sys.argv[2]) or None
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + {ROOM}, now + {ROOM}))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    header(data, max_pixels={MAX_PIXELS}, page=page)
    decoded = decode(data, max_pixels={MAX_PIXELS}, target=lambda _: Size(64, 64), page=page)
    said = f"ok {{decoded.size.width}}x{{decoded.size.height}}"
except RequestFailed as error:
    said = f"{{error.failure.code}} {{error.failure.message}}"
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, said)
"""


def decoded_alone(path: Path, page: int = 0) -> tuple[int, str]:
    """(MiB that the process grew by, what came of it)."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), str(page)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    grown, _, said = done.stdout.strip().partition(" ")
    return int(grown), said


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", head), *chunks, (b"IEND", b"")):
        checksum = zlib.crc32(kind + content)
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
    return data


def saved(image: Image.Image, format: str, **how: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **how)
    return file.getvalue()


def tiff_of(width: int, height: int, strip: bytes) -> bytes:
    """A deflated grey TIFF of one strip."""
    tags = [
        *((256, width), (257, height), (258, 8), (259, 8), (262, 1), (273, 8 + 2 + 9 * 12 + 4)),
        *((277, 1), (278, height), (279, len(strip))),
    ]
    directory = struct.pack("<H", len(tags))
    directory += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0\x08\0\0\0" + directory + bytes(4) + strip


def webp_of(width: int, height: int) -> bytes:
    """A real one, whose canvas says that it is larger."""
    data = bytearray(
        saved(Image.new("RGBA", (16, 16)), "WEBP", lossless=True, icc_profile=b"x" * 200)
    )
    at = data.index(b"VP8X") + 12
    data[at : at + 6] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


def gif_of(width: int, height: int) -> bytes:
    data = bytearray(saved(Image.new("P", (16, 16)), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


@cache
def deep(count: int) -> bytes:
    """So many zero bytes, deflated."""
    return zlib.compress(bytes(count), 9)


PROMISES = {
    "png": png(50_000, 50_000, (b"IDAT", deep(10**6))),
    "tiff": tiff_of(60_000, 60_000, deep(10**6)),
    "webp": webp_of(16_000, 16_000),
    "gif": gif_of(60_000, 60_000),
    "bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 100, 0, 54, 40, 60_000, 60_000, 1, 24, *[0] * 6),
    "ppm": b"P6 60000 60000 255\n" + bytes(100),
    "qoi": b"qoif" + struct.pack(">IIBB", 60_000, 60_000, 3, 0) + bytes(100),
}


@pytest.mark.parametrize("kind", PROMISES)
def test_a_header_that_promises_too_much_is_refused_before_decoding(tmp_path: Path, kind: str):
    path = tmp_path / "bomb"
    path.write_bytes(PROMISES[kind])
    grown, said = decoded_alone(path)
    assert said.startswith(("image_too_large", "image_unreadable")), said
    if kind != "webp":  # libwebp itself sees that frame and canvas differ
        assert said.startswith("image_too_large"), said
    assert grown < 16, (grown, said)


def test_png_chunks_that_unpack_to_gigabytes_stay_small(tmp_path: Path):
    """Compressed text and colour profiles: 200 MB each, in a file of 600 kB."""
    packed = deep(200 * 10**6)
    chunks = [
        (b"iCCP", b"profile\0\0" + packed),
        (b"zTXt", b"text\0\0" + packed),
        (b"iTXt", b"text\0\1\0\0\0" + packed),
        (b"IDAT", zlib.compress(bytes(31 * 10))),
    ]
    path = tmp_path / "bomb.png"
    path.write_bytes(png(10, 10, *chunks))
    assert path.stat().st_size < MIB
    grown, said = decoded_alone(path)
    assert grown < 64, (grown, said)
    assert said.startswith(("image_unreadable", "ok")), said


def test_pixels_that_unpack_to_more_than_the_header_says_stay_small(tmp_path: Path):
    """The header is honest-looking, the data goes on for 200 MB."""
    for name, data in (
        ("a.png", png(100, 100, (b"IDAT", deep(200 * 10**6)))),
        ("a.tif", tiff_of(100, 100, deep(200 * 10**6))),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        grown, said = decoded_alone(path)
        assert grown < 32, (name, grown, said)
        assert said.startswith(("ok 100x100", "image_unreadable")), said


def test_each_page_s_size_is_checked(tmp_path: Path):
    path = tmp_path / "pages.tif"
    small, large = Image.new("1", (20, 10)), Image.new("1", (5000, 5000))
    small.save(path, "TIFF", save_all=True, append_images=[large], compression="group4")
    assert decoded_alone(path, 1)[1] == "ok 20x10"
    grown, said = decoded_alone(path, 2)
    assert said.startswith("image_too_large 5000 x 5000"), said
    assert grown < 16


def test_a_gif_of_many_frames_shows_its_first(tmp_path: Path):
    frames = [Image.new("P", (1500, 1500), number) for number in range(60)]
    path = tmp_path / "a.gif"
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])
    grown, said = decoded_alone(path)
    assert said == "ok 1500x1500"
    assert grown < 64
