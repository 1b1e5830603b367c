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


class Space:
    """A coordinate space of answers: on each axis, pixel = scale x value + shift."""

    def axes(self, image: Size) -> tuple[tuple[float, float], tuple[float, float]]:
        """(scale, shift) of x and of y for an image of this size."""
        raise NotImplementedError

    def to_pixels(self, box: Box, image: Size) -> Box | None:
        """The box in image pixels, corners sorted, clipped; None if nothing of it is inside."""
        return clip(self._mapped(box, *self.axes(image)), image)

    def from_pixels(self, box: Box, image: Size) -> Box:
        """The inverse of ``to_pixels``: image pixels to this space, not rounded."""
        (sx, tx), (sy, ty) = self.axes(image)
        return self._mapped(box, (1 / sx, -tx / sx), (1 / sy, -ty / sy))

    def point_to_pixels(self, point: Point, image: Size) -> Point | None:
        """The point in image pixels; None if it is outside of the image."""
        (sx, tx), (sy, ty) = self.axes(image)
        x, y = sx * point.x + tx, sy * point.y + ty
        inside = 0 <= x <= image.width and 0 <= y <= image.height
        return Point(point.label, x, y) if inside else None

    def point_from_pixels(self, point: Point, image: Size) -> Point:
        (sx, tx), (sy, ty) = self.axes(image)
        return Point(point.label, (point.x - tx) / sx, (point.y - ty) / sy)

    @staticmethod
    def _mapped(box: Box, x: tuple[float, float], y: tuple[float, float]) -> Box:
        (sx, tx), (sy, ty) = x, y
        x1, x2 = sx * box.x1 + tx, sx * box.x2 + tx
        return Box(box.label, x1, sy * box.y1 + ty, x2, sy * box.y2 + ty, box.score)


@dataclass(frozen=True, slots=True)
class GridSpace(Space):
    """Coordinates that count from 0 to ``steps`` over the whole image, on each axis by itself.

    Right for models that see the image squashed, or answer relative to the upright original.
    ``offset`` is added to a value first: 0.5 where values are bins and mean their centres.
    """

    steps: float
    offset: float = 0.0

    def axes(self, image: Size) -> tuple[tuple[float, float], tuple[float, float]]:
        sx, sy = image.width / self.steps, image.height / self.steps
        return (sx, sx * self.offset), (sy, sy * self.offset)


@dataclass(frozen=True, slots=True)
class PaddedSpace(Space):
    """Coordinates from 0 to ``steps`` over the square that the image was padded to, centred."""

    steps: float

    def axes(self, image: Size) -> tuple[tuple[float, float], tuple[float, float]]:
        side = max(image.width, image.height)
        scale = side / self.steps
        left, top = (side - image.width) // 2, (side - image.height) // 2
        return (scale, -float(left)), (scale, -float(top))


@dataclass(frozen=True, slots=True)
class ResizedSpace(Space):
    """Pixels of the image as it was resized to ``size`` for the model."""

    size: Size

    def axes(self, image: Size) -> tuple[tuple[float, float], tuple[float, float]]:
        return (image.width / self.size.width, 0.0), (image.height / self.size.height, 0.0)


@dataclass(frozen=True, slots=True)
class PixelSpace(Space):
    """Pixels of the original image."""

    def axes(self, image: Size) -> tuple[tuple[float, float], tuple[float, float]]:
        return (1.0, 0.0), (1.0, 0.0)


@dataclass(frozen=True, slots=True)
class Transposed(Space):
    """Another space whose values come y before x: yxyx."""

    space: Space

    def to_pixels(self, box: Box, image: Size) -> Box | None:
        return self.space.to_pixels(_transposed(box), image)

    def from_pixels(self, box: Box, image: Size) -> Box:
        return _transposed(self.space.from_pixels(box, image))

    def point_to_pixels(self, point: Point, image: Size) -> Point | None:
        return self.space.point_to_pixels(Point(point.label, point.y, point.x), image)

    def point_from_pixels(self, point: Point, image: Size) -> Point:
        own = self.space.point_from_pixels(point, image)
        return Point(own.label, own.y, own.x)


def _transposed(box: Box) -> Box:
    return Box(box.label, box.y1, box.x1, box.y2, box.x2, box.score)


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
