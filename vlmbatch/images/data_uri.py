"""Images inside a ``data:`` URI. Their text may be a gigabyte: no copy before its size is known."""

from __future__ import annotations

import base64
import re
from urllib.parse import unquote_to_bytes

from vlmbatch.images.failures import too_many_bytes, unreadable

_HEAD = re.compile(r"data:([^,]{0,1000}),", re.IGNORECASE)
_PLAIN = re.compile(r"[A-Za-z0-9+/]*={0,2}")


def data_size(uri: str) -> int:
    """At most so many bytes it holds; 0 where it is none."""
    head = _HEAD.match(uri)
    if head is None:
        return 0
    length = len(uri) - head.end()
    if _is_base64(head[1]):
        return length // 4 * 3 + 3
    return length if uri.isascii() else 4 * length  # as UTF-8


def data_of(name: str, uri: str, max_bytes: int) -> bytes:
    """The bytes in it; RequestFailed where they are too many or not what the head says."""
    head = _HEAD.match(uri)
    if head is None:
        raise unreadable("a data: URI without a comma")
    is_base64, length = _is_base64(head[1]), len(uri) - head.end()
    # Percent-encoding makes 3 characters of one; in base64 only a few want it, and line breaks.
    if length > (max_bytes * 3 // 2 + 100 if is_base64 else 3 * max_bytes):
        raise too_many_bytes(name, length * 3 // 4 if is_base64 else length // 3, max_bytes)
    payload = uri[head.end() :]
    try:
        data = _base64(payload) if is_base64 else unquote_to_bytes(payload)
    except ValueError as error:  # also binascii.Error and UnicodeEncodeError
        kind = "base64" if is_base64 else "text"
        raise unreadable(f"not valid {kind}: {name} ({error})") from error
    if len(data) > max_bytes:
        raise too_many_bytes(name, len(data), max_bytes)
    if not data:
        raise unreadable(f"empty (0 bytes): {name}")
    return data


def _is_base64(head: str) -> bool:
    return head.lower().replace(" ", "").endswith(";base64")


def _base64(payload: str) -> bytes:
    if _PLAIN.fullmatch(payload) and len(payload) % 4 == 0:
        return base64.b64decode(payload)
    data = b"".join(unquote_to_bytes(payload).split())
    data = data.translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
