"""``vlmbatch status --watch``: a look every few seconds, until nothing runs any more."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any

import click

from vlmbatch.history import Outputs, describe_many, printable
from vlmbatch.status import describe

_NO_WRAP, _WRAP = "\x1b[?7l", "\x1b[?7h"
"""DECAWM: a line that is too long for the terminal is cut, so that a line is a line."""


def shown(found: dict[str, Any]) -> str:
    """A look for a person."""
    return describe_many(found) if "runs" in found else describe(found)


def watch(outputs: Outputs, seconds: float, *, as_json: bool) -> None:
    """In place on a terminal; elsewhere a line for each run that changed, or each look as JSON."""
    if as_json:
        for found in _looks(outputs, seconds):
            click.echo(json.dumps(found))
    elif sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        _redraw(outputs, seconds)
    else:
        said: dict[str, tuple[Any, ...]] = {}
        for found in _looks(outputs, seconds):
            for run in found.get("runs", [found]):
                news = (run["state"], run["ok"], run["failed"], run["rows"])
                if said.get(run["output"]) != news:
                    said[run["output"]] = news
                    click.echo(line_of(run))


def _looks(outputs: Outputs, seconds: float) -> Iterator[dict[str, Any]]:
    while True:
        found = outputs.look()
        yield found
        if all(run["state"] != "running" for run in found.get("runs", [found])):
            return
        time.sleep(seconds)


def _redraw(outputs: Outputs, seconds: float) -> None:
    drawn = 0
    for found in _looks(outputs, seconds):
        lines = [printable(line) for line in shown(found).split("\n")]
        lines = lines[-max(1, shutil.get_terminal_size().lines - 1) :]  # as many as it can go up
        up = f"\x1b[{drawn}F" if drawn else ""
        # Each line is cleared to its end as it is written, and what is below is cleared last.
        text = "".join(f"{line}\x1b[K\n" for line in lines)
        click.echo(f"{up}{_NO_WRAP}{text}\x1b[J{_WRAP}", nl=False)
        drawn = len(lines)


def line_of(run: dict[str, Any]) -> str:
    """As in: out: running, 120 of 1,000 rows, 3 failed, 12.0 rows/s, 73 s left."""
    words = [
        run["state"],
        f"{run['done']:,} of {run['rows']:,} rows",
        f"{run['failed']:,} failed",
    ]
    if run["rows_per_second"]:
        words.append(f"{run['rows_per_second']:,.1f} rows/s")
    if run["seconds_left"] is not None:
        words.append(f"{run['seconds_left']:,} s left")
    if run["reason"]:
        words.append(run["reason"])
    return printable(f"{run['output']}: {', '.join(words)}")
