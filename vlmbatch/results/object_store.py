"""An output on an object store: S3, Google Cloud Storage, Azure, whatever fsspec can write.

A file is built locally and uploaded in one call, so that nobody sees half of it; its name says what
is in it, so that an upload whose acknowledgement was lost is repeated without harm. Nothing is
written through ``fs.open``, which publishes half-written files when its block is left by an error.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import xxhash

from vlmbatch.errors import OutputNotOurs, RunStopped, UsageError
from vlmbatch.results import uploads
from vlmbatch.results.lease import LEASE_SECONDS, Lease, is_running
from vlmbatch.results.store import Entry, Store, reported
from vlmbatch.results.uploads import tag_of
from vlmbatch.storage import (
    EXTRAS,
    RangedFile,
    Trouble,
    filesystem_of,
    said,
    scheme_of,
    trouble_of,
    without_secrets,
)

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 120.0
"""So long a request is repeated while the store is busy or away."""
FIRST_WAIT_SECONDS = 0.5
MAX_WAIT_SECONDS = 15.0
PUBLISH_SECONDS = 5.0
BLOCKS = 4
"""So many blocks of a file that is being read are in memory."""
READ_ONLY = ("http", "https", "data", "hf", "zip", "tar", "github")
_T = TypeVar("_T")


class ObjectStore(Store):
    """All files under one prefix. ``patience``: seconds that a busy store is waited for."""

    parallel = 16

    def __init__(self, uri: str, *, patience: float = PATIENCE_SECONDS) -> None:
        super().__init__()
        self.place = _checked(uri)
        self._fs, root = filesystem_of(self.place)
        self._root = root.rstrip("/")
        scheme = scheme_of(self.place) or ""
        self._bucket = "/".join(self.place.split("/")[:3])
        self._patience = patience
        self._kind = EXTRAS.get(scheme)
        self._lease: Lease | None = None
        self._publisher: _Publisher | None = None
        # Of this user and place; a resume appends to the same logs.
        digest = xxhash.xxh3_64_hexdigest(self.place.encode())[:8]
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in self._root.split("/")[-1])
        self._user_folder = Path(tempfile.gettempdir()) / f"vlmbatch-{os.getuid()}"
        self._local = self._user_folder / f"{name}-{digest}"

    @property
    def address(self) -> str:
        return self.place

    @property
    def logs(self) -> Path:
        return self._local_folder("logs")

    def _local_folder(self, name: str) -> Path:
        folder = self._local / name
        with reported(folder):
            self._user_folder.mkdir(mode=0o700, exist_ok=True)
            if self._user_folder.stat().st_uid != os.getuid():
                raise PermissionError(errno.EACCES, "another user made it", str(self._user_folder))
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def check_place(self) -> None:
        try:
            self.entries()
        except _NoBucket as error:
            raise UsageError(error.message, hint=error.hint) from None
        if "/" in self._root.strip("/") and self.stat("") is not None:
            raise OutputNotOurs(
                f"{self.place} is an object, not a prefix", hint="give another output with -o"
            )

    def make(self) -> None:
        """There are no folders to make; a store that refuses us says so at the lock."""

    # reading

    def entries(self, folder: str = "") -> list[Entry]:
        path = self._path(folder)

        def listing() -> list[dict[str, Any]]:
            if self._kind == "s3":  # `ls` lists the folder above as well, where this one is empty
                return list(fsspec.asyn.sync(self._fs.loop, self._fs._lsdir, path))
            return list(self._fs.ls(path, detail=True))

        try:
            found = self._ask("list", folder, listing)
        except FileNotFoundError:
            if self._kind == "s3":
                raise _NoBucket(self._bucket) from None
            return []
        entries = []
        for each in found:
            name = each["name"].strip("/")
            if name != path.strip("/"):  # else a folder's marker
                entries.append(Entry(name.rpartition("/")[2], tag_of(each)))
        return sorted(entries, key=lambda entry: entry.name)

    def read(self, name: str, *, patience: float | None = None) -> bytes | None:
        path = self._path(name)
        try:
            data: bytes = self._ask("read", name, lambda: self._fs.cat_file(path), patience)
        except FileNotFoundError:
            return None
        return data

    def whole(self, name: str) -> pa.NativeFile:
        data = self.read(name)
        if data is None:
            raise FileNotFoundError(self.at(name))
        return pa.BufferReader(data)

    def ranged(self, name: str, *, block: int = 2**23) -> pa.NativeFile:
        size = self._ask("read", name, lambda: self._fs.info(self._path(name)))["size"]
        path = self._path(name)

        def fetch(start: int, stop: int) -> bytes:
            def once() -> bytes:
                data: bytes = self._fs.cat_file(path, start=start, end=stop)
                if len(data) != stop - start:
                    raise OSError(
                        errno.EREMOTEIO, f"asked for {stop - start} bytes, got {len(data)}"
                    )
                return data

            return self._ask("read", name, once)

        return pa.PythonFile(BlocksFile(fetch, size, block), mode="r")

    # writing

    def write(
        self, name: str, build: Callable[[Path], None], *, replaces: str | None = None
    ) -> None:
        folder = self._local_folder("tmp")
        with reported(folder), tempfile.TemporaryDirectory(dir=folder) as made:
            temporary = Path(made) / name.rpartition("/")[2]
            build(temporary)
            try:
                return self._put(name, lambda path: self._put_file(temporary, path, replaces))
            except FileExistsError:
                pass
            except _NoBucket:
                if not replaces:
                    raise
            # Perhaps by ourselves: an upload whose acknowledgement was lost is repeated. Where the
            # object to replace is gone, AWS says so in place of 412. (Asked here, not while that
            # error is handled: it would be taken for the cause of what the store says now.)
            there = self.read(name)
            if there != temporary.read_bytes():
                did = "deleted" if there is None else "wrote"
                raise RunStopped(
                    f"another run {did} {self.at(name)} meanwhile",
                    hint="give the same command again: it goes on from what is committed",
                )

    def write_json(self, name: str, value: Any) -> None:
        data = _json(value)
        if self._publisher is not None:
            self._publisher.forget(name)
        self._put(name, lambda path: self._pipe(path, data, None))

    def publish(self, name: str, value: Any) -> None:
        if self._publisher is None:
            self.write_json(name, value)
        else:
            self._publisher.put(name, _json(value))

    def _put_file(self, local: Path, path: str, replaces: str | None) -> None:
        uploads.put_file(self._fs, self._kind, local, path, replaces)

    def _pipe(self, path: str, data: bytes, replaces: str | None) -> None:
        uploads.pipe_file(self._fs, self._kind, data, path, replaces)

    def _put(self, name: str, put: Callable[[str], None]) -> None:
        self._still_ours()
        try:
            self._ask("write", name, lambda: put(self._path(name)))
        except FileNotFoundError:
            raise _NoBucket(self._bucket) from None

    def delete(self, names: Iterable[str]) -> None:
        names = list(names)
        if not names:
            return
        with ThreadPoolExecutor(min(self.parallel, len(names))) as threads:
            list(threads.map(self._delete, names))

    def _delete(self, name: str) -> None:
        self._still_ours()
        with suppress(FileNotFoundError):
            self._ask("delete", name, lambda: self._fs.rm_file(self._path(name)))

    def clean_tmp(self) -> None:
        """What killed writers left on this machine; what they left unfinished on the store is no
        object, and a lifecycle rule's business."""
        for leftover in self._local_folder("tmp").iterdir():
            shutil.rmtree(leftover, ignore_errors=True)

    # the lock

    @contextmanager
    def lock(self, seconds: float = LEASE_SECONDS) -> Iterator[None]:
        """``seconds`` after the last sign of life, another run may take the output over."""
        lease = Lease(self, seconds)
        try:
            lease.take()
        except _NoBucket as error:  # of a store whose listings do not tell
            raise UsageError(error.message, hint=error.hint) from None
        self._lease = lease
        self._publisher = _Publisher(self)
        try:
            yield
        finally:
            self._publisher.close()
            self._publisher = None
            self._lease = None
            lease.give_back()

    def check_held(self) -> None:
        if self._lease is not None:
            self._lease.raise_if_lost()

    def _still_ours(self) -> None:
        """Before anything is changed: who could not renew its lease may have been replaced."""
        if self._lease is not None:
            self._lease.check()

    def is_locked(self) -> bool:
        return is_running(self)

    # for the lease, which goes around the check of the lease

    def stat(self, name: str, *, patience: float | None = None) -> Stat | None:
        """None where there is no such object."""
        try:
            info = self._ask("read", name, lambda: self._info(name), patience)
        except FileNotFoundError:
            return None
        return info

    def _info(self, name: str) -> Stat:
        path = self._path(name)
        info = self._fs.info(path)
        if info["type"] == "directory":
            raise FileNotFoundError(path)
        at = info.get("LastModified") or info.get("last_modified")
        if not isinstance(at, datetime):
            at = self._fs.modified(path)
        return Stat(tag_of(info), at if at.tzinfo else at.replace(tzinfo=UTC))

    def create(self, name: str, data: bytes, *, patience: float | None = None) -> bool:
        """Write an object that must not be there yet; False where it was, if the store looks."""
        try:
            self._ask("write", name, partial(self._pipe, self._path(name), data, ""), patience)
        except FileExistsError:
            return False
        except FileNotFoundError:
            raise _NoBucket(self._bucket) from None
        return True

    def replace(self, name: str, data: bytes, tag: str, *, patience: float | None = None) -> bool:
        """Write an object that is there with this tag; False where it has another one by now, if
        the store looks."""
        put = partial(self._pipe, self._path(name), data, tag or None)
        try:
            self._ask("write", name, put, patience)
        except (FileExistsError, FileNotFoundError):
            return False
        return True

    def remove(self, name: str, *, patience: float | None = None) -> None:
        with suppress(FileNotFoundError):
            self._ask("delete", name, lambda: self._fs.rm_file(self._path(name)), patience)

    def put_unheld(self, name: str, data: bytes) -> None:
        """Write once, without patience."""
        self._ask("write", name, partial(self._pipe, self._path(name), data, None), 0.0)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _ask(
        self, verb: str, name: str, call: Callable[[], _T], patience: float | None = None
    ) -> _T:
        """Ask the store, again and again while it is busy.

        Raises FileNotFoundError, FileExistsError, or RunStopped with the place and what to do.
        """
        until = time.monotonic() + (self._patience if patience is None else patience)
        wait = FIRST_WAIT_SECONDS
        while True:
            try:
                return call()
            except Exception as error:
                trouble = trouble_of(error)
                if trouble is Trouble.MISSING:
                    raise FileNotFoundError(self.at(name)) from error
                if trouble is Trouble.EXISTS:
                    raise FileExistsError(self.at(name)) from error
                if trouble is not Trouble.BUSY or time.monotonic() + wait > until:
                    if patience is None:  # the run stops for it: its last words are tried once
                        self._patience = 0.0
                    raise self._stopped(verb, name, trouble, error) from None
                log.warning("cannot %s %s: %s; trying again", verb, self.at(name), said(error))
            time.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(2 * wait, MAX_WAIT_SECONDS)

    def _stopped(self, verb: str, name: str, trouble: Trouble, error: Exception) -> RunStopped:
        what = f"cannot {verb} {self.at(name) if name else self.place}"
        match trouble:
            case Trouble.CREDENTIALS:
                return RunStopped(
                    f"the credentials for {self._bucket} are missing, wrong or expired: {what} "
                    f"({said(error)})",
                    hint="renew them, and give the same command again: it goes on from what is "
                    "committed",
                )
            case Trouble.FORBIDDEN:
                return RunStopped(
                    f"{self._bucket} does not let us in: {what} ({said(error)})",
                    hint="the credentials must be allowed to list, read, write and delete under "
                    f"{self.place}/",
                )
            case Trouble.BUSY:
                return RunStopped(
                    f"{what}: the store does not answer, or not well ({said(error)})",
                    hint="when it does, give the same command again: it goes on from what is "
                    "committed",
                )
        return RunStopped(f"{what} ({said(error)})")


