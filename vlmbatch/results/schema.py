"""The result columns, version 1: results as Arrow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import pyarrow as pa

from vlmbatch.errors import ErrorCode, Failure, Stage
from vlmbatch.grounding import Box, Point, Size
from vlmbatch.records import Answer, Completion, Result

SCHEMA_VERSION = 1

_BOX = pa.struct(
    [
        pa.field("label", pa.string()),
        pa.field("x1", pa.float32()),
        pa.field("y1", pa.float32()),
        pa.field("x2", pa.float32()),
        pa.field("y2", pa.float32()),
        pa.field("score", pa.float32()),
    ]
)
_POINT = pa.struct(
    [pa.field("label", pa.string()), pa.field("x", pa.float32()), pa.field("y", pa.float32())]
)
_ERROR = pa.struct(
    [
        pa.field("code", pa.string()),
        pa.field("stage", pa.string()),
        pa.field("message", pa.string()),
    ]
)

RESULT_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("request", pa.int32(), nullable=False),
        pa.field("sample", pa.int16(), nullable=False),
        pa.field("question", pa.string()),
        pa.field("text", pa.string()),
        pa.field("boxes", pa.list_(_BOX)),
        pa.field("points", pa.list_(_POINT)),
        pa.field("json", pa.string()),
        pa.field("raw", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("completion_tokens", pa.int32()),
        pa.field("image", pa.string()),
        pa.field("images", pa.list_(pa.string())),
        pa.field("image_width", pa.int32()),
        pa.field("image_height", pa.int32()),
        pa.field("model_image_width", pa.int32()),
        pa.field("model_image_height", pa.int32()),
        pa.field("model", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", _ERROR),
        pa.field("attempts", pa.int8(), nullable=False),
    ]
)


def result_schema(carried: Sequence[pa.Field] = ()) -> pa.Schema:
    """The schema of a run's results: the fixed columns, then those carried from the manifest."""
    fields = (field.with_type(_filterable(field.type)).with_nullable(True) for field in carried)
    return pa.schema([*RESULT_SCHEMA, *fields])


def _filterable(kind: pa.DataType) -> pa.DataType:
    """The same, where Arrow cannot filter by rows: views become plain."""
    if pa.types.is_string_view(kind):
        return pa.string()
    return pa.binary() if pa.types.is_binary_view(kind) else kind


def to_batch(results: Sequence[Result], *, model: str, schema: pa.Schema) -> pa.RecordBatch:
    """The results as one batch, in the order given."""
    records = [_record(result, model) for result in results]
    columns = [_column([record.get(field.name) for record in records], field) for field in schema]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _column(values: list[object], field: pa.Field) -> pa.Array:
    try:
        return pa.array(values, type=field.type)
    except UnicodeEncodeError:  # half of a surrogate pair, which no file can hold
        return pa.array([_encodable(value) for value in values], type=field.type)


def _encodable(value: object) -> object:
    match value:
        case str():
            return value.encode(errors="replace").decode()
        case dict():
            return {key: _encodable(item) for key, item in value.items()}
        case list() | tuple():
            return [_encodable(item) for item in value]
    return value


def _record(result: Result, model: str) -> dict[str, object]:
    record: dict[str, object] = {
        "row": result.row,
        "id": result.id,
        "task": result.task,
        "request": result.request,
        "sample": result.sample,
        "question": result.question,
        "json": result.json,
        "image": result.image,
        "images": result.images,
        "model": model,
        "status": "ok" if result.ok else "failed",
        "attempts": min(result.attempts, 127),
    }
    if result.answer is not None:
        record["text"] = result.answer.text
        if result.answer.boxes is not None:
            record["boxes"] = [
                {
                    "label": b.label,
                    "x1": b.x1,
                    "y1": b.y1,
                    "x2": b.x2,
                    "y2": b.y2,
                    "score": b.score,
                }
                for b in result.answer.boxes
            ]
        if result.answer.points is not None:
            record["points"] = [
                {"label": p.label, "x": p.x, "y": p.y} for p in result.answer.points
            ]
    if result.completion is not None:
        record["raw"] = result.completion.text
        record["finish_reason"] = result.completion.finish_reason
        record["prompt_tokens"] = result.completion.prompt_tokens
        record["completion_tokens"] = result.completion.completion_tokens
    if result.image_size is not None:
        record["image_width"] = result.image_size.width
        record["image_height"] = result.image_size.height
    if result.model_image_size is not None:
        record["model_image_width"] = result.model_image_size.width
        record["model_image_height"] = result.model_image_size.height
    if result.failure is not None:
        record["error"] = {
            "code": str(result.failure.code),
            "stage": str(result.failure.stage),
            "message": result.failure.message,
        }
    if result.carried is not None:
        record.update(result.carried)
    return record


def to_results(batch: pa.RecordBatch) -> Iterator[Result]:
    """The inverse of ``to_batch``: each result of the batch, in order."""
    carried = [name for name in batch.schema.names if name not in RESULT_SCHEMA.names]
    columns = {name: batch[name].to_pylist() for name in batch.schema.names if name != "model"}
    names = list(columns)
    for values in zip(*columns.values(), strict=True):
        yield _result(dict(zip(names, values, strict=True)), carried)


def _result(record: Mapping[str, Any], carried: Sequence[str]) -> Result:
    answer = completion = failure = None
    boxes, points = record["boxes"], record["points"]
    if record["status"] == "ok":
        answer = Answer(
            record["text"],
            None if boxes is None else tuple(Box(**box) for box in boxes),
            None if points is None else tuple(Point(**point) for point in points),
        )
    else:
        failure = _failure(record["error"] or {})
    if record["raw"] is not None:
        completion = Completion(
            record["raw"],
            record["finish_reason"] or "",
            record["prompt_tokens"],
            record["completion_tokens"],
        )
    return Result(
        row=record["row"],
        id=record["id"],
        task=record["task"],
        request=record["request"],
        sample=record["sample"],
        question=record["question"],
        answer=answer,
        json=record["json"],
        completion=completion,
        image=record["image"],
        images=None if record["images"] is None else tuple(record["images"]),
        image_size=_size(record["image_width"], record["image_height"]),
        model_image_size=_size(record["model_image_width"], record["model_image_height"]),
        failure=failure,
        attempts=record["attempts"],
        carried={name: record[name] for name in carried},
    )


def _size(width: int | None, height: int | None) -> Size | None:
    return Size(width, height) if width and height else None


def _failure(error: Mapping[str, Any]) -> Failure:
    """A code that this version does not know is the engine's."""
    code, stage = ErrorCode.ENGINE_FAILED, Stage.GENERATE
    with suppress(KeyError, ValueError):
        code, stage = ErrorCode(error["code"]), Stage(error["stage"])
    return Failure(code, stage, error.get("message") or "")
