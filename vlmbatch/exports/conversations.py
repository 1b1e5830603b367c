"""Results as conversations: what a user would ask, and what the model to be trained answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import xxhash
from jinja2 import Template, TemplateError

from vlmbatch.errors import RequestFailed, UsageError
from vlmbatch.exports.base import Example, Unsuited
from vlmbatch.families import FAMILIES, Family, entry_named, family_for, made
from vlmbatch.families.base import BOX_TASKS, CAPTIONS, Chat
from vlmbatch.families.json_boxes import words_for_json
from vlmbatch.families.own import installed_entries, is_file
from vlmbatch.grounding import Box, Size
from vlmbatch.models import resolve_model
from vlmbatch.reading import stand_in
from vlmbatch.records import IMAGE, Result, TaskKind
from vlmbatch.tasks import Ask, Task, compiled

if TYPE_CHECKING:
    from vlmbatch.exports.source import Source

NONE_FOUND = "There is none."
"""For families whose syntax for no boxes is to say nothing."""
_MARKS = re.compile(r"<(image|video|audio)>")
_TURNS = re.compile(r"<\|im_start\|>|\bUser: |### Human:")


@dataclass(frozen=True, slots=True)
class Wording:
    """How conversations are worded; all of it as the user gave it, files already read."""

    per: Literal["image", "request"] = "image"
    """One conversation about a row, with all of its answers, or one for each answer."""
    system: str | None = None
    user: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Jinja templates of what the user asks, by task; "" is for every other task. Of several, a
    hash of the row's id chooses."""
    for_model: str | None = None
    """The family, or the model, that will be trained: boxes in its syntax, its own prompts."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message; ``content`` holds no mark for images, which belong before the first user's."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """About the images of one example. ``id``: the row's; with what tells it from its others."""

    id: str
    turns: tuple[Turn, ...]


def unmarked(text: str) -> str:
    """A text in which no trainer sees the place of an image that is not there."""
    return _MARKS.sub(r"<\1 >", text)


def messages_of(conversation: Conversation) -> list[dict[str, str]]:
    """As chat templates have them, without images."""
    return [{"role": turn.role, "content": unmarked(turn.content)} for turn in conversation.turns]


class Conversations:
    """Makes conversations of examples. Raises UsageError where the wording does not fit the run."""

    def __init__(self, source: Source, wording: Wording) -> None:
        self._source, self._wording = source, wording
        self.tasks = source.tasks
        self._check_tasks()
        self._user = {
            task: [_template(text) for text in texts] for task, texts in wording.user.items()
        }

    @property
    def identity(self) -> dict[str, Any]:
        """For telling one export from another."""
        wording = self._wording
        return {
            "conversation": wording.per,
            "system": wording.system,
            "user": {task: list(texts) for task, texts in wording.user.items()},
            "for_model": wording.for_model,
        }

    @cached_property
    def family(self) -> Family:
        """Of the model to be trained; by default the one that read the answers."""
        named = self._wording.for_model
        return self._source.family if named is None else family_of(named)

    def check_boxes(self) -> None:
        """Raises UsageError where boxes are to be written in a syntax that the family lacks."""
        if not any(task.kind in BOX_TASKS for task in self.tasks.values()):
            return
        try:
            size = Size(64, 64)
            self.family.write([Box("a", 8, 8, 32, 32)], image=stand_in(size, size))
        except ValueError as error:
            raise UsageError(
                f"the boxes of this run cannot be written as answers: {error}",
                hint="name the family or the model that will be trained with --for-model",
            ) from None

    def of(self, example: Example) -> list[Conversation]:
        """By sample, then by request. Raises Unsuited."""
        several = any(result.sample for result in example.results)
        ordered = sorted(example.results, key=lambda result: (result.sample, result.request))
        found = []
        for sample, results in groupby(ordered, lambda result: result.sample):
            identity = f"{example.id}-{sample}" if several else example.id
            if self._wording.per == "image":
                found.append(Conversation(identity, self._turns(example, results)))
            else:
                found += [
                    Conversation(f"{identity}-{each.request}", self._turns(example, iter([each])))
                    for each in results
                ]
        return found

    def _turns(self, example: Example, results: Iterator[Result]) -> tuple[Turn, ...]:
        system = self._wording.system
        turns = [] if system is None else [Turn("system", system)]
        for result in results:
            turns.append(Turn("user", self.question(example, result)))
            turns.append(Turn("assistant", self.answer(result)))
        return tuple(turns)

    def question(self, example: Example, result: Result) -> str:
        """The user's words: the template's, else what was asked, else the family's own prompt."""
        task = self.tasks[result.task]
        templates = self._user.get(task.name) or self._user.get("")
        if templates:
            return self._rendered(templates, example, result)
        if task.template is not None or task.kind is TaskKind.VQA:
            return result.question or ""
        return said(self.family, ask_of(task, result))

    def answer(self, result: Result) -> str:
        """What the model shall say. Raises Unsuited."""
        task, answer = self.tasks[result.task], result.answer
        assert answer is not None
        if task.kind in BOX_TASKS and answer.boxes is not None:
            return self._boxes(result)
        is_object = task.structure is not None and task.structure.json_schema is not None
        text = result.json if is_object else answer.text
        if not text:
            raise Unsuited("no_text")
        return text

    def _boxes(self, result: Result) -> str:
        answer = result.answer
        assert answer is not None
        if answer.points and not answer.boxes:
            if self._wording.for_model is None and result.completion is not None:
                return result.completion.text  # nobody writes points but who said them
            raise Unsuited("points")
        if result.image_size is None:
            raise Unsuited("image_size_unknown")
        image = stand_in(result.image_size, self.family.target(result.image_size))
        return self.family.write(answer.boxes or (), image=image) or NONE_FOUND

    def _rendered(self, templates: list[Template], example: Example, result: Result) -> str:
        key = f"{example.id}\0{result.request}\0{result.sample}".encode()
        template = templates[xxhash.xxh3_64_intdigest(key) % len(templates)]
        ask = ask_of(self.tasks[result.task], result)
        fields: dict[str, Any] = {
            "question": result.question,
            "phrase": result.question,
            "task": result.task,
        }
        fields |= {"labels": list(ask.labels), "id": example.id, "row": example.row}
        try:
            return template.render({**example.carried, **fields})
        except Exception as error:  # a template runs on a stranger's data
            raise UsageError(
                f"a template of the user's words does not fit row {example.row}: {error}",
                hint="it has question, phrase, labels, task, id, row and carried columns",
            ) from None

    def _check_tasks(self) -> None:
        for task in self._wording.user:
            if task and task not in self.tasks:
                raise UsageError(
                    f"the user's words are for a task {task!r} that was not asked",
                    hint=f"this run asked: {', '.join(self.tasks)}",
                )