@dataclass(frozen=True, slots=True)
class Stat:
    """``modified`` is by the store's own clock."""

    tag: str
    modified: datetime


class _NoBucket(RunStopped):
    def __init__(self, bucket: str) -> None:
        super().__init__(
            f"there is no bucket {bucket}", hint="make it, or give another output with -o"
        )


class _Publisher:
    """Writes the newest value of each published name every few seconds, as long as it is open."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._waiting: dict[str, bytes] = {}
        self._writing = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, name: str, data: bytes) -> None:
        self._waiting[name] = data

    def forget(self, name: str) -> None:
        """What waits for this name is not written any more."""
        with self._writing:
            self._waiting.pop(name, None)

    def _run(self) -> None:
        while not self._closed.wait(PUBLISH_SECONDS):
            with self._writing:
                while self._waiting:
                    name, data = self._waiting.popitem()
                    with suppress(RunStopped, FileNotFoundError):  # it is only decoration
                        self._store.check_held()
                        self._store.put_unheld(name, data)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()


class BlocksFile(RangedFile):
    """A file read by ``fetch(start, stop)``, with a few blocks of it in memory."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int, block: int) -> None:
        super().__init__(size)
        self._fetch = fetch
        self._block = block
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def bytes_of(self, first: int, stop: int) -> bytes:
        pieces = []
        while first < stop:
            number, skip = divmod(first, self._block)
            pieces.append(self._get(number)[skip : skip + stop - first])
            first += len(pieces[-1])
        return b"".join(pieces)

    def _get(self, number: int) -> bytes:
        if number not in self._blocks:
            start = number * self._block
            self._blocks[number] = self._fetch(start, min(start + self._block, self.size))
            if len(self._blocks) > BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return self._blocks[number]


def _checked(uri: str) -> str:
    """The URL without a slash at its end."""
    scheme = scheme_of(uri)
    shown = without_secrets(uri)
    if scheme in READ_ONLY or "::" in uri or "://" not in uri:
        raise UsageError(
            f"an output cannot be written to {shown}",
            hint="give a folder, or a prefix on an object store, as in s3://bucket/run1",
        )
    path = uri.partition("://")[2]
    if not path.strip("/"):
        raise UsageError(
            f"{uri} names no bucket", hint="give bucket and prefix, as in s3://bucket/run1"
        )
    host = path.partition("/")[0]
    if any(c in uri for c in "?#") or ("@" in host and EXTRAS.get(scheme or "") != "azure"):
        raise UsageError(
            f"credentials and settings do not belong into -o ({shown})",
            hint="the store's own environment variables have their place for them",
        )
    return uri.rstrip("/")


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode()
