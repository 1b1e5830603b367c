"""The files of a manifest, on the local disk or in a store, read by ranges."""

from __future__ import annotations

import lzma
import os
import random
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import pyarrow as pa

from vlmbatch.errors import ManifestError, ManifestUnreachable, VlmbatchError
from vlmbatch.storage import RangedFile, Trouble, filesystem_of, joined, said, scheme_of, trouble_of

T = TypeVar("T")

REMOTE_BUFFER = 8 * 2**20
REMOTE_THREADS = 8
LOCAL_BUFFER = 2**17
ATTEMPTS = 4
BACKOFF_SECONDS = 0.5

_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "Zstandard", b"BZh": "bzip2"}
_PACKED |= {b"\xfd7zXZ\0": "xz", b"PK\3\4": "zip"}
_UNREADABLE = (
    pa.ArrowException,
    OSError,
    EOFError,
    ValueError,
    MemoryError,
    OverflowError,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
)


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file of the manifest. ``name`` is relative to the manifest's folder.

    ``identity`` is an xxh3-128 hex of what ``format`` says of the content: a Parquet footer, the
    bytes of a text, a tar's members, an image folder's paths and sizes; never the modification
    time, which a copy changes. ``starts``: rows of the file at which it is cheap to begin,
    ascending, from 0; ``offsets``: their places in it, for formats that seek to them.
    """

    name: str
    size: int
    identity: str
    rows: int
    format: str
    starts: tuple[int, ...] = (0,)
    offsets: tuple[int, ...] = ()
    listing: str = ""
    """Of images: their paths, packed. Of a Delta table: its Parquet files."""
    version: int | None = None
    """Of tables that have versions: the one that is read."""

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        return {key: item for key, item in value.items() if item not in ("", (), None)}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> ManifestFile:
        lists = {key: tuple(stored.get(key, ())) for key in ("starts", "offsets")}
        return cls(**{**stored, **lists})


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file is: ``folder`` is a local path or the URI of a place in a store."""

    folder: str
    name: str
    version: int | None = None
    """Of tables that have versions: None is the newest."""

    @property
    def is_local(self) -> bool:
        return scheme_of(self.folder) is None

    @property
    def path(self) -> str:
        """Local path or URI."""
        if self.is_local:
            return os.path.normpath(os.path.join(self.folder, self.name))
        if self.name.startswith("../"):
            return joined(self.folder, self.name)
        return f"{self.folder.rstrip('/')}/{self.name}"

    @property
    def size(self) -> int:
        """In bytes. Raises ManifestError for what is no file."""
        if self.is_local:
            with reading(self.path):
                if os.path.exists(self.path) and not os.path.isfile(self.path):
                    raise ManifestError(  # to open a pipe waits for its writer
                        f"cannot read {self.path}: it is a pipe, socket or device",
                        hint="a manifest is read more than once: give a file",
                    )
                return os.stat(self.path).st_size
        fs, path = filesystem_of(self.path)
        with reading(self.path):
            size = tried(lambda: fs.info(path)).get("size")
        if size is None:
            raise ManifestError(
                f"cannot read {self.path}: its server does not tell how many bytes it has",
                hint="a manifest is read by ranges: download it first",
            )
        return int(size)

    def open(self, size: int | None = None) -> Any:
        """A seekable binary file, unbuffered where it is in a store; ``size`` as it is known."""
        if self.is_local:
            with reading(self.path):
                return open(self.path, "rb", buffering=LOCAL_BUFFER)
        fs, path = filesystem_of(self.path)
        return Ranges(fs, path, self.size if size is None else size, name=self.path)


