"""``vlmbatch import-batch``: the answers of a batch become results, as a run's own would."""

from __future__ import annotations

import asyncio
import shlex
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from PIL import Image

from vlmbatch.answering import Answering
from vlmbatch.batches.answers import Answers, Line, read_answers
from vlmbatch.errors import ErrorCode, Stage, failed
from vlmbatch.grounding import Size
from vlmbatch.images.budget import ByteBudget, Reservation
from vlmbatch.images.load import LoadedImages, Loader
from vlmbatch.images.urls import ImageUrls
from vlmbatch.intervals import Intervals
from vlmbatch.manifest import RowStream
from vlmbatch.records import Completion, ImageRef, LoadedImage, Range, Request, Result, Row
from vlmbatch.reopen import Reopened, existing_run_file, joined, reopened
from vlmbatch.results.files import Counts
from vlmbatch.results.gathering import gather_all
from vlmbatch.results.retry import asked_anew
from vlmbatch.results.store import open_store
from vlmbatch.summary import TOO_MANY_FAILED


@dataclass(slots=True)
class Imported:
    """What an import prints at its end. ``rows`` = ``ok`` + ``failed`` + ``skipped`` + ``left``."""

    rows: int = 0
    requests: int = 0
    ok: int = 0
    failed: int = 0
    skipped: int = 0
    """Rows that had their results before; ``replaced`` of their failed ones are answered now."""
    replaced: int = 0
    left: int = 0
    incomplete: int = 0
    """Of the rows left: those that have some of their answers in these files."""
    failures: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    files: int = 0
    lines: int = 0
    duplicates: int = 0
    foreign: int = 0
    broken: int = 0
    model: str = ""
    output: str = ""
    exit_code: int = 0
    warnings: list[str] = field(default_factory=list)

    def add(self, results: list[Result]) -> None:
        """The results of one more row."""
        codes = [result.failure.code for result in results if result.failure is not None]
        self.requests += len(results)
        self.ok += not codes
        self.failed += bool(codes)
        self.failures.update(map(str, codes))
        for completion in (result.completion for result in results):
            if completion is not None:
                self.prompt_tokens += completion.prompt_tokens or 0
                self.completion_tokens += completion.completion_tokens or 0

    def to_json(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__slots__}
        return {**values, "failures": dict(self.failures.most_common())}

    def as_text(self) -> str:
        """For a person."""
        left = f", {self.left:,} left" if self.left else ""
        files = f"{self.files} file{'s' if self.files != 1 else ''}"
        lines = [
            f"imported: {self.rows:,} rows = {self.ok:,} ok + {self.failed:,} failed + "
            f"{self.skipped:,} answered earlier{left}",
            f"  {self.requests:,} answers from {self.lines:,} lines in {files}, "
            f"{self.completion_tokens:,} tokens, as answers of {self.model}",
        ]
        lines += [f"    {count:>9,}  {code}" for code, count in self.failures.most_common()]
        if self.replaced:
            lines.append(f"  {self.replaced:,} results that had failed before are answered now")
        lines.append(f"  in {self.output}")
        if self.failed:
            lines.append(
                f"  to ask the failed ones again: {shlex.join(['vlmbatch', 'retry', self.output])}"
            )
        if self.left:
            lines.append("  for the rest: more result files, or the run's own command")
        return "\n".join(lines)


def import_batch(folder: str, paths: Sequence[str]) -> Imported:
    """Commit what these result files answer. Again does no harm: what is ok stays as it is.

    Raises UsageError, with nothing committed, for a file without a usable line.
    """
    existing_run_file(open_store(folder))
    summary = Imported(files=len(paths), output=folder)
    with reopened(folder) as opened:
        run_file, output = opened.run_file, opened.output
        answers = read_answers(
            paths,
            run=run_file.run,
            rows=opened.manifest.rows,
            max_pixels=run_file.spec.max_image_pixels,
        )
        with closing(answers):
            before = output.counts()
            asyncio.run(_commit(opened, answers, summary))
        gather_all(output, whole_only=False)
        after = output.counts()
        _sum_up(summary, opened, answers, before, after)
        opened.write_status("imported" if summary.left else "finished")
    return summary


