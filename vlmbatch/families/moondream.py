"""Moondream 2 and 3: methods of the checkpoint's own code, one for each kind of question.

``caption(image, length=...)``, ``query(image, question)``, ``detect(image, object)`` and
``point(image, object)`` (moondream/torch/moondream.py). Boxes come from a region head and not from
text, so only an engine that runs that code can give them; it passes them on as JSON:
``[{"x_min": 0.1, "y_min": 0.2, "x_max": 0.5, "y_max": 0.6}]`` or ``[{"x": 0.3, "y": 0.4}]``, 0 to 1
over the original image. Values can leave that range a little.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from vlmbatch.families.base import ALL_TASKS, Chat, Entry, wanted
from vlmbatch.families.json_boxes import default_label, find_json, placed
from vlmbatch.grounding import Box, GridSpace, Size, Space
from vlmbatch.records import Answer, LoadedImage, TaskKind
from vlmbatch.tasks import Ask


class Moondream(Chat):
    """What ``word`` gives is the argument of the method that the ask's kind needs.

    A caption's is ``caption short`` or ``caption`` (the normal length), the words by which vLLM's
    Moondream 3 knows them from questions.
    """

    name = "moondream"
    space: Space = GridSpace(1)

    def word(self, ask: Ask) -> str:
        if ask.kind is TaskKind.CAPTION:
            return "caption short" if ask.style == "short" else "caption"
        return super().word(ask)

    def word_boxes(self, ask: Ask) -> str:
        return wanted(ask)

    def read_boxes(
        self, kind: TaskKind, text: str, labels: tuple[str, ...], image: LoadedImage
    ) -> Answer:
        return placed(find_json(text, default_label(kind, labels)), text, self.space, image)

    def write(self, boxes: Sequence[Box], *, image: LoadedImage) -> str:
        own = (self.space.from_pixels(box, image.size) for box in boxes)
        return json.dumps(
            [
                {"x_min": b.x1, "y_min": b.y1, "x_max": b.x2, "y_max": b.y2, "label": b.label}
                for b in own
            ],
            ensure_ascii=False,
        )

    def image_tokens(self, size: Size) -> int | None:
        """The same for every image: its crops are pooled to 27 x 27; and one token before them."""
        return 27 * 27 + 1


ENTRIES = (
    Entry(
        name=Moondream.name,
        checkpoints=("vikhyatk/moondream2", "moondream/moondream*"),
        tasks=ALL_TASKS,
        boxes="own code: x_min, y_min, x_max, y_max, 0 to 1",
        evidence="documented",
        architectures=("HfMoondream", "Moondream3ForCausalLM"),
        matches=lambda config, model: config.get("model_type") in ("moondream1", "moondream3"),
        make=lambda config: Moondream(),
        own_code=True,
        note="--engine-arg points=true asks for points instead of boxes; vLLM has only captions "
        "and questions, and those only of Moondream 3",
    ),
)
