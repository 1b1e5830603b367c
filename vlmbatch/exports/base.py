"""What a format of training data is.

A format turns examples into records (``Format.records``) and says where records go (``sink``): as
lines of JSON that are joined into one file (``Lines``), as Parquet (``Tables``), or as it likes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import pyarrow as pa

from vlmbatch.exports.pieces import Piece
from vlmbatch.exports.selection import Drop
from vlmbatch.exports.sinks import LineSink, ParquetSink, join
from vlmbatch.grounding import Size
from vlmbatch.manifest.columns import is_list
from vlmbatch.records import Result

if TYPE_CHECKING:
    from vlmbatch.exports.exporting import Export


SPLITS_OF_DATASETS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""By which ``datasets`` (data_files.py) tells files and folders apart; all others are ``train``."""


class ImageMode(StrEnum):
    """How an export has its images."""

    REFERENCE = "reference"
    """Where they are; those that the consumer cannot open are copied."""
    COPY = "copy"
    """As files below the export's folder."""
    EMBED = "embed"
    """Inside the format's own files."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One image of an example, as the format asked for it.

    ``name``: a file name with the right ending, no two alike in an export. ``path``: where files in
    the export's folder find it (relative to that folder with slashes, or absolute, or an address);
    None where it is embedded. ``data``: the encoded bytes, where it is embedded. ``size``: upright,
    in pixels; None where it is not known.
    """

    name: str
    path: str | None = None
    data: bytes | None = None
    size: Size | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One row of the output, as far as it is exported: at least one result, all of them good.

    ``results`` are in the order of request and sample, their boxes in pixels of the upright image
    ``images[0]``. ``carried``: the columns that the run copied from the manifest.
    """

    row: int
    id: str
    results: tuple[Result, ...]
    carried: Mapping[str, Any]
    images: tuple[Picture, ...] = ()
    split: str = "train"

    def in_split(self, split: str) -> Example:
        return replace(self, split=split)


class Unsuited(Exception):
    """This example has no place in this format; ``reason`` is what the summary counts, in a word or
    two: ``several_images``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Sink(Protocol):
    """Takes the records of one split of one piece."""

    def add(self, record: Any) -> None: ...

    def close(self) -> None:
        """Everything is written; the piece publishes the file."""


class Format:
    """Base of all formats. One is made per export; pieces come one after the other."""

    name: ClassVar[str]
    about: ClassVar[str]
    """A line for ``vlmbatch export --help``."""
    images: ClassVar[tuple[ImageMode, ...]] = tuple(ImageMode)
    """Those that it can have; the first is the default."""
    opens_addresses: ClassVar[bool] = False
    """Its consumers open http(s) and store addresses; else such images are copied."""
    several_images: ClassVar[bool] = True
    """Else rows with several are left out, and counted."""
    talks: ClassVar[bool] = False
    """It has the user's words, or whole conversations: settings of their wording are for it."""
    says_boxes: ClassVar[bool] = False
    """Boxes are answers in the syntax of the model to be trained: its family must have one."""
    absolute_paths: ClassVar[bool] = False
    """Local images are named by absolute paths, not relative to the export's folder."""
    upright: ClassVar[bool] = False
    """Not all of its consumers obey EXIF, and its records name places in the upright image: local
    images that are stored turned are copied upright, also where the others are named."""
    endings: ClassVar[frozenset[str]] = frozenset(("jpg", "png", "webp", "gif", "bmp"))
    """Of files that its consumers open; images of other formats become PNG or JPEG."""
    split_names: ClassVar[Mapping[str, str]] = {}
    """Those that its consumers know, and what each is to them; any, where it is empty."""
    options: ClassVar[Mapping[str, str]] = {}
    """Settings of its own (``--format-arg KEY=VALUE``): what each is."""
    taken: ClassVar[frozenset[str]] = frozenset()
    """Columns of its own: a carried column of such a name gets ``carried_`` before it."""

    def __init__(self, export: Export) -> None:
        """Raises UsageError where the run or the options do not fit; nothing is written yet."""
        self.export = export
        self.boxes: Counter[str] = Counter()
        """Boxes and points of the current piece, ``exported`` or why not; empty where the format
        has none."""

    def drops(self) -> Sequence[Drop]:
        """Why results have no place in this format, whatever their example."""
        return ()

    def records(self, example: Example) -> Iterable[Any]:
        """What becomes of an example. Raises Unsuited."""
        raise NotImplementedError

    def sink(self, piece: Piece, split: str) -> Sink:
        """Where the records of a split of a piece go: into files that ``piece.file`` names."""
        raise NotImplementedError

    def copy_to(self, example: Example, name: str) -> str:
        """Where a copied image of the example goes, relative to the export's folder."""
        return f"images/{example.row // 10_000:05d}/{name}"

    def finish(self) -> None:
        """All pieces are there: join them, write what is about the whole. May happen twice."""

    def carried(self, example: Example) -> dict[str, Any]:
        """The carried columns, under names that are free in this format."""
        return {
            name: plain_value(example.carried[each.name], each.type)
            for name, each in self.columns.items()
        }

    def carried_fields(self) -> list[pa.Field]:
        """The same, as columns of a table."""
        return [pa.field(name, plain_type(each.type)) for name, each in self.columns.items()]

    @cached_property
    def columns(self) -> dict[str, pa.Field]:
        """The carried columns by their names in this format: their own, where these are free."""
        carried = self.export.source.carried
        own = {each.name for each in carried}
        found: dict[str, pa.Field] = {}
        for each in carried:
            name = self.allowed(each.name)
            while name in self.taken or name in found or (name in own and name != each.name):
                name = self.allowed(f"carried_{name}")
            found[name] = each
        return found

    def allowed(self, name: str) -> str:
        """The name, or one like it where its consumers take columns of such names for others."""
        return name


