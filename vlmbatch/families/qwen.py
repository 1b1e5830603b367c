"""The Qwen-VL models; each generation puts its boxes in another space.

- Qwen-VL, Qwen-VL-Chat: ``<ref>a bowl</ref><box>(2,269),(304,674)</box>``, 0 to 999 over the image,
  which is squashed to 448 x 448. The README says [0, 1000), the evaluation code divides by 999.
- Qwen2-VL: the same between ``<|box_start|>`` and its like, 0 to 1000 (issue 189).
- Qwen2.5-VL: JSON, in pixels of the image as its processor resizes it (staff, issue 782).
- Qwen3-VL, 3.5 and 4 (experimental): the same JSON, but 0 to 1000 (staff, issue 1427).

Prompts are those of the READMEs and cookbooks. Resizing is transformers' ``smart_resize``, with the
pixel budget of the checkpoint's preprocessor_config.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmbatch.families.base import ALL_TASKS, OCR, Chat, Entry, wanted, whole
from vlmbatch.families.json_boxes import on_grid, read_json, write_json
from vlmbatch.families.sizes import (
    at_most,
    pixel_budget,
    shrink_to_pixels,
    smart_resize,
    too_long,
)
from vlmbatch.families.tags import Tagged, Tags
from vlmbatch.grounding import Box, GridSpace, ResizedSpace, Size, Space
from vlmbatch.records import IMAGE, Answer, LoadedImage, TaskKind
from vlmbatch.tasks import Ask

_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


REQUIREMENTS = (
    "transformers==4.37.2",
    "tokenizers==0.15.2",
    "huggingface_hub==0.36.2",
    "tiktoken==0.12.0",
    "einops==0.8.1",
    "transformers_stream_generator==0.0.5",
)
"""Of the first generation; the authors say transformers 4.32, which has no wheels for 3.12."""


class QwenVLChat(Tagged):
    """Qwen-VL-Chat: ChatML with the image's place in the text."""

    name = "qwen_vl_chat"
    raw = True
    space: Space = GridSpace(999)
    tags = Tags(ref=("<ref>", "</ref>"), box=("<box>", "</box>"), quad=("<quad>", "</quad>"))

    def __init__(self, side: int = 448) -> None:
        self._side = side

    def word(self, ask: Ask) -> str:
        said = super().word(ask)
        user = f"<|im_start|>user\nPicture 1: {IMAGE}\n{said}<|im_end|>\n"
        return f"{_SYSTEM}{user}<|im_start|>assistant\n"

    def word_boxes(self, ask: Ask) -> str:
        return f"Output the bounding box of {wanted(ask)}"

    def write(self, boxes: Sequence[Box], *, image: LoadedImage) -> str:
        return _write_tagged(boxes, self.tags, self.space, 999, image)

    def target(self, size: Size) -> Size:
        return at_most(size, self._side)

    def image_tokens(self, size: Size) -> int | None:
        """256 from the resampler."""
        return 256


class QwenVL(QwenVLChat):
    """Qwen-VL, the base model: it continues the text; an answer to ground begins inside the box."""

    name = "qwen_vl"

    def word(self, ask: Ask) -> str:
        match ask.kind:
            case TaskKind.VQA:
                return f"{IMAGE}{ask.question} Answer:"
            case TaskKind.GROUND | TaskKind.DETECT:
                return f"{IMAGE}<ref>{wanted(ask)}</ref><box>"
            case TaskKind.OCR:
                return f"{IMAGE}{OCR} Answer:"
            case _:
                detailed = "" if ask.style == "short" else " in detail"
                return f"{IMAGE}Describe the image in English{detailed}:"

    def read_boxes(
        self, kind: TaskKind, text: str, labels: tuple[str, ...], image: LoadedImage
    ) -> Answer:
        opens, closes = self.tags.box
        if opens not in text.partition(closes)[0]:
            text = opens + text
        return super().read_boxes(kind, text, labels, image)


class Qwen2VL(Tagged):
    """Qwen2-VL; the tags are special tokens."""

    name = "qwen2_vl"
    space: Space = GridSpace(1000)
    tags = Tags(
        ref=("<|object_ref_start|>", "<|object_ref_end|>"),
        box=("<|box_start|>", "<|box_end|>"),
        quad=("<|quad_start|>", "<|quad_end|>"),
    )

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        self._resizing = Resizing(config or {}, patch=14)

    def word_boxes(self, ask: Ask) -> str:
        return f"Detect the bounding box of {wanted(ask)}"

    def write(self, boxes: Sequence[Box], *, image: LoadedImage) -> str:
        return _write_tagged(boxes, self.tags, self.space, 1000, image)

    def target(self, size: Size) -> Size:
        return self._resizing.target(size)

    def image_tokens(self, size: Size) -> int | None:
        return self._resizing.tokens(size)


class Qwen3VL(Chat):
    """Qwen3-VL and later: JSON from 0 to 1000."""

    name = "qwen3_vl"
    patch = 16

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        self._resizing = Resizing(config or {}, self.patch)

    def word_boxes(self, ask: Ask) -> str:
        if ask.kind is TaskKind.GROUND:
            how = "in this image and output the bbox coordinates in JSON format."
            return f"Locate {ask.question} {how}"
        all_of = f"Outline the position of each {wanted(ask)}"
        return f"{all_of} and output all the coordinates in JSON format."

    def read_boxes(
        self, kind: TaskKind, text: str, labels: tuple[str, ...], image: LoadedImage
    ) -> Answer:
        return read_json(kind, text, labels, self.space_of(image), image)

    def write(self, boxes: Sequence[Box], *, image: LoadedImage) -> str:
        space = self.space_of(image)
        last = self.last_of(image)
        return write_json(
            on_grid(space.from_pixels(box, image.size), last.width, last.height) for box in boxes
        )

    def space_of(self, image: LoadedImage) -> Space:
        return GridSpace(1000)

    def last_of(self, image: LoadedImage) -> Size:
        """The largest coordinates."""
        return Size(1000, 1000)

    def step(self, size: Size) -> tuple[float, float]:
        """Pixels from one coordinate to the next, x and y, of an image given in its target size."""
        return size.width / 1000, size.height / 1000

    def target(self, size: Size) -> Size:
        return self._resizing.target(size)

    def image_tokens(self, size: Size) -> int | None:
        return self._resizing.tokens(size)


