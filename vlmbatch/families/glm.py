"""GLM-4.1V, 4.5V and 4.6V: ``<|begin_of_box|>[[x1,y1,x2,y2]]<|end_of_box|>``, 0 to 1000.

Source: README of zai-org/GLM-V; brackets vary between answers. The same two tokens also stand
around the short final answer to a question. GLM-4V-9B, the older one, was not trained on boxes
(issue 196 of GLM-4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmbatch.families.base import (
    ALL_TASKS,
    TEXT_TASKS,
    Chat,
    Entry,
    plain_text,
    wanted,
    whole,
)
from vlmbatch.families.json_boxes import edges, on_grid
from vlmbatch.families.sizes import (
    at_most,
    pixel_budget,
    shrink_to_pixels,
    smart_resize,
    too_long,
)
from vlmbatch.families.tags import Tagged, Tags
from vlmbatch.grounding import Box, GridSpace, Size, Space
from vlmbatch.records import LoadedImage
from vlmbatch.tasks import Ask


class Glm(Tagged):
    """The GLM-V models; an image is treated as a video of two equal frames."""

    name = "glm4v"
    space: Space = GridSpace(1000)
    tags = Tags(box=("<|begin_of_box|>", "<|end_of_box|>"))

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        config = config or {}
        patch = whole(config, "preprocessor", "patch_size", default=14)
        self._factor = patch * whole(config, "preprocessor", "merge_size", default=2)
        least, most = pixel_budget(config, 112 * 112, 28 * 28 * 15_000)
        self._least, self._most = least / 2, most / 2

    def word_boxes(self, ask: Ask) -> str:
        boxes = "the bounding box [[x1,y1,x2,y2], …] in the image"
        return f"Please pinpoint {boxes} as per the given description. {wanted(ask)}"

    def plain(self, text: str) -> str:
        return plain_text(text)  # numbers in the final answer are its text

    def write(self, boxes: Sequence[Box], *, image: LoadedImage) -> str:
        grid = (on_grid(self.space.from_pixels(box, image.size), 1000) for box in boxes)
        lists = ",".join(f"[{','.join(map(str, edges(box)))}]" for box in grid)
        return self.tags.written("", f"[{lists}]")

    def target(self, size: Size) -> Size:
        return shrink_to_pixels(size, max(int(self._most), self._factor**2))

    def image_tokens(self, size: Size) -> int | None:
        """Source: ``smart_resize`` of transformers' glm4v image processor."""
        given = self.target(size)
        scale = max(1.0, self._factor / given.width, self._factor / given.height)
        if scale > 1:
            given = Size(int(given.width * scale), int(given.height * scale))
        if too_long(given):
            return None
        grid = smart_resize(given, self._factor, self._least, self._most)
        return grid.pixels // self._factor**2


class Glm4V9B(Chat):
    """GLM-4V-9B: squashed to one square; no boxes."""

    name = "glm_4v_9b"

    def __init__(self, side: int = 1120) -> None:
        self._side = side

    def target(self, size: Size) -> Size:
        return at_most(size, self._side)


ENTRIES = (
    Entry(
        name=Glm.name,
        checkpoints=("zai-org/GLM-4.1V-*", "zai-org/GLM-4.5V*", "zai-org/GLM-4.6V*"),
        tasks=ALL_TASKS,
        boxes="<|begin_of_box|>[[x1,y1,x2,y2]]<|end_of_box|>, 0 to 1000",
        evidence="documented",
        matches=lambda config, model: (
            config.get("model_type") in ("glm4v", "glm4v_moe", "glm46v", "glmga")
        ),
        make=Glm,
    ),
    Entry(
        name=Glm4V9B.name,
        checkpoints=("THUDM/glm-4v-9b",),
        tasks=TEXT_TASKS,
        boxes="",
        evidence="unverified",
        architectures=("GLM4VForCausalLM",),
        matches=lambda config, model: (
            config.get("model_type") == "chatglm" and "vision_config" in config
        ),
        make=lambda config: Glm4V9B(whole(config, "vision_config", "image_size", default=1120)),
        own_code=True,
    ),
)
