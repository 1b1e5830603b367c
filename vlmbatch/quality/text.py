"""What was found, for a person."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vlmbatch.quality.base import Metric

if TYPE_CHECKING:
    from vlmbatch.quality.measuring import Quality, TaskQuality

_EXAMPLES = 3
_CHARS = 70


def describe(quality: Quality) -> str:
    lines = [
        f"{quality.output}: {quality.rows:,} rows, {quality.results:,} results by {quality.model}"
    ]
    for task in quality.tasks:
        lines.append(f"{task.name}: {task.results:,} results")
        if task.results:
            lines += _lines(task)
    lines += [f"passed: {gate}" for gate in quality.gates if gate.passed]
    return "\n".join(lines)


def _lines(task: TaskQuality) -> Iterator[str]:
    for measure in task.measures:
        for metric in measure.metrics():
            if metric.is_share and "." not in metric.name and metric.value is not None:
                yield from _share(metric)
        for name, said in measure.lines():
            yield f"  {name:<15} {said}"


def _share(metric: Metric) -> Iterator[str]:
    note = f"  {_short(metric.note)}" if metric.note else ""
    yield f"  {metric.name:<15} {metric.value:>7.2%} {metric.count:>11,}{note}"
    for example in metric.examples[:_EXAMPLES]:
        yield f"{'':18} row {example.row} ({_short(example.id, 32)}): {_short(example.text)}"


def _short(text: str, length: int = _CHARS) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 3]}..."
