"""Families that are not in this package: a file of the user's own, or another package's.

Such a file is Python with an ``ENTRY`` (base.Entry), as examples/my_family.py shows. A package
names its entries under the entry point group ``vlmbatch.families``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path

import xxhash

from vlmbatch.errors import UsageError
from vlmbatch.families.base import Entry

GROUP = "vlmbatch.families"
_EXAMPLE = "examples/my_family.py shows how one looks"


def entry_in_file(path: str) -> Entry:
    """Executes the file, once per content. Raises UsageError with the line that is wrong."""
    file = Path(os.path.expanduser(path))
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UsageError(
            f"cannot read the family file {path}: {error.strerror}",
            hint="--family takes a family's name or the path of a Python file",
        ) from None
    return _executed(file.resolve(), xxhash.xxh3_64_hexdigest(content))


@cache
def _executed(file: Path, content: str) -> Entry:
    name = f"vlmbatch_family_{content}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"the family file {file} fails{_where(error, file)}: {error!r}") from None
    return _checked(getattr(module, "ENTRY", None), f"the family file {file}")


@cache
def installed_entries() -> tuple[Entry, ...]:
    """Those of installed packages. Raises UsageError for one that cannot be loaded."""
    found = []
    for point in importlib.metadata.entry_points(group=GROUP):
        where = f"the family {point.name!r} of {point.value}"
        try:
            entry = point.load()
        except Exception as error:
            raise UsageError(
                f"{where} cannot be loaded: {error!r}", hint="mend or uninstall that package"
            ) from None
        found.append(_checked(entry, where))
    return tuple(found)


def is_file(name: str | None) -> bool:
    """Whether ``--family`` names a file, whose code it would run."""
    return name is not None and name.endswith(".py")


def content_of(name: str | None) -> str | None:
    """What stands for the content of a family file in a fingerprint."""
    if name is None or not is_file(name):
        return None
    return xxhash.xxh3_64_hexdigest(Path(os.path.expanduser(name)).read_bytes())


def _checked(entry: object, where: str) -> Entry:
    if isinstance(entry, Entry):
        return entry
    what = "no ENTRY" if entry is None else f"an ENTRY that is a {type(entry).__name__}"
    raise UsageError(f"{where} has {what}", hint=f"it must be a vlmbatch Entry; {_EXAMPLE}")


def _where(error: Exception, file: Path) -> str:
    """The line of the file in which it happened."""
    if isinstance(error, SyntaxError):
        return f" in line {error.lineno}"
    lines = []
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == str(file):
            lines.append(step.tb_lineno)
        step = step.tb_next
    return f" in line {lines[-1]}" if lines else ""
