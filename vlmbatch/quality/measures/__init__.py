"""Which measures a task has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vlmbatch.quality.base import Answers, Measure
from vlmbatch.quality.measures.boxes import Boxes
from vlmbatch.quality.measures.empty import Empty
from vlmbatch.quality.measures.failures import Failures
from vlmbatch.quality.measures.fitting import Fitting
from vlmbatch.quality.measures.labels import AnswerLabels, BoxLabels
from vlmbatch.quality.measures.languages import Languages
from vlmbatch.quality.measures.lengths import Lengths
from vlmbatch.quality.measures.loops import Loops
from vlmbatch.quality.measures.openings import Preambles, Refusals
from vlmbatch.quality.measures.repeated import Repeated
from vlmbatch.quality.measures.scripts import Scripts
from vlmbatch.quality.measures.truncated import Truncated
from vlmbatch.quality.scratch import Scratch
from vlmbatch.records import TaskKind
from vlmbatch.tasks import Task


@dataclass(frozen=True)
class Subject:
    """One task of a run, to be measured.

    ``number``: which of the run's tasks it is. ``results``: about how many there are.
    ``results_of`` looks up what one row answered.
    """

    task: Task
    number: int
    results: int
    scratch: Scratch
    results_of: Callable[[int], Answers]


def is_prose(task: Task) -> bool:
    """Its answers are free text."""
    return task.structure is None and task.kind not in (TaskKind.GROUND, TaskKind.DETECT)


def is_unlike_others(task: Task) -> bool:
    """Two images should not have the same answer. Many may well have the answer "yes"."""
    return is_prose(task) and task.kind is not TaskKind.VQA


def measures_of(subject: Subject) -> list[Measure]:
    """In the order in which they are shown."""
    task = subject.task
    measures: list[Measure] = [Failures(), Truncated()]
    if task.structure is not None:
        measures.append(Fitting())
        if task.structure.choices:
            measures.append(AnswerLabels(subject.scratch, subject.number, task.structure.choices))
    elif task.kind in (TaskKind.GROUND, TaskKind.DETECT):
        asked = tuple(task.spec.labels or ())
        measures += [Empty(), Boxes(), BoxLabels(subject.scratch, subject.number, asked)]
    else:
        measures += [Empty(), Refusals(), Preambles(), Loops()]
        if is_unlike_others(task):
            measures.append(Repeated(subject.scratch, subject.number, subject.results_of))
        else:
            measures.append(AnswerLabels(subject.scratch, subject.number))
        measures += [Lengths(), Scripts(), Languages(subject.results)]
    return measures
