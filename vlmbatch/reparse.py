"""``vlmbatch reparse``: text, boxes and json again from the raw answers, without a model.

A better parser, another family's, or another reading of the box space costs no GPU time. Only
``raw`` and the sizes of the images are needed, neither the model nor the images nor the manifest.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vlmbatch.errors import ErrorCode, RequestFailed, UsageError
from vlmbatch.families.own import is_file
from vlmbatch.grounding import Size
from vlmbatch.job import JobSpec
from vlmbatch.reading import Reading, read_answer, read_half, reading_of, stand_in
from vlmbatch.records import Completion, LoadedImage, Range, Request, Result, TaskKind
from vlmbatch.reopen import existing_run_file, held
from vlmbatch.results.files import write_shard
from vlmbatch.results.output import Output, schema_of
from vlmbatch.results.schema import RESULT_SCHEMA, to_batch
from vlmbatch.results.store import open_store
from vlmbatch.run_file import RunFile, write_run_file
from vlmbatch.summary import TOO_MANY_FAILED
from vlmbatch.tasks import Task, make_task

READ_AGAIN = frozenset([ErrorCode.PARSE_FAILED, ErrorCode.SCHEMA_MISMATCH, ErrorCode.TRUNCATED])
"""Failures that are about reading; with another code there is no answer to read."""
PATCH_RESULTS = 8192
_DERIVED = (
    *("text", "boxes", "points", "json", "status", "error"),
    *("model_image_width", "model_image_height"),
)
_NEEDED = (
    *("row", "id", "task", "request", "sample", "question", "raw", "finish_reason"),
    *("completion_tokens", "image_width", "image_height"),
    *("model_image_width", "model_image_height", "status", "error"),
)


@dataclass(slots=True)
class Reparsed:
    """What a reparse prints at its end. ``results`` = ``ok`` + ``failed`` + ``not_read``."""

    results: int = 0
    ok: int = 0
    failed: int = 0
    not_read: int = 0
    """They have no answer: their image, row or request failed."""
    changed: int = 0
    mended: int = 0
    """Failed before, ok now."""
    broken: int = 0
    """Ok before, failed now."""
    failures: dict[str, int] = field(default_factory=dict)
    family: str = ""
    box_space: str | None = None
    output: str = ""
    exit_code: int = 0
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def as_text(self) -> str:
        space = f", box space {self.box_space}" if self.box_space else ""
        lines = [
            f"reparsed: {self.results:,} results = {self.ok:,} ok + {self.failed:,} failed + "
            f"{self.not_read:,} without an answer",
            f"  read by family {self.family}{space}: {self.changed:,} changed; {self.mended:,} "
            f"that had failed are ok now, {self.broken:,} the other way round",
            *(f"    {count:>9,}  {code}" for code, count in self.failures.items()),
            f"  in {self.output}",
        ]
        return "\n".join(lines)


def reparse(folder: str, *, family: str | None = None, box_space: str | None = None) -> Reparsed:
    """Read all answers again, as ``family`` and ``box_space`` say; None: as before.

    Part by part, each replaced in one step; after a kill, the same again ends it. Raises UsageError
    where the folder is no output, or the family or the reading is unknown.
    """
    store = open_store(folder)
    _read_as(existing_run_file(store), family, box_space)  # refuse before anything is changed
    schema = schema_of(store) or RESULT_SCHEMA
    with held(store, lambda _: schema) as (output, run_file):
        job, reading = _read_as(run_file, family, box_space)
        read = read_half(job, reading)
        run_file = replace(run_file, job=job.model_dump(), read=read, rereading=True)
        write_run_file(store, run_file)
        rereader = _Rereader(run_file, reading)
        for number in output.view().numbers(output.part_rows):
            for patch in rereader.patches(output.results(output.part_range(number))):
                _commit(output, patch, run_file.epoch)
            output.gather_if_gapless(number, whole_only=False)
        write_run_file(store, replace(run_file, rereading=False))
        summary, counts = rereader.summary, output.counts()
    summary.output, summary.family, summary.box_space = folder, reading.family.name, job.box_space
    summary.failures = dict(counts.failures.most_common())
    summary.warnings = rereader.warnings()
    if counts.too_many_failed(job.max_failure_rate):
        summary.exit_code = TOO_MANY_FAILED
    return summary


def _read_as(
    run_file: RunFile, family: str | None, box_space: str | None
) -> tuple[JobSpec, Reading]:
    """The run's job with these ways of reading, and what reads so."""
    job = run_file.spec
    if family is not None:
        job = job.model_copy(update={"parser": family, "box_space": None})
    elif is_file(named := job.parser or job.family):
        raise UsageError(
            f"this output was read by the family file {named}, which is not executed unasked",
            hint=f"if you trust it: {shlex.join(['--family', str(named)])}",
        )
    if box_space is not None:
        job = job.model_copy(update={"box_space": box_space})
    return job, reading_of(job, run_file.model["config"])


