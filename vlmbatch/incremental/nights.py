"""What the starts of an incremental run came to: a summary beside each generation, for status."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from vlmbatch.errors import RunStopped
from vlmbatch.results.generations import numbers, open_selection
from vlmbatch.results.store import GENERATIONS, Store
from vlmbatch.run_file import now
from vlmbatch.summary import Summary

SHOWN = 7


def note_night(store: Store, number: int, summary: Summary) -> None:
    """Beside the generation's file; only decoration."""
    with suppress(RunStopped):
        store.write_json(_name(number), {"ended": now(), **summary.to_json()})


def last_nights(store: Store, last: int = SHOWN) -> list[dict[str, Any]]:
    """The last starts that had something to do, oldest first: what each planned, and came to.

    ``state`` is ``killed`` where it could not say.
    """
    nights = []
    for number in numbers(store)[-last:]:
        with suppress(RunStopped):
            counts = open_selection(store, number).generation.counts
            ended: dict[str, Any] = store.read_json(_name(number)) or {"state": "killed"}
            kept = ("ended", "state", "ok", "failed", "failures", "seconds", "exit_code")
            night = {"number": number, "planned": counts}
            nights.append(night | {key: ended.get(key) for key in kept})
    return nights


def describe_nights(nights: list[dict[str, Any]]) -> list[str]:
    """Lines for a person."""
    lines = []
    for night in nights:
        planned = night["planned"]
        new = planned.get("new", 0) + planned.get("repeated", 0) + planned.get("gone", 0)
        again = planned.get("changed", 0) + planned.get("failed", 0)
        said = f"{night['ok']:,} ok, {night['failed']:,} failed" if night["ended"] else ""
        state = "" if night["exit_code"] == 0 else f" ({night['state']})"
        lines.append(
            f"    {night['ended'] or '':<20} {new:>9,} new, {again:>7,} again: {said}{state}"
        )
    return lines


def _name(number: int) -> str:
    return f"{GENERATIONS}/{number:04d}.json"
