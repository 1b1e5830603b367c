"""Which manifest columns mean what, and how one record becomes a Row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import pyarrow as pa
import xxhash

from vlmbatch.errors import ManifestError
from vlmbatch.records import ImageRef, Row
from vlmbatch.storage import without_secrets

ASKED = ("question", "questions", "phrase", "labels")
"""Columns that say what to ask about a row; they are part of a row's default id."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns that a run reads. ``names`` maps our names to the manifest's (--column)."""

    names: Mapping[str, str]
    fields: tuple[str, ...]
    """Manifest columns that end up in ``Row.fields``, under their own or our name."""
    has_id: bool
    images_as_uris: bool = False
    images_as_lists: bool = False
    """A row may have several images."""

    @property
    def to_read(self) -> list[str]:
        wanted = [self.names["image"], *self.fields]
        if self.has_id:
            wanted.append(self.names["id"])
        return list(dict.fromkeys(wanted))


def choose_columns(
    schema: pa.Schema, given: Mapping[str, str], wanted: Iterable[str], *, where: str
) -> Columns:
    """The columns to read from a manifest with this schema; ``wanted`` are the extra ones.

    Raises ManifestError for a column that is missing or of a type that cannot be asked about.
    """
    present = schema.names
    unknown = [name for name in given if name not in ("image", "id", *ASKED)]
    if unknown:
        raise ManifestError(
            f"--column cannot rename {unknown[0]!r}",
            hint=f"it renames: image, id, {', '.join(ASKED)}",
        )
    names = {name: given.get(name, name) for name in ("image", "id", *ASKED)}
    for ours, theirs in given.items():
        if theirs not in present:
            raise _missing(theirs, present, where, f"asked for by --column {ours}={theirs}")
    if names["image"] not in present:
        raise ManifestError(
            f"no column 'image' in {where} (it has: {', '.join(present) or 'no columns'})",
            hint=f"name the column with --column image={likely_image(schema)}",
        )
    twice = sorted({name for name in present if present.count(name) > 1})
    for name in twice:
        if name in (*names.values(), *wanted):
            raise ManifestError(
                f"{where} has several columns {name!r}",
                hint="write it with column names that differ, or leave that column out",
            )
    _check_image_type(schema.field(names["image"]), where)
    _check_asked_types(schema, names, where)
    fields = [names[name] for name in ASKED if names[name] in present]
    for name in wanted:
        if name not in present:
            raise _missing(name, present, where, "asked for by --carry, --prompt or --engine-arg")
        fields.append(name)
    image_type = schema.field(names["image"]).type
    return Columns(
        names,
        tuple(dict.fromkeys(name for name in fields if name != names["image"])),
        has_id=names["id"] in present,
        images_as_uris=is_string(image_type),
        images_as_lists=is_list(image_type),
    )


def row_of(
    record: Mapping[str, Any], row: int, columns: Columns, unreadable: str | None = None
) -> Row:
    """One record as a Row. What is wrong with it is said in ``problem``; this never raises.

    ``unreadable`` is what was found wrong when the record was read."""
    images, problem = images_of(record[columns.names["image"]])
    problem = unreadable or problem
    fields = fields_of(record, columns)
    given = record[columns.names["id"]] if columns.has_id else None
    identity = str(given) if given not in (None, "") else default_id(images, fields)
    return Row(row, identity, images, fields, problem)


def fields_of(record: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """``Row.fields`` of this record."""
    fields = {name: record[name] for name in columns.fields}
    for ours in ASKED:  # --column question=q: templates may use either name
        theirs = columns.names[ours]
        if theirs != ours and theirs in fields:
            fields[ours] = fields[theirs]
    return fields


def default_id(images: Iterable[ImageRef], fields: Mapping[str, Any]) -> str:
    """xxh3-128 hex over the length-prefixed image references or bytes and what is asked."""
    digest = xxhash.xxh3_128()
    for image in images:
        if image.data:
            digest.update(len(image.data).to_bytes(8, "little"))
            digest.update(image.data)
        else:
            digest.update(image_piece(image.uri or ""))
    for name in ASKED:
        digest.update(asked_piece(name, fields.get(name)))
    return digest.hexdigest()


def image_piece(uri: str) -> bytes:
    """What a reference adds to its row's default id."""
    is_data = uri[:5].lower() == "data:"
    return sized(uri if is_data else without_secrets(uri))


