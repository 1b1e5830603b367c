"""Where an output lives, and files there that are visible only when they are whole.

``LocalStore`` is a folder; results/object_store.py has the one for object stores.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from vlmbatch.errors import OutputLocked, OutputNotOurs, RunStopped
from vlmbatch.storage import is_local

OURS = "__vlmbatch"
RUN_FILE = f"{OURS}/run.json"
STATUS_FILE = f"{OURS}/status.json"
QUALITY_FILE = f"{OURS}/quality.json"
"""What ``vlmbatch quality`` found when it looked last."""
NONCE_FILE = f"{OURS}/nonce"
LOCK_FILE = f"{OURS}/lock"
SHARDS = f"{OURS}/shards"
GENERATIONS = f"{OURS}/generations"
FOOTER_BYTES = 2**18
"""So much of a file is read at a time where only its footer is wanted."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or folder in a listing. ``tag`` is another for another content, or empty; folders have
    none."""

    name: str
    tag: str = ""


class Store(ABC):
    """The place of one output. Files go by their names in it, with slashes."""

    place: str
    """As messages and commands name it."""
    parallel: int = 1
    """So many small reads or deletions at a time are worth while."""

    def __init__(self) -> None:
        self.footers: dict[tuple[str, str], dict[str, Any]] = {}
        """What result files say of themselves, by name and tag; only what has a tag."""

    @property
    @abstractmethod
    def address(self) -> str:
        """The place as another process finds it, whatever its current folder."""

    @property
    @abstractmethod
    def logs(self) -> Path:
        """A local folder, which may be one for each machine."""

    def at(self, name: str) -> str:
        """For messages."""
        return f"{self.place.rstrip('/')}/{name}"

    @abstractmethod
    def check_place(self) -> None:
        """Raises OutputNotOurs or UsageError where no output can be."""

    @abstractmethod
    def make(self) -> None:
        """Create the folders. Raises RunStopped where the place cannot be written."""

    @abstractmethod
    def entries(self, folder: str = "") -> list[Entry]:
        """What lies right in the folder, by name; nothing where there is no such folder."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """None where there is no such file."""

    @abstractmethod
    def whole(self, name: str) -> pa.NativeFile:
        """To read all of a file of bounded size. Raises FileNotFoundError."""

    @abstractmethod
    def ranged(self, name: str, *, block: int = 2**23) -> pa.NativeFile:
        """To read some of a file, or much by and by. Raises FileNotFoundError."""

    @abstractmethod
    def write(
        self, name: str, build: Callable[[Path], None], *, replaces: str | None = None
    ) -> None:
        """``build`` writes a temporary file; it appears under its name whole, and durably.

        ``replaces``: the tag of the file that may be there, empty for none; RunStopped where
        another one is by now, if the store can tell. None: whatever is there."""

    def write_json(self, name: str, value: Any) -> None:
        text = json.dumps(value, indent=1, ensure_ascii=False)
        self.write(name, lambda temporary: _write_text(temporary, text))

    def read_json(self, name: str) -> Any | None:
        """The value, or None where there is no such file."""
        data = self.read(name)
        if data is None:
            return None
        try:
            return json.loads(data)
        except ValueError as error:
            raise RunStopped(f"cannot read {self.at(name)}: {error}") from None

    def publish(self, name: str, value: Any) -> None:
        """``write_json``, perhaps later, or not at all where a newer value has come by then."""
        self.write_json(name, value)

    @abstractmethod
    def delete(self, names: Iterable[str]) -> None:
        """Files that are not there do no harm."""

    @abstractmethod
    def clean_tmp(self) -> None:
        """Delete what killed writers left. Only the holder of the lock may."""

    @abstractmethod
    def lock(self) -> AbstractContextManager[None]:
        """Hold the output. Raises OutputLocked, naming the holder, where another run does."""

    @abstractmethod
    def check_held(self) -> None:
        """Raises RunStopped where the lock that this process took has gone to another run."""

    @abstractmethod
    def is_locked(self) -> bool:
        """Whether a run holds the output at this moment."""


def open_store(output: str | Path) -> Store:
    """The store of an output: a folder, or the URL of a prefix on an object store.

    Raises UsageError for a URL that nothing here writes to, or that has credentials in it.
    """
    uri = str(output)
    if is_local(uri):
        return LocalStore(uri[5:].removeprefix("//") if uri[:5].lower() == "file:" else uri)
    from vlmbatch.results.object_store import ObjectStore

    return ObjectStore(uri)


class LocalStore(Store):
    """An output folder. Writing: into tmp/, fsync, rename, fsync of the folder."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.place = str(self.folder)
        self.ours = self.folder / OURS
        self.shards = self.folder / SHARDS
        self.tmp = self.ours / "tmp"

    @property
    def address(self) -> str:
        return str(self.folder.absolute())

    @property
    def logs(self) -> Path:
        return self.ours / "logs"

    def check_place(self) -> None:
        folder = self.folder
        if folder.is_dir():
            return
        if os.path.lexists(folder):
            raise OutputNotOurs(
                f"{folder} is a file, not a folder", hint="give another output with -o"
            )
        above = next(path for path in folder.absolute().parents if os.path.exists(path))
        if not above.is_dir():
            raise OutputNotOurs(
                f"cannot make the folder {folder}: {above} is a file",
                hint="give another output with -o",
            )

    def make(self) -> None:
        with reported(self.folder):
            for folder in (self.shards, self.tmp, self.logs, self.folder / GENERATIONS):
                folder.mkdir(parents=True, exist_ok=True)

    def entries(self, folder: str = "") -> list[Entry]:
        try:
            return [Entry(name) for name in sorted(os.listdir(self.folder / folder))]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def read(self, name: str) -> bytes | None:
        try:
            return (self.folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def whole(self, name: str) -> pa.NativeFile:
        return pa.memory_map(str(self.folder / name))

    def ranged(self, name: str, *, block: int = 2**23) -> pa.NativeFile:
        return pa.OSFile(str(self.folder / name))

    def write(
        self, name: str, build: Callable[[Path], None], *, replaces: str | None = None
    ) -> None:
        """The folder's lock cannot be lost: ``replaces`` is not looked at."""
        path = self.folder / name
        temporary = self.tmp / f"{path.name}.{uuid.uuid4().hex[:8]}"
        with reported(path):
            try:
                build(temporary)
                _sync(temporary)
                os.replace(temporary, path)
                _sync(path.parent)
            finally:
                with suppress(FileNotFoundError):
                    temporary.unlink()

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            path = self.folder / name
            with reported(path), suppress(FileNotFoundError):
                path.unlink()

    def clean_tmp(self) -> None:
        self.delete(f"{OURS}/tmp/{leftover.name}" for leftover in self.entries(f"{OURS}/tmp"))

    @contextmanager
    def lock(self) -> Iterator[None]:
        path = self.folder / LOCK_FILE
        with reported(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                _lock_soon(handle)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise RunStopped(f"cannot lock {path}: {error.strerror}") from None
                holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
                raise OutputLocked(
                    f"another run holds {self.folder} ({holder or 'just started'})",
                    hint="wait for it, stop it, or give another -o",
                ) from None
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
            yield
            os.ftruncate(handle, 0)
        finally:
            os.close(handle)

    def check_held(self) -> None:
        """Nobody takes a flock away from a process that lives."""

    def is_locked(self) -> bool:
        try:
            handle = os.open(self.folder / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(handle)
        return False


def _lock_soon(handle: int) -> None:
    """An exclusive lock, or OSError after a second: who only looks holds it for an instant."""
    for _ in range(20):
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
        time.sleep(0.05)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turns an OSError (full disk, read-only folder) into RunStopped with the place."""
    try:
        yield
    except OSError as error:
        hints = {
            errno.ENOSPC: "free some space and run the same command again",
            errno.EDQUOT: "free some space and run the same command again",
            errno.EROFS: "give an output folder that can be written with -o",
            errno.EACCES: "give an output folder that can be written with -o",
            errno.ENOTDIR: "give another output folder with -o",
            errno.EEXIST: "give another output folder with -o",
        }
        # By number: pyarrow's own text only wraps the system's.
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise RunStopped(
            f"cannot write {path}: {reason}", hint=hints.get(error.errno or 0)
        ) from None


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
