"""The requests of a run that have no good answer yet, as batch files of the OpenAI form."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from tqdm import tqdm

from vlmbatch.answering import RowRequests, make_loader
from vlmbatch.batches.custom_id import CustomId
from vlmbatch.engines.chat import body_of, check_dialect
from vlmbatch.engines.data_uris import data_uri
from vlmbatch.engines.openai import OpenAIArgs, parse_args
from vlmbatch.errors import Failure, RequestFailed, UsageError
from vlmbatch.intervals import Intervals
from vlmbatch.job import JobSpec
from vlmbatch.manifest import RowStream
from vlmbatch.models import DEMO, demo_path
from vlmbatch.records import LoadedImage, Range, Request, Row
from vlmbatch.reopen import Reopened, existing_run_file, joined, reopened
from vlmbatch.results.appending import Appending
from vlmbatch.results.retry import asked_anew
from vlmbatch.results.store import open_store, reported
from vlmbatch.storage import is_local, without_secrets

FILE_REQUESTS = 50_000
FILE_BYTES = 200_000_000
"""What OpenAI takes per file; vLLM takes any."""

ROWS_AT_ONCE = 32
URL = "/v1/chat/completions"
TMP = ".tmp"
_OURS = re.compile(r"requests-\d{5,}\.jsonl(\.tmp)?")


@dataclass(slots=True)
class Exported:
    """What an export prints at its end.

    ``rows`` = ``exported`` + ``answered`` + ``failed`` + ``too_large``.
    """

    rows: int = 0
    exported: int = 0
    requests: int = 0
    answered: int = 0
    """Rows that have only good results."""
    failed: int = 0
    """Rows that cannot be asked: their failed results are in the output."""
    failures: Counter[str] = field(default_factory=Counter)
    too_large: int = 0
    """Rows with a request above the size of a file: left to the run."""
    files: list[str] = field(default_factory=list)
    bytes: int = 0
    model: str = ""
    output: str = ""
    destination: str = ""
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__slots__}
        return {**values, "failures": dict(self.failures.most_common())}

    def as_text(self) -> str:
        """For a person."""
        files = f"{len(self.files)} file{'s' if len(self.files) != 1 else ''}"
        lines = [
            f"exported: {self.rows:,} rows = {self.exported:,} in batch files + "
            f"{self.answered:,} answered + {self.failed:,} failed"
            + (f" + {self.too_large:,} too large" if self.too_large else ""),
            f"  {self.requests:,} requests to {self.model} in {files} "
            f"({self.bytes / 1e6:,.1f} MB) in {self.destination}",
        ]
        lines += [f"    {count:>9,}  {code}" for code, count in self.failures.most_common()]
        if self.failed:
            lines.append(f"  the failed ones are in {self.output}, and are not asked")
        if self.files:
            command = shlex.join(["vlmbatch", "import-batch", self.output])
            lines.append(f"  when they are answered: {command} RESULTS.jsonl ...")
        return "\n".join(lines)


def export_requests(
    folder: str,
    destination: str,
    *,
    overwrite: bool = False,
    model: str | None = None,
    file_requests: int = FILE_REQUESTS,
    file_bytes: int = FILE_BYTES,
) -> Exported:
    """Write the requests of every row that is missing or has failed results, in about the
    manifest's order.

    A row whose images cannot be loaded, or that cannot be asked, gets its failed results in the
    output here and now, as a run would have it. ``model``: the server's name for it.
    """
    existing_run_file(open_store(folder))
    place = _checked(folder, destination, overwrite)
    summary = Exported(output=folder, destination=destination)
    with reopened(folder) as opened:
        wire = _Wire.of(opened, model)
        summary.rows, summary.model = opened.rows, wire.model
        with RequestFiles(place, file_requests, file_bytes) as files:
            asyncio.run(_Export(opened, wire, files, summary).write())
            files.publish()
        summary.files = [str(Path(destination) / name) for name in files.names]
        summary.bytes = files.bytes
    if summary.too_large:
        summary.warnings.append(
            f"{summary.too_large:,} rows have requests of more than {file_bytes:,} bytes, which no "
            "batch file may hold: they are left to the run"
        )
    return summary


@dataclass(frozen=True, slots=True)
class _Wire:
    """How requests are written: as the openai engine would send them."""

    model: str
    args: OpenAIArgs
    dialect: str

    @classmethod
    def of(cls, opened: Reopened, model: str | None) -> Self:
        """A run with the openai engine says it by its arguments; every other model runs in vLLM."""
        job = opened.run_file.spec
        is_openai = job.engine.name == "openai"
        args = parse_args(job.engine.args) if is_openai else OpenAIArgs(dialect="vllm")
        dialect = "openai" if args.dialect == "auto" else args.dialect
        for task in opened.asking.tasks:
            check_dialect(dialect, opened.asking.sampling, task.structure)
        return cls(model or _model_name(job, opened.run_file.model), args, dialect)

    def lines_of(
        self, run: str, requests: list[Request], images: tuple[LoadedImage, ...]
    ) -> list[bytes]:
        """The lines of one row; blocks."""
        urls = [image.url or data_uri(image.pixels, self.args.image_format) for image in images]
        return [self._line(run, request, urls, images) for request in requests]

    def _line(
        self, run: str, request: Request, urls: list[str], images: tuple[LoadedImage, ...]
    ) -> bytes:
        size = images[0].size if images[0].url is None else None
        custom_id = CustomId(run, request.row, request.request, request.sample, size)
        body = body_of(
            request,
            urls,
            model=self.model,
            dialect=self.dialect,
            length_field=self.args.max_tokens_field,
            omit=self.args.omit,
        )
        line = {"custom_id": str(custom_id), "method": "POST", "url": URL, "body": body}
        return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def _model_name(job: JobSpec, model: dict[str, Any]) -> str:
    """What ``vllm run-batch --model`` or an endpoint calls it."""
    return str(demo_path()) if job.model == DEMO else str(model["path"] or model["label"])


class _Export:
    """One export: rows are read, loaded several at a time, and written as they come."""

    def __init__(
        self, opened: Reopened, wire: _Wire, files: RequestFiles, summary: Exported
    ) -> None:
        self._opened = opened
        self._wire = wire
        self._files = files
        self._summary = summary
        self._threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="load")
        self._loader = make_loader(
            opened.run_file.spec,
            opened.asking.family,
            base=opened.manifest.folder,
            threads=self._threads,
        )
        self._writing = asyncio.Lock()

    async def write(self) -> None:
        opened, summary = self._opened, self._summary
        failed = opened.appending()
        in_flight = asyncio.Semaphore(ROWS_AT_ONCE)
        bar = tqdm(total=summary.rows, unit="row", file=sys.stderr, disable=None, desc="export")
        try:
            async with asyncio.TaskGroup() as tasks:
                async for row in self._rows(self._todo()):
                    await in_flight.acquire()
                    task = tasks.create_task(self._row(row, failed))
                    task.add_done_callback(lambda _: in_flight.release())
                    bar.update(row.row + 1 - bar.n)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            bar.close()
            await self._loader.close()
            self._threads.shutdown(wait=False, cancel_futures=True)
        failed.flush()
        summary.answered = summary.rows - summary.exported - summary.failed - summary.too_large

    def _todo(self) -> list[Range]:
        """The ranges that hold all rows that are missing or have failed results."""
        opened = self._opened
        if not opened.rows:
            return []
        width = opened.run_file.spec.checkpoint_rows
        todo = Intervals(opened.committed.missing(Range(0, opened.rows)))
        for rows in opened.failed.ranges(width):
            if rows.first < opened.rows:
                todo.add(Range(rows.first, min(rows.stop, opened.rows)))
        return joined(todo, width)

    async def _rows(self, ranges: list[Range]) -> AsyncIterator[Row]:
        """The rows, read in a thread."""
        stream = RowStream(self._opened.manifest, self._opened.asking.columns)
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read") as reader:
            for wanted in ranges:
                rows = stream.rows(wanted)
                while (row := await loop.run_in_executor(reader, next, rows, None)) is not None:
                    yield row

    async def _row(self, row: Row, failed: Appending) -> None:
        """Write the row's requests, or commit why there are none; nothing for one that is ok."""
        is_committed = self._opened.committed.covers(Range(row.row, row.row + 1))
        if is_committed and not self._opened.failed.attempts(row.row):
            return
        earlier = self._opened.failed.attempts if is_committed else asked_anew
        row_requests = RowRequests(self._opened.asking, earlier)
        requests = row_requests.of(row)
        asked = [request for request in requests if request.problem is None]
        failure: Failure | None = None
        if asked:
            try:
                await self._ask(row, asked)
                return
            except RequestFailed as error:
                failure = error.failure
        results = [row_requests.failed_result(row, request, failure) for request in requests]
        self._summary.failed += 1
        self._summary.failures.update(str(each.failure.code) for each in results if each.failure)
        if not is_committed:
            async with self._writing:
                await asyncio.to_thread(failed.add, row.row, results)

    async def _ask(self, row: Row, requests: list[Request]) -> None:
        """Raises RequestFailed where the images cannot be loaded. Pixels and lines are held within
        the byte budget until they are written."""
        with await self._loader.load(row.images) as loaded:
            run = self._opened.run_file.run
            lines = await asyncio.to_thread(self._wire.lines_of, run, requests, loaded.images)
            async with self._writing:
                if await asyncio.to_thread(self._files.add, lines):
                    self._summary.exported += 1
                    self._summary.requests += len(lines)
                else:
                    self._summary.too_large += 1


