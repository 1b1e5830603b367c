"""The folder of an export: what makes it resumable.

One piece holds what came of one part of the results. Its files lie in a temporary folder until it
is whole; a mark, written last, says that it is there. A killed export goes on at the first piece
without a mark.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from vlmbatch.errors import UsageError
from vlmbatch.results.store import OURS, LocalStore, reported
from vlmbatch.storage import is_local, without_secrets

SETTINGS_FILE = f"{OURS}/export.json"
_TMP = f"{OURS}/tmp"
_MARKS = f"{OURS}/pieces"
LAYOUT = 2
"""Of what pieces hold, and how rows are divided: no export goes on with pieces of another one."""


@dataclass(slots=True)
class Piece:
    """The files of one piece while it is written."""

    KEPT: ClassVar[str] = f"{OURS}/kept"
    """What lies below is there until the export has ended, for ``Format.finish``."""

    place: Path
    number: int
    names: list[str] = field(default_factory=list)

    def file(self, name: str) -> Path:
        """Where to write what will be ``name`` in the export's folder."""
        self.names.append(name)
        path = self.place / _TMP / f"{len(self.names):05d}-{os.path.basename(name)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class Destination:
    """The folder that an export writes: its settings, its finished pieces."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.store = LocalStore(place)
        self._wrote: set[str] = set()

    @contextmanager
    def held(self) -> Iterator[None]:
        """No second export writes here meanwhile. Raises OutputLocked."""
        with reported(self.place):
            for folder in (_TMP, _MARKS):
                (self.place / folder).mkdir(parents=True, exist_ok=True)
        with self.store.lock():
            yield

    @property
    def settings(self) -> dict[str, Any] | None:
        """What the export that is there was told; None where there is none."""
        found: dict[str, Any] | None = self.store.read_json(SETTINGS_FILE)
        return found

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        self._wrote |= set(settings.get("wrote", ()))
        self.store.write_json(SETTINGS_FILE, {**settings, "wrote": sorted(self._wrote)})

    def tally(self, number: int) -> dict[str, Any] | None:
        """What a finished piece holds; None where it is not there."""
        found: dict[str, Any] | None = self.store.read_json(_mark(number))
        return found

    @contextmanager
    def piece(self, number: int) -> Iterator[Piece]:
        """To be filled, then committed."""
        self._clean()
        yield Piece(self.place, number)

    def commit(self, piece: Piece, tally: Mapping[str, Any]) -> None:
        """All of its files appear, and then its mark."""
        with reported(self.place):
            for at, name in enumerate(piece.names, 1):
                written = self.place / _TMP / f"{at:05d}-{os.path.basename(name)}"
                if written.exists():
                    self.claim(name)
                    target = self.place / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(written, target)
        self.store.write_json(_mark(piece.number), dict(tally))

    def claim(self, name: str) -> None:
        """Before something appears under this name: what is ours is known, also after a kill."""
        top = name.partition("/")[0]
        if top != OURS and top not in self._wrote:
            self._wrote.add(top)
            if (settings := self.settings) is not None:
                self.write_settings(settings)

    def write(self, name: str, build: Callable[[BinaryIO], object]) -> None:
        """A file about the whole export: it appears when all of it is written."""
        self.claim(name)
        path = self.place / name
        temporary = self.place / _TMP / f"whole-{path.name}"
        with reported(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb", buffering=2**20) as file:
                build(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)

    def end(self) -> None:
        """What was kept for joining goes."""
        self._clean()
        shutil.rmtree(self.place / Piece.KEPT, ignore_errors=True)

    def clear(self) -> None:
        """An earlier export goes, as far as it is ours: what stands beside it stays."""
        self.write_settings({**(self.settings or {}), "state": "clearing"})
        for name in (self.settings or {}).get("wrote", ()):
            path = self.place / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                with suppress(FileNotFoundError):
                    path.unlink()
        for folder in (_MARKS, _TMP, Piece.KEPT):
            shutil.rmtree(self.place / folder, ignore_errors=True)
        for folder in (_TMP, _MARKS):
            (self.place / folder).mkdir(parents=True, exist_ok=True)
        self._wrote = set()

    def _clean(self) -> None:
        shutil.rmtree(self.place / _TMP, ignore_errors=True)
        (self.place / _TMP).mkdir(parents=True, exist_ok=True)


def _mark(number: int) -> str:
    return f"{_MARKS}/{number:05d}.json"


def checked_place(output: str, destination: str) -> Path:
    """The folder for an export. Raises UsageError where none can be."""
    if not destination.strip():
        raise UsageError("DEST is empty", hint="name a new folder")
    if not is_local(destination):
        raise UsageError(
            f"an export is written to a local folder, not to {without_secrets(destination)}",
            hint="name a folder, and copy it where you need it",
        )
    place = Path(destination.removeprefix("file://")).resolve()
    if is_local(output) and Path(output).resolve() in (place, *place.parents):
        raise UsageError(
            f"{destination} is inside the output {output}, which holds results and nothing else",
            hint="give another folder",
        )
    if os.path.lexists(place) and not place.is_dir():
        raise UsageError(f"{destination} is a file, not a folder", hint="give a folder")
    if place.is_dir() and not (place / SETTINGS_FILE).exists():
        found = sorted(path.name for path in place.iterdir() if path.name != OURS)
        if found or (place / OURS / "run.json").exists():
            raise UsageError(
                f"{destination} holds something else ({', '.join(found[:3])}), and no export",
                hint="give an empty or new folder",
            )
    return place


def same_settings(before: Mapping[str, Any], now: Mapping[str, Any], destination: str) -> None:
    """Raises UsageError, naming what differs, where another export is in the folder."""
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        lines = [
            f"{key}: was {_short(before.get(key))}, now {_short(now.get(key))}" for key in changed
        ]
        raise UsageError(
            "\n  ".join([f"{destination} holds another export; these changed:", *lines]),
            hint="give another folder, or start anew: the same command with --overwrite",
        )


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 100 else f"{text[:97]}..."
