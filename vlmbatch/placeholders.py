"""Placeholders of a job spec: ``${NAME}`` of the environment, ``{date}``, ``${{date}}`` in prompts.

In the keys of PLACES (paths, URLs and ``output``):

    ${NAME}  ${NAME:-default}            a variable of the environment
    {date}  {date-1d}  {date+7d}         a day as YYYY-MM-DD
    {date:%Y/%m/%d}  {date-1d:%Y%m%d}    the same in any form of strftime

In the texts of PROMPTS, where ``{{ column }}`` is Jinja: ``${{date}}``, ``${{date-1d:%d.%m.%Y}}``.
Everything else in braces stays as it is, and what a variable holds is not looked at again.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from typing import Any
from zoneinfo import ZoneInfo

from vlmbatch.errors import UsageError

Address = tuple[str | int, ...]
"""Where something stands in a spec: keys, and positions in lists."""

PLACES = {
    ("manifest",),
    ("include",),
    ("exclude",),
    ("output",),
    ("model",),
    ("family",),
    ("allow_roots",),
    ("ray_address",),
    ("notify_url",),
    ("engine", "base_url"),
    ("engine", "lora"),
    ("tasks", "json_schema"),
}
"""Keys whose texts may hold variables and dates; of a list, each entry."""
PROMPTS = {("system",), ("tasks", "prompt"), ("tasks", "question"), ("tasks", "phrase")}
"""Keys in which ``${{date}}`` is the day."""

_IN_PROMPTS = r"\$\{\{\s*date(?=[-+:\s}])(?P<worded>[^{}]*)\}\}"
_IN_PLACES = re.compile(
    rf"{_IN_PROMPTS}|\$\{{(?P<variable>[^{{}}]*)\}}|\{{date(?=[-+:}}])(?P<date>[^{{}}]*)\}}"
)
_WORDED = re.compile(_IN_PROMPTS)
_VARIABLE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?")
_DAY = re.compile(r"(?:([-+][0-9]{1,18})d)?(?::(.+))?")


class AsGiven(str):
    """A text from an option of the command line: the shell has expanded what was to be expanded."""

    __slots__ = ()


class BesideSpec(str):
    """The path of a file that a spec names, relative to the folder of that spec."""

    folder: str = ""


@dataclass
class Filler:
    """Fills in placeholders, and keeps what it found."""

    day: datetime
    environment: Mapping[str, str] | None
    """None: variables stay as they are written."""
    variables: set[str] = field(default_factory=set)
    """The variables that were named, and are set or have no default."""
    problems: list[tuple[Address, str]] = field(default_factory=list)
    """What could not be filled in: (address, problem)."""

    def fill(self, value: Any, address: Address = ()) -> Any:
        """The value, which stands at this address of a spec, with its placeholders filled in."""
        key = tuple(step for step in address if isinstance(step, str))
        if isinstance(value, AsGiven):
            return str(value)
        if isinstance(value, BesideSpec):
            return os.path.join(value.folder, self._filled(_IN_PLACES, value, address))
        if isinstance(value, Mapping):
            if key in PLACES and _braces_without_quotes(value):
                self.problems.append(
                    (address, "a text that begins with { needs quotes, as in '{date}'")
                )
            return {name: self.fill(item, (*address, name)) for name, item in value.items()}
        if isinstance(value, list):
            return [self.fill(item, (*address, index)) for index, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        if key in PLACES:
            return self._filled(_IN_PLACES, value, address)
        if key in PROMPTS:
            return self._filled(_WORDED, value, address)
        return value

    def _filled(self, pattern: re.Pattern[str], text: str, address: Address) -> str:
        def replaced(match: re.Match[str]) -> str:
            try:
                found = match.groupdict()
                if found.get("variable") is not None:
                    return self._variable(match[0], found["variable"])
                day = found["worded"] if found.get("date") is None else found["date"]
                return self._date(match[0], day.strip())
            except ValueError as error:
                self.problems.append((address, str(error)))
                return match[0]

        return pattern.sub(replaced, text)

    def _variable(self, written: str, inside: str) -> str:
        match = _VARIABLE.fullmatch(inside)
        if match is None:
            raise ValueError(f"{written} names no variable: ${{NAME}} or ${{NAME:-default}}")
        name, default = match.groups()
        value = None if self.environment is None else self.environment.get(name)
        if value is None and default is not None and self.environment is not None:
            return default
        if default is None or value is not None:
            self.variables.add(name)
        if self.environment is None:
            return written
        if value is None:
            raise ValueError(f"the environment variable {name} is not set")
        return value

    def _date(self, written: str, inside: str) -> str:
        match = _DAY.fullmatch(inside)
        if match is None:
            raise ValueError(f"{written} is no date: as in {{date}}, {{date-1d}}, {{date:%Y/%m}}")
        days, form = match.groups()
        try:
            return (self.day + timedelta(days=int(days or 0))).strftime(form or "%Y-%m-%d")
        except OverflowError:
            raise ValueError(f"{written} is no day that a calendar has") from None


def day_of(given: str | None, zone: tzinfo, clock: Callable[[tzinfo], datetime]) -> datetime:
    """Midnight of the day that ``--date`` gave, else now.

    Raises UsageError where it is none.
    """
    if given is None:
        return clock(zone)
    try:
        day = date.fromisoformat(given)
    except ValueError:
        raise UsageError(f"--date {given}: expected a day such as 2026-11-21") from None
    return datetime.combine(day, time(), zone)


def zone_of(name: object) -> tzinfo:
    """The time zone of this name, UTC without one. Raises ValueError where none is known."""
    if name is None:
        return UTC
    try:
        return ZoneInfo(str(name))
    except (OSError, ValueError, LookupError):
        raise ValueError(
            f"no time zone {str(name)[:60]!r} is known here: as in Europe/Berlin "
            "(pip install tzdata, on a machine without zones)"
        ) from None


def _braces_without_quotes(value: Mapping[Any, Any]) -> bool:
    """YAML reads ``output: {date}`` as keys without values."""
    return bool(value) and all(
        str(key).startswith("date") and item is None for key, item in value.items()
    )


# values that are not to be seen

SHORTEST_SECRET = 4
"""Characters. Shorter values stand in run.json by their name, but not in what is said: hardly any
line of text would be left."""
_hidden: dict[str, str] = {}


def by_name(text: str, variables: Mapping[str, str]) -> str:
    """The text with the variables' values replaced by ``${NAME}``, longer ones first."""
    names = {value: name for name, value in sorted(variables.items()) if value}
    if not names:
        return text
    longer_first = sorted(names, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longer_first))
    return re.sub(pattern, lambda match: f"${{{names[match[0]]}}}", text)


def by_value(text: str, variables: Mapping[str, str]) -> str:
    """The other way round; variables that are not set stay."""
    return re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", lambda m: variables.get(m[1], m[0]), text)


def values_of(names: Iterable[str]) -> dict[str, str]:
    """Those of the variables that are set here."""
    return {name: os.environ[name] for name in names if name in os.environ}


def hide(variables: Mapping[str, str]) -> None:
    """From now on this process says ``${NAME}`` instead of these values."""
    for name, value in variables.items():
        if len(value) >= SHORTEST_SECRET:
            _hidden[name] = value


class Hiding(logging.Formatter):
    """Log lines, and tracebacks, as they may be said."""

    def format(self, record: logging.LogRecord) -> str:
        return hidden(super().format(record))


def hidden(text: str) -> str:
    """The text as it may be said."""
    return by_name(text, _hidden) if _hidden else text