class RequestFiles:
    """``requests-00000.jsonl`` and on in one folder: under other names until ``publish``."""

    def __init__(self, folder: Path, max_requests: int, max_bytes: int) -> None:
        self._folder = folder
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._file: BinaryIO | None = None
        self._requests = self._size = 0
        self.names: list[str] = []
        self.bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        for name in self.names:
            with suppress(OSError):
                _unpublished(self._folder / name).unlink()

    def add(self, lines: list[bytes]) -> bool:
        """Write the lines of one row: into one file where they fit into one, so that its results
        come together. False, with nothing written, where a line fits into none."""
        if max(map(len, lines)) > self._max_bytes:
            return False
        if not self._fits(len(lines), sum(map(len, lines))):
            self._end_file()
        with reported(self._folder):
            for line in lines:
                if not self._fits(1, len(line)):
                    self._end_file()
                if self._file is None:
                    self._begin_file()
                assert self._file is not None
                self._file.write(line)
                self._requests += 1
                self._size += len(line)
        return True

    def publish(self) -> None:
        """All files appear, whole; those of an earlier export are gone."""
        self._end_file()
        with reported(self._folder):
            if self._folder.is_dir():
                for path in self._folder.iterdir():
                    if _OURS.fullmatch(path.name) and path.name.removesuffix(TMP) not in self.names:
                        path.unlink()
            for name in self.names:
                os.replace(_unpublished(self._folder / name), self._folder / name)
            if self.names:
                _sync(self._folder)

    def _fits(self, requests: int, size: int) -> bool:
        return (
            self._requests + requests <= self._max_requests and self._size + size <= self._max_bytes
        )

    def _begin_file(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"requests-{len(self.names):05d}.jsonl"
        path = _unpublished(self._folder / name)
        self._file = open(path, "wb", buffering=2**20)  # noqa: SIM115  until _end_file
        self.names.append(name)

    def _end_file(self) -> None:
        if self._file is not None:
            with reported(self._folder):
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
            self._file = None
        self.bytes += self._size
        self._requests = self._size = 0


def _unpublished(path: Path) -> Path:
    return path.with_name(path.name + TMP)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checked(output: str, destination: str, overwrite: bool) -> Path:
    """The folder for the files. Raises UsageError where it is not free."""
    if not is_local(destination):
        raise UsageError(
            f"batch files are written to a local folder, not to {without_secrets(destination)}",
            hint="name a folder, and copy it where you need it",
        )
    place = Path(destination).resolve()
    if is_local(output) and Path(output).resolve() in (place, *place.parents):
        raise UsageError(
            f"{destination} is inside the output {output}, which holds results and nothing else",
            hint="give another folder",
        )
    if not os.path.lexists(place):
        return place
    if not place.is_dir():
        raise UsageError(f"{destination} is a file, not a folder", hint="give a folder")
    found = sorted(path.name for path in place.iterdir() if not path.name.endswith(TMP))
    if found and not overwrite:
        raise UsageError(
            f"{destination} is not empty ({', '.join(found[:3])})",
            hint="give another folder; --overwrite replaces requests-*.jsonl in it",
        )
    return place
