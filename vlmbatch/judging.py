"""What ``-t judge`` asks: how right an answer is that another model gave about the same image."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vlmbatch.job import JUDGE, TaskSpec
from vlmbatch.records import Given

PROMPT = """\
Another model was shown this image and asked:
{{ question }}

It answered:
{{ answer }}

Judge that answer by what the image shows, and by nothing else.
5: right, and all that it says is in the image
4: right, with a small mistake or something that matters little left out
3: partly right
2: mostly wrong, or it says much that is not in the image
1: wrong, or no answer to what was asked
Answer with JSON only, the score and one short sentence: {"score": 3, "reason": "..."}"""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "score": {"type": "integer", "enum": [1, 2, 3, 4, 5]},
        "reason": {"type": "string"},
    },
    "required": ["score", "reason"],
    "additionalProperties": False,
}
"""A list of numbers rather than a range: every engine can hold a model to it."""

_UNWORDED = {"caption": "Describe the image.", "ocr": "Read all the text in the image."}


def completed(spec: TaskSpec) -> TaskSpec:
    """A judge's task with the prompt and the form of the answer that it does not name itself; any
    other task as it is."""
    if spec.name != JUDGE:
        return spec
    changes: dict[str, Any] = {}
    if spec.prompt is None:
        changes["prompt"] = PROMPT
    if spec.json_schema is None and spec.choices is None and spec.regex is None:
        changes["json_schema"] = SCHEMA
    return spec.model_copy(update=changes)


def given_of(record: Mapping[str, Any]) -> Given:
    """A result's question and answer, in words."""
    task = record["task"]
    question = _question(task, record["question"])
    if record["status"] != "ok":
        error = record["error"]
        return Given(task, question, "", f"no answer: {error['code']}: {error['message']}")
    return Given(task, question, _answer(record))


def _question(task: str, said: str | None) -> str:
    """What was asked, as a sentence."""
    if not said:
        return _UNWORDED.get(task, task)
    if task == "ground":
        return f"Where is this in the image: {said}"
    if task == "detect" and said.startswith("["):
        try:
            return f"Where in the image are: {', '.join(json.loads(said))}"
        except (ValueError, TypeError):  # a prompt of the user's own
            return said
    return said


def _answer(record: Mapping[str, Any]) -> str:
    """Boxes and points as shares of the image: which pixels a judge sees is its own matter."""
    if record["boxes"] is None:
        return record["text"] or ""
    width, height = record["image_width"] or 1, record["image_height"] or 1
    lines = [
        f"{box['label'] or 'it'}: from {box['x1'] / width:.0%} to {box['x2'] / width:.0%} of the "
        f"width, counted from the left, and from {box['y1'] / height:.0%} to "
        f"{box['y2'] / height:.0%} of the height, counted from the top"
        for box in record["boxes"]
    ]
    lines += [
        f"{point['label'] or 'it'}: at {point['x'] / width:.0%} of the width, counted from the "
        f"left, and {point['y'] / height:.0%} of the height, counted from the top"
        for point in record["points"] or ()
    ]
    return "\n".join(lines) or "It is not in the image."
