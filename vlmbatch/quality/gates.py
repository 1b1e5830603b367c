"""``--fail-on "repeated>0.05"``: figures that make a job fail."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from operator import ge, gt, le, lt
from typing import TYPE_CHECKING, Any, Self

from vlmbatch.errors import ErrorCode, UsageError
from vlmbatch.quality.measures.languages import MISSING

if TYPE_CHECKING:
    from vlmbatch.quality.measuring import TaskQuality

_OPERATORS = {">=": ge, "<=": le, ">": gt, "<": lt}
_FORM = re.compile(r"\s*(?P<name>[^<>=]*?)\s*(?P<operator>>=|<=|>|<)\s*(?P<limit>[^<>=]*?)\s*")


@dataclass(frozen=True, slots=True)
class Gate:
    """It fails where the figure named ``name`` is ``operator`` ``limit``.

    ``name`` is a metric's, of every task that has it, or TASK.METRIC.
    """

    text: str
    name: str
    operator: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """``repeated>0.05``, ``caption.words_median < 5``, ``failed>=1%``. Raises UsageError."""
        match = _FORM.fullmatch(text)
        number = re.fullmatch(r"(\d+\.?\d*|\.\d+)(%?)", match["limit"]) if match else None
        if not match or not match["name"] or not number:
            raise UsageError(
                f"--fail-on {text!r} is no gate", hint="write it as in --fail-on 'repeated>0.05'"
            )
        limit = float(number[1]) / (100 if number[2] else 1)
        return cls(text, match["name"], match["operator"], limit)

    def metric_in(self, task: TaskQuality) -> str | None:
        """The name of the task's metric that it is about, or None."""
        for name in (self.name, self.name.removeprefix(f"{task.name}.")):
            if any(_has(measure, name) for measure in task.measures):
                return name
        return None


@dataclass(frozen=True, slots=True)
class GateResult:
    """What became of a gate in one task. ``value`` is None where nothing was there to measure:
    that passes."""

    gate: Gate
    task: str
    metric: str
    value: float | None

    @property
    def passed(self) -> bool:
        if self.value is None:
            return True
        return not _OPERATORS[self.gate.operator](self.value, self.gate.limit)

    def __str__(self) -> str:
        shown = "nothing to measure" if self.value is None else f"{self.value:.4g}"
        return f"{self.metric} of {self.task} is {shown} (--fail-on {self.gate.text!r})"

    def to_json(self) -> dict[str, Any]:
        return {
            "gate": self.gate.text,
            "task": self.task,
            "metric": self.metric,
            "value": self.value,
            "passed": self.passed,
        }


def checked(gates: Sequence[Gate], tasks: Iterable[TaskQuality]) -> None:
    """Before anything is measured. Raises UsageError for gates about what no task has: a gate that
    can never close would be a false comfort."""
    tasks = list(tasks)
    unknown = [gate for gate in gates if not any(gate.metric_in(task) for task in tasks)]
    if not unknown:
        return
    names = sorted(set(_names(tasks)))
    lines = []
    for gate in unknown:
        close = get_close_matches(gate.name, names, n=1)
        nearest = f" (did you mean {close[0]!r}?)" if close else ""
        lines.append(f"{gate.name!r} in --fail-on {gate.text!r}{nearest}")
    known = sorted({name for task in tasks for each in task.measures for name in each.names})
    hint = f"measured in this output: {', '.join(known)}"
    if any("language" in gate.name for gate in unknown) and "other_language" not in known:
        hint = MISSING
    raise UsageError("\n  ".join(["no such measure of this output:", *lines]), hint=hint)


def judged(gates: Sequence[Gate], tasks: Sequence[TaskQuality]) -> list[GateResult]:
    return [
        GateResult(gate, task.name, name, _value(task, name))
        for gate in gates
        for task in tasks
        if (name := gate.metric_in(task)) is not None
    ]


def _value(task: TaskQuality, name: str) -> float | None:
    for measure in task.measures:
        if _has(measure, name):
            return measure.value(name) if task.results else None
    return None


def _has(measure: Any, name: str) -> bool:
    return name in measure.names or any(
        name.startswith(family) and _may_come(family, name.removeprefix(family))
        for family in measure.families
    )


def _may_come(family: str, rest: str) -> bool:
    if family == "failed.":
        return rest in list(ErrorCode)
    return bool(rest)


def _names(tasks: Iterable[TaskQuality]) -> Iterator[str]:
    for task in tasks:
        for measure in task.measures:
            for name in measure.names:
                yield from (name, f"{task.name}.{name}")
            if "failed." in measure.families:
                yield from (f"failed.{code}" for code in ErrorCode)
