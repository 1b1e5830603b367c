"""What image processors make of an image's size: budgets of pixels, grids of tiles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vlmbatch.families.base import whole
from vlmbatch.grounding import Size


def shrink_to_pixels(size: Size, most: int) -> Size:
    """The size with at most so many pixels, its shape kept as well as whole pixels can."""
    if size.pixels <= most:
        return size
    scale = math.sqrt(most / size.pixels)
    width, height = int(size.width * scale), int(size.height * scale)
    return Size(min(max(1, width), most), min(max(1, height), most))


def shrink_into(size: Size, frame: Size) -> Size:
    """The size as it fits into a frame, its shape kept; never larger than it was."""
    scale = min(frame.width / size.width, frame.height / size.height)
    if scale >= 1:
        return size
    return Size(max(1, round(size.width * scale)), max(1, round(size.height * scale)))


def shrink_to_edge(size: Size, edge: int) -> Size:
    """The size with its longer side at most ``edge``, its shape kept."""
    return shrink_into(size, Size(edge, edge))


def at_most(size: Size, side: int) -> Size:
    """For models that squash every image to a square of this side: no edge is longer."""
    return Size(min(size.width, side), min(size.height, side))


def smart_resize(size: Size, factor: int, least: float, most: float) -> Size:
    """Edges as multiples of ``factor``, area from ``least`` to ``most`` pixels, shape about kept.

    Source: ``smart_resize`` of transformers' qwen2_vl image processor (which refuses shapes of more
    than 1 : 200; here they get a size).
    """
    width, height = _rounded(size.width, factor), _rounded(size.height, factor)
    if width * height > most:
        beta = math.sqrt(size.pixels / most)
        width = max(factor, math.floor(size.width / beta / factor) * factor)
        height = max(factor, math.floor(size.height / beta / factor) * factor)
    elif width * height < least:
        beta = math.sqrt(least / size.pixels)
        width = math.ceil(size.width * beta / factor) * factor
        height = math.ceil(size.height * beta / factor) * factor
    return Size(max(width, factor), max(height, factor))


def _rounded(edge: int, factor: int) -> int:
    return round(edge / factor) * factor


def too_long(size: Size) -> bool:
    """Qwen's and GLM's image processors refuse it."""
    return max(size.width, size.height) > 200 * min(size.width, size.height)


def pixel_budget(config: Mapping[str, Any], least: int, most: int) -> tuple[int, int]:
    """Fewest and most pixels by the image processor's settings, in any of their spellings."""
    for low, high in (
        (("min_pixels",), ("max_pixels",)),
        (("size", "shortest_edge"), ("size", "longest_edge")),
        (("size", "min_pixels"), ("size", "max_pixels")),
    ):
        least = whole(config, "preprocessor", *low, default=0) or least
        most = whole(config, "preprocessor", *high, default=0) or most
    return min(least, most), most


def tile_grid(size: Size, tile: int, most: int, least: int = 1) -> tuple[int, int]:
    """(columns, rows) of at most so many square tiles, of about the image's shape.

    The nearest ratio; of equal ones the larger grid, as long as the image has more than half of its
    pixels. Source: ``get_optimal_tiled_canvas`` of transformers' got_ocr2 image processor, which is
    InternVL's.
    """
    grids = [
        (columns, count // columns)
        for count in range(least, most + 1)
        for columns in range(1, count + 1)
        if count % columns == 0
    ]
    best, best_difference = (1, 1), math.inf
    for columns, rows in grids:
        difference = abs(size.width / size.height - columns / rows)
        larger = size.pixels > 0.5 * tile * tile * columns * rows
        if difference < best_difference or (difference == best_difference and larger):
            best, best_difference = (columns, rows), difference
    return best
