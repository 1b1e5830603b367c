"""What flows through a run: Row -> Request -> Completion -> Result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, cast

from vlmbatch.errors import Failure
from vlmbatch.grounding import Box, Point, Size

if TYPE_CHECKING:
    from PIL.Image import Image


IMAGE = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Where the image goes in a whole prompt; the engine puts the model's own placeholder there."""


@dataclass(frozen=True, slots=True)
class Range:
    """Manifest rows [first, stop)."""

    first: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.stop:
            raise ValueError(f"not a range of rows: [{self.first}, {self.stop})")

    def __len__(self) -> int:
        return self.stop - self.first

    def __str__(self) -> str:
        return f"{self.first}-{self.stop - 1}"


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One image of a row: where it is (``uri``), or its encoded bytes, or both (bytes win)."""

    uri: str | None = None
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class Given:
    """An answer that another run gave about a row, in words; ``problem``: why there is none."""

    task: str
    question: str
    answer: str
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One manifest row. ``fields`` holds every column that was read, images excepted."""

    row: int
    id: str
    images: tuple[ImageRef, ...]
    fields: Mapping[str, Any]
    problem: str | None = None
    """Why the row cannot be asked about (null image, wrong type), else None."""
    answers: tuple[Given, ...] = ()
    """Those that are to be judged, in the order of the run that gave them."""


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """A decoded image: upright (EXIF applied), RGB, perhaps already shrunk for the model.

    ``size`` is the upright original's size in pixels, ``pixels.size`` what the model is given.
    """

    pixels: Image
    size: Size
    key: str
    """Same key, same content: engines cache by it."""
    url: str | None = None
    """Where the endpoint fetches it by itself; then ``pixels`` and ``size`` are a stand-in."""

    @classmethod
    def of_size(cls, size: Size, given: Size) -> LoadedImage:
        """Stands for an image of which only the sizes are known: all that reading an answer needs.
        ``given``: what the model was given."""
        return cls(cast("Image", _NoPixels(given.width, given.height)), size, "")


@dataclass(frozen=True, slots=True)
class _NoPixels:
    width: int
    height: int

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height


class TaskKind(StrEnum):
    """What kind of answer a task wants; a custom task is TEXT."""

    CAPTION = "caption"
    VQA = "vqa"
    GROUND = "ground"
    DETECT = "detect"
    OCR = "ocr"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the engine picks tokens; greedy by default."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    min_tokens: int = 0
    seed: int | None = None
    """Of this very request: the samples of one request have different ones."""
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    """An answer ends before any of these."""


@dataclass(frozen=True, slots=True)
class Structure:
    """The form that an answer must have; exactly one of the three is set. See structure.py."""

    json_schema: str | None = None
    """A JSON Schema, as JSON text."""
    choices: tuple[str, ...] = ()
    regex: str | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt about one row, worded for the model's family.

    ``prompt`` is the text of the user's turn; the engine puts the images before it and applies the
    chat template. With IMAGE in it, it is the whole prompt as the model reads it.
    ``request`` counts from 0 over all requests of the row, whatever their task.
    """

    row: int
    request: int
    sample: int
    task: str
    kind: TaskKind
    prompt: str
    question: str | None
    """The ``question`` column: what was asked, None for the built-in captions and ocr."""
    system: str | None = None
    labels: tuple[str, ...] = ()
    """What to look for: the labels of a detect request, the phrase of a ground request."""
    images: tuple[LoadedImage, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    structure: Structure | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    problem: Failure | None = None
    """Why this cannot be asked; then it goes to no engine."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What the engine returned. ``text`` keeps special tokens, but not the end-of-turn token."""

    text: str
    finish_reason: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion as its family reads it; boxes and points in image pixels."""

    text: str | None = None
    boxes: tuple[Box, ...] | None = None
    points: tuple[Point, ...] | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """One output row: who asked what, and the answer or the failure."""

    row: int
    id: str
    task: str
    request: int
    sample: int = 0
    question: str | None = None
    answer: Answer | None = None
    json: str | None = None
    completion: Completion | None = None
    image: str | None = None
    images: tuple[str | None, ...] | None = None
    image_size: Size | None = None
    model_image_size: Size | None = None
    failure: Failure | None = None
    attempts: int = 0
    carried: Mapping[str, Any] | None = None

    @property
    def ok(self) -> bool:
        return self.failure is None
