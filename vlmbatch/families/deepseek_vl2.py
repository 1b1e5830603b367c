"""DeepSeek-VL2: ``<|ref|>The giraffe<|/ref|><|det|>[[580, 270, 999, 900]]<|/det|>``, 0 to 999.

Syntax, prompt and the 999: serve/app_modules/utils.py and the README of DeepSeek-VL2. The image is
padded to a grid of 384 px tiles, but the official drawing code maps boxes to the image itself.
DeepSeek-OCR writes the same tags (not verified).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmbatch.families.base import ALL_TASKS, Entry
from vlmbatch.families.json_boxes import edges, on_grid
from vlmbatch.families.sizes import shrink_into
from vlmbatch.families.tags import Tagged, Tags
from vlmbatch.grounding import Box, GridSpace, Size, Space
from vlmbatch.records import LoadedImage, TaskKind
from vlmbatch.tasks import Ask

_TILE = 384
_SIDE = 14  # tokens along a tile
_FRAMES = tuple(
    Size(columns * _TILE, rows * _TILE)
    for columns in range(1, 10)
    for rows in range(1, 9 // columns + 1)
)


class DeepSeekVL2(Tagged):
    """DeepSeek-VL2; a row with more than two images costs less, its images are not cut."""

    name = "deepseek_vl2"
    space: Space = GridSpace(999)
    tags = Tags(ref=("<|ref|>", "<|/ref|>"), box=("<|det|>", "<|/det|>"))

    def __init__(self, frames: Sequence[Size] = _FRAMES) -> None:
        self._frames = frames

    def word_boxes(self, ask: Ask) -> str:
        if ask.kind is TaskKind.GROUND:
            return f"<|ref|>{ask.question}<|/ref|>."
        return f"<|grounding|>Detect every {', '.join(ask.labels)} in this image."

    def write(self, boxes: Sequence[Box], *, image: LoadedImage) -> str:
        grid = [on_grid(self.space.from_pixels(box, image.size), 999) for box in boxes]
        written = (self.tags.written(box.label, f"[{edges(box)}]") for box in grid)
        return "".join(written) or "There are none."

    def target(self, size: Size) -> Size:
        return shrink_into(size, self._frame(size))

    def image_tokens(self, size: Size) -> int | None:
        """The overview's rows, a separator, the tiles' rows; each row ends with one more token."""
        frame = self._frame(self.target(size))
        columns, rows = frame.width // _TILE * _SIDE, frame.height // _TILE * _SIDE
        return _SIDE * (_SIDE + 1) + 1 + rows * (columns + 1)

    def _frame(self, size: Size) -> Size:
        """The frame that keeps most of the image's pixels, then the one with least padding."""

        def kept(frame: Size) -> int:
            scale = min(frame.width / size.width, frame.height / size.height)
            return min(int(size.width * scale) * int(size.height * scale), size.pixels)

        return max(self._frames, key=lambda frame: (kept(frame), kept(frame) - frame.pixels))


class DeepSeekOcr(DeepSeekVL2):
    """DeepSeek-OCR: pages as Markdown."""

    name = "deepseek_ocr"

    def word(self, ask: Ask) -> str:
        if ask.kind is TaskKind.OCR:
            return "<|grounding|>Convert the document to markdown."
        return super().word(ask)

    def target(self, size: Size) -> Size:
        return size

    def image_tokens(self, size: Size) -> int | None:
        return None


def _of(config: Mapping[str, Any]) -> DeepSeekVL2:
    listed = config.get("candidate_resolutions")
    frames = [
        Size(int(pair[0]), int(pair[1]))
        for pair in (listed if isinstance(listed, list) else ())
        if isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n > 0 for n in pair)
    ]
    return DeepSeekVL2(frames or _FRAMES)


def _is_ocr(config: Mapping[str, Any], model: str) -> bool:
    architectures = config.get("architectures")
    named = [model, *(architectures if isinstance(architectures, list) else ())]
    return any("ocr" in str(name).lower() for name in named)


ENTRIES = (
    Entry(
        name=DeepSeekOcr.name,
        checkpoints=("deepseek-ai/DeepSeek-OCR*",),
        tasks=ALL_TASKS,
        boxes="<|ref|>..<|/ref|><|det|>[[x1, y1, x2, y2]]<|/det|>, 0 to 999",
        evidence="unverified",
        architectures=("DeepseekOCRForCausalLM",),
        matches=lambda config, model: (
            config.get("model_type") in ("deepseek_ocr", "deepseek_ocr2")
            or (config.get("model_type") == "deepseek_vl_v2" and _is_ocr(config, model))
        ),
        make=lambda config: DeepSeekOcr(),
        own_code=True,
        note="prompt and syntax are DeepSeek-VL2's and from memory",
    ),
    Entry(
        name=DeepSeekVL2.name,
        checkpoints=("deepseek-ai/deepseek-vl2*",),
        tasks=ALL_TASKS,
        boxes="<|ref|>..<|/ref|><|det|>[[x1, y1, x2, y2]]<|/det|>, 0 to 999",
        evidence="documented",
        architectures=("DeepseekVLV2ForCausalLM",),
        matches=lambda config, model: config.get("model_type") == "deepseek_vl_v2",
        make=_of,
        note="for vLLM, or with its own code",
    ),
)
