"""Boxes and points, and the coordinate spaces that models answer in.

Everything that leaves a family is in *image pixels*: pixels of the original image after its EXIF
rotation, origin at the top left, xyxy, x2 and y2 exclusive.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Size:
    """Width and height in pixels, both at least 1."""

    width: int
    height: int

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise ValueError(f"a size is at least 1 x 1, not {self.width} x {self.height}")

    @property
    def pixels(self) -> int:
        return self.width * self.height


@dataclass(frozen=True, slots=True)
class Box:
    """A labelled rectangle, xyxy; which space it is in is said by whoever holds it."""

    label: str
    x1: float
    y1: float
    x2: float
    y2: float
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """A labelled point; which space it is in is said by whoever holds it."""

    label: str
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class GridSpace:
    """Coordinates that count from 0 to ``steps`` over the whole image, on each axis by itself.

    Right for models that see the image squashed, or answer relative to the upright original.
    """

    steps: float

    def to_pixels(self, box: Box, image: Size) -> Box | None:
        """The box in image pixels, corners sorted, clipped; None if nothing of it is inside."""
        scale_x, scale_y = image.width / self.steps, image.height / self.steps
        return clip(
            Box(
                box.label,
                box.x1 * scale_x,
                box.y1 * scale_y,
                box.x2 * scale_x,
                box.y2 * scale_y,
                box.score,
            ),
            image,
        )

    def from_pixels(self, box: Box, image: Size) -> Box:
        """The inverse of ``to_pixels``: image pixels to steps, not rounded."""
        scale_x, scale_y = self.steps / image.width, self.steps / image.height
        return Box(
            box.label,
            box.x1 * scale_x,
            box.y1 * scale_y,
            box.x2 * scale_x,
            box.y2 * scale_y,
            box.score,
        )


def clip(box: Box, image: Size) -> Box | None:
    """The part of the box inside the image, corners sorted; None where that is empty."""
    x1, x2 = sorted((box.x1, box.x2))
    y1, y2 = sorted((box.y1, box.y2))
    x1, x2 = max(0.0, x1), min(float(image.width), x2)
    y1, y2 = max(0.0, y1), min(float(image.height), y2)
    if x1 >= x2 or y1 >= y2:
        return None
    return Box(box.label, x1, y1, x2, y2, box.score)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes in the same space, 0 to 1."""
    width = min(a.x2, b.x2) - max(a.x1, b.x1)
    height = min(a.y2, b.y2) - max(a.y1, b.y1)
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a.x2 - a.x1) * (a.y2 - a.y1) + (b.x2 - b.x1) * (b.y2 - b.y1) - both)