def family_of(name: str) -> Family:
    """A family by its name or file, else that of a model (a Hub id or a folder)."""
    names = (*FAMILIES, *(entry.name for entry in installed_entries()))
    if name in names or is_file(name):
        return made(entry_named(name), {})
    model = resolve_model(name)
    return family_for(model.config, model_id=name)


def ask_of(task: Task, result: Result) -> Ask:
    """What was asked, as far as the result tells."""
    asked = result.question
    labels: tuple[str, ...] = ()
    if task.template is None and asked:
        if task.kind is TaskKind.GROUND:
            labels = (asked,)
        elif task.kind is TaskKind.DETECT:
            labels = tuple(json.loads(asked))
    return Ask(task.kind, task.spec.style, asked, labels)


def said(family: Family, ask: Ask) -> str:
    """The family's words for it, as the text of a user's turn."""
    try:
        prompt = family.word(ask)
        if family.raw and _TURNS.search(prompt) and isinstance(family, Chat):
            prompt = Chat.word(family, ask)
    except RequestFailed:  # it was never asked so
        if ask.kind in BOX_TASKS:
            return words_for_json(ask, "").strip()
        return CAPTIONS[ask.style]
    return prompt.replace(IMAGE, "").strip()


def paraphrases_in(path: str) -> dict[str, tuple[str, ...]]:
    """Templates of what the user asks: a line each, or a JSON object of lists by task.

    Raises UsageError.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"cannot read the paraphrases {path}: {reason}") from None
    if not text.lstrip().startswith('{"'):
        found = tuple(line.strip() for line in text.splitlines() if line.strip())
        if not found:
            raise UsageError(f"{path} has no lines", hint="give one paraphrase a line")
        return {"": found}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    for task, lines in value.items():
        if not isinstance(lines, list) or not lines or not all(isinstance(x, str) for x in lines):
            raise UsageError(
                f"{path}: {task!r} is no list of texts", hint='as in {"caption": ["...", "..."]}'
            )
    return {task: tuple(lines) for task, lines in value.items()}


def _template(text: str) -> Template:
    try:
        return compiled(text)
    except TemplateError as error:
        raise UsageError(
            f"{text!r} is not a template: {error}", hint="it is Jinja: {{ question }}"
        ) from None
