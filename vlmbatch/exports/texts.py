"""The texts of examples, for formats that have no turns."""

from __future__ import annotations

from typing import Any

from vlmbatch.exports.base import Example, Unsuited


def texts_of(example: Example) -> list[str]:
    """Of each answer that has one: its text, or its JSON. Raises Unsuited where there is none."""
    found = [
        text
        for result in example.results
        if (text := (result.answer.text if result.answer else None) or result.json)
    ]
    if not found:
        raise Unsuited("no_text")
    return found


def answers_of(example: Example) -> list[dict[str, Any]]:
    """Each answer with what was asked; JSON as text."""
    return [
        {
            "task": result.task,
            "question": result.question,
            "text": result.answer and result.answer.text,
            "json": result.json,
        }
        for result in example.results
    ]


def line_of_text(text: str) -> str:
    """The text in one line."""
    return " ".join(text.split())
