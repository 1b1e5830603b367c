"""What a family of models has in common: how it is asked, and how its answer is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from vlmbatch.errors import ErrorCode, RequestFailed, Stage, failed
from vlmbatch.grounding import Box, Size, Space
from vlmbatch.records import Answer, LoadedImage, TaskKind
from vlmbatch.tasks import Ask

if TYPE_CHECKING:
    from PIL.Image import Image


class Family(Protocol):
    """One way of prompting and answering. Chosen by the model's config, never by its answers."""

    name: str
    version: int
    """Counts changes of ``read``: answers read by another version can be read again."""
    raw: bool
    """What ``word`` returns is the whole prompt, with IMAGE in it, for a model without a chat
    template; else it is the text of the user's turn, and the engine puts the image before it."""

    @property
    def frame(self) -> str | None:
        """A whole prompt for checkpoints that lost their chat template: IMAGE and ``{text}``."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that begin another turn: an answer to one of the family's own prompts ends
        before."""

    @property
    def text_of(self) -> Callable[[Sequence[str]], str] | None:
        """Of an answer's tokens, as in the vocabulary, its text; for engines that have the tokens.
        None: as the tokenizer decodes them."""

    def word(self, ask: Ask) -> str:
        """How the ask is put to the model; see ``raw``."""

    def read(
        self, kind: TaskKind, text: str, *, labels: tuple[str, ...], image: LoadedImage
    ) -> Answer:
        """The completion's text as an answer, boxes in pixels of the upright original image.

        Raises RequestFailed (parse_failed), and nothing else, whatever the text is; takes time
        linear in its length.
        """

    def write(self, boxes: Sequence[Box], *, image: LoadedImage) -> str:
        """The inverse of ``read``: boxes in image pixels, as the model would say them. Raises
        ValueError where the family has no syntax for boxes."""

    def target(self, size: Size) -> Size:
        """The size that the model will see of an image of this size; the loader shrinks to it."""

    def prepare(self, pixels: Image) -> Image:
        """What the model is given of an image that has its ``target`` size; ``read`` maps back."""

    def seen(self, given: Size) -> Size:
        """The size that coordinates refer to, of an image that the engine is given in this one."""

    def image_tokens(self, size: Size) -> int | None:
        """Prompt tokens that an image of this size costs; None where that is not known."""


Evidence = Literal["run", "documented", "unverified"]
"""run: this very convention is exercised by a checkpoint in our tests; documented: by the model's
authors; unverified: nobody could be asked, or nothing is written down."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A family as ``vlmbatch models`` lists it and as it is chosen."""

    name: str
    checkpoints: tuple[str, ...]
    """Hub ids, with ``*``."""
    tasks: tuple[TaskKind, ...]
    boxes: str
    """The syntax and the space of its boxes, in a few words; empty: it has none."""
    evidence: Evidence
    matches: Callable[[Mapping[str, Any], str], bool]
    """Of a config.json and the Hub id or folder name of the model."""
    make: Callable[[Mapping[str, Any]], Family]
    """From the config.json; the image processor's settings are its ``preprocessor`` entry."""
    own_code: bool = False
    """The checkpoint needs --trust-remote-code."""
    architectures: tuple[str, ...] = ()
    """Classes in ``architectures`` of config.json that transformers' registry does not have."""
    requirements: tuple[str, ...] = ()
    """Pinned packages that its own code needs and that do not fit ours: an environment of its own
    holds them. Empty: that code runs in ours."""
    box_spaces: Mapping[str, Space] = field(default_factory=dict)
    """Readings of its boxes that are disputed, the default one first: each may be the family's
    ``space``."""
    note: str = ""
    """What is doubtful about it, in a sentence."""


CAPTIONS = {
    "short": "Describe this image in one short sentence.",
    "detailed": "Describe this image in detail.",
}
OCR = "Read all the text in this image. Answer with the text only."

TEXT_TASKS = (TaskKind.CAPTION, TaskKind.VQA, TaskKind.OCR)
BOX_TASKS = (TaskKind.GROUND, TaskKind.DETECT)
ALL_TASKS = (*TEXT_TASKS, *BOX_TASKS)

_SPECIAL = re.compile(
    r"<\|[^<>|]{1,48}\|>|<｜[^<>｜]{1,48}｜>|</?s>|<(?:eos|bos|pad|unk|end_of_utterance|end_of_turn)>"
)
_NONE = re.compile(
    r"\[\s*\]|\bnone\b|\bno such\b|\bthere (?:is|are) no|没有|不存在|未找到", re.IGNORECASE
)