async def _commit(opened: Reopened, answers: Answers, summary: Imported) -> None:
    """Rows in the manifest's order, each read from it once."""
    fresh, patches = opened.appending(), opened.appending(patch=True)
    stream = RowStream(opened.manifest, opened.asking.columns)
    with_lines = Intervals(Range(row, row + 1) for row in answers.rows())
    for rows in joined(with_lines, opened.run_file.spec.checkpoint_rows):
        for row in stream.rows(rows):
            lines = answers.of_row(row.row)
            if not lines:
                continue
            if opened.committed.covers(Range(row.row, row.row + 1)):
                results = await _second_answers(opened, row, lines)
                if results:
                    patches.add(row.row, results)
                    summary.replaced += len(results)
                continue
            first = await _first_answers(opened, row, lines)
            if first is None:
                summary.incomplete += 1
            else:
                fresh.add(row.row, first)
                summary.add(first)
    fresh.flush()
    patches.flush()


async def _first_answers(
    opened: Reopened, row: Row, lines: dict[tuple[int, int], Line]
) -> list[Result] | None:
    """All results of a row that has none yet; None where an answer is missing."""
    answering = _answering(opened, lines, again=False)
    asked = [request for request in answering.requests.of(row) if request.problem is None]
    if not all((request.request, request.sample) in lines for request in asked):
        return None
    return await answering.results_of(row, loaded=lambda: None)


async def _second_answers(
    opened: Reopened, row: Row, lines: dict[tuple[int, int], Line]
) -> list[Result]:
    """What is ok now, of the row's results that had failed. Another failure replaces none, so that
    importing a file twice changes nothing."""
    if not opened.failed.attempts(row.row):
        return []
    answering = _answering(opened, lines, again=True)
    return [result for result in await answering.results_of(row, loaded=lambda: None) if result.ok]


def _answering(opened: Reopened, lines: dict[tuple[int, int], Line], *, again: bool) -> Answering:
    """The way of a run's rows, with the row's lines in place of the engine and of its images."""
    asking = opened.asking
    if asking.reading.on_truncation == "retry":  # nobody is there to be asked again
        asking = replace(asking, reading=replace(asking.reading, on_truncation="keep"))
    size = next(iter(lines.values())).id.size
    loader: Loader = ImageUrls()
    if size is not None:
        given = asking.family.prepare(_blank(asking.family.target(size)))
        loader = _RecordedSize(size, Size(*given.size))
    return Answering(
        asking, loader, _LinesEngine(lines), opened.failed.attempts if again else asked_anew
    )


class _LinesEngine:
    """Answers with the lines of one row."""

    capacity = 1

    def __init__(self, lines: dict[tuple[int, int], Line]) -> None:
        self._lines = lines

    async def start(self) -> None:
        pass

    async def generate(self, request: Request) -> Completion:
        line = self._lines.get((request.request, request.sample))
        if line is None:
            raise failed(ErrorCode.ENGINE_FAILED, Stage.GENERATE, "the batch has no such answer")
        return line.completion()

    async def close(self) -> None:
        pass


class _RecordedSize:
    """Stands for images of the size that the custom_id recorded: answers are read by it."""

    def __init__(self, size: Size, given: Size) -> None:
        self._image = LoadedImage.of_size(size, given)

    async def admit(self, refs: Sequence[ImageRef]) -> None:
        pass

    async def load(
        self, refs: Sequence[ImageRef], admitted: Reservation | None = None
    ) -> LoadedImages:
        return LoadedImages((self._image,) * len(refs), Reservation(ByteBudget(0), 0))

    async def close(self) -> None:
        pass


@lru_cache(maxsize=4)
def _blank(size: Size) -> Image.Image:
    return Image.new("RGB", (size.width, size.height))


def _sum_up(
    summary: Imported, opened: Reopened, answers: Answers, before: Counts, after: Counts
) -> None:
    lines = answers.lines
    summary.rows = max(opened.rows, after.rows)
    summary.skipped = before.rows
    summary.left = summary.rows - after.rows
    summary.model = opened.run_file.model["label"]
    for name in ("duplicates", "foreign", "broken"):
        setattr(summary, name, getattr(lines, name))
    summary.lines = lines.usable + lines.foreign + lines.broken
    if after.too_many_failed(opened.run_file.spec.max_failure_rate):
        summary.exit_code = TOO_MANY_FAILED
    if lines.broken:
        unnamed = lines.broken - len(lines.problems)
        more = f" and {unnamed:,} more" if unnamed else ""
        summary.warnings.append(
            f"{lines.broken:,} lines cannot be read: {'; '.join(lines.problems)}{more}"
        )
    if lines.foreign:
        summary.warnings.append(f"{lines.foreign:,} lines are answers of other runs: left alone")
    if summary.incomplete:
        summary.warnings.append(
            f"{summary.incomplete:,} rows have only some of their answers in these files: import "
            "the other files together with these, or let the run answer those rows"
        )
