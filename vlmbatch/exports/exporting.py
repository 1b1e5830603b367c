"""``vlmbatch export``: an output as training data, part by part.

    results of a part -> selection -> examples -> their images -> records of the format -> a piece

One part of the results gives one piece; what is whole is never made again. Nothing is held longer
than it takes to write it.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlmbatch import __version__
from vlmbatch.errors import UsageError
from vlmbatch.exports.base import Example, Format, ImageMode, Sink, Unsuited
from vlmbatch.exports.conversations import Conversations, Wording
from vlmbatch.exports.own import format_named
from vlmbatch.exports.pictures import Pictures
from vlmbatch.exports.pieces import (
    LAYOUT,
    Destination,
    Piece,
    checked_place,
    same_settings,
)
from vlmbatch.exports.quality import checked_filters, quality_drops, stripped
from vlmbatch.exports.selection import Drop, Selection
from vlmbatch.exports.source import Source, open_source
from vlmbatch.exports.splits import Groups, Splits
from vlmbatch.records import ImageRef
from vlmbatch.results.store import reported
from vlmbatch.status import rows_wanted


@dataclass(frozen=True, slots=True)
class Settings:
    """What an export was told, beside its format; another one of them makes another export."""

    images: ImageMode | None = None
    split: str | None = None
    where: str | None = None
    min_chars: int | None = None
    max_chars: int | None = None
    wording: Wording = field(default_factory=Wording)
    drop: list[str] | None = None
    """Filters of vlmbatch.quality."""
    max_per_label: int | None = None
    strip_preambles: bool | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    """The format's own."""


COUNTS = ("records", "dropped", "images", "boxes")


@dataclass(slots=True)
class Tally:
    """What a piece, or all of them, came to. ``results`` = ``exported`` + ``dropped``."""

    results: int = 0
    exported: int = 0
    rows: int = 0
    """Those of which something was exported."""
    records: Counter[str] = field(default_factory=Counter)
    """By split."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Results that were not exported, by reason."""
    images: Counter[str] = field(default_factory=Counter)
    boxes: Counter[str] = field(default_factory=Counter)
    """Boxes and points of the rows: ``exported``, or why not."""

    def add(self, other: Tally) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def to_json(self) -> dict[str, Any]:
        counts = {n: dict(getattr(self, n)) for n in COUNTS}
        return {**{n: getattr(self, n) for n in ("results", "exported", "rows")}, **counts}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Tally:
        counts = {n: Counter(value[n]) for n in COUNTS}
        return cls(value["results"], value["exported"], value["rows"], **counts)


@dataclass(slots=True)
class Exported:
    """What an export prints at its end."""

    format: str
    output: str
    destination: str
    rows: int = 0
    results: int = 0
    exported: int = 0
    records: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    boxes: dict[str, int] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    pieces: int = 0
    pieces_resumed: int = 0
    """Pieces that an earlier start had made."""
    seconds: float = 0.0
    rows_per_second: float | None = None
    """Of this start; None where it made no piece."""
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def as_text(self) -> str:
        """For a person."""
        splits = " + ".join(f"{count:,} {name}" for name, count in self.records.items())
        lines = [
            f"exported: {self.exported:,} of {self.results:,} results about {self.rows:,} rows "
            f"as {splits or 'no'} records ({self.format})",
            *(f"    {count:>9,}  left out: {reason}" for reason, count in self.dropped.items()),
        ]
        for name, counts in (("boxes", self.boxes), ("images", self.images)):
            if counts:
                each = (f"{count:,} {what.replace('_', ' ')}" for what, count in counts.items())
                lines.append(f"  {name}: {', '.join(each)}")
        rate = f", {self.rows_per_second:,.0f} rows/s" if self.rows_per_second else ""
        if self.files:
            lines.append(f"  {', '.join(self.files[:6])} in {self.destination}")
        lines.append(f"  {self.seconds:,.1f} s{rate}")
        if self.pieces_resumed:
            lines.append(f"  {self.pieces_resumed:,} of {self.pieces:,} pieces were there already")
        return "\n".join(lines)


@dataclass(frozen=True)
class Export:
    """One export, as its format sees it."""

    source: Source
    destination: Destination
    settings: Settings
    options: Mapping[str, str]

    @property
    def place(self) -> Path:
        """The folder of the export."""
        return self.destination.place

    @cached_property
    def splits(self) -> Splits:
        return Splits(self.settings.split)

    @cached_property
    def conversations(self) -> Conversations:
        return Conversations(self.source, self.settings.wording)

    @property
    def model(self) -> str:
        """``id@revision`` of the model that answered."""
        return str(self.source.run_file.model["label"])

    def kept(self, name: str) -> list[Path]:
        """What all pieces wrote as ``Piece.KEPT/NAME-<number>...``, in their order."""
        return sorted((self.place / Piece.KEPT).glob(f"{name}-*"))


