"""Base of the formats that list the boxes of images: COCO, YOLO, Label Studio and their like.

A piece keeps a line for each row. At the end the rows about one image are joined, and the
categories are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from vlmbatch.exports.base import Example, Format, Sink, Unsuited
from vlmbatch.exports.boxes import BOX_OPTIONS, BoxRules, Sieve
from vlmbatch.exports.carried import write_carried
from vlmbatch.exports.pieces import Piece
from vlmbatch.exports.selection import Drop
from vlmbatch.exports.sinks import LineSink, lines_of
from vlmbatch.grounding import Box, Point, Size
from vlmbatch.records import TaskKind

if TYPE_CHECKING:
    from vlmbatch.exports.exporting import Export


@dataclass(slots=True)
class Labelled:
    """One image, with the boxes, points and captions of all rows about it.

    ``path``: as ``base.Picture`` has it; of a copy, relative to the export's folder. ``id`` and
    ``carried`` (the carried columns) are its first row's.
    """

    id: str
    path: str
    size: Size
    boxes: list[Box] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    looked: bool = True
    """Boxes were asked for: where there are none, nothing was found."""
    carried: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of each row: ``row``, ``id`` and its carried columns."""


@dataclass(slots=True)
class Found:
    """What the rows of a split hold, all in all."""

    labels: set[str] = field(default_factory=set)
    point_labels: set[str] = field(default_factory=set)
    several: dict[int, int] = field(default_factory=dict)
    """How many rows are about an image, by its hash, where it is more than one."""
    looked: bool = False
    captions: bool = False


