"""Images that are members of archives: ``zip://member::archive`` and ``tar://member::archive``.

An archive's directory is read once per worker and kept; a member is then one read of its bytes,
so that many can be in flight. Nothing is unpacked beyond the limit on an image's bytes.
"""

from __future__ import annotations

import asyncio
import io
import re
import struct
import tarfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Awaitable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from vlmbatch.errors import RequestFailed
from vlmbatch.images.failures import Larger, check_size, forbidden, missing, unreadable
from vlmbatch.storage import RangedFile, without_secrets

_MEMBER = re.compile(r"(zip|tar)://(.+?)::(.+)", re.IGNORECASE | re.DOTALL)
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip's member: signature, lengths of name and extra
_SPARE = 512  # bytes read beyond a member for its local header's extra fields
KEPT = 32
"""Directories of archives."""
DIRECTORY_READS = 1 << 20
"""Bytes read at once while a directory is read, or more where it asks for more."""
MAX_DIRECTORY = 256 << 20


class Bytes(Protocol):
    """Where archives lie: a store, or the local disk."""

    async def size(self, uri: str) -> int: ...
    async def version(self, uri: str) -> str | None: ...
    async def read(self, uri: str, start: int, stop: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Member:
    """Where a member's bytes are. ``start``: of its local header in a zip, of its data in a tar."""

    start: int
    stored: int
    """Bytes in the archive."""
    size: int
    """Bytes of the image, as the archive says."""
    method: int | None
    """How a zip compressed it; None in a tar."""
    problem: str | None = None
    crc: int | None = None
    """CRC-32 of the image, as a zip says; a tar says none."""


class ArchiveImages:
    """``get`` for one event loop; members are unpacked in a thread of ``executor``."""

    def __init__(self, *, max_bytes: int, executor: Executor) -> None:
        self._max_bytes = max_bytes
        self._executor = executor
        self._directories: OrderedDict[str, asyncio.Future[dict[str, Member]]] = OrderedDict()

    async def get(self, uri: str, reserved: int, *, places: Bytes) -> bytes:
        """All bytes of a member. Raises Larger where they are more than were reserved, else
        RequestFailed."""
        name = without_secrets(uri)
        archive, inside, member = await self._member(uri, name, places)
        # In memory together: what is stored and what it unpacks to.
        needed = member.size if member.method is None else member.size + member.stored
        larger = max(member.size, member.stored)
        check_size(name, larger, reserved=larger, max_bytes=self._max_bytes)
        if needed > reserved:
            raise Larger(needed)
        data = await self._bytes_of(member, inside, archive, places)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, _unpacked, member, data, name)

    async def version(self, uri: str, *, places: Bytes) -> str | None:
        """Of a zip the member's CRC-32 and size; of a tar, which has no CRC, the whole archive's
        version too. RequestFailed as ``get``."""
        archive, _, member = await self._member(uri, without_secrets(uri), places)
        if member.crc is not None:
            return f"{member.crc:08x} {member.size} bytes"
        whole = await places.version(archive)
        return None if whole is None else f"{whole} {member.start} {member.size} bytes"

    async def _member(self, uri: str, name: str, places: Bytes) -> tuple[str, str, Member]:
        """(the archive, the member's name in it, where that is)."""
        matched = _MEMBER.fullmatch(uri)
        if matched is None or "::" in matched[3]:
            raise forbidden(f"not zip://member::archive or tar://member::archive: {name}")
        kind, inside, archive = matched[1].lower(), matched[2].lstrip("/"), matched[3]
        members = await self._directory(kind, archive, places)
        member = members.get(inside) or members.get(inside.removeprefix("./"))  # as tar lists it
        if member is None:
            raise missing(f"no such member: {name} (the archive has {len(members):,})")
        if member.problem is not None:
            raise unreadable(f"{member.problem}: {name}")
        return archive, inside, member

    async def _bytes_of(self, member: Member, inside: str, archive: str, places: Bytes) -> bytes:
        """What is stored of it, read at once."""
        if member.method is None:
            return await places.read(archive, member.start, member.start + member.stored)
        ahead = _LOCAL_HEADER.size + len(inside.encode()) + _SPARE
        data = await places.read(archive, member.start, member.start + ahead + member.stored)
        try:
            signature, name_length, extra_length = _LOCAL_HEADER.unpack_from(data)
        except struct.error:
            signature = b""
        if signature != b"PK\3\4":
            raise unreadable(f"broken zip: no member {inside} at byte {member.start:,}")
        start = _LOCAL_HEADER.size + name_length + extra_length
        if start > ahead:  # rare: its local header is longer than its entry in the directory
            first = member.start + start
            return await places.read(archive, first, first + member.stored)
        return data[start : start + member.stored]

    async def _directory(self, kind: str, archive: str, places: Bytes) -> dict[str, Member]:
        """Read by the first who asks; all others wait for it."""
        key = f"{kind}:{archive}"
        found = self._directories.get(key)
        if found is None or (found.done() and (found.cancelled() or found.exception())):
            found = asyncio.ensure_future(self._read_directory(kind, archive, places))
            self._directories[key] = found
            while len(self._directories) > KEPT:
                self._directories.popitem(last=False)
        self._directories.move_to_end(key)
        return await asyncio.shield(found)

    async def _read_directory(self, kind: str, archive: str, places: Bytes) -> dict[str, Member]:
        name = without_secrets(archive)
        loop = asyncio.get_running_loop()
        raw = _Remote(archive, await places.size(archive), places, loop)
        read = partial(_zip_members if kind == "zip" else _tar_members, raw)
        try:
            return await asyncio.to_thread(read)  # not in the executor, which may read for it
        except RequestFailed:
            raise
        except (zipfile.BadZipFile, tarfile.TarError, OSError, ValueError, EOFError) as error:
            words = " ".join(str(error).split())[:200]
            raise unreadable(f"not a {kind} archive that can be read: {name} ({words})") from error


