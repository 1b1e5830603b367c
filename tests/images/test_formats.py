"""Pages, colour profiles, deep grey, and the formats that the extra `formats` brings."""

import struct
import sys
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageCms

from vlmbatch.errors import ErrorCode, Failure, RequestFailed
from vlmbatch.grounding import Size
from vlmbatch.images.decode import decode, header

MAX = 4_000_000


def encoded(image: Image.Image, format: str, **how: object) -> bytes:
    file = BytesIO()
    image.save(file, format, **how)
    return file.getvalue()


def failure_of(data: bytes, **how) -> Failure:
    with pytest.raises(RequestFailed) as caught:
        decode(data, max_pixels=MAX, **how)
    return caught.value.failure


def test_a_page_of_a_tiff_has_its_own_size():
    pages = [Image.new("RGB", (20, 10 + n), (n * 40, 0, 0)) for n in range(4)]
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    for number, page in enumerate(pages, 1):
        decoded = decode(data, max_pixels=MAX, page=number)
        assert decoded.size == header(data, max_pixels=MAX, page=number).size == Size(*page.size)
        assert decoded.pixels.getpixel((5, 5)) == page.getpixel((5, 5))
    assert decode(data, max_pixels=MAX).size == Size(20, 10)
    failure = failure_of(data, page=5)
    assert failure.code is ErrorCode.IMAGE_MISSING
    assert failure.message == "no page 5: it has 4"
    assert failure_of(data, page=0).message == "no page 0: it has 4"


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_a_page_of_an_animation_is_a_frame(format: str):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    how = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **how)
    assert decode(data, max_pixels=MAX, page=3).pixels.getpixel((4, 4)) == (0, 0, 255)
    assert failure_of(data, page=4).code is ErrorCode.IMAGE_MISSING


def test_an_image_that_has_no_pages_has_one():
    data = encoded(Image.new("RGB", (8, 8)), "JPEG")
    assert decode(data, max_pixels=MAX, page=1).size == Size(8, 8)
    assert failure_of(data, page=2).message == "no page 2: it has 1"


def swapped_profile() -> bytes:
    """sRGB with red and blue exchanged: what is stored as red is shown as blue."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for old, new in ((b"rXYZ", b"tmp_"), (b"bXYZ", b"rXYZ"), (b"tmp_", b"bXYZ")):
        profile = profile.replace(old, new, 1)
    return profile.replace(b"sRGB", b"sBGR")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_a_colour_profile_is_applied(format: str):
    how = {"lossless": True} if format == "WEBP" else {}
    image = Image.new("RGB", (16, 16), (200, 30, 60))
    plain = decode(encoded(image, format, **how), max_pixels=MAX).pixels
    data = encoded(image, format, icc_profile=swapped_profile(), **how)
    pixels = decode(data, max_pixels=MAX, target=lambda _: Size(8, 8)).pixels
    found = np.asarray(pixels, int)[4, 4]
    assert np.abs(found - np.asarray(plain, int)[4, 4][::-1]).max() <= 6
    assert pixels.info == {}


def test_an_srgb_profile_and_a_broken_one_change_nothing():
    image = Image.effect_noise((32, 32), 90).convert("RGB")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"x" * 500, swapped_profile()[:200]):
        pixels = decode(encoded(image, "PNG", icc_profile=profile), max_pixels=MAX).pixels
        assert np.abs(np.asarray(pixels, int) - np.asarray(image, int)).max() <= 1


def test_a_12_bit_tiff_is_not_dark():
    pixels = [0, 2048, 4095, 4095]
    packed = bytes([pixels[0] >> 4, (pixels[0] & 15) << 4 | pixels[1] >> 8, pixels[1] & 255])
    packed += bytes([pixels[2] >> 4, (pixels[2] & 15) << 4 | pixels[3] >> 8, pixels[3] & 255])
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1)]
    tags += [(278, 1), (279, len(packed))]
    directory = struct.pack("<H", len(tags))
    directory += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    data = b"II*\0\x08\0\0\0" + directory + bytes(4) + packed
    decoded = decode(data, max_pixels=MAX)
    assert np.asarray(decoded.pixels)[0, :, 0].tolist() == [0, 128, 255, 255]


def test_jpeg_xl_is_refused_with_the_reason():
    assert "JPEG XL" in failure_of(b"\xff\x0a" + bytes(20)).message


def test_a_heic_image():
    pillow_heif = pytest.importorskip("pillow_heif", reason="pip install 'vlmbatch[formats]'")
    image = Image.new("RGB", (64, 48), (200, 30, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = BytesIO()
    pillow_heif.from_pillow(image).save(file, quality=90, exif=exif.tobytes())
    data = file.getvalue()
    decoded = decode(data, max_pixels=MAX)
    assert decoded.size == header(data, max_pixels=MAX).size
    assert sorted((decoded.size.width, decoded.size.height)) == [48, 64]
    assert np.abs(np.asarray(decoded.pixels, int)[10, 10] - [200, 30, 60]).max() < 12
    assert failure_of(data[: len(data) // 2]).code is ErrorCode.IMAGE_UNREADABLE
    with pytest.raises(RequestFailed) as caught:
        header(data, max_pixels=64 * 48 - 1)
    assert caught.value.failure.code is ErrorCode.IMAGE_TOO_LARGE


def pdf_of(*pages: tuple[int, int]) -> bytes:
    """Blank pages of these sizes in points, a red square in the corner at the top left."""
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Count {len(pages)} /Kids "
        f"[{' '.join(f'{3 + 2 * n} 0 R' for n in range(len(pages)))}] >>",
    ]
    for number, (width, height) in enumerate(pages):
        draw = f"1 0 0 rg 0 {height - 36} 36 36 re f"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {width} {height}] "
            f"/Contents {4 + 2 * number} 0 R >>"
        )
        objects.append(f"<< /Length {len(draw)} >>\nstream\n{draw}\nendstream")
    data, places = b"%PDF-1.4\n", []
    for number, text in enumerate(objects, 1):
        places.append(len(data))
        data += f"{number} 0 obj\n{text}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = f"xref\n0 {len(places) + 1}\n0000000000 65535 f \n{table}"
    end += f"trailer << /Size {len(places) + 1} /Root 1 0 R >>\nstartxref\n{len(data)}\n%%EOF\n"
    return data + end.encode()


def test_a_page_of_a_pdf():
    pytest.importorskip("pypdfium2", reason="pip install 'vlmbatch[formats]'")
    data = pdf_of((144, 72), (72, 144), (100_000, 100_000))
    first = decode(data, max_pixels=MAX)
    assert first.size == header(data, max_pixels=MAX).size == Size(300, 150)
    assert first.pixels.getpixel((10, 10)) == (255, 0, 0)
    assert first.pixels.getpixel((290, 140)) == (255, 255, 255)
    shrunk = decode(data, max_pixels=MAX, page=2, target=lambda size: Size(15, 30))
    assert (shrunk.size, shrunk.pixels.size) == (Size(150, 300), (15, 30))
    huge = header(data, max_pixels=MAX, page=3).size
    assert 0.9 * MAX < huge.pixels <= MAX
    assert failure_of(data, page=4).message == "no page 4: it has 3"
    assert failure_of(data[:40]).code is ErrorCode.IMAGE_UNREADABLE


def test_without_its_library_a_pdf_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    failure = failure_of(pdf_of((72, 72)))
    assert failure.code is ErrorCode.IMAGE_UNREADABLE
    assert "pip install 'vlmbatch[formats]'" in failure.message
