"""The columns of files that were written one by one, such as the parts of a table."""

from __future__ import annotations

import pyarrow as pa

from vlmbatch.manifest.columns import is_list


def common_schema(a: pa.Schema, b: pa.Schema) -> pa.Schema | None:
    """The columns, with types that hold every value of both; None where there are other columns,
    or types that no type holds together.

    A column that is null throughout a file has no type there, and numbers are as wide as the file
    needed. Whole numbers and floats are not mixed: large ids would change.
    """
    if a.equals(b):
        return a
    kinds, others = ({field.name: field.type for field in schema} for schema in (a, b))
    if kinds.keys() != others.keys():
        return None
    common = {name: _common_type(kind, others[name]) for name, kind in kinds.items()}
    return None if None in common.values() else pa.schema(list(common.items()))


def _common_type(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if is_list(a) and is_list(b):
        items = _common_type(a.value_type, b.value_type)
        return None if items is None else pa.list_(items)
    if pa.types.is_struct(a) and pa.types.is_struct(b):
        fields = common_schema(pa.schema(list(a)), pa.schema(list(b)))
        return None if fields is None else pa.struct(list(fields))
    for family in (pa.types.is_signed_integer, pa.types.is_unsigned_integer, pa.types.is_floating):
        if family(a) and family(b):
            return max(a, b, key=lambda kind: kind.bit_width)
    for usual, large in ((pa.string(), pa.large_string()), (pa.binary(), pa.large_binary())):
        if {a, b} == {usual, large}:
            return large
    return None
