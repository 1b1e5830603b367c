"""In place of the loader where the endpoint fetches the images itself: nothing is read here."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from vlmbatch.errors import ErrorCode, Stage, failed
from vlmbatch.grounding import Size
from vlmbatch.images.budget import ByteBudget, Reservation
from vlmbatch.images.fetch import reference
from vlmbatch.images.load import LoadedImages
from vlmbatch.records import ImageRef, LoadedImage


class ImageUrls:
    """Has the methods of ImageLoader; its images have a ``url``, and a stand-in for pixels."""

    def __init__(self) -> None:
        self._nothing = ByteBudget(0)
        self._stand_in = Image.new("RGB", (1, 1))

    async def admit(self, refs: Sequence[ImageRef]) -> None:
        """Nothing is held."""

    async def load(
        self, refs: Sequence[ImageRef], admitted: Reservation | None = None
    ) -> LoadedImages:
        """Raises RequestFailed (bad_row) for an image that has no http(s) address."""
        images = tuple(self._sent_as(ref) for ref in refs)
        return LoadedImages(images, await self._nothing.reserve(0))

    async def close(self) -> None:
        """Nothing is open."""

    def _sent_as(self, ref: ImageRef) -> LoadedImage:
        url = ref.uri or ""
        if not url.lower().startswith(("http://", "https://")):
            found = reference(ref) or "bytes without an address"
            raise failed(
                ErrorCode.BAD_ROW,
                Stage.LOAD,
                f"images go to the endpoint as http(s) URLs (image_transport url), this is {found}",
            )
        return LoadedImage(self._stand_in, Size(1, 1), url, url)
