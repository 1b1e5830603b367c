"""The texts of examples, for formats that have no turns."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vlmbatch.exports.base import Example


def no_text(batch: pa.RecordBatch) -> pa.Array:
    """A Drop: answers that are neither a text nor JSON, as boxes are."""
    is_text = pc.greater(pc.utf8_length(batch["text"]), 0)
    has_any = pc.or_(pc.fill_null(is_text, False), pc.is_valid(batch["json"]))
    return pc.if_else(has_any, pa.scalar(None, pa.string()), "no_text")


def texts_of(example: Example) -> list[str]:
    """Of each answer that ``no_text`` leaves: its text, or its JSON."""
    texts = ((result.answer.text if result.answer else None) for result in example.results)
    pairs = zip(texts, example.results, strict=True)
    return [text or result.json or "" for text, result in pairs]


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
