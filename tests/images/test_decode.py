"""Encoded bytes become an upright RGB image, or a failure that says what was found."""

import random
import struct
import subprocess
import sys
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps

from vlmbatch.errors import ErrorCode, Failure, RequestFailed, Stage
from vlmbatch.grounding import Size
from vlmbatch.images.decode import decode, header

# What the module does for itself on import; pytest sets its own filters for each test.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")

MAX = 1_000_000
ORIENTED = ["JPEG", "PNG", "TIFF", "WEBP"]


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def rgb(data: bytes) -> np.ndarray:
    decoded = decode(data, max_pixels=MAX)
    assert decoded.pixels.mode == "RGB"
    assert decoded.pixels.size == (decoded.size.width, decoded.size.height)
    assert decoded.size == header(data, max_pixels=MAX).size
    return np.asarray(decoded.pixels)


def failure_of(data: bytes, max_pixels: int = MAX) -> Failure:
    with pytest.raises(RequestFailed) as caught:
        decode(data, max_pixels=max_pixels)
    assert caught.value.failure.stage is Stage.LOAD
    assert "\n" not in caught.value.failure.message
    return caught.value.failure


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours, so that JPEG keeps them, and no symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1)
    blue = 127 + 127 * np.sin((x + 2 * y + seed) / 9)
    return Image.fromarray(np.stack([red, green, blue], axis=2).astype(np.uint8))


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand, so that it can lie; 8-bit RGB."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, body in ((b"IHDR", head), *chunks):
        parts += [struct.pack(">I", len(body)), name, body]
        parts += [struct.pack(">I", zlib.crc32(name + body))]
    return b"".join(parts)