class Qwen25VL(Qwen3VL):
    """Qwen2.5-VL: JSON in pixels of the resized image, so the size that the engine got decides."""

    name = "qwen2_5_vl"
    patch = 14

    def space_of(self, image: LoadedImage) -> Space:
        return ResizedSpace(self.last_of(image))

    def last_of(self, image: LoadedImage) -> Size:
        return self.seen(Size(*image.pixels.size))

    def seen(self, given: Size) -> Size:
        return self._resizing.grid(given)

    def step(self, size: Size) -> tuple[float, float]:
        grid = self._resizing.grid(self.target(size))
        return size.width / grid.width, size.height / grid.height


class Resizing:
    """What the image processor of Qwen2-VL and all later ones does with an image's size."""

    def __init__(self, config: Mapping[str, Any], patch: int) -> None:
        patch = whole(config, "preprocessor", "patch_size", default=patch)
        self._factor = patch * whole(config, "preprocessor", "merge_size", default=2)
        # Settings that say nothing of it get the class's default; where there are none to read,
        # those of the checkpoints on the Hub are likely (transformers issue 36292).
        most = 28 * 28 * 1280 if "preprocessor" in config else 12_845_056
        self._least, self._most = pixel_budget(config, 56 * 56, most)

    def target(self, size: Size) -> Size:
        return shrink_to_pixels(size, max(self._most, self._factor**2))

    def grid(self, given: Size) -> Size:
        """The size that the processor makes of the size that it is given."""
        return smart_resize(given, self._factor, self._least, self._most)

    def tokens(self, size: Size) -> int | None:
        """Without the two tokens around them. None: the processor refuses this shape."""
        given = self.target(size)
        return None if too_long(given) else self.grid(given).pixels // self._factor**2


def _write_tagged(
    boxes: Sequence[Box], tags: Tags, space: Space, last: int, image: LoadedImage
) -> str:
    written = []
    for box in boxes:
        b = on_grid(space.from_pixels(box, image.size), last)
        written.append(tags.written(box.label, f"({b.x1},{b.y1}),({b.x2},{b.y2})"))
    return "".join(written) or "There are none."


def _is_qwen_vl(config: Mapping[str, Any], model: str) -> bool:
    """Qwen-VL's ``model_type`` is that of the first text models, which have no vision part."""
    return config.get("model_type") == "qwen" and ("visual" in config or "-vl" in model.lower())


ENTRIES = (
    Entry(
        name=QwenVLChat.name,
        checkpoints=("Qwen/Qwen-VL-Chat*",),
        tasks=ALL_TASKS,
        boxes="<ref>..</ref><box>(x1,y1),(x2,y2)</box>, 0 to 999",
        evidence="documented",
        architectures=("QWenLMHeadModel",),
        matches=lambda config, model: _is_qwen_vl(config, model) and "chat" in model.lower(),
        make=lambda config: QwenVLChat(whole(config, "visual", "image_size", default=448)),
        own_code=True,
        requirements=REQUIREMENTS,
        note="its own code needs torchvision too",
    ),
    Entry(
        name=QwenVL.name,
        checkpoints=("Qwen/Qwen-VL",),
        tasks=ALL_TASKS,
        boxes="<ref>..</ref><box>(x1,y1),(x2,y2)</box>, 0 to 999",
        evidence="documented",
        architectures=("QWenLMHeadModel",),
        matches=lambda config, model: _is_qwen_vl(config, model) and "chat" not in model.lower(),
        make=lambda config: QwenVL(whole(config, "visual", "image_size", default=448)),
        own_code=True,
        requirements=REQUIREMENTS,
        note="its own code needs torchvision too",
    ),
    Entry(
        name=Qwen2VL.name,
        checkpoints=("Qwen/Qwen2-VL-*-Instruct*",),
        tasks=ALL_TASKS,
        boxes="<|box_start|>(x1,y1),(x2,y2)<|box_end|>, 0 to 1000",
        evidence="documented",
        matches=lambda config, model: config.get("model_type") == "qwen2_vl",
        make=Qwen2VL,
    ),
    Entry(
        name=Qwen25VL.name,
        checkpoints=("Qwen/Qwen2.5-VL-*-Instruct*",),
        tasks=ALL_TASKS,
        boxes='JSON "bbox_2d", pixels of the resized image',
        evidence="documented",
        matches=lambda config, model: config.get("model_type") == "qwen2_5_vl",
        make=Qwen25VL,
    ),
    Entry(
        name=Qwen3VL.name,
        checkpoints=("Qwen/Qwen3-VL-*", "Qwen/Qwen3.5-*", "Qwen/Qwen4-Exp*"),
        tasks=ALL_TASKS,
        boxes='JSON "bbox_2d", 0 to 1000',
        evidence="documented",
        matches=lambda config, model: (
            config.get("model_type")
            in ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp")
        ),
        make=Qwen3VL,
    ),
)
