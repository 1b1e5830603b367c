"""JSON Lines: one object per line; blank lines are no rows."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pyarrow as pa

from vlmbatch.errors import ManifestError
from vlmbatch.manifest import text
from vlmbatch.manifest.files import ManifestFile, Place, reading
from vlmbatch.manifest.values import Misfit, fitted, schema_of

NAME = "jsonl"
CALLED = "JSONL (.jsonl, .ndjson)"
SUFFIXES = (".jsonl", ".ndjson")
check = text.check_size


def look_at(place: Place) -> tuple[ManifestFile, pa.Schema]:
    sample: list[dict[str, Any]] = []
    problems: list[str] = []

    def take(line: bytes | None) -> None:
        record, problem = parsed(line)
        if problem is None:
            sample.append(record)
        else:
            problems.append(problem)

    text.refuse_utf16(place)
    file = text.indexed(place, NAME, _lines, take)
    if problems and not sample:
        raise ManifestError(
            f"cannot read {place.path}: its first line {problems[0]}",
            hint="JSONL has one JSON object per line (from an array: jq -c '.[]')",
        )
    return file, schema_of(sample)


def records(
    place: Place,
    file: ManifestFile,
    first: int,
    columns: Sequence[str],
    schema: pa.Schema,
    asked: Collection[str],
) -> Iterator[tuple[dict[str, Any], str | None]]:
    kinds = {name: schema.field(name).type for name in columns}
    with reading(place.path), text.text_of(place) as stream:
        row, offset = text.nearest_start(file, first)
        if offset:
            stream.seek(offset)
        for _, line in _lines(stream, offset):
            if row >= first:
                yield fitting(*parsed(line), kinds, asked)
            row += 1


def parsed(line: bytes | None) -> tuple[dict[str, Any], str | None]:
    """(the object, what is wrong with the line if it is none)."""
    if line is None:
        return {}, f"is longer than {text.LINE_BYTES // 2**20} MiB"
    try:
        value = json.loads(line.decode())
        if b"\\u" in line:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except UnicodeError:
        return {}, "is no UTF-8 text"
    except RecursionError:
        return {}, "is nested too deeply"
    except json.JSONDecodeError as error:
        return {}, f"is no JSON: {error.msg} at character {error.pos + 1}"
    except ValueError as error:  # a number of thousands of digits
        return {}, f"is no JSON: {error}"
    if not isinstance(value, dict):
        return {}, "is JSON, and no object"
    return value, None


def fitting(
    record: dict[str, Any],
    problem: str | None,
    kinds: dict[str, pa.DataType],
    asked: Collection[str],
) -> tuple[dict[str, Any], str | None]:
    """The record's columns, as their types hold them; what does not fit is null, and said."""
    found: dict[str, Any] = {}
    problem = problem and f"the line {problem}"
    for name, kind in kinds.items():
        try:
            found[name] = fitted(record.get(name), kind, as_json=name not in asked)
        except Misfit as error:
            found[name] = None
            problem = problem or f"column {name!r} {error}"
    return found, problem


def _lines(stream: Any, offset: int = 0) -> Iterator[tuple[int, bytes | None]]:
    at_start = offset == 0
    for after, line in text.lines(stream, offset):
        if at_start and line is not None:
            line = line.removeprefix(text.BOM)
        at_start = False
        if line is None or (line and not line.isspace()):
            yield after, line