def stored_as(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What a camera stores so that ``orientation`` turns it upright (EXIF 2.3, tag 0x0112)."""
    return {
        1: lambda: pixels,
        2: lambda: pixels[:, ::-1],
        3: lambda: pixels[::-1, ::-1],
        4: lambda: pixels[::-1],
        5: lambda: pixels.swapaxes(0, 1),
        6: lambda: np.rot90(pixels),
        7: lambda: pixels[::-1, ::-1].swapaxes(0, 1),
        8: lambda: np.rot90(pixels, -1),
    }[orientation]()


def exif_with(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ORIENTED)
def test_every_exif_orientation_comes_out_upright(format: str, orientation: int):
    upright = np.asarray(photo(40, 24))
    stored = Image.fromarray(np.ascontiguousarray(stored_as(upright, orientation)))
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    data = encoded(stored, format, exif=exif_with(orientation), **options.get(format, {}))
    assert header(data, max_pixels=MAX).size == Size(40, 24)
    assert np.abs(rgb(data).astype(int) - upright).max() <= (8 if format == "JPEG" else 0)

    shrunk = decode(data, max_pixels=MAX, target=lambda size: Size(size.width // 2, 6))
    assert (shrunk.pixels.size, shrunk.size) == ((20, 6), Size(40, 24))
    expected = np.asarray(photo(40, 24).resize((20, 6), Image.Resampling.LANCZOS))
    assert np.abs(np.asarray(shrunk.pixels).astype(int) - expected).max() <= 12


def test_a_png_may_carry_its_orientation_behind_the_pixels():
    rows = b"".join(b"\0" + bytes([x, 0, 0] * 3) for x in (10, 200))
    exif = exif_with(6).tobytes().removeprefix(b"Exif\0\0")
    end = ((b"eXIf", exif), (b"IEND", b""))
    decoded = decode(png(3, 2, (b"IDAT", zlib.compress(rows)), *end), max_pixels=MAX)
    assert decoded.size == Size(2, 3)
    assert np.asarray(decoded.pixels)[0, :, 0].tolist() == [200, 10]


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage"]
)
def test_broken_exif_does_not_cost_the_image(exif: bytes):
    assert rgb(encoded(photo(20, 10), "JPEG", exif=exif)).shape == (10, 20, 3)


def test_sixteen_bit_grey_keeps_its_proportions():
    values = np.array([[0, 257, 12850, 32896, 40000, 65535]], dtype=np.uint16)
    expected = [0, 1, 50, 128, 156, 255]
    for format in ("PNG", "TIFF", "PPM"):
        assert rgb(encoded(Image.fromarray(values), format))[0, :, 0].tolist() == expected
    big_endian = Image.frombytes("I;16B", (6, 1), values.astype(">u2").tobytes())
    assert rgb(encoded(big_endian, "TIFF"))[0, :, 1].tolist() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([1e6, 1.5e6, 2e6], [0, 128, 255]),
        ([0.0, 0.0, 0.0], [0, 0, 0]),
        ([-5.0, -5.0, -5.0], [0, 0, 0]),
    ],
)
def test_float_grey_is_scaled_from_the_range_it_uses(values, expected):
    data = encoded(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF")
    assert rgb(data)[0, :, 2].tolist() == expected


@pytest.mark.parametrize("values", [[np.nan, 0.5], [0.5, np.nan], [np.inf, -np.inf]])
def test_float_grey_with_holes_is_still_an_image(values):
    data = encoded(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF")
    assert rgb(data).shape == (1, 2, 3)


def test_thirty_two_bit_integers_are_scaled():
    values = np.array([[-1000, 0, 1000]], dtype=np.int32)
    data = encoded(Image.fromarray(values), "TIFF")
    assert rgb(data)[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_laid_on_white(format: str):
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((255, 128, 0)):
        image.putpixel((x, 0), (200, 0, 0, alpha))
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    found = rgb(encoded(image, format, **options))[0].tolist()
    assert found == [[200, 0, 0], [227, 127, 127], [255, 255, 255]]
    grey = encoded(image.convert("LA"), "PNG")
    assert rgb(grey)[0, 2].tolist() == [255, 255, 255]


def test_palette_with_transparency_in_one_colour_or_in_many():
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    for x in range(3):
        image.putpixel((x, 0), x)
    white, first, last = [255, 255, 255], [10, 20, 30], [70, 80, 90]
    assert rgb(encoded(image, "GIF", transparency=1))[0].tolist() == [first, white, last]
    assert rgb(encoded(image, "PNG", transparency=1))[0].tolist() == [first, white, last]
    many = encoded(image, "PNG", transparency=bytes([255, 0, 255]))
    assert rgb(many)[0].tolist() == [first, white, last]


def test_a_colour_key_is_transparent():
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    data = encoded(image, "PNG", transparency=(1, 2, 3))
    assert rgb(data)[0].tolist() == [[255, 255, 255], [9, 9, 9]]


def test_cmyk_jpeg():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(rgb(encoded(image, "JPEG", quality=100))[8, 8] - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("YCbCr", (76, 85, 255), (254, 0, 0)),
        ("LAB", (136, 208, 195), (250, 3, 11)),
        ("RGBX", (1, 2, 3, 0), (1, 2, 3)),
    ],
)
def test_tiff_in_every_colour_space(mode, colour, expected):
    found = rgb(encoded(Image.new(mode, (4, 4), colour), "TIFF"))[2, 2]
    assert np.abs(found.astype(int) - expected).max() <= 4


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(format: str):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert rgb(data)[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [(300, 1), (1, 300), (1, 1)])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_thin_images(format: str, size: tuple[int, int]):
    data = encoded(photo(*size), format)
    assert rgb(data).shape == (size[1], size[0], 3)
    shrunk = decode(data, max_pixels=MAX, target=lambda size: Size(min(size.width, 20), 1))
    assert shrunk.pixels.size == (min(size[0], 20), 1)


@pytest.mark.parametrize("size", [(1600, 1000), (1601, 999), (1593, 1007)])
def test_a_jpeg_shrunk_while_decoding_is_not_shifted(size: tuple[int, int]):
    image = photo(*size)
    data = encoded(image, "JPEG", quality=95)
    decoded = decode(data, max_pixels=10 * MAX, target=lambda _: Size(100, 60))
    assert (decoded.size, decoded.pixels.size) == (Size(*size), (100, 60))
    expected = np.asarray(image.resize((100, 60), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(np.asarray(decoded.pixels) - expected).mean() < 2


def test_a_target_may_be_larger_or_another_shape():
    decoded = decode(encoded(photo(20, 10), "PNG"), max_pixels=MAX, target=lambda _: Size(30, 5))
    assert decoded.pixels.size == (30, 5)


def test_an_error_in_the_target_is_not_blamed_on_the_image():
    with pytest.raises(ZeroDivisionError):
        decode(encoded(photo(20, 10), "JPEG"), max_pixels=MAX, target=lambda _: Size(1 // 0, 1))


def test_too_many_pixels_are_refused_before_decoding():
    bomb = png(60_000, 60_000, (b"IDAT", b""))
    failure = failure_of(bomb, max_pixels=178_956_970)
    assert failure.code is ErrorCode.IMAGE_TOO_LARGE
    assert failure.message == "60000 x 60000 is 3,600,000,000 pixels, more than 178,956,970"
    with pytest.raises(RequestFailed):
        header(bomb, max_pixels=178_956_970)
    assert header(encoded(photo(20, 10), "PNG"), max_pixels=200).size == Size(20, 10)
    assert failure_of(encoded(photo(20, 10), "PNG"), max_pixels=199)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_a_truncated_image_is_unreadable(format: str):
    data = encoded(photo(200, 100), format)
    failure = failure_of(data[: len(data) // 2])
    assert failure.code is ErrorCode.IMAGE_UNREADABLE
    assert not failure.retryable


def test_the_message_says_what_was_found():
    jpeg = encoded(photo(200, 100), "JPEG")
    assert failure_of(jpeg[:-900]).message.startswith("truncated JPEG: image file is truncated")
    text = failure_of(b"<!DOCTYPE html>\n<title>404</title>")
    assert text.message == (
        "an HTML page, not an image: starts with <!DOCTYPE html> <title>404</title>"
    )
    vector = failure_of(b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>")
    assert vector.message.startswith("an SVG, which is no picture of pixels")
    pointer = failure_of(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert pointer.message.startswith("a pointer of Git LFS, not the image: `git lfs pull`")
    assert failure_of(b"not an image").message == (
        "not an image, or its header is broken: "
        'starts with 6e 6f 74 20 61 6e 20 69 ("not an image")'
    )
    for data in (b"", b"x", b"<svg xmlns='http://www.w3.org/2000/svg'/>", png(0, 5)):
        assert failure_of(data).code is ErrorCode.IMAGE_UNREADABLE


def test_formats_that_run_programs_are_not_read():
    data = encoded(Image.new("RGB", (4, 4)), "EPS")
    assert failure_of(data).message.startswith("not an image")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "AVIF"])
def test_the_result_does_not_hold_on_to_the_encoded_bytes(format: str):
    data = encoded(photo(20, 10), format)
    before = sys.getrefcount(data)
    decoded = decode(data, max_pixels=MAX)
    assert sys.getrefcount(data) == before
    assert type(decoded.pixels) is Image.Image


def test_the_result_does_not_hold_on_to_the_file():
    data = encoded(photo(20, 10), "PNG", icc_profile=b"x" * 1000, exif=exif_with(1))
    pixels = decode(data, max_pixels=MAX).pixels
    assert type(pixels) is Image.Image
    assert pixels.info == {}


def test_pillow_s_warnings_stay_inside():
    """In a process of its own, since pytest sets the warning filters of this one."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01\0\0\0\x01\0\0\0"
    data = encoded(photo(20, 10), "JPEG", exif=exif)
    large = encoded(Image.new("1", (10_000, 9_000)), "PNG")
    script = (
        "import sys; from vlmbatch.images.decode import decode, header;"
        f"decode(bytes.fromhex({data.hex()!r}), max_pixels=10**6);"
        f"header(bytes.fromhex({large.hex()!r}), max_pixels=10**9)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", script], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")


def originals() -> list[bytes]:
    image = photo(64, 48)
    palette = image.quantize(16)
    return [
        encoded(image, "JPEG", exif=exif_with(6)),
        encoded(image, "JPEG", progressive=True),
        encoded(image, "PNG", exif=exif_with(8)),
        encoded(palette, "PNG", transparency=3),
        encoded(palette, "GIF", transparency=3),
        encoded(image, "TIFF", exif=exif_with(5)),
        encoded(image, "TIFF", compression="tiff_lzw"),
        encoded(image, "WEBP", exif=exif_with(3)),
        encoded(image, "BMP"),
        encoded(image, "JPEG2000"),
    ]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed (mostly near the start, where the structure is), cut out, doubled, cut off."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        reach = len(changed) if rng.random() < 0.5 else min(len(changed), 200)
        if reach == 0:
            break
        at = rng.randrange(reach)
        match rng.randrange(5):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at] = rng.choice((0, 1, 127, 128, 255))
            case 2:
                del changed[at : at + rng.randint(1, 20)]
            case 3:
                changed[at:at] = changed[at : at + rng.randint(1, 20)]
            case 4 if rng.random() < 0.3:
                del changed[max(at, 1) :]
    return bytes(changed)


def test_a_mutated_image_is_an_image_or_a_failure():
    rng = random.Random(7)
    files = originals()
    images, failures = 0, []
    for count in range(600):
        data = mutated(files[count % len(files)], rng)
        target = (lambda _: Size(16, 16)) if count % 2 else None
        try:
            decoded = decode(data, max_pixels=MAX, target=target)
            images += decoded.pixels.mode == "RGB"
        except RequestFailed as error:
            failures.append(error.failure)
    assert images + len(failures) == 600
    assert min(images, len(failures)) > 100
    assert not any("\n" in failure.message or failure.retryable for failure in failures)


def test_orientation_agrees_with_pillow():
    for data in originals():
        expected = ImageOps.exif_transpose(Image.open(BytesIO(data)))
        assert decode(data, max_pixels=MAX).pixels.size == expected.size
