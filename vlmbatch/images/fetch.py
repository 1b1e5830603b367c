"""An image's encoded bytes: embedded, from a local file, or from a ``file:`` or ``data:`` URI."""

from __future__ import annotations

import base64
import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

from vlmbatch.errors import ErrorCode, RequestFailed, Stage, failed
from vlmbatch.records import ImageRef
from vlmbatch.storage import scheme_of, without_secrets

_NEVER_A_FILE = (errno.ENAMETOOLONG, errno.ELOOP)
_MEDIA_TYPE = re.compile(r"data:([a-z]+/[a-z0-9.+-]{1,60}(?=[;,]))?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Source:
    """Encoded bytes, found but not yet read. ``open`` gives a seekable file of ``size`` bytes."""

    name: str
    size: int
    open: Callable[[], BinaryIO]


def fetch(ref: ImageRef, *, base: str, max_bytes: int) -> bytes:
    """The encoded bytes of an image; blocks. Relative paths start at ``base``.

    Raises RequestFailed: missing, forbidden, unreadable, too large, or fetch_failed (retryable).
    """
    return read(locate(ref, base=base, max_bytes=max_bytes))


def locate(ref: ImageRef, *, base: str, max_bytes: int) -> Source:
    """Where the bytes are and how many, checked against ``max_bytes``; no file is opened yet."""
    if ref.data is not None:
        source = _memory(reference(ref) or "embedded image", ref.data)
    elif not ref.uri:
        raise _failed(ErrorCode.IMAGE_MISSING, "the row names no image")
    else:
        source = _byscheme_of(ref.uri, base=base, max_bytes=max_bytes)
    if source.size == 0:
        raise _failed(ErrorCode.IMAGE_UNREADABLE, f"empty (0 bytes): {source.name}")
    if source.size > max_bytes:
        raise _too_many_bytes(source.name, source.size, max_bytes)
    return source


def read(source: Source) -> bytes:
    """All bytes of the source; fetch_failed if their number changed since it was located."""
    with file_errors(source.name), source.open() as file:
        data = file.read(source.size + 1)
    if len(data) != source.size:
        message = f"changed while it was read: {source.name} (was {source.size:,} bytes)"
        raise _failed(ErrorCode.FETCH_FAILED, message, retryable=True)
    return data


def reference(ref: ImageRef) -> str | None:
    """What results call the image: no payload, and no user info or query behind a scheme.

    ``data:image/png`` for a data URI, a local path as it is, None for bytes without a URI.
    """
    if not ref.uri:
        return None
    if scheme_of(ref.uri) == "data":
        media_type = _MEDIA_TYPE.match(ref.uri)
        return media_type.group() if media_type else "data:"
    return without_secrets(ref.uri)


def _byscheme_of(uri: str, *, base: str, max_bytes: int) -> Source:
    """The dispatch: a further kind of store is a further case here."""
    if scheme_of(uri) is None and scheme_of(base) is not None and not os.path.isabs(uri):
        uri = f"{base.rstrip('/')}/{uri}"
    name = reference(ImageRef(uri=uri)) or uri
    match scheme_of(uri):
        case None:
            return _local(name, uri, base)
        case "file":
            return _local(name, _file_path(name, uri), base)
        case "data":
            return _data_uri(name, uri, max_bytes)
        case scheme:
            raise _failed(
                ErrorCode.IMAGE_FORBIDDEN,
                f"cannot read {scheme}: URIs: {name} (this version reads images from local paths,"
                " file: and data: URIs and embedded bytes only)",
            )


def _local(name: str, path: str, base: str) -> Source:
    if scheme_of(base) is not None:
        message = f"a manifest in {reference(ImageRef(uri=base))} may not name local files: {name}"
        raise _failed(ErrorCode.IMAGE_FORBIDDEN, message)
    path = os.path.join(base, path)
    with file_errors(name):
        found = os.stat(path)
    # Before any open: opening a pipe waits for its writer, opening a device may move a tape.
    if stat.S_ISDIR(found.st_mode):
        raise _failed(ErrorCode.IMAGE_UNREADABLE, f"a folder, not an image: {name}")
    if not stat.S_ISREG(found.st_mode):
        raise _failed(ErrorCode.IMAGE_UNREADABLE, f"a pipe, socket or device, not a file: {name}")
    return Source(name, found.st_size, lambda: open(path, "rb"))


def _file_path(name: str, uri: str) -> str:
    """RFC 8089: ``file:/path``, ``file:///path`` or ``file://localhost/path``, percent-decoded."""
    path = uri[len("file:") :].partition("?")[0]
    if path.startswith("//"):
        host, slash, path = path[2:].partition("/")
        path = slash + path
        if host.lower() not in ("", "localhost"):
            message = f"names a file on another host: {name}"
            raise _failed(ErrorCode.IMAGE_FORBIDDEN, message)
    with file_errors(name):
        return os.fsdecode(unquote_to_bytes(path))


def _data_uri(name: str, uri: str, max_bytes: int) -> Source:
    head, comma, payload = uri.partition(",")
    if not comma:
        raise _failed(ErrorCode.IMAGE_UNREADABLE, "a data: URI without a comma")
    is_base64 = head.lower().replace(" ", "").endswith(";base64")
    if len(payload) > 4 * max_bytes:  # a byte takes at most 3 characters (percent-encoded)
        raise _too_many_bytes(name, len(payload) // 3, max_bytes)
    try:
        data = unquote_to_bytes(payload)
        if is_base64:
            data = b"".join(data.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
            data = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except ValueError as error:  # also binascii.Error and UnicodeEncodeError
        message = f"not valid {'base64' if is_base64 else 'text'}: {name} ({error})"
        raise _failed(ErrorCode.IMAGE_UNREADABLE, message) from error
    return _memory(name, data)


def _memory(name: str, data: bytes) -> Source:
    return Source(name, len(data), lambda: BytesIO(data))


@contextmanager
def file_errors(name: str) -> Iterator[None]:
    """Turns what the file system raises about ``name`` into a RequestFailed."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _failed(ErrorCode.IMAGE_MISSING, f"no such file: {name}") from error
    except PermissionError as error:
        raise _failed(ErrorCode.IMAGE_FORBIDDEN, f"permission denied: {name}") from error
    except OSError as error:
        if error.errno in _NEVER_A_FILE:
            raise _failed(ErrorCode.IMAGE_MISSING, f"{error.strerror}: {name[:80]}") from error
        message = f"cannot read {name}: {error.strerror or error}"
        raise _failed(ErrorCode.FETCH_FAILED, message, retryable=True) from error
    except ValueError as error:  # a NUL or a lone surrogate in the path
        message = f"not a path: {name[:80]!r} ({error})"
        raise _failed(ErrorCode.IMAGE_MISSING, message) from error


def _too_many_bytes(name: str, size: int, max_bytes: int) -> RequestFailed:
    message = f"{size:,} bytes, more than the {max_bytes:,} allowed: {name}"
    return _failed(ErrorCode.IMAGE_TOO_LARGE, message)


def _failed(code: ErrorCode, message: str, *, retryable: bool = False) -> RequestFailed:
    return failed(code, Stage.LOAD, message, retryable=retryable)
