"""TRL's vision data sets for SFTTrainer: Parquet with ``images`` and ``messages``.

Read from trl 1.16 (``data_utils.prepare_multimodal_messages``): images are bytes in the column
``images``, ``content`` is a plain string, and TRL itself puts the image blocks before the first
user's words. Blocks of our own would break: Arrow gives every block every key.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa

from vlmbatch.errors import UsageError
from vlmbatch.exports.base import (
    SPLITS_OF_DATASETS,
    Example,
    ImageMode,
    Tables,
    with_features,
)
from vlmbatch.exports.conversations import messages_of

if TYPE_CHECKING:
    from vlmbatch.exports.exporting import Export

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
    says_boxes = True
    options: ClassVar[Mapping[str, str]] = {
        "completion": "true: columns prompt and completion instead of messages, so that TRL learns "
        "from the answer alone (with --conversation per-request)"
    }
    split_names: ClassVar[Mapping[str, str]] = SPLITS_OF_DATASETS
    taken = frozenset(("id", "images", "messages", "image", "prompt", "completion", "tools"))

    def __init__(self, export: Export) -> None:
        super().__init__(export)
        given = export.options.get("completion", "false")
        if given not in ("true", "false"):
            raise UsageError(f"completion={given} is neither true nor false", hint="leave it out")
        self._apart = given == "true"
        if self._apart and export.settings.wording.per != "request":
            raise UsageError(
                "a completion is one answer, and a conversation has them all",
                hint="add --conversation per-request",
            )

    def schema(self) -> pa.Schema:
        names = ("prompt", "completion") if self._apart else ("messages",)
        columns = [
            pa.field("id", pa.string()),
            pa.field("images", pa.list_(IMAGE)),
            *(pa.field(name, pa.list_(MESSAGE)) for name in names),
            *self.carried_fields(),
        ]
        return with_features(pa.schema(columns), images=["images"])

    def copy_to(self, example: Example, name: str) -> str:
        """Numbers alone: ``datasets`` takes ``0001-my-test.png`` for a file of the test split, too,
        and finds that it is no Parquet."""
        number = re.match(r"\d+(-\d+)?", name)
        assert number is not None, name
        return super().copy_to(example, number[0] + os.path.splitext(name)[1])

    def records(self, example: Example) -> Iterator[dict[str, Any]]:
        images = [
            {"bytes": picture.data, "path": picture.name if picture.data else picture.path}
            for picture in example.images
        ]
        for conversation in self.export.conversations.of(example):
            messages = messages_of(conversation)
            said = {"messages": messages}
            if self._apart:
                said = {"prompt": messages[:-1], "completion": messages[-1:]}
            yield {"id": conversation.id, "images": images, **said, **self.carried(example)}


FORMAT = Trl
