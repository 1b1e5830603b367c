"""LLaVA 1.5, 1.6 (NeXT) and OneVision: boxes as four numbers from 0 to 1.

``[0.32, 0.15, 0.63, 0.89]``, xyxy, usually two decimals. Evidence:

- 1.5: prompts from haotian-liu/LLaVA (documented). Its boxes refer to the picture padded to a
  square (issues 606, 822), but people who evaluated it disagree about RefCOCO: ``padded`` is the
  default, ``squash`` the other reading. transformers' default processor shrinks the shorter side
  and cuts the longer one at both ends, so the picture is padded before it goes in (``prepare``),
  with the encoder's mean colour as in the original.
- 1.6 and OneVision: nothing is documented for boxes; those of 1.5, of the picture itself
  (unverified). Their processors see the whole picture.

Tokens: transformers 5.19, models/llava*/processing_*.py. Without a chat template ``frame`` is the
conversation of the original code, by language model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import floor, sqrt
from typing import TYPE_CHECKING, Any

from vlmbatch.families.base import (
    Chat,
    Entry,
    answered,
    in_pixels,
    steps_of,
    whole,
)
from vlmbatch.families.sizes import shrink_to_edge
from vlmbatch.grounding import Box, GridSpace, PaddedSpace, Size, Space
from vlmbatch.records import IMAGE, Answer, LoadedImage, TaskKind
from vlmbatch.tasks import Ask

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN_COLOUR = (122, 116, 104)
"""CLIP's mean colour, 255 x image_mean."""

PADDED, SQUASHED = PaddedSpace(1), GridSpace(1)

_NUMBER = r"\s{0,9}(-?(?:\d{1,6}(?:\.\d{0,9})?|\.\d{1,9}))\s{0,9}"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions. "
)
_VICUNA = f"{_SYSTEM}USER: {IMAGE}\n{{text}} ASSISTANT:"
_MISTRAL = f"[INST] {IMAGE}\n{{text}} [/INST]"
_HERMES = (
    "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n"
    f"{IMAGE}\n{{text}}<|im_end|><|im_start|>assistant\n"
)
_QWEN = f"<|im_start|>user {IMAGE}\n{{text}}<|im_end|><|im_start|>assistant\n"
_YI_34B_WIDTH = 7168

_TASKS = (TaskKind.CAPTION, TaskKind.VQA, TaskKind.GROUND, TaskKind.OCR)


class Llava(Chat):
    """LLaVA 1.5: a square of ``side`` pixels, ``grid`` x ``grid`` tokens."""

    name = "llava"
    space: Space = PADDED
    frame = _VICUNA

    def __init__(self, side: int = 336, grid: int = 24) -> None:
        self._side, self._grid = side, grid

    def word_boxes(self, ask: Ask) -> str:
        if ask.kind is TaskKind.DETECT:
            return super().word_boxes(ask)
        return (
            "Please provide the bounding box coordinate of the region this sentence describes: "
            f"{ask.question}"
        )

    def read_boxes(
        self, kind: TaskKind, text: str, labels: tuple[str, ...], image: LoadedImage
    ) -> Answer:
        text = answered(text)
        return in_pixels(_boxes(text, labels[0] if labels else ""), text, self.space, image)

    def write(self, boxes: Sequence[Box], *, image: LoadedImage) -> str:
        if not boxes:
            return "There is none."
        texts = []
        for box in boxes:
            b = self.space.from_pixels(box, image.size)
            x1, x2 = steps_of(100 * b.x1, 100 * b.x2, 100)
            y1, y2 = steps_of(100 * b.y1, 100 * b.y2, 100)
            texts.append("[" + ", ".join(f"{n / 100:.2f}" for n in (x1, y1, x2, y2)) + "]")
        return ", ".join(texts)

    def step(self, size: Size) -> tuple[float, float]:
        """A hundredth, in pixels."""
        (x, _), (y, _) = self.space.axes(size)
        return x / 100, y / 100

    def target(self, size: Size) -> Size:
        return shrink_to_edge(size, self._side)

    def prepare(self, pixels: Image) -> Image:
        """Padded to a square, the picture in the middle, as PaddedSpace has it."""
        return padded(pixels)

    def image_tokens(self, size: Size) -> int:
        return self._grid**2


