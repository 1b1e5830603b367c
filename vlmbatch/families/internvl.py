"""InternVL 2.5, 3 and 3.5: ``<ref>cat</ref><box>[[253, 231, 733, 787]]</box>``, 0 to 1000.

Prompt and syntax: evaluate_grounding.py of the InternVL repository; without ``<ref>`` in the prompt
it may answer with bare lists (issue 625). The image is cut into 1 to 12 square tiles, squashed to
fill them, so coordinates are relative to the whole image on each axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmbatch.families.base import ALL_TASKS, Entry, whole
from vlmbatch.families.json_boxes import on_grid
from vlmbatch.families.sizes import tile_grid
from vlmbatch.families.tags import Tagged, Tags
from vlmbatch.grounding import Box, GridSpace, Size, Space
from vlmbatch.records import LoadedImage, TaskKind
from vlmbatch.tasks import Ask


class InternVL(Tagged):
    """The tags are special tokens in some versions."""

    name = "internvl"
    space: Space = GridSpace(1000)
    tags = Tags(ref=("<ref>", "</ref>"), box=("<box>", "</box>"), quad=("<quad>", "</quad>"))

    def __init__(self, tile: int = 448, tiles: int = 12, tokens: int = 256) -> None:
        self._tile, self._tiles, self._tokens = tile, tiles, tokens

    def word_boxes(self, ask: Ask) -> str:
        if ask.kind is TaskKind.GROUND:
            what = "the bounding box coordinate of the region this sentence describes"
            return f"Please provide {what}: <ref>{ask.question}</ref>"
        wanted = ", ".join(f"<ref>{label}</ref>" for label in ask.labels)
        return f"Detect the {wanted} in the image with its bounding box."

    def write(self, boxes: Sequence[Box], *, image: LoadedImage) -> str:
        grid = [on_grid(self.space.from_pixels(box, image.size), 1000) for box in boxes]
        written = (self.tags.written(b.label, f"[[{b.x1}, {b.y1}, {b.x2}, {b.y2}]]") for b in grid)
        return "".join(written) or "There are none."

    def target(self, size: Size) -> Size:
        """The canvas of tiles that the image is squashed to, if it is larger on both axes."""
        columns, rows = grid = tile_grid(size, self._tile, self._tiles)
        canvas = Size(columns * self._tile, rows * self._tile)
        smaller = canvas.width <= size.width and canvas.height <= size.height
        same = smaller and tile_grid(canvas, self._tile, self._tiles) == grid
        return canvas if same else size

    def image_tokens(self, size: Size) -> int | None:
        """Every tile, a thumbnail if there are several, and the tokens around them."""
        columns, rows = tile_grid(self.target(size), self._tile, self._tiles)
        tiles = columns * rows
        return self._tokens * (tiles + (tiles > 1)) + 2


def _of(config: Mapping[str, Any]) -> InternVL:
    """InternVL's own checkpoints (``internvl_chat``) and the converted ones name things apart."""
    vision = config.get("vision_config")
    side = vision.get("image_size") if isinstance(vision, Mapping) else None
    if isinstance(side, list) and side:
        side = side[0]
    tile = side if type(side) is int and side > 0 else 448
    tile = whole(config, "force_image_size", default=tile)
    tiles = whole(config, "max_dynamic_patch", default=12)
    tiles = whole(config, "preprocessor", "max_patches", default=tiles)
    return InternVL(tile, tiles, whole(config, "image_seq_length", default=256))


ENTRIES = (
    Entry(
        name=InternVL.name,
        checkpoints=("OpenGVLab/InternVL2_5-*", "OpenGVLab/InternVL3*"),
        tasks=ALL_TASKS,
        boxes="<ref>..</ref><box>[[x1, y1, x2, y2]]</box>, 0 to 1000",
        evidence="documented",
        architectures=("InternVLChatModel",),
        matches=lambda config, model: config.get("model_type") in ("internvl", "internvl_chat"),
        make=_of,
        note="checkpoints that are not in the -hf form need their own code",
    ),
)
