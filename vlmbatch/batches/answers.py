"""Result files of a batch, as one table of where each answer stands: OpenAI's form, and vLLM's.

Result files are in no order and may be large: they are read once for an index of some 40 bytes per
line, and each line again when its row's turn comes.
"""

from __future__ import annotations

import json
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import pyarrow as pa

from vlmbatch.batches.custom_id import CustomId
from vlmbatch.engines.chat import NoContent, Unreadable, completion_of, refusal, shortened
from vlmbatch.errors import ErrorCode, RequestFailed, RunStopped, Stage, UsageError, failed
from vlmbatch.records import Completion

LINE_BYTES = 64 * 2**20
NAMED = 5
"""So many unreadable lines are named."""

_FILE, _ROW, _REQUEST, _SAMPLE, _REFUSED, _OFFSET = "file", "row", "request", "sample", "no", "at"
_SORTED_BY = (_ROW, _REQUEST, _SAMPLE, _REFUSED, _FILE, _OFFSET)


@dataclass(slots=True)
class Lines:
    """What was found in the files. ``usable`` = first answers + ``duplicates``."""

    usable: int = 0
    duplicates: int = 0
    foreign: int = 0
    """Of another run, or not of vlmbatch."""
    broken: int = 0
    problems: list[str] = field(default_factory=list)
    """The first few broken ones, as ``file:line: why``."""

    def add_broken(self, where: str, why: str) -> None:
        self.broken += 1
        if len(self.problems) < NAMED:
            self.problems.append(f"{where}: {why}")


@dataclass(frozen=True, slots=True)
class Line:
    """One answer, or the reason why there is none."""

    id: CustomId
    value: Mapping[str, Any]

    @property
    def refused(self) -> bool:
        """No answer: the first of a request that is none of these wins."""
        return self.value.get("error") is not None or _status(self.value) != 200

    def completion(self) -> Completion:
        """Raises RequestFailed."""
        if self.refused:
            raise _refusal(self.value)
        response = self.value["response"]
        try:
            return completion_of(json.dumps(response.get("body")))
        except (Unreadable, NoContent) as error:
            message = shortened(str(error))
            raise failed(ErrorCode.ENGINE_FAILED, Stage.GENERATE, message) from None


class Answers:
    """The index. Close it: it holds the files open."""

    def __init__(self, paths: Sequence[str], lines: Lines, table: pa.Table) -> None:
        self.lines = lines
        self._paths = paths
        table = table.sort_by([(name, "ascending") for name in _SORTED_BY])
        self._columns = {name: _as_array(table[name]) for name in (*_SORTED_BY,)}
        self._stack = ExitStack()
        self._files: dict[int, BinaryIO] = {}
        lines.duplicates = len(table) - sum(1 for _ in self._keys())

    def rows(self) -> Iterator[int]:
        """The rows that have any line, ascending."""
        last = -1
        for row in self._columns[_ROW]:
            if row != last:
                last = row
                yield row

    def of_row(self, row: int) -> dict[tuple[int, int], Line]:
        """The row's answers by (request, sample): of several the first that is no refusal."""
        found: dict[tuple[int, int], Line] = {}
        rows = self._columns[_ROW]
        at = bisect_left(rows, row)
        while at < len(rows) and rows[at] == row:
            key = (self._columns[_REQUEST][at], self._columns[_SAMPLE][at])
            if key not in found:
                found[key] = self._line(at)
            at += 1
        return found

    def close(self) -> None:
        self._stack.close()

    def _keys(self) -> Iterator[tuple[int, int, int]]:
        """(row, request, sample), each once."""
        last = (-1, -1, -1)
        names = (_ROW, _REQUEST, _SAMPLE)
        for key in zip(*(self._columns[name] for name in names), strict=True):
            if key != last:
                last = key
                yield key

    def _line(self, at: int) -> Line:
        number, offset = self._columns[_FILE][at], self._columns[_OFFSET][at]
        path = self._paths[number]
        try:
            if number not in self._files:
                opened = open(path, "rb")  # noqa: SIM115  until close()
                self._files[number] = self._stack.enter_context(opened)
            file = self._files[number]
            file.seek(offset)
            line = _parse(file.readline(LINE_BYTES))
        except (OSError, ValueError) as error:
            raise RunStopped(f"cannot read {path} a second time: {error}") from None
        key = tuple(self._columns[name][at] for name in (_ROW, _REQUEST, _SAMPLE))
        if line is None or (line.id.row, line.id.request, line.id.sample) != key:
            raise RunStopped(f"{path} changed while it was read", hint="run the same command again")
        return line


