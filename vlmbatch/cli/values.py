"""Values of options: pairs, lists, files, times."""

from __future__ import annotations

from pathlib import Path

import click

from vlmbatch.errors import UsageError


def pairs(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, str]:
    found = {}
    for value in values:
        key, equals, rest = value.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{value!r} is not KEY=VALUE")
        found[key] = rest
    return found


def words(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> list[str] | None:
    return None if value is None else split_words(value)


def split_words(value: str) -> list[str]:
    return [word.strip() for word in value.split(",") if word.strip()]


def text_of(value: str) -> str:
    """TEXT, or the content of a file for @FILE."""
    if not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {value[1:]}: {error}") from None


def notify_url(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    from vlmbatch.job import notify_url_from

    try:
        return notify_url_from(text_of(value).strip())
    except (UsageError, ValueError) as error:
        raise click.BadParameter(str(error)) from None


def seconds(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    from vlmbatch.job import parse_seconds

    try:
        seconds = parse_seconds(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    assert isinstance(seconds, float)
    return max(0.1, seconds)
