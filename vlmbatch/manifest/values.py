"""Columns of records that come without types (JSON): their types, from a sample of the rows.

A type is Arrow's. Values that disagree become the nearest type that holds them all, in the end
text (JSON).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from vlmbatch.manifest.columns import is_list

_INT64 = range(-(2**63), 2**63)


class Misfit(ValueError):
    """A value is not of the type that the sample's rows had."""


def schema_of(records: Iterable[Mapping[str, Any]]) -> pa.Schema:
    """The columns of all these records, in the order in which they first appear."""
    kinds: dict[str, pa.DataType] = {}
    for record in records:
        for name, value in record.items():
            kinds[name] = _either(kinds.get(name, pa.null()), _kind_of(value))
    return pa.schema(list(kinds.items()))


def schema_of_both(a: pa.Schema, b: pa.Schema) -> pa.Schema:
    """Of two files' columns."""
    kinds = {field.name: field.type for field in a}
    for field in b:
        kinds[field.name] = _either(kinds.get(field.name, pa.null()), field.type)
    return pa.schema(list(kinds.items()))


def settled(schema: pa.Schema) -> pa.Schema:
    """Columns in which the sample has nothing but null are text."""
    return pa.schema([(field.name, _settled(field.type)) for field in schema])


def fitted(value: Any, kind: pa.DataType, *, as_json: bool = False) -> Any:
    """The value as this type holds it; raises Misfit. ``as_json``: text may stand for an object or
    a list."""
    if value is None:
        return None
    if pa.types.is_string(kind):
        if isinstance(value, str):
            return value
        if isinstance(value, bytes) or (isinstance(value, dict | list) and not as_json):
            raise Misfit(f"holds {_called(value)} where the first rows hold text")
        return json.dumps(value, ensure_ascii=False)
    if is_list(kind):
        items = value if isinstance(value, list) else [value]
        return [fitted(item, kind.value_type, as_json=as_json) for item in items]
    if pa.types.is_struct(kind) and isinstance(value, dict):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return {f.name: fitted(value.get(f.name), f.type, as_json=as_json) for f in fields}
    if pa.types.is_boolean(kind) and isinstance(value, bool):
        return value
    if pa.types.is_integer(kind) and type(value) is int and value in _INT64:
        return value
    if pa.types.is_floating(kind) and type(value) in (int, float) and abs(value) < 1e308:
        return float(value)
    if pa.types.is_floating(kind) and type(value) is float:  # infinite, or no number
        return value
    if pa.types.is_binary(kind) and isinstance(value, bytes):
        return value
    raise Misfit(f"holds {_called(value)} where the first rows hold {kind}")


def _kind_of(value: Any) -> pa.DataType:
    match value:
        case None:
            return pa.null()
        case bool():
            return pa.bool_()
        case int() if value in _INT64:
            return pa.int64()
        case float():
            return pa.float64()
        case bytes():
            return pa.binary()
        case list():
            kind = pa.null()
            for item in value:
                kind = _either(kind, _kind_of(item))
            return pa.list_(kind)
        case dict():
            return pa.struct([(key, _kind_of(item)) for key, item in value.items()])
    return pa.string()


def _either(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    """The type that holds values of both."""
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if is_list(a) or is_list(b):
        items = [kind.value_type if is_list(kind) else kind for kind in (a, b)]
        return pa.list_(_either(*items))
    if pa.types.is_struct(a) and pa.types.is_struct(b):
        kinds = {a.field(i).name: a.field(i).type for i in range(a.num_fields)}
        for i in range(b.num_fields):
            field = b.field(i)
            kinds[field.name] = _either(kinds.get(field.name, pa.null()), field.type)
        return pa.struct(list(kinds.items()))
    if {a, b} == {pa.int64(), pa.float64()}:
        return pa.float64()
    return pa.string()


def _settled(kind: pa.DataType) -> pa.DataType:
    if is_list(kind):
        return pa.list_(_settled(kind.value_type))
    if pa.types.is_struct(kind) and kind.num_fields:
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return pa.struct([(field.name, _settled(field.type)) for field in fields])
    if pa.types.is_null(kind) or pa.types.is_struct(kind):  # no file can hold a struct of nothing
        return pa.string()
    return kind


def _called(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", str: "text"}
    return names.get(type(value), "bytes" if isinstance(value, bytes) else "a number")