def asked_piece(name: str, value: Any) -> bytes:
    """What the value of a column of ASKED adds to its row's default id."""
    if value is None:
        return b""
    kind = sized(name.removesuffix("s"))  # a question is no phrase of the same words
    items = value if isinstance(value, list) else [value]
    return kind + b"".join([sized(str(item)) for item in items if item is not None])


def sized(text: str) -> bytes:
    """Its UTF-8 bytes after how many they are."""
    piece = text.encode()
    return len(piece).to_bytes(8, "little") + piece


def images_of(value: Any) -> tuple[tuple[ImageRef, ...], str | None]:
    """The images that a value names or holds, and what is wrong with the first that is none."""
    items = value if isinstance(value, list) else [value]
    images: list[ImageRef] = []
    for position, item in enumerate(items):
        image = _image_of(item)
        if image is None:
            place = f"image {position} of {len(items)}" if isinstance(value, list) else "the image"
            return tuple(images), f"{place} is {'null' if item is None else 'empty'}"
        images.append(image)
    return tuple(images), None if images else "the image list is empty"


def _image_of(item: Any) -> ImageRef | None:
    match item:
        case str() if item:
            return ImageRef(uri=item)
        case bytes():
            return ImageRef(data=item)
        case {"bytes": bytes() as data, **rest}:
            path = rest.get("path")
            return ImageRef(uri=path if isinstance(path, str) and path else None, data=data)
        case {"path": str() as path} if path:
            return ImageRef(uri=path)
    return None


def is_string(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _is_binary(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )


def is_embedded(kind: pa.DataType) -> bool:
    """Whether a column of images holds them, not only their places."""
    if is_list(kind) or pa.types.is_dictionary(kind):
        return is_embedded(kind.value_type)
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return _is_binary(kind)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        names = {kind.field(i).name for i in range(kind.num_fields)}
        return bool(names & {"bytes", "path"})
    return is_string(kind) or _is_binary(kind)


def _check_image_type(field: pa.Field, where: str) -> None:
    kind = field.type.value_type if is_list(field.type) else field.type
    if not _is_image(kind):
        raise ManifestError(
            f"column {field.name!r} in {where} holds {field.type}, not images",
            hint="an image is a path or URI (string), bytes, a struct {bytes, path}, "
            "or a list of these",
        )


def _check_asked_types(schema: pa.Schema, names: Mapping[str, str], where: str) -> None:
    for ours in ASKED:
        if names[ours] not in schema.names:
            continue
        kind = schema.field(names[ours]).type
        item = kind.value_type if is_list(kind) else kind
        if pa.types.is_dictionary(item):
            item = item.value_type
        if not (is_string(item) or pa.types.is_null(item)):
            raise ManifestError(
                f"column {names[ours]!r} in {where} holds {kind}; "
                f"{ours!r} is text or a list of texts",
                hint=f"name another column with --column {ours}=NAME",
            )


def likely_image(schema: pa.Schema) -> str:
    """The column that the images are in, by its name, else by its type; else ``NAME``."""
    usual = ("url", "path", "file", "file_name", "filename", "img", "images", "jpg", "png")
    for name in usual:
        if name in schema.names:
            return name
    return next((f.name for f in schema if _is_image(f.type)), "NAME")


def _missing(name: str, present: list[str], where: str, why: str) -> ManifestError:
    close = get_close_matches(name, present, n=1)
    return ManifestError(
        f"no column {name!r} in {where} (it has: {', '.join(present)})",
        hint=f"{why}; did you mean {close[0]!r}?" if close else why,
    )