class Ranges(RangedFile):
    """A file in a store: each read is one request for its range, kept by nobody but ``keep``."""

    def __init__(self, fs: Any, path: str, size: int, *, name: str) -> None:
        super().__init__(size)
        self._fs = fs
        self._path = path
        self._name = name
        self._file: Any = None
        self._kept = (size, b"")

    def keep(self, first: int, data: bytes) -> None:
        """These bytes from ``first`` on are known: reads within them ask nobody."""
        self._kept = (first, data)

    def bytes_of(self, first: int, stop: int) -> bytes:
        kept_from, kept = self._kept
        if kept_from <= first and stop <= kept_from + len(kept):
            return kept[first - kept_from : stop - kept_from]
        return self._fetched(first, stop)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()

    def _range(self, first: int, stop: int) -> Any:
        if self._fs.async_impl:
            return self._fs.cat_file(self._path, start=first, end=stop)
        if self._file is None:  # the others open a file for each range, and read ahead in it
            self._file = self._fs.open(self._path, "rb", cache_type="none")
        self._file.seek(first)
        return self._file.read(stop - first)

    def _fetched(self, first: int, stop: int) -> bytes:
        with reading(self._name):
            data = tried(lambda: self._range(first, stop))
        if len(data) != stop - first:
            raise ManifestError(
                f"cannot read {self._name}: asked for {stop - first:,} bytes from {first:,} on, "
                f"its server sent {len(data):,}",
                hint="a manifest is read by ranges, and must not change: download it first",
            )
        return bytes(data)


def in_order(calls: Sequence[Callable[[], T]], *, one_by_one: bool) -> Iterator[T]:
    """What these calls return: one at a time on the disk, a few at once in a store."""
    if one_by_one or len(calls) == 1:
        for call in calls:
            yield call()
        return
    pool = ThreadPoolExecutor(REMOTE_THREADS, thread_name_prefix="footers")
    try:
        yield from pool.map(lambda call: call(), calls)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def tried(ask: Any) -> Any:
    """What the store says, asked again a few times while it is busy."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return ask()
        except Exception as error:
            if attempt == ATTEMPTS or trouble_of(error) is not Trouble.BUSY:
                raise
        time.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))


@contextmanager
def reading(path: str, hint: str = "check that the file is whole") -> Iterator[None]:
    """Turns what a file system, a store or a library raises about ``path`` into an error of ours.

    ManifestError where the file is missing or broken, ManifestUnreachable where the store does not
    let us in, or is busy."""
    try:
        yield
    except VlmbatchError:
        raise
    except Exception as error:
        if scheme_of(path) is not None:
            raise _of_store(path, error, hint) from None
        if isinstance(error, _UNREADABLE):
            raise _broken(path, error, hint) from None
        raise


def _of_store(path: str, error: Exception, hint: str) -> VlmbatchError:
    match trouble_of(error):
        case Trouble.MISSING:
            return ManifestError(f"no manifest {path}: nothing is there")
        case Trouble.CREDENTIALS:
            return ManifestUnreachable(
                f"cannot read {path}: the credentials are missing, wrong or expired "
                f"({said(error)})",
                hint="set the store's own variables in the environment, on every node",
            )
        case Trouble.FORBIDDEN:
            return ManifestUnreachable(
                f"cannot read {path}: access is denied ({said(error)})",
                hint="these credentials are wrong, or need the right to list and to read it",
            )
        case Trouble.BUSY:
            return ManifestUnreachable(
                f"cannot read {path}: the store does not answer, or is overloaded ({said(error)})",
                hint="run the same command again later",
            )
    return _broken(path, error, hint)


def _broken(path: str, error: Exception, hint: str) -> ManifestError:
    if isinstance(error, FileNotFoundError):
        hint = "bring it back, or what it is a link to"
    reason = "".join(letter if letter.isprintable() else "?" for letter in said(error))
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    return ManifestError(f"cannot read {path}: {reason}", hint=hint)


def refuse_packed(path: str, head: bytes) -> None:
    """Raises ManifestError for a file that begins as compressed files and zip archives do."""
    kind = next((kind for start, kind in _PACKED.items() if head.startswith(start)), None)
    if kind == "zip" and path.lower().endswith(".zip"):
        raise ManifestError(
            f"cannot read {path}: it is a zip archive",
            hint=f"unpack it and give the folder, or a table whose images are zip://MEMBER::{path}",
        )
    if kind is not None and kind != "zip":  # which spreadsheets and many others are
        raise ManifestError(
            f"cannot read {path}: it is compressed ({kind})",
            hint="decompress it first; only text may be compressed, as .jsonl.gz, .csv.gz or .zst",
        )


def changed(path: str) -> ManifestError:
    return ManifestError(
        f"{path} changed since this run was planned",
        hint="run the same command again to see what changed",
    )
