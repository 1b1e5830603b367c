"""The formats by name: of this package, and of others under the entry points ``vlmbatch.exports``.

An entry point names a class derived from ``vlmbatch.exports.base.Format``, which is all that a
format of one's own needs.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from difflib import get_close_matches

from vlmbatch.errors import UsageError
from vlmbatch.exports import FORMATS
from vlmbatch.exports.base import Format

GROUP = "vlmbatch.exports"


def format_named(name: str) -> type[Format]:
    """The class of a format. Raises UsageError where there is none, or it cannot be loaded."""
    if name in FORMATS:
        found: type[Format] = importlib.import_module(f"vlmbatch.exports.{FORMATS[name]}").FORMAT
        return found
    points = importlib.metadata.entry_points(group=GROUP)
    if name not in points.names:
        known = [*FORMATS, *sorted(points.names)]
        close = get_close_matches(name, known, n=1)
        meant = f" (did you mean {close[0]!r}?)" if close else ""
        raise UsageError(
            f"unknown format {name!r}{meant}", hint=f"known: {', '.join(known)}, openai-batch"
        )
    point = points[name]
    where = f"the format {name!r} of {point.value}"
    try:
        loaded = point.load()
    except Exception as error:
        raise UsageError(
            f"{where} cannot be loaded: {error!r}", hint="mend or uninstall that package"
        ) from None
    if isinstance(loaded, type) and issubclass(loaded, Format):
        return loaded
    raise UsageError(f"{where} is no Format", hint="it must be a class derived from base.Format")
