"""What ``vlmbatch status`` says of a folder of many outputs: the last nights, one line each."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vlmbatch.errors import VlmbatchError
from vlmbatch.results.store import RUN_FILE, Store, open_store
from vlmbatch.status import NoOutput, status_of


class Outputs:
    """One output, or the ``last`` of those right under a folder. Each ``look`` finds new ones."""

    def __init__(self, folder: str, *, last: int) -> None:
        self._store = open_store(folder)
        self._last = last
        self._stores: dict[str, Store] = {}
        self._created: dict[str, str] = {}
        """By name; known from the look before, so that old runs are not read again and again."""

    def look(self) -> dict[str, Any]:
        """The status of the output, or of the last outputs: see ``many``.

        Raises NoOutput where there is none.
        """
        try:
            return status_of(self._store)
        except NoOutput:
            self._find()
            if not self._created:
                raise
        names = sorted(self._created, key=lambda name: (self._created[name], name))
        shown = names[-self._last - 1 :]  # and the one before, to compare with
        with ThreadPoolExecutor(self._store.parallel) as threads:
            found = list(threads.map(self._status, shown))
        for name, status in zip(shown, found, strict=True):
            self._created[name] = status["created"] or self._created[name]
        return many(self._store.place, found, last=self._last, older=len(names) - self._last)

    def _find(self) -> None:
        """All folders with a run.json, and when their runs were begun."""
        names = [entry.name for entry in self._store.entries() if not entry.tag]
        with ThreadPoolExecutor(self._store.parallel) as threads:
            created = list(threads.map(self._look_into, names))
        self._created = {
            name: when for name, when in zip(names, created, strict=True) if when is not None
        }

    def _look_into(self, name: str) -> str | None:
        """When the run there was begun; None where there is no run, empty where nobody can tell."""
        if name in self._created:
            return self._created[name]
        store = self._stores.get(name) or open_store(self._store.at(name))
        try:
            value = store.read_json(RUN_FILE)
        except (VlmbatchError, OSError):
            value = {}
        if value is None:
            return None
        self._stores[name] = store
        return str(value.get("created", "")) if isinstance(value, dict) else ""

    def _status(self, name: str) -> dict[str, Any]:
        store = self._stores[name]
        try:
            return {"name": name, **status_of(store)}
        except (VlmbatchError, OSError) as error:
            reason = error.message if isinstance(error, VlmbatchError) else str(error)
            return {"name": name, **_UNREADABLE, "output": store.place, "reason": reason}


_UNREADABLE: dict[str, Any] = {
    "output": "",
    "state": "unreadable",
    "reason": "",
    **dict.fromkeys(("rows", "done", "ok", "failed", "requests", "truncated"), 0),
    "failures": {},
    "rows_per_second": 0.0,
    **dict.fromkeys(("created", "began", "ended", "seconds", "seconds_left"), None),
}


def many(place: str, found: list[dict[str, Any]], *, last: int, older: int) -> dict[str, Any]:
    """Runs by the time they were begun, newest last, each with its ``trend``; and their totals.
    ``found`` may begin with one more, to compare with."""
    before: list[dict[str, Any] | None] = [None, *found]
    runs = [
        {**run, "trend": None if earlier is None else trend(earlier, run)}
        for earlier, run in zip(before, found, strict=False)
    ][-last:]
    failures: Counter[str] = Counter()
    for run in runs:
        failures.update(run["failures"])
    totals = {key: sum(run[key] for run in runs) for key in ("rows", "done", "ok", "failed")}
    return {
        "folder": place,
        "runs": runs,
        "older": max(0, older),
        "totals": {
            "runs": len(runs),
            "states": dict(Counter(run["state"] for run in runs).most_common()),
            **totals,
            "failures": dict(failures.most_common()),
            "seconds": round(sum(run["seconds"] or 0.0 for run in runs), 3),
        },
    }


def trend(before: dict[str, Any], run: dict[str, Any]) -> dict[str, Any] | None:
    """What changed from one run to the next: ``rows`` as a share of those before (None where there
    were none), ``failed`` as the difference of the shares of answered rows that failed.

    None where one of them cannot be read.
    """
    if "unreadable" in (before["state"], run["state"]):
        return None
    rows = (run["rows"] - before["rows"]) / before["rows"] if before["rows"] else None
    return {
        "rows": None if rows is None else round(rows, 4),
        "failed": round(_failed_share(run) - _failed_share(before), 6),
    }


def _failed_share(run: dict[str, Any]) -> float:
    return run["failed"] / run["done"] if run["done"] else 0.0


# for a person

HEADER = ("run", "state", "rows", "ok", "failed", "", "seconds", "rows/s", "began (UTC)", "trend")
_RIGHT = {"rows", "ok", "failed", "seconds", "rows/s"}


def describe_many(found: dict[str, Any]) -> str:
    """A table, and a line of totals."""
    rows = [HEADER, *(_cells(run) for run in found["runs"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if name in _RIGHT else cell.ljust(width)
            for cell, width, name in zip(row, widths, HEADER, strict=True)
        ).rstrip()
        for row in rows
    ]
    totals = found["totals"]
    states = ", ".join(f"{count} {state}" for state, count in totals["states"].items())
    lines.append(
        f"{totals['runs']} run{'' if totals['runs'] == 1 else 's'} ({states}): "
        f"{totals['rows']:,} rows = {totals['ok']:,} ok + {totals['failed']:,} failed + "
        f"{totals['rows'] - totals['done']:,} left, {totals['seconds']:,.1f} s"
    )
    if found["older"]:
        lines.append(
            f"{found['older']:,} older: --last {totals['runs'] + found['older']} shows all"
        )
    return "\n".join(lines)


def _cells(run: dict[str, Any]) -> tuple[str, ...]:
    top = next(iter(run["failures"].items()), None)
    known = run["state"] != "unreadable"
    return (
        printable(run["name"]),
        run["state"],
        *(f"{run[key]:,}" if known else "" for key in ("rows", "ok", "failed")),
        f"{top[0]} {top[1]:,}" if top else "",
        "" if run["seconds"] is None else f"{run['seconds']:,.1f}",
        f"{run['rows_per_second']:,.1f}" if run["rows_per_second"] else "",
        (run["began"] or "")[:16].replace("T", " "),
        _trend_words(run) if known else printable(run["reason"]),
    )


def _trend_words(run: dict[str, Any]) -> str:
    """As in: rows +4.2 %, failed +0.13 %. Empty for what did not change."""
    if run["trend"] is None:
        return ""
    rows, failed = run["trend"]["rows"], run["trend"]["failed"]
    words = [f"rows {rows:+.1%}"] if rows else []
    words += [f"failed {failed:+.2%}"] if failed else []
    return ", ".join(words).replace("%", " %") or "="


def printable(text: str) -> str:
    """On one line, whatever a folder is called."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