class _Remote(RangedFile):
    """A file for a thread, whose bytes come through the event loop."""

    def __init__(self, uri: str, size: int, places: Bytes, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(size)
        self._uri, self._places, self._loop = uri, places, loop

    def bytes_of(self, first: int, stop: int) -> bytes:
        if stop - first > MAX_DIRECTORY:
            raise ValueError(f"its directory has more than {MAX_DIRECTORY:,} bytes")
        read: Awaitable[bytes] = self._places.read(self._uri, first, stop)
        return asyncio.run_coroutine_threadsafe(_awaited(read), self._loop).result()


async def _awaited(read: Awaitable[bytes]) -> bytes:
    return await read


def _zip_members(raw: _Remote) -> dict[str, Member]:
    with zipfile.ZipFile(io.BufferedReader(raw, DIRECTORY_READS)) as archive:
        return {info.filename: _zip_member(info) for info in archive.infolist()}


def _zip_member(info: zipfile.ZipInfo) -> Member:
    problem = None
    if info.flag_bits & 1:
        problem = "encrypted"
    elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        problem = f"compressed by method {info.compress_type}, not stored or deflated"
    elif info.is_dir():
        problem = "a folder, not an image"
    return Member(
        info.header_offset,
        info.compress_size,
        info.file_size,
        info.compress_type,
        problem,
        info.CRC,
    )


def _tar_members(raw: _Remote) -> dict[str, Member]:
    """A compressed tar is refused: each member would cost all that stand before it."""
    members: dict[str, Member] = {}
    with tarfile.open(fileobj=io.BufferedReader(raw, DIRECTORY_READS), mode="r:") as archive:
        while (info := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # else it keeps what we keep already
            problem = None if info.isreg() and not info.issparse() else "not a plain file"
            name = info.name.removeprefix("./")
            members[name] = Member(info.offset_data, info.size, info.size, None, problem)
    return members


def _unpacked(member: Member, data: bytes, name: str) -> bytes:
    if len(data) < member.stored:
        raise unreadable(f"the archive ends before its member does: {name}")
    if member.method == zipfile.ZIP_DEFLATED:
        unpacking = zlib.decompressobj(-zlib.MAX_WBITS)
        try:  # one byte more than the directory says shows a bomb, and no more is unpacked
            data = unpacking.decompress(data, member.size + 1)
        except zlib.error as error:
            raise unreadable(f"broken zip: {name} ({error})") from error
    if len(data) != member.size:
        raise unreadable(f"not as long as the archive's directory says: {name}")
    if not data:
        raise unreadable(f"empty (0 bytes): {name}")
    return data
