"""Everything that can go wrong, as one tree.

    VlmbatchError                 the run, or the command, cannot go on
    ├── UsageError                because of what was asked; nothing ran (exit 2)
    │   ├── ManifestError         the manifest is missing, unreadable, or lacks a column
    │   ├── ModelNotFound         no such model here or on the Hub (in models.py)
    │   ├── FingerprintMismatch   the output holds answers to another question
    │   └── OutputNotOurs         the output folder holds something else
    ├── RunStopped                for a cause outside the command (exit 1)
    │   ├── OutputLocked          another run holds the output
    │   ├── EngineStartError      the engine cannot start here
    │   ├── ManifestUnreachable   the manifest's store is gone, or does not let us in
    │   ├── EndpointError         the endpoint is gone, or does not let us in
    │   ├── CredentialsRefused    a store of images does not let us in
    │   └── WorkerRefused         a worker does not see what the driver sees
    ├── EngineDead                the engine died under its worker; the worker ends, not the run
    └── RequestFailed             one request, or one row, failed: carries its Failure

A message names the thing, the place and what was found; ``hint`` is the next step.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ErrorCode(StrEnum):
    """Why a result failed: the ``error.code`` column. Readers must accept codes added later."""

    IMAGE_MISSING = "image_missing"
    IMAGE_FORBIDDEN = "image_forbidden"
    IMAGE_UNREADABLE = "image_unreadable"
    IMAGE_TOO_LARGE = "image_too_large"
    FETCH_TIMEOUT = "fetch_timeout"
    FETCH_FAILED = "fetch_failed"
    BAD_ROW = "bad_row"
    PROMPT_TOO_LONG = "prompt_too_long"
    ENGINE_FAILED = "engine_failed"
    ENGINE_TIMEOUT = "engine_timeout"
    ENGINE_CRASH = "engine_crash"
    TRUNCATED = "truncated"
    PARSE_FAILED = "parse_failed"
    SCHEMA_MISMATCH = "schema_mismatch"


class Stage(StrEnum):
    """Where in the worker a request failed: the ``error.stage`` column."""

    ROW = "row"
    LOAD = "load"
    PROMPT = "prompt"
    GENERATE = "generate"
    PARSE = "parse"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one result has no answer. ``retryable``: the same request may succeed later."""

    code: ErrorCode
    stage: Stage
    message: str
    retryable: bool = False


class VlmbatchError(Exception):
    """Base of all errors that a user sees. ``exit_code`` is what the command ends with."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  -> {self.hint}"


class UsageError(VlmbatchError):
    """Nothing ran, because of what was asked."""

    exit_code = 2


class ManifestError(UsageError):
    """The manifest is missing, unreadable, or lacks a column."""


class FingerprintMismatch(UsageError):
    """The output holds answers to another question."""


class OutputNotOurs(UsageError):
    """The output folder holds something that vlmbatch did not write."""


class RunStopped(VlmbatchError):
    """The run stopped for a cause outside the command; what is committed is kept."""


class OutputLocked(RunStopped):
    """Another run holds the output."""


class EngineStartError(RunStopped):
    """The engine cannot start: the model is missing, a library is missing, memory is short."""


class ManifestUnreachable(RunStopped):
    """The manifest's store does not answer, or its credentials are missing, wrong or expired."""


class EndpointError(RunStopped):
    """The endpoint cannot be reached, has not answered for too long, or does not let us in."""


class CredentialsRefused(RunStopped):
    """The credentials for a store of images are missing, wrong or expired: no row's fault."""


class WorkerRefused(RunStopped):
    """A worker does not see the output, the manifest or the version that the driver sees."""


class EngineDead(VlmbatchError):
    """The engine died: the worker ends, its ranges go to others.

    ``suspects``: the rows that the engine was computing when it died, where it knows them.
    """

    def __init__(
        self, message: str, *, hint: str | None = None, suspects: frozenset[int] | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.suspects = suspects


class RequestFailed(VlmbatchError):
    """One request failed, and nothing else is touched."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def failed(
    code: ErrorCode, stage: Stage, message: str, *, retryable: bool = False
) -> RequestFailed:
    """The exception that turns into a failed result with this code."""
    return RequestFailed(Failure(code, stage, message, retryable))
