"""The ``custom_id`` of a batch request: whose answer it is, and what is needed to read it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vlmbatch.grounding import Size

_ID = re.compile(r"vlmbatch-([0-9a-f]{1,32})-(\d{1,12})-(\d{1,9})-(\d{1,5})-(\d{1,9})x(\d{1,9})")


@dataclass(frozen=True, slots=True)
class CustomId:
    """One request of one run: ``vlmbatch-<run>-<row>-<request>-<sample>-<width>x<height>``.

    ``size`` is that of the row's first image, upright, when the request was written: boxes can be
    read without the image, which may be gone or changed by then. 0x0, None here: the request names
    its images by URL, and nobody has measured them.
    """

    run: str
    row: int
    request: int
    sample: int
    size: Size | None

    def __str__(self) -> str:
        where = f"{self.row}-{self.request}-{self.sample}"
        width, height = (self.size.width, self.size.height) if self.size else (0, 0)
        return f"vlmbatch-{self.run}-{where}-{width}x{height}"

    @classmethod
    def parse(cls, text: object) -> CustomId | None:
        """None where vlmbatch did not write it."""
        match = _ID.fullmatch(text) if isinstance(text, str) and text.isascii() else None
        if match is None:
            return None
        row, request, sample, width, height = map(int, match.groups()[1:])
        size = Size(width, height) if width and height else None
        return cls(match[1], row, request, sample, size)
