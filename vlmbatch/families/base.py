"""What a family of models has in common: how it is asked, and how its answer is read."""

from __future__ import annotations

import re
from typing import Protocol

from vlmbatch.errors import ErrorCode, RequestFailed, Stage, failed
from vlmbatch.grounding import Size
from vlmbatch.records import Answer, LoadedImage, TaskKind
from vlmbatch.tasks import Ask


class Family(Protocol):
    """One way of prompting and answering. Chosen by the model's config, never by its answers."""

    name: str
    version: int
    """Counts changes of ``read``: answers read by another version can be read again."""

    def word(self, ask: Ask) -> str:
        """The text of the user's turn; the engine puts the image before it."""

    def read(
        self, kind: TaskKind, text: str, *, labels: tuple[str, ...], image: LoadedImage
    ) -> Answer:
        """The completion's text as an answer, boxes in pixels of the upright original image.

        Raises RequestFailed (parse_failed), and nothing else, whatever the text is.
        """

    def target(self, size: Size) -> Size:
        """The size that the model will see of an image of this size; the loader shrinks to it."""


CAPTIONS = {
    "short": "Describe this image in one short sentence.",
    "detailed": "Describe this image in detail.",
}
OCR = "Read all the text in this image. Answer with the text only."

_SPECIAL = re.compile(r"<\|[^<>|]{1,48}\|>|</?s>|<(?:eos|bos|pad|end_of_utterance|end_of_turn)>")


def plain_text(text: str) -> str:
    """The text without special tokens and outer whitespace. Raises parse_failed if none is left."""
    plain = _SPECIAL.sub("", text).strip()
    if not plain:
        raise unreadable("the model answered nothing")
    return plain


def unreadable(message: str) -> RequestFailed:
    return failed(ErrorCode.PARSE_FAILED, Stage.PARSE, message)


def shown(text: str, length: int = 80) -> str:
    """The text in quotes for a message, cut to a length."""
    return repr(text if len(text) <= length else f"{text[:length]}...")
