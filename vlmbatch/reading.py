"""How answers are read: the half of a run that can be done again without the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from vlmbatch.errors import ErrorCode, Stage, failed
from vlmbatch.families import Family, entry_named, entry_of, made
from vlmbatch.families.own import content_of
from vlmbatch.grounding import Size
from vlmbatch.job import JobSpec
from vlmbatch.records import Answer, Completion, LoadedImage, Request
from vlmbatch.results.schema import SCHEMA_VERSION
from vlmbatch.structure import fitting

CUT = "length"
"""The finish_reason of an answer that reached --max-tokens."""


@dataclass(frozen=True)
class Reading:
    """Who reads the answers, and what becomes of those that were cut."""

    family: Family
    on_truncation: str


def reading_of(job: JobSpec, config: Mapping[str, Any]) -> Reading:
    """``config``: the model's config.json. Raises UsageError for an unknown family or box space."""
    asks = entry_of(config, job.model or "", job.family)
    entry = entry_named(job.parser) if job.parser else asks
    return Reading(made(entry, config, job.box_space), job.sampling.on_truncation)


def read_half(job: JobSpec, reading: Reading) -> dict[str, Any]:
    """The half of the fingerprint that ``reparse`` may change."""
    return {
        "family": reading.family.name,
        "family_version": reading.family.version,
        "family_file": content_of(job.parser or job.family),
        "box_space": job.box_space,
        "schema": SCHEMA_VERSION,
    }


def read_answer(
    reading: Reading, request: Request, completion: Completion
) -> tuple[Answer, str | None]:
    """(what the completion says, its ``json``). Raises RequestFailed where it is no answer."""
    if completion.finish_reason == CUT and reading.on_truncation == "fail":
        raise failed(ErrorCode.TRUNCATED, Stage.GENERATE, _how_cut(request, completion))
    answer = reading.family.read(
        request.kind, completion.text, labels=request.labels, image=request.images[0]
    )
    structure = request.structure
    return answer, None if structure is None else fitting(answer.text or "", structure)


def _how_cut(request: Request, completion: Completion) -> str:
    tokens = completion.completion_tokens
    after = "" if tokens is None else f" after {tokens} tokens"
    return f"the answer was cut{after} (--max-tokens {request.sampling.max_tokens})"


@dataclass(frozen=True, slots=True)
class _Pixels:
    """Stands for a picture of which only the size is known; families look at nothing else."""

    width: int
    height: int

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height


def stand_in(size: Size, given: Size) -> LoadedImage:
    """An image for a family to read or write about, without pixels: its upright size, and the size
    in which the model was given it, or will be."""
    return LoadedImage(cast(Any, _Pixels(given.width, given.height)), size, "")
