"""Carried columns where a format has no place for them: ``carried_SPLIT.jsonl`` in DEST.

No consumer of these formats looks there: kohya's and ultralytics' read folders of images below it,
fiftyone one folder for each split.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa

from vlmbatch.exports.base import plain_type
from vlmbatch.exports.sinks import line_of
from vlmbatch.manifest.columns import is_list

if TYPE_CHECKING:
    from vlmbatch.exports.exporting import Export

TAKEN = frozenset(("file_name", "row", "id"))
"""What a line has beside the columns: the image's file as the export names it, relative to DEST or
absolute, and the row of the output that it is from."""


def write_carried(export: Export, split: str, lines: Iterable[Mapping[str, Any]]) -> None:
    """A line for each exported row, several where they are about one image; no file where no
    columns are carried."""

    def build(file: BinaryIO) -> None:
        file.writelines(map(line_of, lines))

    if export.source.carried:
        export.destination.write(f"carried_{split}.jsonl", build)


def type_in_json(kind: pa.DataType) -> pa.DataType:
    """The type of such values when they come back from lines of JSON: text where JSON has no form
    for them (``sinks.line_of``)."""
    kind = plain_type(kind)
    return kind if _is_in_json(kind) else pa.string()


def value_from_json(value: Any, kind: pa.DataType) -> Any:
    """The value for a column of ``type_in_json(kind)``."""
    if value is None or isinstance(value, str) or _is_in_json(plain_type(kind)):
        return value
    return line_of(value).decode().rstrip("\n")


def _is_in_json(kind: pa.DataType) -> bool:
    if is_list(kind):
        return _is_in_json(kind.value_type)
    if pa.types.is_struct(kind):
        return all(_is_in_json(kind.field(i).type) for i in range(kind.num_fields))
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
    return any(test(kind) for test in (*tests, pa.types.is_string, pa.types.is_large_string))