class Lines(Format):
    """Records are JSON objects: one file of lines for each split, ``train.jsonl``."""

    def sink(self, piece: Piece, split: str) -> Sink:
        return LineSink(piece.file(f"{Piece.KEPT}/{split}-{piece.number:05d}.jsonl"))

    def finish(self) -> None:
        for split in self.export.splits.names:
            if pieces := self.export.kept(split):
                self.export.destination.write(f"{split}.jsonl", partial(join, pieces))


class Tables(Format):
    """Records are rows of Parquet files: ``train-00000.parquet``, one for each piece and split.

    ``datasets.load_dataset("parquet", data_dir=...)`` finds the splits by these names.
    """

    def schema(self) -> pa.Schema:
        """Of the records."""
        raise NotImplementedError

    def sink(self, piece: Piece, split: str) -> Sink:
        return ParquetSink(piece.file(f"{split}-{piece.number:05d}.parquet"), self.schema())


def with_features(schema: pa.Schema, images: Iterable[str] = ()) -> pa.Schema:
    """The schema with the metadata by which ``datasets`` knows its features: these columns hold
    images, or lists of them."""
    features = {field.name: _feature(field.type) for field in schema}
    for name in images:
        is_list = pa.types.is_list(schema.field(name).type)
        image = {"_type": "Image"}
        features[name] = {"feature": image, "_type": "List"} if is_list else image
    info = {"info": {"features": features}}
    return schema.with_metadata({"huggingface": json.dumps(info)})


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type that ``datasets`` has for values of this one."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if is_list(kind):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_map(kind):
        pair = [("key", plain_type(kind.key_type)), ("value", plain_type(kind.item_type))]
        return pa.list_(pa.struct(pair))
    if pa.types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return pa.struct([pa.field(each.name, plain_type(each.type)) for each in fields])
    return kind


def plain_value(value: Any, kind: pa.DataType) -> Any:
    """The value as one of ``plain_type``: a map's pairs are objects, as readers of JSON want."""
    if value is None:
        return None
    if pa.types.is_map(kind):
        return [{"key": key, "value": plain_value(each, kind.item_type)} for key, each in value]
    if is_list(kind):
        return [plain_value(each, kind.value_type) for each in value]
    if pa.types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return {each.name: plain_value(value[each.name], each.type) for each in fields}
    return value


def _feature(kind: pa.DataType) -> Any:
    """As ``datasets`` writes an Arrow type down."""
    if pa.types.is_struct(kind):
        return {kind.field(i).name: _feature(kind.field(i).type) for i in range(kind.num_fields)}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    return {"dtype": _dtype(kind), "_type": "Value"}


def _dtype(kind: pa.DataType) -> str:
    names = {pa.float32(): "float32", pa.float64(): "float64", pa.float16(): "float16"}
    names |= {pa.bool_(): "bool", pa.date32(): "date32", pa.date64(): "date64"}
    return names.get(kind, str(kind))