def export(
    folder: str,
    destination: str,
    form: str,
    settings: Settings | None = None,
    *,
    manifest: str | None = None,
    overwrite: bool = False,
    drops: Sequence[Drop] = (),
) -> Exported:
    """Write the good results of an output as training data; again: go on where it was killed.

    ``manifest``: where the run's manifest is by now. ``drops``: further reasons to leave results
    out; whoever gives them says so in ``settings``. Raises UsageError where something does not fit,
    and RunStopped.
    """
    began = time.monotonic()
    settings = settings or Settings()
    if settings.drop is not None:
        settings = replace(settings, drop=checked_filters(settings.drop))
    kind = format_named(form)
    source = open_source(folder, manifest)
    if not kind.talks and settings.wording != Wording():
        raise UsageError(
            f"the format {kind.name} has no conversations to word",
            hint="leave out --conversation, --system, --user-template, --paraphrases, --for-model",
        )
    target = Destination(checked_place(folder, destination))
    exported = Export(source, target, settings, _options(kind, settings.options))
    mode = _image_mode(kind, settings.images)
    if kind.says_boxes:
        exported.conversations.check_boxes()
    writer = kind(exported)
    always = [*drops, *writer.drops()]
    selected = partial(
        Selection,
        source.output.schema,
        where=settings.where,
        min_chars=settings.min_chars,
        max_chars=settings.max_chars,
        changed=partial(stripped, source) if settings.strip_preambles else None,
    )
    selected()  # is checked
    _check_split_names(exported.splits.names, kind)
    told = _told(exported, kind, mode)
    with target.held():
        before = target.settings
        if before is not None and (overwrite or before["state"] == "clearing"):
            target.clear()
            before = None
        elif before is not None:
            same_settings(before["settings"], told, destination)
        is_done = before is not None and before["state"] == "done"
        state = {"state": "unfinished", "vlmbatch": __version__, "settings": told}
        if not is_done:
            target.write_settings({**state, "wrote": before["wrote"] if before else []})
        pictures = partial(
            Pictures, writer, source.run_file.spec, base=source.base, place=target.place
        )
        judging: list[Drop] = []
        if not is_done:
            judging = quality_drops(
                source,
                target,
                lambda found: selected(drops=[*always, *found]),
                partial(pictures, mode=ImageMode.EMBED),
                names=settings.drop or (),
                max_per_label=settings.max_per_label,
            )
        selection = selected(drops=[*always, *judging])
        with pictures(mode=mode) as fetching:
            making = _Making(exported, writer, selection, fetching)
            total, resumed = making.all_pieces()
        if not is_done:
            with reported(target.place):
                writer.finish()
            target.write_settings({**state, "state": "done", "tally": total.to_json()})
        target.end()
        files = (target.settings or {}).get("wrote", [])
    return _summary(
        exported, kind, total, files, resumed, making.rows, time.monotonic() - began, destination
    )


class _Making:
    """Makes the pieces that are not there."""

    def __init__(
        self, exported: Export, writer: Format, selection: Selection, pictures: Pictures
    ) -> None:
        self._export, self._writer = exported, writer
        self._selection, self._pictures = selection, pictures
        self.rows = 0

    def all_pieces(self) -> tuple[Tally, int]:
        """(what all pieces hold, how many of them were there)."""
        total, resumed = Tally(), 0
        source, target = self._export.source, self._export.destination
        rows = sum(len(rows) for rows in source.view.committed)
        with closing(tqdm(total=rows, unit="row", file=sys.stderr, disable=None)) as bar:
            for number in source.parts:
                found = target.tally(number)
                if found is None:
                    tally = self._piece(number, bar)
                else:
                    tally, resumed = Tally.from_json(found), resumed + 1
                total.add(tally)
                bar.update(min((number + 1) * source.output.part_rows, rows) - bar.n)
        return total, resumed

    def _piece(self, number: int, bar: Any) -> Tally:
        target = self._export.destination
        selection, pictures = self._selection, self._pictures
        selection.results, selection.dropped = 0, Counter()
        pictures.counts, self._writer.boxes = Counter(), Counter()
        tally, sinks = Tally(), dict[str, Sink]()
        with target.piece(number) as piece:
            try:
                for example, error in pictures.of(self._wanted(number, tally)):
                    if error is not None:
                        tally.dropped[str(error.failure.code)] += len(example.results)
                    else:
                        self._write(example, piece, sinks, tally)
                    self.rows += 1
                    if self.rows % 1000 == 0:
                        bar.update(1000)
            finally:
                with reported(target.place):
                    for sink in sinks.values():
                        sink.close()
            tally.results = selection.results
            tally.dropped.update(selection.dropped)
            tally.images, tally.boxes = pictures.counts, self._writer.boxes
            assert tally.results == tally.exported + sum(tally.dropped.values()), tally
            target.commit(piece, tally.to_json())
        return tally

    def _wanted(self, number: int, tally: Tally) -> Iterator[tuple[Example, tuple[ImageRef, ...]]]:
        """The part's examples with the references of their images."""
        source = self._export.source
        examples = source.examples(number, self._selection)
        splits, groups = self._export.splits, self._groups
        for example, refs in source.with_images(examples, fetched=self._pictures.fetches):
            if not refs:
                tally.dropped["not_in_manifest"] += len(example.results)
                continue
            if len(refs) > 1 and not self._writer.several_images:
                tally.dropped["several_images"] += len(example.results)
            else:
                yield example.in_split(splits.at(groups.of(refs[0]))), refs

    @cached_property
    def _groups(self) -> Groups:
        """Of all rows, whatever is exported of them: another selection goes to the same splits."""
        if len(self._export.splits.names) == 1:
            return Groups()
        return Groups(self._export.source.several_images())

    def _write(self, example: Example, piece: Piece, sinks: dict[str, Sink], tally: Tally) -> None:
        try:
            records = list(self._writer.records(example))
        except Unsuited as why:
            tally.dropped[why.reason] += len(example.results)
            return
        with reported(self._export.place):
            if example.split not in sinks:
                sinks[example.split] = self._writer.sink(piece, example.split)
            for record in records:
                sinks[example.split].add(record)
        tally.rows += 1
        tally.exported += len(example.results)
        tally.records[example.split] += len(records)


