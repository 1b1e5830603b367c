"""MiniCPM-V and MiniCPM-o: ``<ref>cat</ref><box>253 231 733 787</box>``, 0 to 1000.

Prompt and syntax are the maintainers' (issues 185 and 982 of MiniCPM-V, 39 of the CookBook); there
are also ``<point>x y</point>`` and ``<quad>`` with eight numbers. The image is seen once as a whole
and in up to nine slices of about 448 x 448.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vlmbatch.families.base import ALL_TASKS, Entry, whole
from vlmbatch.families.json_boxes import on_grid
from vlmbatch.families.sizes import shrink_to_pixels
from vlmbatch.families.tags import Tagged, Tags
from vlmbatch.grounding import Box, GridSpace, Size, Space
from vlmbatch.records import LoadedImage, TaskKind
from vlmbatch.tasks import Ask


class MiniCPM(Tagged):
    """MiniCPM-V 2.5 to 4.5: a fixed number of tokens for each slice."""

    name = "minicpmv"
    space: Space = GridSpace(1000)
    tags = Tags(
        ref=("<ref>", "</ref>"),
        box=("<box>", "</box>"),
        quad=("<quad>", "</quad>"),
        point=("<point>", "</point>"),
    )

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        config = config or {}
        self._side = whole(config, "preprocessor", "scale_resolution", default=448)
        self._slices = whole(config, "preprocessor", "max_slice_nums", default=9)
        self._tokens = whole(config, "query_num", default=64)

    def word_boxes(self, ask: Ask) -> str:
        what = "the bounding box coordinate of the region this sentence describes"
        if ask.kind is TaskKind.DETECT:
            what = "the bounding box coordinates of every object that one of these names describes"
        names = (ask.question or "",) if ask.kind is TaskKind.GROUND else ask.labels
        refs = ", ".join(f"<ref>{name}</ref>" for name in names)
        return f"Please provide {what}: {refs}"

    def write(self, boxes: Sequence[Box], *, image: LoadedImage) -> str:
        grid = [on_grid(self.space.from_pixels(box, image.size), 1000) for box in boxes]
        written = (self.tags.written(b.label, f"{b.x1} {b.y1} {b.x2} {b.y2}") for b in grid)
        return "".join(written) or "There are none."

    def target(self, size: Size) -> Size:
        return shrink_to_pixels(size, self._slices * self._side**2)

    def image_tokens(self, size: Size) -> int | None:
        """Overview and slices, each between two tokens."""
        rows, columns = slices(self.target(size), self._side, self._slices)
        return (self._tokens + 2) * (1 + rows * columns)


class MiniCPM46(MiniCPM):
    """MiniCPM-V 4.6 and 4.7: a token for every 4 x 4 patches (2 x 2 in the mode "4x")."""

    name = "minicpmv4_6"

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__(config)
        config = config or {}
        self._patch = whole(config, "preprocessor", "patch_size", default=14)
        preprocessor = config.get("preprocessor")
        mode = preprocessor.get("downsample_mode") if isinstance(preprocessor, Mapping) else None
        self._per_token = 4 if mode == "4x" else 16

    def image_tokens(self, size: Size) -> int | None:
        """Overview and slices, each between two tokens; without the image's number and newlines.

        Source: transformers' minicpmv4_6 image processor and processor.
        """
        given = self.target(size)
        rows, columns = slices(given, self._side, self._slices)
        width, height = float(given.width), float(given.height)
        overview = self._tokens_of(width, height, enlarge=rows == 0) + 2
        if rows == 0:
            return overview
        width = max(round(width / columns), 1)
        height = max(round(height / rows), 1)
        return overview + rows * columns * (self._tokens_of(width, height, enlarge=True) + 2)

    def _tokens_of(self, width: float, height: float, *, enlarge: bool) -> int:
        if enlarge or width * height > self._side**2:
            ratio = width / height
            height = int(self._side / math.sqrt(ratio))
            width = int(height * ratio)
        cell = 4 * self._patch
        patches = [max(round(edge / cell) * cell, cell) // self._patch for edge in (height, width)]
        return patches[0] * patches[1] // self._per_token


def slices(size: Size, side: int, most: int) -> tuple[int, int]:
    """(rows, columns) of the slices besides the overview; (0, 0) where there are none.

    Source: ``get_sliced_grid`` of transformers' minicpmv4_6 image processor.
    """
    wanted = min(math.ceil(size.pixels / side**2), most)
    if wanted <= 1:
        return 0, 0
    log_ratio = math.log(size.width / size.height)
    best, least = (1, 1), math.inf
    for count in (wanted - 1, wanted, wanted + 1):
        if count == 1 or count > most:
            continue
        for rows in range(1, count + 1):
            if count % rows:
                continue
            error = abs(log_ratio - math.log(count // rows / rows))
            if error < least or (error == least and rows > best[0]):
                best, least = (rows, count // rows), error
    return best


_MODELS = ("MiniCPM-Llama3-V-2_5", "MiniCPM-V-2*", "MiniCPM-o-*", "MiniCPM-V-4", "MiniCPM-V-4_5")

ENTRIES = (
    Entry(
        name=MiniCPM46.name,
        checkpoints=("openbmb/MiniCPM-V-4.6", "openbmb/MiniCPM-V-4.7"),
        tasks=ALL_TASKS,
        boxes="<ref>..</ref><box>x1 y1 x2 y2</box>, 0 to 1000",
        evidence="documented",
        matches=lambda config, model: config.get("model_type") in ("minicpmv4_6", "minicpmv4_7"),
        make=MiniCPM46,
    ),
    Entry(
        name=MiniCPM.name,
        checkpoints=tuple(f"openbmb/{model}" for model in _MODELS),
        tasks=ALL_TASKS,
        boxes="<ref>..</ref><box>x1 y1 x2 y2</box>, 0 to 1000",
        evidence="documented",
        architectures=("MiniCPMV", "MiniCPMO"),
        matches=lambda config, model: config.get("model_type") in ("minicpmv", "minicpmo"),
        make=MiniCPM,
        own_code=True,
        requirements=(
            "transformers==4.44.2",
            "tokenizers==0.19.1",
            "huggingface_hub==0.36.2",
            "sentencepiece==0.2.1",
        ),
        note="vLLM has the model; MiniCPM-V 1 and 2 need torchvision and timm too",
    ),
)
