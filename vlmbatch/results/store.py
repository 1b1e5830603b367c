"""Files that are visible only when they are whole: the local folder that an output lives in."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vlmbatch.errors import OutputLocked, RunStopped

OURS = "__vlmbatch"


class LocalStore:
    """An output folder. Writing: into tmp/, fsync, rename, fsync of the folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.ours = self.folder / OURS
        self.shards = self.ours / "shards"
        self.tmp = self.ours / "tmp"
        self.logs = self.ours / "logs"

    def make(self) -> None:
        """Create the folders. Raises RunStopped where the place cannot be written."""
        with reported(self.folder):
            for folder in (self.shards, self.tmp, self.logs):
                folder.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, build: Callable[[Path], None]) -> None:
        """``build`` writes a temporary file; it appears at ``path`` whole, and durably."""
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

    def write_json(self, path: Path, value: Any) -> None:
        text = json.dumps(value, indent=1, ensure_ascii=False)
        self.write(path, lambda temporary: _write_text(temporary, text))

    def read_json(self, path: Path) -> Any | None:
        """The value, or None where there is no such file."""
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise RunStopped(f"cannot read {path}: {error}") from None

    def delete(self, path: Path) -> None:
        with reported(path), suppress(FileNotFoundError):
            path.unlink()

    def clean_tmp(self) -> None:
        """Delete what killed writers left. Only the holder of the lock may."""
        if self.tmp.is_dir():
            for leftover in self.tmp.iterdir():
                self.delete(leftover)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the output. Raises OutputLocked, naming the holder, where another run does."""
        path = self.ours / "lock"
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

    def is_locked(self) -> bool:
        """Whether a run holds the output at this moment."""
        try:
            handle = os.open(self.ours / "lock", os.O_RDONLY | os.O_CLOEXEC)
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
