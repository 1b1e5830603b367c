"""Any model with a chat template: plain prompts, and boxes as JSON from 0 to 1000.

The box convention is a guess of the runner's for models that it does not know; many recent models
were trained on it. Where another one holds, ``--box-space`` says which.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlmbatch.families.base import ALL_TASKS, Chat, Entry
from vlmbatch.families.json_boxes import on_grid, read_json, words_for_json, write_json
from vlmbatch.grounding import Box, GridSpace, PixelSpace, Space, Transposed
from vlmbatch.records import Answer, LoadedImage, TaskKind
from vlmbatch.tasks import Ask

_JSON_FORM = (
    'Answer with JSON only: [{"bbox_2d": [x1, y1, x2, y2], "label": "..."}], '
    "coordinates from 0 to 1000, or [] if there is none."
)

SPACES: dict[str, Space] = {
    "0-1000": GridSpace(1000),
    "0-1000-yxyx": Transposed(GridSpace(1000)),
    "0-999": GridSpace(999),
    "0-100": GridSpace(100),
    "0-1": GridSpace(1),
    "pixels": PixelSpace(),
}
"""The readings that ``--box-space`` offers, the guess first; ``pixels``: of the original image."""


class Generic(Chat):
    """The fallback family."""

    name = "generic"
    version = 3
    space: Space = SPACES["0-1000"]

    def word_boxes(self, ask: Ask) -> str:
        return words_for_json(ask, _JSON_FORM)

    def read_boxes(
        self, kind: TaskKind, text: str, labels: tuple[str, ...], image: LoadedImage
    ) -> Answer:
        return read_json(kind, text, labels, self.space, image)

    def write(self, boxes: Sequence[Box], *, image: LoadedImage) -> str:
        return write_json(on_grid(GridSpace(1000).from_pixels(b, image.size), 1000) for b in boxes)


ENTRIES = (
    Entry(
        name="generic",
        checkpoints=("any other with a chat template",),
        tasks=ALL_TASKS,
        boxes="JSON, bbox_2d, 0 to 1000 (a guess)",
        evidence="unverified",
        matches=lambda config, model_id: True,
        make=lambda config: Generic(),
        box_spaces=SPACES,
        note="where the model has another convention, --box-space says which",
    ),
)
