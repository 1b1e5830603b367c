"""What Qwen-VL's own fine-tuning code reads: LLaVA's shape, boxes as the model itself writes them.

Qwen2.5-VL counts pixels of the image as its processor resizes it, so the pixel budget of the
training decides the numbers; Qwen2-VL, Qwen3-VL and later count from 0 to 1000. Source:
QwenLM/Qwen3-VL, qwen-vl-finetune/README.md; the spaces are those of ``families/qwen.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from vlmbatch.families import Family
from vlmbatch.grounding import Box, Size
from vlmbatch.records import LoadedImage


def answer(family: Family, boxes: Sequence[Box], size: Size) -> str:
    """Boxes in image pixels as the family's model says them of an image of this size."""
    given = family.target(size)
    pixels = Image.new("1", (given.width, given.height))  # only its size matters
    return family.write(boxes, image=LoadedImage(pixels, size, ""))
