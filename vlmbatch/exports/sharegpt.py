"""LLaMA-Factory's data: ShareGPT in OpenAI's roles, with its entry in ``dataset_info.json``.

Source: ``data/README.md`` of hiyouga/LLaMA-Factory (ff6d4d1): one ``<image>`` in the text for each
image; paths are relative to the folder that ``dataset_dir`` (or ``media_dir``) names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vlmbatch.errors import UsageError
from vlmbatch.exports.base import Example, ImageMode, Lines
from vlmbatch.exports.conversations import messages_of

if TYPE_CHECKING:
    from vlmbatch.exports.exporting import Export


class Sharegpt(Lines):
    """``train.jsonl`` and ``dataset_info.json``, in which it is called ``NAME`` (``vlmbatch``);
    other splits are ``NAME_val`` and so on."""

    name = "sharegpt"
    about = "JSON lines for LLaMA-Factory: messages, images; and dataset_info.json"
    images = (ImageMode.REFERENCE, ImageMode.COPY)
    talks = True
    says_boxes = True
    upright = True
    options = {"name": "the data set's name in dataset_info.json (vlmbatch)"}  # noqa: RUF012
    taken = frozenset(("id", "messages", "images", "system", "tools", "videos", "audios"))

    def __init__(self, export: Export) -> None:
        super().__init__(export)
        self._name = export.options.get("name", "vlmbatch")
        if not re.fullmatch(r"[^\s,]+", self._name):
            raise UsageError(
                f"name={self._name} is no name of a data set: trainers are told a list of them",
                hint="without commas and blanks, as in name=captions",
            )

    def records(self, example: Example) -> Iterator[dict[str, Any]]:
        marks = "<image>" * len(example.images)
        for conversation in self.export.conversations.of(example):
            messages = messages_of(conversation)
            first = next(message for message in messages if message["role"] == "user")
            first["content"] = f"{marks}\n{first['content']}"
            yield {
                "id": conversation.id,
                "messages": messages,
                "images": [picture.path for picture in example.images],
                **self.carried(example),
            }

    def finish(self) -> None:
        super().finish()
        name, entries = self._name, {}
        for split in self.export.splits.names:
            if self.export.kept(split):
                entries[name if split == "train" else f"{name}_{split}"] = _entry(f"{split}.jsonl")
        text = json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
        self.export.destination.write("dataset_info.json", lambda file: file.write(text.encode()))


def _entry(file: str) -> dict[str, Any]:
    return {
        "file_name": file,
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    }


FORMAT = Sharegpt
