"""Folders that a run writes to: whether it may, and how much room there is. Nothing is written."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from vlmbatch.doctor.findings import Finding, ok, problem, warning
from vlmbatch.results.output import check_ours
from vlmbatch.results.store import LocalStore, Store, open_store
from vlmbatch.storage import is_local

GIB = 2**30
FULL = 64 * 2**20
"""Bytes: with less nothing can be done."""


def temporary_folder() -> Finding:
    return room("temporary folder", Path(tempfile.gettempdir()), GIB, "TMPDIR names another")


def output_place(output: str) -> Finding:
    """Of ``-o``: whether an output can be there, is ours, and is not held by another run."""
    name = "output"
    store = _store(output)
    check_ours(store)
    if store.is_locked():
        return problem(
            name, f"another run holds {store.place}", "wait for it, stop it, or give another -o"
        )
    if isinstance(store, LocalStore):
        return room(name, store.folder.absolute(), GIB, "give another folder with -o")
    return ok(name, f"{store.place} can be listed; that it can be written is seen at the start")


def _store(output: str) -> Store:
    """One that does not wait for a store that is away."""
    if is_local(output):
        return open_store(output)
    from vlmbatch.results.object_store import ObjectStore

    return ObjectStore(output, patience=0.0)


def room(name: str, folder: Path, wanted: int, remedy: str) -> Finding:
    """About a folder that is there, or will be made."""
    here = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(here, os.W_OK | os.X_OK):
        return problem(name, f"{here} cannot be written", remedy)
    free = shutil.disk_usage(here).free
    what = f"{folder}: {free / GIB:,.1f} GiB free"
    if free < FULL:
        return problem(name, what, f"free some space; {remedy}")
    return warning(name, what, f"free some space; {remedy}") if free < wanted else ok(name, what)
