"""What is asked, independent of the model: a row and the run's tasks give the row's requests."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

from jinja2 import StrictUndefined, Template, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vlmbatch.errors import ErrorCode, Failure, RequestFailed, Stage, UsageError, failed
from vlmbatch.job import BUILT_IN_TASKS, SamplingSpec, TaskSpec
from vlmbatch.records import IMAGE, Request, Row, Sampling, Structure, TaskKind
from vlmbatch.structure import structure_of

_templates = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False)

MAX_PROMPT_CHARS = 1_000_000


@dataclass(frozen=True, slots=True)
class Ask:
    """One thing to ask about a row, not yet worded for a family."""

    kind: TaskKind
    style: str = "short"
    question: str | None = None
    labels: tuple[str, ...] = ()
    """The labels of a detect ask, the one phrase of a ground ask."""


PLACEHOLDERS = {
    TaskKind.VQA: Ask(TaskKind.VQA, question="{question}"),
    TaskKind.GROUND: Ask(TaskKind.GROUND, question="{phrase}", labels=("{phrase}",)),
    TaskKind.DETECT: Ask(TaskKind.DETECT, labels=("{label}", "{label}")),
    TaskKind.OCR: Ask(TaskKind.OCR),
}
"""Asks about no row, to show how a family words them; a caption's has only its style."""


class Wording(Protocol):
    """The half of a family that tasks need."""

    @property
    def stop(self) -> tuple[str, ...]: ...

    def word(self, ask: Ask) -> str: ...


@dataclass(frozen=True)
class Task:
    """One task of the run: its spec, ready to be asked about rows."""

    spec: TaskSpec

    @property
    def name(self) -> str:
        return self.spec.name

    @cached_property
    def kind(self) -> TaskKind:
        return TaskKind(self.name) if self.name in BUILT_IN_TASKS else TaskKind.TEXT

    @cached_property
    def template(self) -> Template | None:
        return None if self.spec.prompt is None else compiled(self.spec.prompt)

    @cached_property
    def structure(self) -> Structure | None:
        """What its answers must look like."""
        return structure_of(self.spec)

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the prompt template uses."""
        if self.spec.prompt is None:
            return frozenset()
        return frozenset(meta.find_undeclared_variables(_templates.parse(self.spec.prompt)))


def compiled(text: str) -> Template:
    """The template, sandboxed; a name that nothing stands for is an error. Raises TemplateError."""
    return _templates.from_string(text)


def make_task(spec: TaskSpec) -> Task:
    """The task of a spec.

    Raises UsageError for an unknown name, a template that is none, or a structure that is none.
    """
    if spec.name not in BUILT_IN_TASKS and spec.prompt is None:
        raise UsageError(
            f"unknown task {spec.name!r}",
            hint=f"built in: {', '.join(BUILT_IN_TASKS)}; one of your own needs its prompt: "
            f"--prompt {spec.name}=TEXT",
        )
    if not re.fullmatch(r"[\w.-]+", spec.name):
        raise UsageError(
            f"{spec.name!r} is no name for a task", hint="use letters, digits and _ - . only"
        )
    task = Task(spec)
    try:
        task.template  # noqa: B018  compiles
        task.variables  # noqa: B018
    except TemplateError as error:
        raise UsageError(
            f"the prompt of task {spec.name!r} is not a template: {error}",
            hint="it is Jinja: {{ column }} stands for a column of the row",
        ) from None
    task.structure  # noqa: B018  is checked
    return task


def sampling_of(spec: SamplingSpec) -> Sampling:
    """How the tokens of one answer are picked."""
    values = spec.model_dump(exclude={"num_samples", "on_truncation"})
    return Sampling(**{**values, "stop": tuple(spec.stop)})


def requests_of(
    row: Row,
    tasks: Sequence[Task],
    family: Wording,
    *,
    system: str | None,
    sampling: Sampling,
    num_samples: int = 1,
) -> list[Request]:
    """The row's requests, numbered from 0; one that cannot be asked says why in ``problem``.

    Each comes ``num_samples`` times in a row, with samples from 0 and seeds of their own.

    An empty list means that nothing is asked about this row (all question lists are empty).
    """
    found: list[Request] = []
    asked = 0
    for task in tasks:
        stop = sampling.stop if task.template else _with(sampling.stop, family.stop)
        of_task = replace(sampling, stop=stop)
        samplings = [_of_sample(of_task, sample) for sample in range(num_samples)]
        for ask, failure in _asks(task, row):
            prompt, question, problem = "", ask.question, failure
            if problem is None:
                try:
                    prompt, question = _worded(task, ask, row, family)
                except RequestFailed as error:
                    problem = error.failure
            found += [
                Request(
                    row=row.row,
                    request=asked,
                    sample=sample,
                    task=task.name,
                    kind=task.kind,
                    prompt=prompt,
                    question=question,
                    system=system,
                    labels=ask.labels,
                    sampling=own,
                    structure=task.structure,
                    fields=row.fields,
                    problem=problem,
                )
                for sample, own in enumerate(samplings)
            ]
            asked += 1
    return found


def _with(stop: tuple[str, ...], more: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*stop, *more)))


def _of_sample(sampling: Sampling, sample: int) -> Sampling:
    """With another seed for every sample, if there is one."""
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + sample)


def _asks(task: Task, row: Row) -> Iterator[tuple[Ask, Failure | None]]:
    spec, kind = task.spec, task.kind
    if row.problem is not None:
        yield Ask(kind), _bad(row.problem)
    elif kind is TaskKind.VQA:
        questions = _texts(row.fields, ("questions", "question"), spec.question)
        for question in questions:
            fine = question or (task.template is not None and not _has(row, spec, "question"))
            yield (
                Ask(kind, question=question),
                None if fine else _bad("the question is null or empty"),
            )
    elif kind is TaskKind.GROUND:
        for phrase in _texts(row.fields, ("phrase",), spec.phrase):
            ask = Ask(kind, question=phrase, labels=(phrase,) if phrase else ())
            yield (
                ask,
                _grounding_problem(row)
                or (None if phrase else _bad("the phrase is null or empty")),
            )
    elif kind is TaskKind.DETECT:
        labels = [label for label in _labels(row.fields, spec.labels) if label]
        ask = Ask(
            kind,
            question=json.dumps(labels, ensure_ascii=False) if labels else None,
            labels=tuple(labels),
        )
        yield ask, _grounding_problem(row) or (None if labels else _bad("there are no labels"))
    else:
        yield Ask(kind, style=spec.style), None


def _has(row: Row, spec: TaskSpec, name: str) -> bool:
    return spec.question is not None or name in row.fields or f"{name}s" in row.fields


def _grounding_problem(row: Row) -> Failure | None:
    if len(row.images) > 1:
        return _bad(f"boxes need one image, this row has {len(row.images)}")
    return None


def _bad(message: str) -> Failure:
    return Failure(ErrorCode.BAD_ROW, Stage.ROW, message)


def _texts(
    fields: Mapping[str, Any], names: Sequence[str], stand_in: str | None
) -> list[str | None]:
    if stand_in is not None:
        return [stand_in]
    for name in names:
        value = fields.get(name)
        if name.endswith("s"):
            value = _json_list(value)
        if value is not None:
            return list(value) if isinstance(value, list) else [value]
    return [None]


def _labels(fields: Mapping[str, Any], stand_in: list[str] | None) -> list[str | None]:
    if stand_in is not None:
        return list(stand_in)
    value = _json_list(fields.get("labels"))
    if isinstance(value, str):
        return [label.strip() for label in value.split(",")]
    return list(value) if isinstance(value, list) else []


def _json_list(value: Any) -> Any:
    """A list of texts that a cell of a CSV file holds as JSON; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    fine = isinstance(found, list) and all(isinstance(each, str | None) for each in found)
    return found if fine else value


