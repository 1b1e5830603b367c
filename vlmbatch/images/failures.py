"""What the ways to an image raise, said alike."""

from __future__ import annotations

from vlmbatch.errors import ErrorCode, Failure, RequestFailed, Stage, failed


class Larger(Exception):
    """The image has more bytes than were reserved for it: ``size``, as its place says."""

    def __init__(self, size: int) -> None:
        super().__init__(f"{size:,} bytes")
        self.size = size


class Busy(RequestFailed):
    """A failure that may pass; the server asked to wait ``seconds`` before the next attempt."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(Failure(ErrorCode.FETCH_FAILED, Stage.LOAD, message, retryable=True))
        self.seconds = seconds


def load_failed(code: ErrorCode, message: str, *, retryable: bool = False) -> RequestFailed:
    return failed(code, Stage.LOAD, message, retryable=retryable)


def missing(message: str) -> RequestFailed:
    return load_failed(ErrorCode.IMAGE_MISSING, message)


def forbidden(message: str) -> RequestFailed:
    return load_failed(ErrorCode.IMAGE_FORBIDDEN, message)


def unreadable(message: str) -> RequestFailed:
    return load_failed(ErrorCode.IMAGE_UNREADABLE, message)


def fetch_failed(message: str) -> RequestFailed:
    """May pass: it is tried again."""
    return load_failed(ErrorCode.FETCH_FAILED, message, retryable=True)


def timed_out(name: str, seconds: float) -> RequestFailed:
    message = f"not here after {seconds:.0f} s: {name}"
    return load_failed(ErrorCode.FETCH_TIMEOUT, message, retryable=True)


def too_many_bytes(name: str, size: int, max_bytes: int) -> RequestFailed:
    message = f"{size:,} bytes, more than the {max_bytes:,} allowed: {name}"
    return load_failed(ErrorCode.IMAGE_TOO_LARGE, message)


def check_size(name: str, size: int, *, reserved: int, max_bytes: int) -> None:
    """Before the bytes are read: Larger where they do not fit what was reserved."""
    if size > max_bytes:
        raise too_many_bytes(name, size, max_bytes)
    if size > reserved:
        raise Larger(size)