def _options(kind: type[Format], given: Mapping[str, str]) -> Mapping[str, str]:
    for name in given:
        if name not in kind.options:
            known = ", ".join(kind.options) or "none"
            raise UsageError(
                f"the format {kind.name} has no setting {name!r}", hint=f"it has: {known}"
            )
    return given


def _image_mode(kind: type[Format], asked: ImageMode | None) -> ImageMode:
    if asked is not None and asked not in kind.images:
        raise UsageError(
            f"the format {kind.name} does not {asked} images",
            hint=f"--images {' or '.join(kind.images)}",
        )
    return asked or kind.images[0]


def _check_split_names(names: Sequence[str], kind: type[Format]) -> None:
    """Raises UsageError for splits that the format's consumers would take for one."""
    if not kind.split_names:
        return
    known = [kind.split_names.get(name) for name in names]
    if None in known or len(set(known)) < len(known):
        raise UsageError(
            f"readers of {kind.name} cannot tell the splits {', '.join(names)} apart",
            hint=f"of each of these, one: {_alike(kind.split_names)}",
        )


def _alike(names: Mapping[str, str]) -> str:
    """``train; val, validation; test``."""
    found: dict[str, list[str]] = {}
    for name, meaning in names.items():
        found.setdefault(meaning, []).append(name)
    return "; ".join(", ".join(each) for each in found.values())


def _told(exported: Export, kind: type[Format], mode: ImageMode) -> dict[str, Any]:
    """What makes this export another one than others, as export.json keeps it."""
    given = asdict(exported.settings)
    given.pop("images")
    given.pop("wording")
    wording = exported.conversations.identity if kind.talks else {}
    source = exported.source
    return {
        "format": kind.name,
        "layout": LAYOUT,
        "images": str(mode),
        **given,
        **wording,
        "output": source.run_file.run,
        "results": source.identity,
    }


def _summary(
    exported: Export,
    kind: type[Format],
    total: Tally,
    files: list[str],
    resumed: int,
    rows: int,
    seconds: float,
    destination: str,
) -> Exported:
    source = exported.source
    summary = Exported(kind.name, source.folder, destination)
    summary.rows, summary.results, summary.exported = total.rows, total.results, total.exported
    order = {name: at for at, name in enumerate(exported.splits.names)}
    summary.records = dict(sorted(total.records.items(), key=lambda item: order[item[0]]))
    summary.dropped = dict(total.dropped.most_common())
    summary.images, summary.boxes = dict(total.images), dict(total.boxes)
    summary.files = files
    summary.pieces, summary.pieces_resumed = len(source.parts), resumed
    summary.seconds = round(seconds, 2)
    summary.rows_per_second = round(rows / seconds, 1) if rows else None
    summary.warnings = _warnings(exported, total)
    return summary


def _warnings(exported: Export, total: Tally) -> list[str]:
    source, warnings = exported.source, []
    committed = sum(len(rows) for rows in source.view.committed)
    wanted = rows_wanted(source.output.store, source.run_file)
    if committed < wanted:
        warnings.append(
            f"the run is not finished: {committed:,} of {wanted:,} rows are answered, and only "
            "those are exported"
        )
    if total.images["not_there"]:
        warnings.append(
            f"{total.images['not_there']:,} of the images that are named are not there: if they "
            "moved with the manifest, name it with --manifest"
        )
    if total.images["shortened"]:
        warnings.append(
            f"{total.images['shortened']:,} addresses are written without user info and query, "
            "which may be secrets; where images cannot be had without: --images copy"
        )
    warnings += _far_off(exported, total)
    if not total.exported:
        warnings.append("nothing was exported: no result is left")
    return warnings


def _far_off(exported: Export, total: Tally) -> list[str]:
    """Splits without anything, or with less than half of what was asked for, which is no chance."""
    records = sum(total.records.values())
    shares = ": all rows that share an image, also through others, are in one split"
    why = shares if exported.source.may_have_several else ""
    found = []
    for name, share in exported.splits.shares:
        got, asked = total.records[name], share * records
        if records and (not got or (asked >= 50 and got < asked / 2)):
            found.append(
                f"{name} has {got:,} of {records:,} records, where {asked:,.3g} were asked for{why}"
            )
    return found
