"""TRL's vision data sets for SFTTrainer: Parquet with ``images`` and ``messages``.

Read from trl 1.16 (``data_utils.prepare_multimodal_messages``): images are bytes in the column
``images``, ``content`` is a plain string, and TRL itself puts the image blocks before the first
user's words. Blocks of our own would break: Arrow gives every block every key.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pyarrow as pa

from vlmbatch.exports.base import Example, ImageMode, Tables, with_features

MODES = (ImageMode.REFERENCE, ImageMode.COPY)
IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
MESSAGE = pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())])


class Trl(Tables):
    """A row for each conversation. Images that are not embedded are named by absolute paths:
    ``datasets`` opens relative ones from wherever the trainer was started."""

    name = "trl"
    about = "Parquet for TRL's SFTTrainer: images, messages"
    images: ClassVar[tuple[ImageMode, ...]] = (ImageMode.EMBED, *MODES)
    opens_addresses = True
    absolute_paths = True
    talks = True
    taken = frozenset(("id", "images", "messages", "image", "prompt", "completion", "tools"))

    def schema(self) -> pa.Schema:
        columns = [
            pa.field("id", pa.string()),
            pa.field("images", pa.list_(IMAGE)),
            pa.field("messages", pa.list_(MESSAGE)),
            *self.carried_fields(),
        ]
        return with_features(pa.schema(columns), images=["images"])

    def records(self, example: Example) -> Iterator[dict[str, Any]]:
        images = [
            {"bytes": picture.data, "path": picture.name if picture.data else picture.path}
            for picture in example.images
        ]
        for conversation in self.export.conversations.of(example):
            messages = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
            yield {
                "id": conversation.id,
                "images": images,
                "messages": messages,
                **self.carried(example),
            }


FORMAT = Trl
