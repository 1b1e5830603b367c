"""Llama 3.2 Vision and Llama 4: chat template, no documented boxes.

Llama 3.2 looks at the picture by cross-attention (up to four tiles of 560 px): in the prompt it is
one token. Llama 4 cuts it into tiles of 336 px, up to 16, beside the whole of it as one more; 144
tokens each. Source: transformers 5.19, models/llama4/processing_llama4.py and
image_processing_llama4.py.
"""

from __future__ import annotations

from math import inf

from vlmbatch.families.base import TEXT_TASKS, Chat, Entry
from vlmbatch.grounding import Size

TILE, TILES, TOKENS = 336, 16, 144


class Llama32(Chat):
    """Mllama."""

    name = "llama3_2_vision"

    def image_tokens(self, size: Size) -> int:
        return 1


class Llama4(Chat):
    """Scout and Maverick."""

    name = "llama4"

    def image_tokens(self, size: Size) -> int:
        rows, columns = tiles(size)
        around = TOKENS + 3
        if rows * columns == 1:
            return around
        return around + rows * columns * TOKENS + rows * columns  # x and y separators


def tiles(size: Size) -> tuple[int, int]:
    """Rows and columns: the smallest enlargement that is possible, else the least shrinking."""
    grids = [
        (rows, columns)
        for rows in range(1, TILES + 1)
        for columns in range(1, TILES + 1)
        if rows * columns <= TILES
    ]

    def scale(grid: tuple[int, int]) -> float:
        return min(grid[1] * TILE / size.width, grid[0] * TILE / size.height)

    larger = [scale(grid) for grid in grids if scale(grid) >= 1]
    wanted = min(larger, default=max((scale(grid) for grid in grids), default=inf))
    return min((g for g in grids if scale(g) == wanted), key=lambda g: g[0] * g[1])


ENTRIES = (
    Entry(
        name="llama4",
        checkpoints=("meta-llama/Llama-4-*",),
        tasks=TEXT_TASKS,
        boxes="",
        evidence="documented",
        matches=lambda config, model_id: config.get("model_type") == "llama4",
        make=lambda config: Llama4(),
    ),
    Entry(
        name="llama3_2_vision",
        checkpoints=("meta-llama/Llama-3.2-*-Vision*",),
        tasks=TEXT_TASKS,
        boxes="",
        evidence="documented",
        matches=lambda config, model_id: config.get("model_type") == "mllama",
        make=lambda config: Llama32(),
    ),
)