def read_answers(paths: Sequence[str], *, run: str, rows: int, max_pixels: int) -> Answers:
    """The index of these files, for a run of so many rows.

    Raises UsageError for a file that cannot be read or has no usable line.
    """
    lines = Lines()
    columns = {name: array("q") for name in _SORTED_BY}
    for number, path in enumerate(paths):
        before, of_others = lines.usable, None
        for offset, where, text in _lines(path):
            try:
                line = _parse(text)
            except ValueError as error:
                lines.add_broken(where, str(error))
                continue
            if line is None or line.id.run != run:
                lines.foreign += 1
                of_others = of_others or ("vlmbatch" if line is None else line.id.run)
                continue
            pixels = line.id.size.pixels if line.id.size else 0
            if line.id.row >= rows or pixels > max_pixels:
                lines.add_broken(where, f"no request of this run has the custom_id {line.id}")
                continue
            lines.usable += 1
            values = (line.id.row, line.id.request, line.id.sample, line.refused, number, offset)
            for name, value in zip(_SORTED_BY, values, strict=True):
                columns[name].append(int(value))
        if lines.usable == before:
            raise _unusable(path, lines, of_others, run)
    table = pa.table({name: _as_arrow(values) for name, values in columns.items()})
    return Answers(paths, lines, table)


def _lines(path: str) -> Iterator[tuple[int, str, bytes]]:
    """(offset, ``file:line``, the line) of each line that is not blank."""
    try:
        with open(path, "rb") as file:
            offset = number = 0
            while text := file.readline(LINE_BYTES):
                number += 1
                if text.strip():
                    yield offset, f"{path}:{number}", text
                offset += len(text)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def _parse(text: bytes) -> Line | None:
    """None for a line of somebody else's batch. Raises ValueError, saying what is wrong."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({shortened(str(error), 80)})") from None
    if not isinstance(value, dict) or "custom_id" not in value:
        raise ValueError("no custom_id: is this a result file of a batch?")
    if "response" not in value and "error" not in value:
        raise ValueError("neither a response nor an error: is this a file of requests?")
    custom_id = CustomId.parse(value["custom_id"])
    return None if custom_id is None else Line(custom_id, value)


def _unusable(path: str, lines: Lines, of_others: str | None, run: str) -> UsageError:
    if of_others == "vlmbatch":
        return UsageError(f"no line of {path} is of a request that vlmbatch wrote")
    if of_others is not None:
        return UsageError(
            f"the answers in {path} belong to another run ({of_others}; this one is {run})",
            hint="name the output that those requests were exported from; it is another run "
            "after --overwrite",
        )
    if lines.problems:
        return UsageError(f"no usable line in {path}:\n  " + "\n  ".join(lines.problems))
    return UsageError(f"{path} is empty", hint="leave it out, or fetch it again")


def _status(value: Mapping[str, Any]) -> int | None:
    response = value.get("response")
    status = response.get("status_code") if isinstance(response, dict) else None
    return status if isinstance(status, int) else None


def _refusal(value: Mapping[str, Any]) -> RequestFailed:
    """OpenAI has the error in the response's body, or ({code, message}) beside a null response;
    vLLM has it beside the response, in a body of its own."""
    status, response = _status(value), value.get("response")
    said: Any = value.get("error")
    if said is None and isinstance(response, dict):
        said = response.get("body")
    if isinstance(said, dict) and isinstance(said.get("error"), dict):
        said = said["error"]
    code, message = None, said
    if isinstance(said, dict):
        code, message = said.get("code"), said.get("message", said)
    text = shortened(message if isinstance(message, str) else json.dumps(message))
    if status is not None and 400 <= status < 500 and status not in (408, 425, 429):
        return refusal(status, code if isinstance(code, str) else None, text)
    why = status if status not in (None, 200) else code
    label = f" ({why})" if why is not None else ""
    return failed(
        ErrorCode.ENGINE_FAILED, Stage.GENERATE, f"the batch has no answer{label}: {text}"
    )


def _as_arrow(values: array[int]) -> pa.Array:
    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(values)])


def _as_array(column: pa.ChunkedArray) -> array[int]:
    values = array("q")
    for chunk in column.chunks:
        start = chunk.offset * 8
        values.frombytes(chunk.buffers()[1][start : start + len(chunk) * 8])
    return values
