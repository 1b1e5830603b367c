"""From encoded bytes to an upright RGB image, with the size checked before anything is decoded."""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO

from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError
from PIL.Image import Resampling, Transpose

from vlmbatch.errors import ErrorCode, RequestFailed, Stage, failed
from vlmbatch.grounding import Size
from vlmbatch.images.pdf import pdf_size, render_pdf

# Formats whose size in the header is the size that is decoded. Left out on purpose: EPS (runs
# Ghostscript), ICO and ICNS (hold images with headers of their own), and those with weak magic.
_WANTED = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "AVIF", "JPEG2000", "PPM", "QOI")
_PLUGINS = ("HEIF",)  # the extra `formats`; not pillow_jxl, which decodes before the size is known

# Set up once, on import, and never from the threads that decode: Pillow loads its plugins lazily
# without a lock, and warning filters belong to the whole process.
Image.init()
with suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener(thumbnails=False)
warnings.filterwarnings("ignore", module=r"PIL\.")
# Pillow's own bomb check warns or raises at fixed numbers; _open checks every image against
# max_pixels before decoding, and _WANTED holds no format that decodes more than its header says.
Image.MAX_IMAGE_PIXELS = None
_FORMATS = tuple(name for name in (*_WANTED, *_PLUGINS) if name in Image.OPEN)

_PEAKS = {"WEBP": 16, "AVIF": 12, "JPEG2000": 16, "HEIF": 16}  # decoders with buffers of their own
_ORIENTATION = 0x0112
_BITS_PER_SAMPLE = 258
_PDF = b"%PDF-"
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1", b"hevc", b"hevx")
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_SWAPS_AXES = (5, 6, 7, 8)
_GAP = 3.0  # shrink coarsely to 3 x the target, then LANCZOS; Pillow's docs call 3 as good as none


@dataclass(frozen=True, slots=True)
class Header:
    """What is known before decoding. ``size`` is upright (after EXIF rotation)."""

    size: Size
    mode: str
    format: str
    orientation: int = 1
    """EXIF's, 1 to 8: how the stored pixels are turned; 1 where they are upright."""

    @property
    def decoded_bytes(self) -> int:
        """Memory to decode it, shrinking not included: about right, from peaks measured."""
        # Pillow keeps 4 bytes per RGB pixel; other modes are copied once, to become RGB.
        bytes_per_pixel = _PEAKS.get(self.format, 4 if self.mode == "RGB" else 8)
        return self.size.pixels * bytes_per_pixel


@dataclass(frozen=True, slots=True)
class Decoded:
    """An upright RGB image; ``size`` is what it had before it was shrunk."""

    pixels: Image.Image
    size: Size


def header(data: bytes, *, max_pixels: int, page: int | None = None) -> Header:
    """Reads the header only; image_too_large above ``max_pixels``. ``page`` counts from 1.

    A PNG whose orientation stands behind its pixels is taken as upright here; ``decode`` sees it.
    """
    if data.startswith(_PDF):
        return Header(Size(*pdf_size(data, page or 1, max_pixels)), "RGBA", "PDF")
    image = _open(data, max_pixels, page)
    with _explained(image.format or "image"):
        # A TIFF reports its size upright, and rotates itself when it is decoded.
        orientation = 1 if image.format == "TIFF" else _orientation(image)
        return Header(
            _upright(image.size, orientation), image.mode, image.format or "", orientation
        )