def _worded(task: Task, ask: Ask, row: Row, family: Wording) -> tuple[str, str | None]:
    """(the prompt, what the ``question`` column says)."""
    if task.template is None:
        asked = replace(
            ask,
            question=_without_marks(ask.question),
            labels=tuple(str(_without_marks(label)) for label in ask.labels),
        )
        return _short_enough(family.word(asked)), ask.question
    variables: dict[str, Any] = {**row.fields, "id": row.id, "row": row.row}
    if ask.kind is TaskKind.VQA:
        variables["question"] = ask.question
    elif ask.kind is TaskKind.GROUND:
        variables["phrase"] = ask.question
    elif ask.kind is TaskKind.DETECT:
        variables["labels"] = list(ask.labels)
    try:
        prompt = task.template.render(variables)
    except Exception as error:
        # A template runs on a stranger's data: whatever it raises is this row's problem.
        raise failed(
            ErrorCode.BAD_ROW,
            Stage.PROMPT,
            f"the prompt of task {task.name!r} does not fit this row: {error}",
        ) from None
    return _short_enough(str(_without_marks(prompt))), prompt


def _without_marks(text: str | None) -> str | None:
    """Only a family says where the image goes."""
    return text and text.replace(IMAGE, "")


def _short_enough(prompt: str) -> str:
    if len(prompt) > MAX_PROMPT_CHARS:
        raise failed(
            ErrorCode.PROMPT_TOO_LONG,
            Stage.PROMPT,
            f"the prompt has {len(prompt):,} characters (limit {MAX_PROMPT_CHARS:,})",
        )
    return prompt
