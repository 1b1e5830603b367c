"""``vlmbatch eval``: the answers of an output against references.

References are few words about many requests: they go to a temporary database, and the results
stream by in the manifest's order, so that memory is bounded by neither.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from vlmbatch.errors import RunStopped, UsageError
from vlmbatch.evaluation.boxes import pairs
from vlmbatch.evaluation.references import Reference, References
from vlmbatch.evaluation.scores import DETECTED, EXACT, GROUNDED, Score, shown
from vlmbatch.evaluation.texts import RULES
from vlmbatch.grounding import Box
from vlmbatch.reopen import check_read_through, existing_run_file
from vlmbatch.results.output import Output
from vlmbatch.results.schema import RESULT_SCHEMA
from vlmbatch.results.store import Store, open_store
from vlmbatch.run_file import RunFile

METRICS = {"ground": GROUNDED, "detect": DETECTED}
"""Of these tasks; all others are asked for a text."""
UNKNOWN = "?"
"""The task of a reference that names none and has no result, where the run has several."""
_NEEDED = ("row", "id", "task", "request", "sample", "question", "text", "boxes", "status", "error")

Record = Mapping[str, Any]


@dataclass(slots=True)
class Evaluation:
    """What an evaluation found. ``references`` = the ``n`` of all tasks + ``unusable``."""

    output: str = ""
    model: str = ""
    normalize: str = "exact"
    references: int = 0
    unusable: int = 0
    """References that say nothing of the kind that their task answers: no text, or no boxes."""
    without_reference: int = 0
    """Results that no reference is about."""
    tasks: dict[str, Score] = field(default_factory=dict)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__slots__}
        return {**values, "tasks": {name: each.to_json() for name, each in self.tasks.items()}}

    def as_text(self) -> str:
        """For a person."""
        missing = sum(each.missing for each in self.tasks.values())
        lines = [
            f"{self.output} by {self.model}: {self.references:,} references, {missing:,} of them "
            f"without a result; {self.without_reference:,} results without a reference",
            *(score.as_text(task) for task, score in self.tasks.items()),
        ]
        if self.wrong:
            lines.append("wrong, for example:")
        lines += map(_told, self.wrong)
        return "\n".join(lines)


def evaluate(
    output: str, references: Sequence[str], *, normalize: str = "exact", show: int = 0
) -> Evaluation:
    """Judge the results of ``output`` that the reference files are about.

    ``normalize``: a rule of RULES, for both sides. ``show``: so many wrong answers of each task are
    told, the first ones. Raises UsageError for references that cannot be read or that fit nothing.
    """
    store = open_store(output)
    run_file = existing_run_file(store, hint="name the folder of a run")
    check_read_through(store, run_file)
    with closing(References.read(references)) as wanted:
        judge = _Judge(run_file, wanted, normalize, show)
        judge.found.output = output
        try:
            for results in _by_row(store, run_file):
                judge.row(results)
        except FileNotFoundError:
            raise RunStopped(
                f"the files of {output} changed while they were read",
                hint="a run is going on there: try again, or wait for its end",
            ) from None
        judge.rest()
    found = judge.found
    if found.unusable == found.references:
        raise UsageError(
            f"none of the {found.references:,} references says what its task answers",
            hint="ground and detect want 'boxes', other tasks 'text'",
        )
    if not any(score.n - score.missing for score in found.tasks.values()):
        raise UsageError(
            f"none of the {found.references:,} references is about a result of {output}",
            hint=f"they are joined by {wanted.key}, request and task, if given: compare them with "
            f"`select {wanted.key}, request, task` of the results",
        )
    if store.is_locked():
        found.warnings.append("a run is going on: what it has not answered yet counts as wrong")
    return found


def _by_row(store: Store, run_file: RunFile) -> Iterator[list[Record]]:
    """The results of each row, in their order."""
    results = Output(store, run_file.run, run_file.part_rows, RESULT_SCHEMA).results()
    records = (record for batch in results for record in batch.select(_NEEDED).to_pylist())
    for _, of_row in groupby(records, key=lambda record: record["row"]):
        yield list(of_row)


class _Judge:
    """Takes rows of results, and counts."""

    def __init__(self, run_file: RunFile, wanted: References, rule: str, show: int) -> None:
        self._tasks = [task.name for task in run_file.spec.tasks]
        self._wanted = wanted
        self._normal = RULES[rule]
        self._show = show
        self._samples = 0
        self._frequent = _Frequent()
        self.found = Evaluation(
            model=run_file.model["label"], normalize=rule, references=wanted.count
        )

    def row(self, results: Sequence[Record]) -> None:
        """All results of one row."""
        references = self._wanted.of(str(results[0][self._wanted.key]))
        tasks: set[str] = set()
        for result in results:
            if result["sample"]:
                self._samples += 1
                continue
            task, request = result["task"], result["request"]
            first = task not in tasks
            tasks.add(task)
            fitting = [each for each in references if each.fits(request, task, first=first)]
            if fitting:
                self._check_alone(fitting, result)
                self._wanted.judge(fitting[0])
                self._judge(fitting[0], task, result)
            else:
                self.found.without_reference += 1

    def rest(self) -> None:
        """After all rows: the references without a result, and what could not be counted before."""
        only = self._tasks[0] if len(self._tasks) == 1 else UNKNOWN
        for reference in self._wanted.left():
            self._judge(reference, reference.task or only, None)
        found = self.found
        for task, score in found.tasks.items():
            score.most_frequent = self._frequent.of(task)
        self._frequent.close()
        order = [*self._tasks, *found.tasks]
        found.tasks = dict(sorted(found.tasks.items(), key=lambda each: order.index(each[0])))
        if self._samples:
            found.warnings.append(
                f"sample 0 of each request is judged; {self._samples:,} results of other samples "
                "are not"
            )
        if found.unusable:
            found.warnings.append(
                f"{found.unusable:,} references have no text, or no boxes, for a task that answers "
                "with such: they are not counted"
            )

    def _check_alone(self, fitting: Sequence[Reference], result: Record) -> None:
        """One reference and one result belong to each other, or nobody knows which do."""
        key = self._wanted.key
        what = f"request {result['request']} ({result['task']}) of {key} {result[key]!r}"
        if len(fitting) > 1:
            raise UsageError(
                f"{len(fitting)} references are about {what}",
                hint="several acceptable answers are one reference, whose text is a list",
            )
        if fitting[0].judged:
            raise UsageError(
                f"several rows have the id {result['id']!r}, one of them row {result['row']}; "
                "nobody knows which of them the reference is about",
                hint="give the references a column 'row' instead of 'id'",
            )

    def _judge(self, reference: Reference, task: str, result: Record | None) -> None:
        """Count it; ``result`` None: there is none."""
        metric = METRICS.get(task, EXACT)
        if task == UNKNOWN and reference.texts is None:
            metric = GROUNDED
        if (reference.texts if metric == EXACT else reference.boxes) is None:
            self.found.unusable += 1
            return
        score = self.found.tasks.setdefault(task, Score(metric))
        score.n += 1
        answered = result is not None and result["status"] == "ok"
        score.missing += result is None
        score.failed += result is not None and not answered
        said = result if answered else None
        if metric == EXACT:
            right = self._text_is_right(reference, task, said)
        else:
            right = _boxes_are_right(reference, score, said)
        score.right += right
        if not right and score.n - score.right <= self._show:
            self.found.wrong.append(_example(self._wanted.key, reference, task, metric, result))

    def _text_is_right(self, reference: Reference, task: str, said: Record | None) -> bool:
        accepted = {self._normal(each) for each in reference.texts or ()}
        self._frequent.add(task, accepted)
        return said is not None and self._normal(said["text"] or "") in accepted


def _boxes_are_right(reference: Reference, score: Score, said: Record | None) -> bool:
    wanted, found = reference.boxes or (), () if said is None else _boxes(said)
    paired = pairs(wanted, found, labels=score.metric == DETECTED)
    score.boxes_wanted += len(wanted)
    score.boxes_found += len(found)
    score.boxes_paired += paired
    return said is not None and paired == len(wanted) == len(found)


def _boxes(result: Record) -> tuple[Box, ...]:
    boxes = result["boxes"] or ()
    return tuple(Box(b["label"] or "", b["x1"], b["y1"], b["x2"], b["y2"]) for b in boxes)


class _Frequent:
    """How often each acceptable answer of a task is one, on the disk."""

    def __init__(self) -> None:
        self._rows = sqlite3.connect("")
        self._rows.execute(
            "create table answers (task text, answer text, n integer, primary key (task, answer)) "
            "without rowid"
        )

    def add(self, task: str, answers: set[str]) -> None:
        self._rows.executemany(
            "insert into answers values (?, ?, 1) on conflict do update set n = n + 1",
            [(task, answer) for answer in answers],
        )

    def of(self, task: str) -> tuple[str, int] | None:
        select = "select answer, n from answers where task = ? order by n desc, answer limit 1"
        found: tuple[str, int] | None = self._rows.execute(select, (task,)).fetchone()
        return found

    def close(self) -> None:
        self._rows.close()


def _example(
    key: str, reference: Reference, task: str, metric: str, result: Record | None
) -> dict[str, Any]:
    """A wrong answer as it is told: boxes as [label, x1, y1, x2, y2]."""
    wanted: list[Any]
    if metric == EXACT:
        wanted, got = list(reference.texts or ()), result and result["text"]
    else:
        wanted = [_as_list(box) for box in reference.boxes or ()]
        got = result and [_as_list(box) for box in _boxes(result)]
    error = result and result["error"]
    return {
        "task": task,
        "row": result["row"] if result else int(reference.key) if key == "row" else None,
        "id": result["id"] if result else reference.key if key == "id" else None,
        "request": result["request"] if result else reference.request,
        "question": result and result["question"],
        "wanted": wanted,
        "got": None if error else got,
        "error": f"{error['code']}: {error['message']}" if error else None,
    }


def _as_list(box: Box) -> list[Any]:
    return [box.label, *(round(each, 1) for each in (box.x1, box.y1, box.x2, box.y2))]


def _told(example: Mapping[str, Any]) -> str:
    """Two lines for a person."""
    which = f"id {example['id']}" if example["id"] is not None else f"row {example['row']}"
    request = "" if example["request"] is None else f" request {example['request']}"
    asked = f": {shown(example['question'])}" if example["question"] else ""
    wanted = " or ".join(map(_shown, example["wanted"])) or "nothing"
    got = example["error"] or "no result"
    if example["got"] is not None:
        said = example["got"]
        got = _shown(said) if isinstance(said, str) else ", ".join(map(_shown, said)) or "nothing"
    return f"  {example['task']}{request} of {which}{asked}\n    wanted {wanted}; got {got}"


def _shown(value: Any) -> str:
    return shown(value) if isinstance(value, str) else f"{value[0]} {value[1:]}".lstrip()
