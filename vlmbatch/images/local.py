"""Images on local disks, and which of them a manifest may name."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

from vlmbatch.images.failures import check_size, fetch_failed, forbidden, missing, unreadable
from vlmbatch.storage import is_local, without_secrets

_NEVER_A_FILE = (errno.ENAMETOOLONG, errno.ELOOP)


class LocalFiles:
    """Opens files for the rows of one manifest. All methods block.

    ``base`` is the manifest's folder, where relative paths start. A local manifest may name any
    file, one that came from elsewhere none; ``roots`` say instead below which folders a file must
    be, after symbolic links and ``..`` are resolved.
    """

    def __init__(self, base: str, roots: Sequence[str], max_bytes: int) -> None:
        self._base = base
        self._roots = tuple(os.path.realpath(root) for root in roots)
        self._max_bytes = max_bytes

    def read(self, name: str, path: str, reserved: int) -> bytes:
        """All bytes of a file. Raises Larger where they are more than were reserved, else
        RequestFailed."""
        with self.opened(name, path) as file:
            size = os.fstat(file.fileno()).st_size
            check_size(name, size, reserved=reserved, max_bytes=self._max_bytes)
            data = file.read(size + 1)
        if len(data) != size:
            raise fetch_failed(f"changed while it was read: {name} (was {size:,} bytes)")
        if not size:
            raise unreadable(f"empty (0 bytes): {name}")
        return data

    def size(self, name: str, path: str) -> int:
        with self.opened(name, path) as file:
            return os.fstat(file.fileno()).st_size

    def read_range(self, name: str, path: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file, fewer where it ends before."""
        with self.opened(name, path) as file:
            return os.pread(file.fileno(), stop - start, start)

    @contextmanager
    def opened(self, name: str, path: str) -> Iterator[BinaryIO]:
        """The file, unbuffered, if it is one that may be read; errors about it in our words."""
        if path.lower().startswith("file:"):
            path = _file_path(name, path)
        if not self._roots and not is_local(self._base):
            message = (
                f"a manifest in {without_secrets(self._base)} may not name local files: {name}"
            )
            raise forbidden(f"{message} (--allow-root says which ones)")
        with file_errors(name):
            path = os.path.join(self._base, path)
            if self._roots:
                path = os.path.realpath(path)
                if not any(_is_below(path, root) for root in self._roots):
                    raise forbidden(f"not below an --allow-root: {name}")
            found = os.stat(path)
            # Before any open: that of a pipe waits for its writer, that of a device may do things.
            if stat.S_ISDIR(found.st_mode):
                raise unreadable(f"a folder, not an image: {name}")
            if not stat.S_ISREG(found.st_mode):
                raise unreadable(f"a pipe, socket or device, not a file: {name}")
            with open(path, "rb", buffering=0) as file:
                yield file


def local_path(uri: str) -> str:
    """The path of a local file, absolute; of a ``file:`` URI too. Raises RequestFailed."""
    return os.path.abspath(_file_path(uri, uri) if uri.lower().startswith("file:") else uri)


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(os.path.join(root, ""))


def _file_path(name: str, uri: str) -> str:
    """RFC 8089: ``file:/path``, ``file:///path`` or ``file://localhost/path``, percent-decoded."""
    path = uri[len("file:") :].partition("?")[0]
    if path.startswith("//"):
        host, slash, path = path[2:].partition("/")
        path = slash + path
        if host.lower() not in ("", "localhost"):
            raise forbidden(f"names a file on another host: {name}")
    with file_errors(name):
        return os.fsdecode(unquote_to_bytes(path))


@contextmanager
def file_errors(name: str) -> Iterator[None]:
    """Turns what the file system raises about ``name`` into a RequestFailed."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise missing(f"no such file: {name}") from error
    except PermissionError as error:
        raise forbidden(f"permission denied: {name}") from error
    except OSError as error:
        if error.errno in _NEVER_A_FILE:
            raise missing(f"{error.strerror}: {name[:80]}") from error
        raise fetch_failed(f"cannot read {name}: {error.strerror or error}") from error
    except ValueError as error:  # a NUL or a lone surrogate in the path
        raise missing(f"not a path: {name[:80]!r} ({error})") from error