def _commit(output: Output, patch: pa.RecordBatch, epoch: int) -> None:
    rows = Range(patch["row"][0].as_py(), patch["row"][-1].as_py() + 1)
    write_shard(output.store, patch, run=output.run, epoch=epoch, rows=rows, patch=True)


class _Rereader:
    """Turns results into patches that hold those of them that read otherwise now."""

    def __init__(self, run_file: RunFile, reading: Reading) -> None:
        self._reading = reading
        self._model = run_file.model["label"]
        self._tasks = {spec.name: make_task(spec) for spec in run_file.spec.tasks}
        self._unlabelled: Counter[str] = Counter()
        self.summary = Reparsed()

    def patches(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Each of about PATCH_RESULTS results at most; no two of them share a row."""
        waiting: list[pa.RecordBatch] = []
        for batch in map(self._patch, batches):
            if not batch.num_rows:
                continue
            enough = sum(each.num_rows for each in waiting) >= PATCH_RESULTS
            if enough and batch["row"][0] != waiting[-1]["row"][-1]:
                yield _joined(waiting)
                waiting = []
            waiting.append(batch)
        if waiting:
            yield _joined(waiting)

    def _patch(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The results of the batch that read otherwise now."""
        records = batch.select(list(_NEEDED)).to_pylist()
        again = [at for at, record in enumerate(records) if _is_answer(record)]
        self.summary.results += len(records)
        self.summary.not_read += len(records) - len(again)
        if not again:
            return batch.slice(0, 0)
        results = [self._result(records[at]) for at in again]
        fresh = to_batch(results, model=self._model, schema=RESULT_SCHEMA)
        old = new = batch.take(pa.array(again))
        for name in _DERIVED:
            at = new.schema.get_field_index(name)
            new = new.set_column(at, new.schema.field(at), fresh[name])
        self._count(old["status"], new["status"])
        pairs = zip(_derived(old), _derived(new), strict=True)
        changed = new.filter(pa.array([before != now for before, now in pairs]))
        self.summary.changed += changed.num_rows
        return changed

    def _count(self, before: pa.Array, now: pa.Array) -> None:
        was_ok, is_ok = pc.equal(before, "ok"), pc.equal(now, "ok")
        ok = pc.sum(is_ok).as_py()
        self.summary.ok += ok
        self.summary.failed += len(now) - ok
        self.summary.mended += pc.sum(pc.and_(pc.invert(was_ok), is_ok)).as_py()
        self.summary.broken += pc.sum(pc.and_(was_ok, pc.invert(is_ok))).as_py()

    def _result(self, record: Mapping[str, Any]) -> Result:
        result = Result(record["row"], record["id"], record["task"], record["request"])
        request = self._request(record)
        if record["model_image_width"] is not None:
            given = Size(*request.images[0].pixels.size)
            result = replace(result, model_image_size=self._reading.family.seen(given))
        completion = Completion(
            record["raw"],
            record["finish_reason"] or "",
            completion_tokens=record["completion_tokens"],
        )
        try:
            answer, value = read_answer(self._reading, request, completion)
        except RequestFailed as error:
            return replace(result, failure=error.failure)
        return replace(result, answer=answer, json=value)

    def _request(self, record: Mapping[str, Any]) -> Request:
        """As much of the request as its result tells, and as reading needs."""
        task = self._tasks[record["task"]]
        return Request(
            row=record["row"],
            request=record["request"],
            sample=record["sample"],
            task=task.name,
            kind=task.kind,
            prompt="",
            question=record["question"],
            labels=self._labels(task, record["question"]),
            images=(_image(record),),
            structure=task.structure,
        )

    def _labels(self, task: Task, question: str | None) -> tuple[str, ...]:
        """What was looked for; a prompt of the user's own stands in ``question`` instead."""
        if task.kind not in (TaskKind.GROUND, TaskKind.DETECT):
            return ()
        if task.template is None:
            said = question or ""
            return (said,) if task.kind is TaskKind.GROUND else tuple(json.loads(said or "[]"))
        if task.spec.phrase is None and task.spec.labels is None:
            self._unlabelled[task.name] += 1
        return (task.spec.phrase,) if task.spec.phrase else tuple(task.spec.labels or ())

    def warnings(self) -> list[str]:
        return [
            f"task {name!r} has a prompt of its own, so what each of its {count:,} answers looked "
            "for is not in the results: boxes without a label in the answer have none now"
            for name, count in self._unlabelled.items()
        ]


def _derived(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    return list(batch.select(list(_DERIVED)).to_pylist())


def _is_answer(record: Mapping[str, Any]) -> bool:
    failed = record["status"] == "failed" and record["error"]["code"] not in READ_AGAIN
    return record["raw"] is not None and not failed


def _joined(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    return pa.Table.from_batches(batches).combine_chunks().to_batches()[0]


def _image(record: Mapping[str, Any]) -> LoadedImage:
    """Sizes are null where the images went to an endpoint as URLs; then no boxes were asked for."""
    size = Size(record["image_width"] or 1, record["image_height"] or 1)
    given = Size(record["model_image_width"] or 1, record["model_image_height"] or 1)
    return stand_in(size, given)