class LlavaNext(Llava):
    """LLaVA 1.6: the whole picture squashed, and parts of it in more detail."""

    name = "llava_next"
    space: Space = SQUASHED

    def __init__(
        self, side: int, grid: int, pinpoints: Sequence[tuple[int, int]], frame: str
    ) -> None:
        super().__init__(side, grid)
        self._pinpoints = pinpoints
        self.frame = frame

    def target(self, size: Size) -> Size:
        return size

    def prepare(self, pixels: Image) -> Image:
        return pixels

    def image_tokens(self, size: Size) -> int:
        rows, columns = self._unpadded(size)
        return self._grid**2 + rows * columns + rows

    def _unpadded(self, size: Size) -> tuple[int, int]:
        """Rows and columns of features of the enlarged picture, its padding left out."""
        height, width = _best(size, self._pinpoints)
        rows, columns = self._grid * (height // self._side), self._grid * (width // self._side)
        if size.width / size.height > columns / rows:
            kept = int(round(size.height * (columns / size.width), 7))
            return rows - (rows - kept) // 2 * 2, columns
        kept = int(round(size.width * (rows / size.height), 7))
        return rows, columns - (columns - kept) // 2 * 2


class LlavaOneVision(LlavaNext):
    """As 1.6, with a bound on the tokens: what is more than ``most`` squares is pooled."""

    name = "llava_onevision"
    most = 9

    def image_tokens(self, size: Size) -> int:
        rows, columns = self._unpadded(size)
        ratio = sqrt(rows * columns / (self.most * self._grid**2))
        if ratio > 1.1:
            rows, columns = floor(rows // ratio), floor(columns // ratio)
        return self._grid**2 + rows * columns + rows


def padded(pixels: Image) -> Image:
    """In the middle of a square of CLIP's mean colour (``expand2square`` of the original)."""
    from PIL import Image

    if pixels.width == pixels.height:
        return pixels
    side = max(pixels.size)
    square = Image.new("RGB", (side, side), MEAN_COLOUR)
    square.paste(pixels, ((side - pixels.width) // 2, (side - pixels.height) // 2))
    return square


def _boxes(text: str, label: str) -> Iterator[Box]:
    """Fours of numbers; such that are far from 0 to 1 are of another convention, and no boxes."""
    for match in _BOX.finditer(text):
        x1, y1, x2, y2 = map(float, match.groups())
        if max(x1, y1, x2, y2) <= 2:
            yield Box(label, x1, y1, x2, y2)


def _best(size: Size, pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(height, width) of the resolution that keeps most pixels and wastes fewest."""

    def rank(pinpoint: tuple[int, int]) -> tuple[int, int]:
        height, width = pinpoint
        scale = min(width / size.width, height / size.height)
        kept = min(int(size.width * scale) * int(size.height * scale), size.pixels)
        return kept, kept - width * height

    return max(pinpoints, key=rank)


def _pinpoints(config: Mapping[str, Any], default: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found = config.get("image_grid_pinpoints")
    try:
        return [(int(height), int(width)) for height, width in found or ()] or default
    except (TypeError, ValueError):
        return default


def _frame(config: Mapping[str, Any]) -> str:
    """The original code decides by the checkpoint's name; the language models tell as much."""
    text = config.get("text_config")
    kind = text.get("model_type") if isinstance(text, Mapping) else None
    if kind == "mistral":
        return _MISTRAL
    if kind == "qwen2":
        return _QWEN
    return (
        _HERMES
        if whole(config, "text_config", "hidden_size", default=0) == _YI_34B_WIDTH
        else (_VICUNA)
    )


def _side_and_grid(config: Mapping[str, Any], side: int) -> tuple[int, int]:
    side = whole(config, "vision_config", "image_size", default=side)
    return side, max(1, side // whole(config, "vision_config", "patch_size", default=14))


def _make_llava(config: Mapping[str, Any]) -> Llava:
    return Llava(*_side_and_grid(config, 336))


def _make_next(config: Mapping[str, Any]) -> LlavaNext:
    default = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
    side, grid = _side_and_grid(config, 336)
    return LlavaNext(side, grid, _pinpoints(config, default), _frame(config))


def _make_onevision(config: Mapping[str, Any]) -> LlavaOneVision:
    default = [(384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7)]
    side, grid = _side_and_grid(config, 384)
    return LlavaOneVision(side, grid, _pinpoints(config, default), _QWEN)


def _is_llava(config: Mapping[str, Any], model_id: str) -> bool:
    """With CLIP as in 1.5; others (SigLIP, InternViT) share the name of the type only."""
    vision = config.get("vision_config")
    encoder = vision.get("model_type") if isinstance(vision, Mapping) else None
    return config.get("model_type") == "llava" and encoder in (None, "clip_vision_model")


ENTRIES = (
    Entry(
        name="llava",
        checkpoints=("llava-hf/llava-1.5-*", "llava-hf/bakLlava-v1-hf"),
        tasks=_TASKS,
        boxes="[x1, y1, x2, y2], 0 to 1 of the square that the picture is padded to",
        evidence="documented",
        matches=_is_llava,
        make=_make_llava,
        box_spaces={"padded": PADDED, "squash": SQUASHED},
        note="whether RefCOCO's boxes were of the padded square is disputed: --box-space squash",
    ),
    Entry(
        name="llava_next",
        checkpoints=(
            "llava-hf/llava-v1.6-*",
            "llava-hf/llama3-llava-next-8b-hf",
            "llava-hf/llava-next-*",
        ),
        tasks=_TASKS,
        boxes="[x1, y1, x2, y2], 0 to 1 (as of 1.5: not documented)",
        evidence="unverified",
        matches=lambda config, model_id: config.get("model_type") == "llava_next",
        make=_make_next,
        box_spaces={"squash": SQUASHED, "padded": PADDED},
    ),
    Entry(
        name="llava_onevision",
        checkpoints=("llava-hf/llava-onevision-*",),
        tasks=_TASKS,
        boxes="[x1, y1, x2, y2], 0 to 1 (as of 1.5: not documented)",
        evidence="unverified",
        matches=lambda config, model_id: config.get("model_type") == "llava_onevision",
        make=_make_onevision,
        box_spaces={"squash": SQUASHED, "padded": PADDED},
    ),
)
