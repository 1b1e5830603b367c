"""Images as ``data:`` URIs, for a request to an endpoint."""

from __future__ import annotations

import asyncio
import io
from base64 import b64encode
from collections import OrderedDict
from typing import TYPE_CHECKING

from vlmbatch.records import LoadedImage

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("auto", "png", "jpeg")
PNG_UP_TO = 256 * 256
"""``auto``: pictures of more pixels go as JPEG, which is several times smaller for photographs."""

JPEG_QUALITY = 95
JPEG_EDGE = 65_500
"""JPEG has no longer sides."""

KEPT = 16
"""Images whose URIs are held: requests of one row follow one another."""


class DataUris:
    """Each image is encoded once, in a thread, while the requests of its row come one by one."""

    def __init__(self, form: str) -> None:
        self._form = form
        self._kept: OrderedDict[str, asyncio.Task[str]] = OrderedDict()

    async def of(self, image: LoadedImage) -> str:
        task = self._kept.pop(image.key, None)
        if task is None or (task.done() and task.exception() is not None):
            task = asyncio.create_task(asyncio.to_thread(data_uri, image.pixels, self._form))
        self._kept[image.key] = task
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return await asyncio.shield(task)  # another request may wait for it, too


def data_uri(pixels: Image, form: str) -> str:
    """The picture as PNG or JPEG; ``form`` is one of FORMATS."""
    as_png = pixels.width * pixels.height <= PNG_UP_TO if form == "auto" else form == "png"
    as_png = as_png or max(pixels.size) > JPEG_EDGE
    file = io.BytesIO()
    if as_png:
        pixels.save(file, format="PNG")
    else:  # 4:4:4, so that thin coloured strokes of text stay sharp
        pixels.save(file, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    kind = "png" if as_png else "jpeg"
    return f"data:image/{kind};base64,{b64encode(file.getbuffer()).decode('ascii')}"