def is_turned(path: str) -> bool:
    """Whether a local file is an image whose EXIF says that it stands upright otherwise than its
    pixels are stored. Reads the header only."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            return image.format != "TIFF" and _orientation(image) != 1
    except Exception:  # it is no image: whoever opens it will say so
        return False


def decode(
    data: bytes,
    *,
    max_pixels: int,
    target: Callable[[Size], Size] | None = None,
    page: int | None = None,
) -> Decoded:
    """The first frame, or page ``page`` from 1, upright, RGB, transparency on white, resized to
    ``target(upright size)``.

    12- and 16-bit and float grey are scaled to 8 bits; the colour profile of an RGB image is
    applied, so that it comes out as sRGB.
    """
    if data.startswith(_PDF):
        return _pdf_page(data, page or 1, max_pixels, target)
    image = _open(data, max_pixels, page)
    kind = image.format or "image"
    draft = None if target is None else _draft(image, target)
    with _explained(kind):
        image.load()
        orientation = _orientation(image)  # after load, because a PNG may carry it at its end
        pixels = to_rgb(image)
    size = _upright(draft.full_size if draft else image.size, orientation)
    wanted = _turned(size if target is None else target(size), orientation)
    with _explained(kind):
        if pixels.size != wanted:
            box = draft.box if draft else None
            pixels = pixels.resize(wanted, Resampling.LANCZOS, box=box, reducing_gap=_GAP)
        if orientation in _UPRIGHT:
            pixels = pixels.transpose(_UPRIGHT[orientation])
        pixels = _in_srgb(pixels, image)
        if pixels is image:
            pixels = _without_file(image)
        pixels.info = {}
    return Decoded(pixels, size)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB: transparency over white, deep grey scaled and not clipped."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I;16":
        return _grey(image, 0, _white_16(image))
    if image.mode.startswith("I;16"):  # other byte orders
        return _grey(image.convert("I"), 0, _white_16(image))
    if image.mode in ("I", "F"):
        return _grey(image, *_deep_range(image))
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data or image.mode in ("LA", "RGBA", "PA", "RGBa"):
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(rgba, mask=rgba)
        return white
    return image.convert("RGB")


def _without_file(image: Image.Image) -> Image.Image:
    """The pixels of a loaded image, not copied, in an image that does not hold on to its file: to
    the encoded bytes, and to all that stood in them."""
    return Image.Image._new(image, image.im)


def _pdf_page(
    data: bytes, page: int, max_pixels: int, target: Callable[[Size], Size] | None
) -> Decoded:
    with _explained("PDF"):
        pixels = render_pdf(data, page, max_pixels)
    size = Size(*pixels.size)
    wanted = size if target is None else target(size)
    if wanted != size:
        shape = (wanted.width, wanted.height)
        pixels = pixels.resize(shape, Resampling.LANCZOS, reducing_gap=_GAP)
    return Decoded(pixels, size)


def _in_srgb(pixels: Image.Image, image: Image.Image) -> Image.Image:
    """``pixels``, of ``image``, as sRGB; unchanged where there is no profile, or a broken one."""
    profile = image.info.get("icc_profile")
    if image.mode != "RGB" or not isinstance(profile, bytes) or b"sRGB" in profile[:1024]:
        return pixels
    try:
        given = ImageCms.ImageCmsProfile(BytesIO(profile))
        return ImageCms.profileToProfile(pixels, given, ImageCms.createProfile("sRGB")) or pixels
    except (ImageCms.PyCMSError, OSError, ValueError):
        return pixels


def _white_16(image: Image.Image) -> int:
    """What white is in 16-bit grey: a TIFF may hold 12 bits in it."""
    tags = getattr(image, "tag_v2", {})
    return 4095 if tags.get(_BITS_PER_SAMPLE) == (12,) else 65535


def _open(data: bytes, max_pixels: int, page: int | None) -> ImageFile.ImageFile:
    """The image at its page, with its size checked."""
    image = _first(data)
    _check_pixels(image, max_pixels)
    if page is not None and page != 1:
        try:
            image.seek(page - 1)
        except (EOFError, ValueError):
            pages = getattr(_first(data), "n_frames", 1)
            raise _failed(ErrorCode.IMAGE_MISSING, f"no page {page}: it has {pages}") from None
        except Exception as error:
            message = f"broken {image.format}: page {page}: {_one_line(error)}"
            raise _failed(ErrorCode.IMAGE_UNREADABLE, message) from error
        _check_pixels(image, max_pixels)  # each page of a TIFF has its own size
    return image


def _first(data: bytes) -> ImageFile.ImageFile:
    try:
        with _explained("image"):
            return Image.open(BytesIO(data), formats=_FORMATS)
    except RequestFailed as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            raise _failed(ErrorCode.IMAGE_UNREADABLE, _unknown(data[:512])) from error.__cause__
        raise


def _check_pixels(image: ImageFile.ImageFile, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        message = f"broken {image.format}: {width} x {height} pixels"
        raise _failed(ErrorCode.IMAGE_UNREADABLE, message)
    if width * height > max_pixels:
        message = f"{width} x {height} is {width * height:,} pixels, more than {max_pixels:,}"
        raise _failed(ErrorCode.IMAGE_TOO_LARGE, message)


def _unknown(start: bytes) -> str:
    words = start.lower()
    if b"<svg" in words:
        return "an SVG, which is no picture of pixels: render it to PNG before the run"
    if b"<!doctype html" in words or b"<html" in words:
        came = " ".join(start[:60].decode("ascii", "replace").split())
        return f"an HTML page, not an image: starts with {came}"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the image: `git lfs pull` fetches it"
    if start.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "JPEG XL is not read: its size is not known before it is decoded"
    if start[4:8] == b"ftyp" and start[8:12] in _HEIC:
        return "a HEIC image, which needs a library that is not installed (extra 'formats')"
    start = start[:16]
    text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in start)
    return f'not an image, or its header is broken: starts with {start[:8].hex(" ")} ("{text}")'


def _orientation(image: Image.Image) -> int:
    """The EXIF (or XMP) orientation, 1 to 8; 1 where that cannot be read."""
    try:
        # Not PngImageFile.getexif, which decodes the whole image if it has met no EXIF so far.
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except Exception:  # a broken EXIF block does not make the pixels unreadable
        return 1
    return value if value in _UPRIGHT else 1


def _upright(size: tuple[int, int], orientation: int) -> Size:
    return Size(*_turned(Size(*size), orientation))


def _turned(size: Size, orientation: int) -> tuple[int, int]:
    """Between stored and upright, in either direction."""
    if orientation in _SWAPS_AXES:
        return size.height, size.width
    return size.width, size.height


@dataclass(frozen=True, slots=True)
class _Draft:
    """A JPEG that its decoder will shrink by 1, 2, 4 or 8: ``box`` of it is the image.

    Its last column and row may be partial; both sizes are as stored, not upright.
    """

    full_size: tuple[int, int]
    box: tuple[float, float, float, float]


def _draft(image: ImageFile.ImageFile, target: Callable[[Size], Size]) -> _Draft | None:
    if image.format not in ("JPEG", "MPO"):
        return None
    full_size, orientation = image.size, _orientation(image)
    width, height = _turned(target(_upright(full_size, orientation)), orientation)
    with _explained(image.format):
        drafted = image.draft(None, (math.ceil(width * _GAP), math.ceil(height * _GAP)))
    return None if drafted is None else _Draft(full_size, drafted[1])


def _grey(image: Image.Image, low: float, high: float) -> Image.Image:
    """Values low to high of an I;16, I or F image to grey 0 to 255, rounded."""
    factor = 255 / (high - low) if high > low else 1.0
    grey = image.point(lambda value: value * factor + (0.5 - low * factor)).convert("L")
    return grey.convert("RGB")


def _deep_range(image: Image.Image) -> tuple[float, float]:
    """Which values are black and white: the customary range that holds all, else the extremes."""
    low, high = _extremes(image)
    if not (math.isfinite(low) and math.isfinite(high)):
        return 0.0, 1.0
    customary = (65535.0,) if image.mode == "I" else (1.0, 255.0, 65535.0)
    for top in customary:
        if low >= 0 and high <= top:
            return 0.0, top
    return low, high


def _extremes(image: Image.Image) -> tuple[float, float]:
    match image.getextrema():
        case (float() | int() as low, float() | int() as high):
            return low, high
    raise ValueError(f"no single channel: {image.mode}")


@contextmanager
def _explained(kind: str) -> Iterator[None]:
    """Turns what Pillow raises on broken input (anything, in practice) into a RequestFailed."""
    try:
        yield
    except RequestFailed:
        raise
    except MemoryError as error:
        message = f"not enough memory to decode this {kind}"
        raise _failed(ErrorCode.IMAGE_TOO_LARGE, message) from error
    except Image.DecompressionBombError as error:
        raise _failed(ErrorCode.IMAGE_TOO_LARGE, _one_line(error)) from error
    except OSError as error:
        if error.errno is not None:  # the file system's; Pillow's own have no number
            message = f"cannot read the image: {error.strerror or error}"
            raise _failed(ErrorCode.FETCH_FAILED, message, retryable=True) from error
        state = "truncated" if "truncated" in str(error) else "broken"
        message = f"{state} {kind}: {_one_line(error)}"
        raise _failed(ErrorCode.IMAGE_UNREADABLE, message) from error
    except (SyntaxError, ValueError, EOFError, struct.error) as error:
        message = f"broken {kind}: {_one_line(error)}"
        raise _failed(ErrorCode.IMAGE_UNREADABLE, message) from error
    except Exception as error:
        message = f"broken {kind}: {type(error).__name__}: {_one_line(error)}"
        raise _failed(ErrorCode.IMAGE_UNREADABLE, message) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _failed(code: ErrorCode, message: str, *, retryable: bool = False) -> RequestFailed:
    return failed(code, Stage.LOAD, message, retryable=retryable)
