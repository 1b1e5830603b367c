"""References: what is right, one row per request, from Parquet, JSONL or CSV.

They are held in a temporary database on the disk, so that memory does not grow with them.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from vlmbatch.errors import ManifestError, UsageError
from vlmbatch.grounding import Box
from vlmbatch.manifest.files import Place
from vlmbatch.manifest.formats import FORMATS, TABLES
from vlmbatch.manifest.manifest import Manifest, open_manifest

KEYS = ("id", "row")
COLUMNS = (*KEYS, "request", "task", "text", "boxes")
CORNERS = ("x1", "y1", "x2", "y2")


@dataclass(frozen=True, slots=True)
class Reference:
    """What is right for one request of the row ``key``; ``texts`` and ``boxes`` are None where
    nothing is said of them.

    ``request`` None: the first one of the row that is of ``task``; with no task, request 0.
    """

    key: str
    request: int | None = None
    task: str | None = None
    texts: tuple[str, ...] | None = None
    boxes: tuple[Box, ...] | None = None
    number: int = -1
    """Its place in References."""
    judged: bool = False

    def fits(self, request: int, task: str, *, first: bool) -> bool:
        """``first``: the request is the first one of its task."""
        if self.task not in (None, task):
            return False
        if self.request is None:
            return request == 0 if self.task is None else first
        return self.request == request


class References:
    """All references of an evaluation, by the key of their row."""

    def __init__(self, key: str) -> None:
        self.key = key
        """``id`` or ``row``: the column that names a row."""
        self.count = 0
        self._rows = sqlite3.connect("")  # a temporary file, gone with the connection
        self._rows.execute(
            "create table wanted (number integer primary key, key text, request integer, "
            "task text, texts text, boxes text, judged integer default 0)"
        )
        self._rows.execute(
            "create unique index each on wanted (key, ifnull(request, -1), ifnull(task, ''))"
        )

    @classmethod
    def read(cls, paths: Sequence[str]) -> Self:
        """Raises UsageError, naming the file and its row, for what is no reference."""
        try:
            table = open_manifest(paths)
        except ManifestError as error:
            raise UsageError(f"the references: {error.message}", hint=error.hint) from None
        columns = _columns_of(table, paths)
        found = cls(next(key for key in KEYS if key in columns))
        for place, number, reference in _references(table, columns, found.key):
            if not found._added(reference):
                which = f"request {reference.request or 0}" if reference.task is None else "task "
                which += reference.task or ""
                raise UsageError(
                    f"row {number} of {place}: {found.key} {reference.key!r} has a reference for "
                    f"{which} already",
                    hint="several acceptable answers are one reference, whose text is a list",
                )
        return found

    def of(self, key: str) -> list[Reference]:
        """Those of one row."""
        return [_reference(each) for each in self._rows.execute(f"{_SELECT} where key = ?", (key,))]

    def judge(self, reference: Reference) -> None:
        """It has met its result."""
        self._rows.execute("update wanted set judged = 1 where number = ?", (reference.number,))

    def left(self) -> Iterator[Reference]:
        """Those without a result."""
        yield from map(
            _reference, self._rows.execute(f"{_SELECT} where judged = 0 order by number")
        )

    def close(self) -> None:
        self._rows.close()

    def _added(self, reference: Reference) -> bool:
        texts = None if reference.texts is None else json.dumps(reference.texts)
        boxes = None
        if reference.boxes is not None:
            boxes = json.dumps([[b.label, b.x1, b.y1, b.x2, b.y2] for b in reference.boxes])
        try:
            self._rows.execute(
                "insert into wanted (key, request, task, texts, boxes) values (?, ?, ?, ?, ?)",
                (reference.key, reference.request, reference.task, texts, boxes),
            )
        except sqlite3.IntegrityError:
            return False
        self.count += 1
        return True


_SELECT = "select number, key, request, task, texts, boxes, judged from wanted"


def _reference(record: tuple[Any, ...]) -> Reference:
    number, key, request, task, texts, boxes, judged = record
    return Reference(
        key,
        request,
        task,
        None if texts is None else tuple(json.loads(texts)),
        None if boxes is None else tuple(Box(*each) for each in json.loads(boxes)),
        number,
        bool(judged),
    )


def _columns_of(table: Manifest, paths: Sequence[str]) -> list[str]:
    """Those that are there, and needed."""
    there = table.schema.names
    where = " ".join(paths)
    if table.files[0].format not in TABLES:
        raise UsageError(f"{where}: references are Parquet, JSONL or CSV")
    has = f"(it has: {', '.join(there) or 'no columns'})"
    if not set(KEYS) & set(there):
        raise UsageError(
            f"no column 'id' in the references {where} {has}",
            hint="'id' is that of the results; or give 'row', the row's number in the manifest",
        )
    if not {"text", "boxes"} & set(there):
        raise UsageError(
            f"no column 'text' or 'boxes' in the references {where} {has}",
            hint="'text' is the right answer, or a list of them; 'boxes' a list of structs "
            "x1, y1, x2, y2, label, in pixels",
        )
    unused = "row" if "id" in there else None
    return [name for name in COLUMNS if name in there and name != unused]


def _references(
    table: Manifest, columns: Sequence[str], key: str
) -> Iterator[tuple[str, int, Reference]]:
    """(file, row in it from 0, reference)."""
    for file in table.files:
        place = Place(table.folder, file.name)
        records = FORMATS[file.format].records(place, file, 0, columns, table.schema, columns)
        for number, (record, problem) in enumerate(records):
            try:
                if problem is not None:
                    raise ValueError(problem)
                yield place.path, number, _reference_of(record, key, as_json=file.format == "csv")
            except ValueError as error:
                raise UsageError(f"row {number} of {place.path}: {error}") from None


def _reference_of(record: Mapping[str, Any], key: str, *, as_json: bool) -> Reference:
    """``as_json``: a cell of CSV may hold a list as JSON. Raises ValueError."""
    if record[key] is None:
        raise ValueError(f"{key} is null")
    identity = str(_whole(record[key], key) if key == "row" else record[key])
    request, task = record.get("request"), record.get("task")
    text, boxes = record.get("text"), record.get("boxes")
    if as_json:
        text = _from_json(text) if str(text).lstrip().startswith("[") else text
        boxes = _from_json(boxes)
    return Reference(
        identity,
        None if request is None else _whole(request, "request"),
        task if task is None else str(task),
        _texts(text),
        None if boxes is None else tuple(_box(each) for each in _listed(boxes, "boxes")),
    )


def _from_json(cell: str | None) -> Any:
    if cell is None:
        return None
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        raise ValueError(f"{cell[:60]!r} is no JSON") from None


def _whole(value: Any, name: str) -> int:
    try:
        number = int(value)
        if number >= 0 and float(value) == number:
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name} is {value!r}, not a whole number from 0 on")


def _texts(value: Any) -> tuple[str, ...] | None:
    """The acceptable answers; None where none is said."""
    values = value if isinstance(value, list) else [value]
    texts = (
        each if isinstance(each, str) else json.dumps(each) for each in values if each is not None
    )
    return tuple(texts) or None


def _listed(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} is no list")
    return value


def _box(value: Any) -> Box:
    if not isinstance(value, dict) or not set(CORNERS) <= set(value):
        has = f"keys {', '.join(value)}" if isinstance(value, dict) else repr(value)
        raise ValueError(f"a box has x1, y1, x2, y2 and perhaps a label, not {has}")
    try:
        x1, y1, x2, y2 = (float(value[name]) for name in CORNERS)
    except (TypeError, ValueError):
        raise ValueError(f"a corner of the box {value} is no number") from None
    if not (math.isfinite(x1 + y1 + x2 + y2) and x1 < x2 and y1 < y2):
        raise ValueError(f"the box {value} has no area: x1 < x2 and y1 < y2 are wanted")
    return Box(str(value.get("label") or ""), x1, y1, x2, y2)
