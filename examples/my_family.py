"""A family of your own: how a model that vlmbatch does not know is asked, and how it answers.

    vlmbatch run manifest.parquet -t detect -m my-org/my-vlm --family examples/my_family.py

The model of this example answers ``cat: 10 20 110 220; dog: ...``, xyxy from 0 to 1024 over the
whole image. Only ``read_boxes`` and ``word_boxes`` are its own; texts are asked for and read as of
any chat model. The file is Python and is executed: take only files that you trust.
"""

import re

from vlmbatch.families.base import ALL_TASKS, Chat, Entry, in_pixels, wanted
from vlmbatch.grounding import Box, GridSpace

ITEM = re.compile(r"([^:;]{1,80}):\s*(\d{1,4}) (\d{1,4}) (\d{1,4}) (\d{1,4})")


class MyFamily(Chat):
    name = "my_family"
    version = 1  # count it up when `read_boxes` changes
    space = GridSpace(1024)

    def word_boxes(self, ask):
        return f"Where is {wanted(ask)}? Answer as `label: x1 y1 x2 y2`, or `none`."

    def read_boxes(self, kind, text, labels, image):
        found = (Box(label.strip(), *map(float, numbers)) for label, *numbers in ITEM.findall(text))
        return in_pixels(found, text, self.space, image)


ENTRY = Entry(
    name="my_family",
    checkpoints=("my-org/my-vlm",),
    tasks=ALL_TASKS,
    boxes="label: x1 y1 x2 y2, 0 to 1024",
    evidence="unverified",
    matches=lambda config, model: config.get("model_type") == "my_vlm",
    make=lambda config: MyFamily(),
)
