"""``--engine-arg key=value`` of the engines that have a class of their own for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, TypeVar

from vlmbatch.errors import UsageError

Args = TypeVar("Args")


def parsed(
    engine: str,
    kind: type[Args],
    args: Mapping[str, str],
    parse: Callable[[str, str], Any],
    *,
    quote: bool = True,
) -> Args:
    """The arguments as the dataclass ``kind``; ``parse(key, value)`` may raise ValueError.

    Raises UsageError for an unknown key or an unreadable value; ``quote``: the value is shown.
    """
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in args.items():
        if key not in known:
            close = get_close_matches(key, known, n=1)
            raise UsageError(
                f"the {engine} engine has no argument {key!r}",
                hint=f"did you mean {close[0]!r}?" if close else f"it has: {', '.join(known)}",
            )
        try:
            values[key] = parse(key, value)
        except ValueError as error:
            shown = f"{key}={value}" if quote else key
            raise UsageError(f"--engine-arg {shown}: {error}") from None
    return kind(**values)