class Chat:
    """What chat models share: plain prompts for texts, and no boxes.

    Families derive from it and add what is theirs.
    """

    name = "chat"
    version = 1
    raw = False
    frame: str | None = None
    stop: tuple[str, ...] = ()
    text_of: Callable[[Sequence[str]], str] | None = None

    def word(self, ask: Ask) -> str:
        match ask.kind:
            case TaskKind.VQA:
                return ask.question or ""
            case TaskKind.GROUND | TaskKind.DETECT:
                return self.word_boxes(ask)
            case TaskKind.OCR:
                return OCR
            case _:
                return CAPTIONS[ask.style]

    def word_boxes(self, ask: Ask) -> str:
        raise failed(
            ErrorCode.BAD_ROW, Stage.PROMPT, f"family {self.name} has no words for {ask.kind}"
        )

    def read(
        self, kind: TaskKind, text: str, *, labels: tuple[str, ...], image: LoadedImage
    ) -> Answer:
        if kind in BOX_TASKS:
            return self.read_boxes(kind, text, labels, image)
        return Answer(text=self.plain(text))

    def plain(self, text: str) -> str:
        """The answer to an ask for a text. Raises parse_failed."""
        return plain_text(text)

    def read_boxes(
        self, kind: TaskKind, text: str, labels: tuple[str, ...], image: LoadedImage
    ) -> Answer:
        """The answer to an ask for boxes. Raises parse_failed."""
        raise unreadable(f"family {self.name} has no boxes, it answered {shown(text)}")

    def write(self, boxes: Sequence[Box], *, image: LoadedImage) -> str:
        raise ValueError(f"family {self.name} has no syntax for boxes")

    def target(self, size: Size) -> Size:
        return size

    def prepare(self, pixels: Image) -> Image:
        return pixels

    def seen(self, given: Size) -> Size:
        return given

    def image_tokens(self, size: Size) -> int | None:
        return None


def answered(text: str) -> str:
    """The text without a model's thinking: what stands after its last ``</think>``.

    Nothing is left of a thought that was cut off.
    """
    _, _, rest = text.rpartition("</think>")
    return rest.partition("<think>")[0]


def plain_text(text: str, tags: re.Pattern[str] | None = None) -> str:
    """The text without thinking, special tokens, what ``tags`` matches, and outer whitespace.

    Raises parse_failed if none is left.
    """
    plain = _SPECIAL.sub("", answered(text))
    if tags is not None:
        plain = tags.sub("", plain)
    plain = plain.strip()
    if not plain:
        raise unreadable("the model answered nothing")
    return plain


def words_beside(tags: re.Pattern[str], text: str) -> str:
    """Like ``plain_text``; what ``tags`` matches stays where nothing else is left."""
    words = tags.sub("", answered(text))
    return plain_text(words if words.strip() else text)


def in_pixels(found: Iterable[Box], text: str, space: Space, image: LoadedImage) -> Answer:
    """The boxes in pixels; what lies outside of the image is left out.

    Raises parse_failed where there is no box and the text does not say that there is none.
    """
    boxes = list(found)
    if not boxes and not says_none(text):
        raise unreadable(f"no box in the answer {shown(text)}")
    placed = (space.to_pixels(box, image.size) for box in boxes)
    return Answer(boxes=tuple(box for box in placed if box is not None))


def wanted(ask: Ask) -> str:
    """What an ask for boxes looks for: the phrase, or the labels."""
    return ask.question or "" if ask.kind is TaskKind.GROUND else ", ".join(ask.labels)


def says_none(text: str) -> bool:
    """Whether an answer without a box says in words, or as an empty list, that there is none."""
    return _NONE.search(text) is not None


def steps_of(low: float, high: float, last: int) -> tuple[int, int]:
    """Two edges as whole steps from 0 to ``last``, rounded, never the same step."""
    first, second = int(low + 0.5), int(high + 0.5)
    if first == second:
        first, second = int(low), int(low) + 1
    first = min(max(first, 0), last - 1)
    return first, min(max(second, first + 1), last)


def whole(config: Mapping[str, Any], *keys: str, default: int) -> int:
    """A whole number of at least 1 at this place of a config.json; else ``default``."""
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if type(value) is int and value > 0 else default


def unreadable(message: str) -> RequestFailed:
    return failed(ErrorCode.PARSE_FAILED, Stage.PARSE, message)


def shown(text: str, length: int = 80) -> str:
    """The text in quotes for a message, cut to a length."""
    return repr(text if len(text) <= length else f"{text[:length]}...")
