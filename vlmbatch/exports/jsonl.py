"""One JSON object for each answer: for scripts, and for formats that nobody has written yet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from vlmbatch.exports.base import Example, ImageMode, Lines


class Jsonl(Lines):
    """``images`` is a list, ``prompt`` what the model was asked, boxes are in pixels (xyxy)."""

    name = "jsonl"
    about = "an object for each answer: text, boxes, json, the images' paths, carried columns"
    images = (ImageMode.REFERENCE, ImageMode.COPY)
    opens_addresses = True
    talks = True
    upright = True
    taken = frozenset(
        ("id", "row", "task", "request", "sample", "question", "prompt", "text", "boxes", "points")
    ) | {"json", "finish_reason", "images", "width", "height", "model"}

    def records(self, example: Example) -> Iterator[dict[str, Any]]:
        images = [picture.path for picture in example.images]
        size = example.images[0].size
        for result in example.results:
            answer = result.answer
            assert answer is not None
            yield {
                "id": example.id,
                "row": example.row,
                "task": result.task,
                "request": result.request,
                "sample": result.sample,
                "question": result.question,
                "prompt": self.export.conversations.question(example, result),
                "text": answer.text,
                "boxes": None if answer.boxes is None else list(map(asdict, answer.boxes)),
                "points": None if answer.points is None else list(map(asdict, answer.points)),
                "json": result.json,
                "finish_reason": result.completion and result.completion.finish_reason,
                "images": images,
                "width": size and size.width,
                "height": size and size.height,
                "model": self.export.model,
                **self.carried(example),
            }


FORMAT = Jsonl
