"""What an export reads: the results in order, and the images of the rows that they are about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from vlmbatch.errors import ManifestError, OutputLocked, RunStopped, UsageError
from vlmbatch.exports.base import Example
from vlmbatch.exports.selection import Selection
from vlmbatch.families import Family
from vlmbatch.incremental.planning import located
from vlmbatch.incremental.rows import SelectedRows
from vlmbatch.manifest import Manifest, RowStream, open_manifest
from vlmbatch.manifest.columns import choose_columns, is_list, is_string
from vlmbatch.manifest.manifest import stored_schema
from vlmbatch.reading import reading_of
from vlmbatch.records import ImageRef, Range
from vlmbatch.reopen import check_read_through, existing_run_file
from vlmbatch.results.output import Output, View, schema_of
from vlmbatch.results.schema import RESULT_SCHEMA, to_results
from vlmbatch.results.store import open_store
from vlmbatch.run_file import RunFile
from vlmbatch.storage import scheme_of
from vlmbatch.tasks import Task, make_task


@dataclass(frozen=True)
class Source:
    """A finished output, as it is when the export begins."""

    folder: str
    run_file: RunFile
    output: Output
    view: View
    moved: str | None
    """Where the manifest is by now (--manifest)."""

    @cached_property
    def parts(self) -> list[int]:
        """The numbers of the result parts, ascending: one piece of an export each."""
        return self.view.numbers(self.output.part_rows)

    @cached_property
    def identity(self) -> str:
        """Of the results: another one when any of them may have changed."""
        files = [*self.view.parts.values(), *self.view.shards]
        digest = xxhash.xxh3_64(self.run_file.run.encode())
        for file in sorted(files, key=lambda file: file.name):
            digest.update(f"{file.name}\0{file.epoch}\0{file.rows}\n".encode())
        return digest.hexdigest()

    @cached_property
    def tasks(self) -> dict[str, Task]:
        return {spec.name: make_task(spec) for spec in self.run_file.spec.tasks}

    @cached_property
    def family(self) -> Family:
        """The one that read the answers."""
        return reading_of(self.run_file.spec, self.run_file.model["config"]).family

    @cached_property
    def carried(self) -> list[pa.Field]:
        """The columns that were copied from the manifest."""
        return [field for field in self.output.schema if field.name not in RESULT_SCHEMA.names]

    @cached_property
    def base(self) -> str:
        """The folder of the manifest, where relative image paths start."""
        return self.manifest.folder if self.moved else str(self.run_file.manifest["folder"])

    @cached_property
    def manifest(self) -> Manifest:
        """Raises ManifestError, or UsageError where it is another one than the run's."""
        spec = self.run_file.spec
        if self.moved is None:
            try:
                listing = None if self.run_file.is_incremental else self.run_file.manifest
                return open_manifest(
                    spec.manifest, listing, include=spec.include, exclude=spec.exclude
                )
            except ManifestError as error:
                raise ManifestError(
                    error.message, hint="if the manifest has moved, name it with --manifest"
                ) from None
        found = open_manifest([self.moved], include=spec.include, exclude=spec.exclude)
        known = self.run_file.ask["manifest"]
        if not self.run_file.is_incremental and found.identity != known:
            raise UsageError(
                f"{self.moved} is not the manifest of {self.folder}, or it changed since the run",
                hint="name the one that the answers are about",
            )
        return found

    def batches(
        self, number: int, columns: Sequence[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """The results of one part, in the order of row, request and sample."""
        rows = self.output.part_range(number)
        try:
            yield from self.output.results(rows, columns, view=self.view)
        except FileNotFoundError:
            raise RunStopped(
                f"a run works on {self.folder} meanwhile", hint="export again when it has ended"
            ) from None

    def examples(self, number: int, selection: Selection) -> Iterator[Example]:
        """The rows of one part that have results to export; of the others, ``selection`` counts
        why not. Images are still missing."""

        def kept() -> Iterator[Example]:
            for batch in self.batches(number):
                for row, found in groupby(to_results(selection.kept(batch)), lambda r: r.row):
                    results = tuple(found)
                    yield Example(row, results[0].id, results, results[0].carried or {})

        waiting: Example | None = None  # a row's results may lie in two batches
        for example in kept():
            if waiting is not None and waiting.row == example.row:
                results = (*waiting.results, *example.results)
                example = Example(example.row, example.id, results, example.carried)
            elif waiting is not None:
                yield waiting
            waiting = example
        if waiting is not None:
            yield waiting

    def with_images(
        self, examples: Iterable[Example], *, fetched: bool
    ) -> Iterator[tuple[Example, tuple[ImageRef, ...]]]:
        """Each example with its images as the manifest has them.

        Plain paths are in the results; the manifest is read only for what is not: images that it
        holds itself, and full addresses. ``fetched``: the images will be.
        """
        for example in examples:
            named = example.results[0].images or (example.results[0].image,)
            yield example, self._images_of(example.row, named, fetched=fetched)

    def several_images(self) -> Iterator[tuple[ImageRef, ...]]:
        """The images of each row that has several, whatever became of it; as ``with_images``, but
        plain paths always by the results: rows may have left the manifest."""
        if not self.may_have_several:
            return
        columns = ["row", "request", "sample", "images"]
        for number in self.parts:
            for batch in self.batches(number, columns):
                is_first = pc.and_(pc.equal(batch["request"], 0), pc.equal(batch["sample"], 0))
                batch = batch.filter(pc.and_(is_first, pc.is_valid(batch["images"])))
                for row, named in zip(
                    batch["row"].to_pylist(), batch["images"].to_pylist(), strict=True
                ):
                    if images := self._images_of(row, named, fetched=False):
                        yield images

    def _images_of(
        self, row: int, named: Sequence[str | None], *, fetched: bool
    ) -> tuple[ImageRef, ...]:
        if fetched or not self.names_images or not all(map(_is_path, named)):
            return self._rows.of(row)
        return tuple(ImageRef(uri=name) for name in named)

    @cached_property
    def _rows(self) -> ManifestImages:
        return ManifestImages(self)

    @property
    def may_have_several(self) -> bool:
        """Whether a row may have several images."""
        return is_list(self._image_type)

    @property
    def names_images(self) -> bool:
        """Whether the manifest's image column holds texts, not the images themselves."""
        kind = self._image_type
        return is_string(kind.value_type if is_list(kind) else kind)

    @cached_property
    def _image_type(self) -> pa.DataType:
        schema = stored_schema(self.run_file.manifest)
        return schema.field(self.run_file.spec.columns.get("image", "image")).type


class ManifestImages:
    """The images of rows that come in order; from the start again, the manifest is opened anew."""

    def __init__(self, source: Source) -> None:
        manifest, spec = source.manifest, source.run_file.spec
        columns = choose_columns(manifest.schema, spec.columns, (), where=manifest.folder)
        self._rows: RowStream | SelectedRows = RowStream(manifest, columns)
        if source.run_file.is_incremental:  # whose rows are not the manifest's, but have its ids
            self._rows = SelectedRows(self._rows, located(source.output, manifest, columns))

    def of(self, row: int) -> tuple[ImageRef, ...]:
        """Empty where the manifest of an incremental output has that row no more."""
        wanted = Range(row, row + 1)
        return tuple(image for row in self._rows.rows(wanted) for image in row.images)


def open_source(folder: str, manifest: str | None = None) -> Source:
    """The output in this folder. Raises UsageError where it is none, and OutputLocked."""
    store = open_store(folder)
    run_file = existing_run_file(store, hint="name the folder of a run")
    check_read_through(store, run_file)
    if store.is_locked():
        raise OutputLocked(
            f"a run works on {folder} at this moment", hint="export when it has ended"
        )
    schema = schema_of(store) or RESULT_SCHEMA
    output = Output(store, run_file.run, run_file.part_rows, schema)
    return Source(folder, run_file, output, output.view(), manifest)


def _is_path(name: str | None) -> bool:
    return bool(name) and scheme_of(name or "") in (None, "file")
