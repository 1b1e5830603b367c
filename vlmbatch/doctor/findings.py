"""What a check finds, and many checks at once, none of which can hang or break the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from vlmbatch.errors import VlmbatchError

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """``problem``: it stands in the way. ``remedy``: the next step, where there is one."""

    name: str
    status: Status
    what: str
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def ok(name: str, what: str) -> Finding:
    return Finding(name, "ok", what)


def warning(name: str, what: str, remedy: str = "") -> Finding:
    return Finding(name, "warning", what, remedy)


def problem(name: str, what: str, remedy: str = "") -> Finding:
    return Finding(name, "problem", what, remedy)


@dataclass(frozen=True, slots=True)
class Check:
    """Something to look at, for so many seconds at most.

    ``needed``: where it cannot be told, that stands in the way.
    """

    name: str
    look: Callable[[], Finding]
    seconds: float = 30.0
    needed: bool = False

    def untold(self, why: str) -> Finding:
        return Finding(self.name, "problem" if self.needed else "warning", f"cannot be told: {why}")


def findings_of(checks: Sequence[Check]) -> list[Finding]:
    """In the order of the checks, which run at the same time."""
    found: dict[int, Finding] = {}

    def look(number: int, check: Check) -> None:
        found[number] = _looked(check)

    began = time.monotonic()
    threads = [  # daemons: what hangs must not keep the program
        threading.Thread(target=look, args=each, daemon=True) for each in enumerate(checks)
    ]
    for thread in threads:
        thread.start()
    for thread, check in zip(threads, checks, strict=True):
        thread.join(max(0.0, began + check.seconds - time.monotonic()))
    late = "no answer within {:.0f} s"
    return [
        found.get(number) or check.untold(late.format(check.seconds))
        for number, check in enumerate(checks)
    ]


def _looked(check: Check) -> Finding:
    try:
        return check.look()
    except VlmbatchError as error:
        return problem(check.name, error.message, error.hint or "")
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        return check.untold(f"{type(error).__name__}: {said}")
