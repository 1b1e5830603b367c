"""A page of a PDF as an image, where pypdfium2 is installed (the extra ``formats``)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from PIL import Image

from vlmbatch.errors import ErrorCode
from vlmbatch.images.failures import load_failed, missing, unreadable

DPI = 150
"""What OCR models are usually given; less where a page would have more than the pixels allowed."""
_one_at_a_time = Lock()  # PDFium is not made for threads


def pdf_size(data: bytes, page: int, max_pixels: int) -> tuple[int, int]:
    """Of the rendered page, in pixels; ``page`` counts from 1."""
    with _opened(data, page) as opened:
        scale = _scale(opened, max_pixels)
        return math.ceil(opened.get_width() * scale), math.ceil(opened.get_height() * scale)


def render_pdf(data: bytes, page: int, max_pixels: int) -> Image.Image:
    """The page on white, RGB."""
    with _opened(data, page) as opened:
        bitmap = opened.render(scale=_scale(opened, max_pixels), rev_byteorder=True)
        try:
            image: Image.Image = bitmap.to_pil().convert("RGB")
            return image.copy()  # not the bitmap's memory
        finally:
            bitmap.close()


@contextmanager
def _opened(data: bytes, page: int) -> Iterator[Any]:
    try:
        import pypdfium2
    except ImportError:
        raise load_failed(
            ErrorCode.IMAGE_UNREADABLE,
            "a PDF, which needs a library that is not installed (pip install 'vlmbatch[formats]')",
        ) from None
    with _one_at_a_time:
        try:
            document = pypdfium2.PdfDocument(data)
        except pypdfium2.PdfiumError as error:
            raise unreadable(f"broken or encrypted PDF: {error}") from error
        try:
            count = len(document)
            if page > count:
                raise missing(f"no page {page}: it has {count}")
            opened = document[page - 1]
            try:
                yield opened
            finally:
                opened.close()
        except pypdfium2.PdfiumError as error:
            raise unreadable(f"broken PDF: page {page}: {error}") from error
        finally:
            document.close()


def _scale(page: Any, max_pixels: int) -> float:
    """Pixels per point."""
    width, height = page.get_width(), page.get_height()
    if not (0 < width < 1e6 and 0 < height < 1e6):
        raise unreadable(f"broken PDF: a page of {width} x {height} points")
    most = (math.sqrt(4 * width * height * max_pixels + (width - height) ** 2) - width - height) / (
        2 * width * height
    )  # so that (width x scale + 1) x (height x scale + 1) is within max_pixels
    return float(min(DPI / 72, max(most, 1 / max(width, height))))