class Annotations(Format):
    """``finish`` of those that derive from it writes ``self.labelled(split)``."""

    several_images = False
    upright = True
    options: ClassVar[Mapping[str, str]] = BOX_OPTIONS
    has_points: ClassVar[bool] = False
    has_captions: ClassVar[bool] = False

    def __init__(self, export: Export) -> None:
        super().__init__(export)
        options = export.options
        self.rules = BoxRules.of(options.get("labels"), options.get("min_box"))
        self._sieve = Sieve(self.rules)
        self._captioning = [t.name for t in export.source.tasks.values() if _captions(t.kind)]

    def drops(self) -> Sequence[Drop]:
        return (self._no_boxes, _other_samples, *(() if self.has_points else (_only_points,)))

    def _no_boxes(self, batch: pa.RecordBatch) -> pa.Array:
        """Answers that are texts; captions are one where the format has a place for them."""
        has_none = pc.is_null(batch["boxes"])
        if self.has_points:
            has_none = pc.and_(has_none, pc.is_null(batch["points"]))
        if self.has_captions:
            captions = pc.is_in(batch["task"], pa.array(self._captioning, pa.string()))
            has_none = pc.and_not(has_none, captions)
        return _reason(has_none, "no_boxes")

    def records(self, example: Example) -> Iterable[dict[str, Any]]:
        picture = example.images[0]
        size = example.results[0].image_size or picture.size
        if size is None:
            raise Unsuited("image_size_unknown")
        self._sieve.dropped = self.boxes
        boxes: list[Box] = []
        points: list[Point] = []
        captions, looked = [], False
        for result in example.results:
            answer = result.answer
            assert answer is not None
            looked |= answer.boxes is not None
            boxes += self._sieve.boxes(answer.boxes or (), size)
            if self.has_points:
                points += self._sieve.points(answer.points or ())
            elif answer.points:
                self.boxes["points_left_out"] += len(answer.points)
            if answer.boxes is None and answer.text and result.task in self._captioning:
                captions.append(answer.text)
        if boxes or points:
            self.boxes["exported"] += len(boxes) + len(points)
        copy = self.copy_to(example, picture.name)
        is_copied = picture.path in (copy, str(self.export.place / copy))
        yield {
            "image": self._image_of(example),
            "row": example.row,
            "id": example.id,
            "path": copy if is_copied else picture.path,
            "copied": is_copied,
            "size": [size.width, size.height],
            "boxes": [[b.label, b.x1, b.y1, b.x2, b.y2, b.score] for b in boxes],
            "points": [[p.label, p.x, p.y] for p in points],
            "captions": captions,
            "looked": looked,
            "carried": self.carried(example),
        }

    def _image_of(self, example: Example) -> str:
        """The same for rows about the same image: those that name it alike. Where the manifest
        holds the images themselves, each row has its own."""
        named = example.results[0].image
        return named if named and self.export.source.names_images else f"\0{example.row}"

    def sink(self, piece: Piece, split: str) -> Sink:
        return LineSink(piece.file(f"{Piece.KEPT}/{split}-{piece.number:05d}.jsonl"))

    def labelled(self, split: str) -> Iterator[Labelled]:
        """Each image once, when the last row about it has come: images wait no longer than that.

        A second copy of an image, made for a later row, is deleted.
        """
        left = dict(self.found[split].several)
        waiting: dict[int, Labelled] = {}
        for line in self._lines(split):
            digest = _digest(line)
            if digest not in left:
                yield _labelled(line)
                continue
            image, again = waiting.get(digest), _labelled(line)
            if image is None:
                waiting[digest] = again
            else:
                image.boxes += again.boxes
                image.points += again.points
                image.captions += again.captions
                image.looked |= again.looked
                image.rows += again.rows
                if line["copied"] and again.path != image.path:
                    (self.export.place / again.path).unlink(missing_ok=True)
            left[digest] -= 1
            if not left[digest]:
                yield waiting.pop(digest)

    def write_carried(self) -> None:
        """For formats that have no place for carried columns."""
        for split in self.found:
            images = self.labelled(split)
            lines = ({"file_name": image.path, **row} for image in images for row in image.rows)
            write_carried(self.export, split, lines)

    @cached_property
    def categories(self) -> list[str]:
        """Those asked for, in their order; else all that were found, sorted."""
        found = {label for each in self.found.values() for label in each.labels}
        return list(self.rules.labels) or sorted(found)

    @cached_property
    def point_labels(self) -> list[str]:
        """The same for points, where there are any."""
        found = {label for each in self.found.values() for label in each.point_labels}
        return list(self.rules.labels) if found and self.rules.labels else sorted(found)

    @cached_property
    def found(self) -> dict[str, Found]:
        """By split; those that hold something, in their order."""
        kept = self.export.kept
        return {name: self._found(name) for name in self.export.splits.names if kept(name)}

    def _found(self, split: str) -> Found:
        """Holds 8 bytes and a place in a set for each image."""
        found, seen = Found(), set[int]()
        for line in self._lines(split):
            digest = _digest(line)
            if digest in seen:
                found.several[digest] = found.several.get(digest, 1) + 1
            seen.add(digest)
            found.labels.update(label for label, *_ in line["boxes"])
            found.point_labels.update(label for label, *_ in line["points"])
            found.looked |= line["looked"]
            found.captions |= bool(line["captions"])
        return found

    def _lines(self, split: str) -> Iterator[dict[str, Any]]:
        for path in self.export.kept(split):
            yield from lines_of(path)


def _digest(line: Mapping[str, Any]) -> int:
    return xxhash.xxh3_64_intdigest(line["image"].encode(errors="replace"))


def _labelled(line: Mapping[str, Any]) -> Labelled:
    return Labelled(
        line["id"],
        line["path"],
        Size(*line["size"]),
        [Box(*box) for box in line["boxes"]],
        [Point(*point) for point in line["points"]],
        line["captions"],
        line["looked"],
        line["carried"],
        [{"row": line["row"], "id": line["id"], **line["carried"]}],
    )


def _captions(kind: TaskKind) -> bool:
    return kind is TaskKind.CAPTION


def _other_samples(batch: pa.RecordBatch) -> pa.Array:
    """One image has its boxes once."""
    return _reason(pc.greater(batch["sample"], 0), "another_sample")


def _only_points(batch: pa.RecordBatch) -> pa.Array:
    """Something is in the image, though no box says where: without any, it would be empty."""
    some, none = (pc.list_value_length(batch[name]) for name in ("points", "boxes"))
    return _reason(pc.fill_null(pc.and_(pc.greater(some, 0), pc.equal(none, 0)), False), "points")


def _reason(holds: pa.Array, reason: str) -> pa.Array:
    return pc.if_else(holds, reason, pa.scalar(None, pa.string()))
