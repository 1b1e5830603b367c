"""Images that are members of archives, on the local disk and in a store."""

import asyncio
import io
import struct
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness import picture
from tests.s3_faults import Fault, FaultProxy, Request, Together
from vlmbatch.errors import ErrorCode, RequestFailed
from vlmbatch.images.failures import Larger
from vlmbatch.images.fetch import Fetcher, Reach
from vlmbatch.images.load import ImageLoader, ImageMemory, Limits
from vlmbatch.records import ImageRef

MAX = 100_000
PICTURE = picture(60, 40)


def zip_of(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def tar_of(members: dict[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return file.getvalue()


def outcome(uri: str, base: Path | str, *, reserved: int = MAX, roots=()):
    """The bytes, or (code, message)."""

    async def scene():
        with ThreadPoolExecutor(2) as executor:
            reach = Reach(max_bytes=MAX, roots=tuple(map(str, roots)))
            fetcher = Fetcher(base=str(base), reach=reach, executor=executor)
            try:
                return await fetcher.fetch(ImageRef(uri), reserved)
            except RequestFailed as error:
                return error.failure.code, error.failure.message

    return asyncio.run(scene())


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_member_of_a_zip(tmp_path: Path, method: int):
    members = {"a.png": PICTURE, "below/中文 b.png": PICTURE * 2, "empty.png": b""}
    (tmp_path / "p.zip").write_bytes(zip_of(members, method))
    assert outcome("zip://a.png::p.zip", tmp_path) == PICTURE
    assert outcome("zip:///a.png::p.zip", tmp_path) == PICTURE
    assert outcome(f"zip://below/中文 b.png::{tmp_path}/p.zip", "/nowhere") == PICTURE * 2
    assert outcome(f"ZIP://a.png::file://{tmp_path}/p.zip", "/nowhere") == PICTURE
    code, message = outcome("zip://gone.png::p.zip", tmp_path)
    assert code is ErrorCode.IMAGE_MISSING
    assert message == "no such member: zip://gone.png::p.zip (the archive has 3)"
    assert outcome("zip://empty.png::p.zip", tmp_path)[0] is ErrorCode.IMAGE_UNREADABLE
    assert outcome("zip://a.png::gone.zip", tmp_path)[0] is ErrorCode.IMAGE_MISSING


def test_a_member_of_a_tar(tmp_path: Path):
    members = {f"{number}.png": PICTURE + bytes([number]) for number in range(50)}
    members["n" * 150 + ".png"] = b"a long name"
    (tmp_path / "p.tar").write_bytes(tar_of(members))
    assert outcome("tar://17.png::p.tar", tmp_path) == PICTURE + bytes([17])
    assert outcome("tar://./17.png::p.tar", tmp_path) == PICTURE + bytes([17])  # as `tar t` lists
    assert outcome(f"tar://{'n' * 150}.png::p.tar", tmp_path) == b"a long name"
    code, message = outcome("tar://link.png::p.tar", tmp_path)
    assert code is ErrorCode.IMAGE_UNREADABLE
    assert message.startswith("not a plain file")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("zip", b""),
        ("zip", b"PK\5\6" + bytes(10)),
        ("zip", zip_of({"a.png": PICTURE})[:-30]),
        ("tar", b""),
        ("tar", b"x" * 2000),
        ("tar", tar_of({"a.png": PICTURE}, "w:gz")),
        ("zip", tar_of({"a.png": PICTURE})),
    ],
)
def test_what_is_no_archive_is_unreadable(tmp_path: Path, name: str, data: bytes):
    (tmp_path / "p").write_bytes(data)
    code, message = outcome(f"{name}://a.png::p", tmp_path)
    assert code in (ErrorCode.IMAGE_UNREADABLE, ErrorCode.IMAGE_MISSING)
    assert "\n" not in message


def with_sizes(archive: bytes, size: int) -> bytes:
    """The only member's size in the directory replaced by a lie."""
    at = archive.index(b"PK\1\2") + 24
    return archive[:at] + struct.pack("<I", size) + archive[at + 4 :]


def test_a_zip_bomb_unpacks_no_more_than_its_directory_says(tmp_path: Path):
    bomb = zip_of({"a.png": b"\0" * 50_000_000})
    assert len(bomb) < MAX
    (tmp_path / "honest.zip").write_bytes(bomb)
    (tmp_path / "liar.zip").write_bytes(with_sizes(bomb, 1000))
    code, message = outcome("zip://a.png::honest.zip", tmp_path)
    assert code is ErrorCode.IMAGE_TOO_LARGE
    assert message.startswith("50,000,000 bytes, more than the 100,000 allowed")
    code, message = outcome("zip://a.png::liar.zip", tmp_path)
    assert code is ErrorCode.IMAGE_UNREADABLE
    assert "not as long as the archive's directory says" in message
    with pytest.raises(Larger):
        outcome("zip://a.png::liar.zip", tmp_path, reserved=10)


def test_an_archive_obeys_the_rules_of_local_files(tmp_path: Path):
    (tmp_path / "p.zip").write_bytes(zip_of({"a.png": PICTURE}))
    forbidden = [
        outcome(f"zip://a.png::{tmp_path}/p.zip", "s3://bucket/lists"),
        outcome(f"zip://a.png::file://{tmp_path}/p.zip", "s3://bucket/lists"),
        outcome("zip://a.png::p.zip", tmp_path, roots=[tmp_path / "inside"]),
        outcome("zip://a.png::http://127.0.0.1/p.zip", tmp_path),
        outcome(f"zip://a.png::zip://p.zip::{tmp_path}/p.zip", tmp_path),
        outcome(f"zip://a.png::local://{tmp_path}/p.zip", tmp_path),
        outcome("zip://a.png", tmp_path),
    ]
    assert [code for code, _ in forbidden] == [ErrorCode.IMAGE_FORBIDDEN] * len(forbidden)
    assert outcome("zip://a.png::p.zip", tmp_path, roots=[tmp_path]) == PICTURE


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_in_a_store_the_directory_is_read_once_and_members_are_in_flight_together(
    rclone_server, kind: str
):
    pytest.importorskip("s3fs")
    members = {f"{number}.png": picture(30, 20 + number) for number in range(20)}
    bucket = rclone_server.new_bucket()
    data = zip_of(members) if kind == "zip" else tar_of(members)
    rclone_server.fs().pipe_file(f"{bucket}/p.{kind}", data)

    async def scene() -> None:
        memory = ImageMemory(2**30)
        with ThreadPoolExecutor(2) as executor:
            loader = ImageLoader(
                base=f"s3://{bucket}",
                memory=memory,
                executor=executor,
                limits=Limits(Reach(max_bytes=MAX), backoff=0),
                target=None,
            )
            refs = [ImageRef(f"{kind}://{name}::p.{kind}") for name in members]
            rows = [loader.load([ref]) for ref in refs]
            loaded = await asyncio.gather(*rows)
        assert [each.images[0].size.height for each in loaded] == list(range(20, 40))

    def after_the_directory(request: Request) -> Fault | None:
        return Together(11) if request.number > 4 else None

    with FaultProxy(rclone_server, after_the_directory) as proxy:
        with proxy.in_environment():
            asyncio.run(scene())
        assert proxy.operations["HEAD"] == 1
        # One for each member, and few for the directory.
        assert 20 < proxy.operations["GET"] < 25
        assert proxy.most_in_flight > 10
