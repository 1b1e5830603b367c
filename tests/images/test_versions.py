"""What places say of images tells whether these were replaced, without reading them."""

import asyncio
import io
import os
import tarfile
import zipfile

import pytest
from aiohttp import web

from tests.s3_faults import EXPIRED, FaultProxy, from_request
from tests.web import web_server
from vlmbatch.errors import CredentialsRefused
from vlmbatch.images.fetch import Reach
from vlmbatch.images.versions import Versions

INSIDE = Reach(allow_private=True)


def versions(*uris: str, base: str = "/nowhere", reach: Reach = INSIDE) -> list[str | None]:
    with Versions(base=base, reach=reach) as found:
        return found.of([[uri] for uri in uris])


def test_a_local_file_has_another_version_when_its_size_changed(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"x" * 10)
    rows = ["a.png", str(tmp_path / "b.png"), (tmp_path / "a.png").as_uri(), "gone.png", "."]
    before = versions(*rows, base=str(tmp_path))
    assert before == ["10 bytes"] * 3 + [None, None]
    os.utime(tmp_path / "a.png", (1, 1_000_000))  # as a copy may
    assert versions(*rows, base=str(tmp_path)) == before
    (tmp_path / "b.png").write_bytes(b"x" * 11)
    assert versions(*rows, base=str(tmp_path))[:3] == ["10 bytes", "11 bytes", "10 bytes"]


def test_files_that_may_not_be_read_have_none(tmp_path):
    (tmp_path / "allowed").mkdir()
    for name in ("secret.png", "allowed/a.png"):
        (tmp_path / name).write_bytes(b"x")
    rows = ["allowed/a.png", "allowed/../secret.png"]
    reach = Reach(roots=(str(tmp_path / "allowed"),))
    assert versions(*rows, base=str(tmp_path), reach=reach) == ["1 bytes", None]
    assert versions(str(tmp_path / "secret.png"), base="s3://bucket/folder") == [None]
    assert versions("ftp://x.org/a.png", "nothing://x") == [None, None]


def test_a_row_has_the_versions_of_all_its_images(tmp_path):
    for name, size in (("a.png", 1), ("b.png", 2)):
        (tmp_path / name).write_bytes(b"x" * size)
    rows = [["a.png", "b.png"], ["b.png", "a.png"], None, [], ["a.png", "gone.png"], ["b.png"]]
    with Versions(base=str(tmp_path), reach=Reach()) as found:
        first, second, *rest = found.of(rows)
        assert found.of([["a.png", "b.png"]]) == [first]
        assert found.of([]) == []
    assert first != second
    assert rest == [None, None, None, "2 bytes"]


def test_a_data_uri_is_its_content():
    one, two, again = versions(*[f"data:image/png;base64,{x}AAA" for x in "ABA"])
    assert one == again != two
    assert "AAAA" not in str(one)


def test_web_servers_are_asked_for_an_etag_then_for_the_size():
    async def seen(request: web.Request) -> web.Response:
        return web.Response(body=b"x" * 7, headers={"ETag": f'"{tag}"'})

    async def moved(request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": "/seen"})

    async def refused(request: web.Request) -> web.Response:
        return web.Response(status=403)

    async def check() -> None:
        nonlocal tag
        answers = {"/seen": seen, "/plain": b"12345", "/moved": moved, "/refused": refused}
        async with web_server(answers) as server:
            uris = [server.url(path) for path in ("/seen", "/moved", "/plain", "/refused", "/gone")]
            before = await asyncio.to_thread(versions, *uris)
            assert before == ['"one"', '"one"', "5 bytes", None, None]
            assert {request.method for request in server.requests} == {"HEAD"}
            tag = "two"
            assert (await asyncio.to_thread(versions, *uris))[:2] == ['"two"'] * 2
            asked = len(server.requests)
            assert await asyncio.to_thread(versions, *uris, reach=Reach()) == [None] * 5
            assert len(server.requests) == asked  # hosts inside are not asked at all

    tag = "one"
    asyncio.run(check())


def test_a_server_that_does_not_answer_is_not_waited_for():
    async def check() -> None:
        until = asyncio.Event()

        async def silent(request: web.Request) -> web.Response:
            await until.wait()
            return web.Response()

        async with web_server({"/silent": silent, "/plain": b"1"}) as server:
            uris = server.url("/silent"), server.url("/plain")
            reach = Reach(allow_private=True, seconds=1.0)
            assert await asyncio.to_thread(versions, *uris, reach=reach) == [None, "1 bytes"]
            until.set()

    asyncio.run(check())


def test_an_object_that_was_replaced_by_one_of_its_size_has_another_version(rclone_server):
    fs, bucket = rclone_server.fs(), rclone_server.new_bucket()
    fs.pipe_file(f"{bucket}/photos/a.png", b"one")
    fs.pipe_file(f"{bucket}/photos/b.png", b"same")
    rows = [f"s3://{bucket}/photos/a.png", "b.png", f"s3://{bucket}/gone.png"]
    with rclone_server.in_environment():
        before = versions(*rows, base=f"s3://{bucket}/photos")
        fs.pipe_file(f"{bucket}/photos/a.png", b"two")
        after = versions(*rows, base=f"s3://{bucket}/photos")
    assert before[0] != after[0]
    assert None not in (before[0], after[0], before[1])
    assert (before[1], before[2]) == (after[1], None)


def test_credentials_that_expired_end_the_run(rclone_server):
    bucket = rclone_server.new_bucket()
    with FaultProxy(rclone_server, from_request(1, EXPIRED)) as proxy, proxy.in_environment():
        with pytest.raises(CredentialsRefused):
            versions(f"s3://{bucket}/a.png", f"s3://{bucket}/b.png")


def write_archive(path, members: dict[str, bytes]) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_members_of_archives(tmp_path):
    first = {"a.png": b"one", "b.png": b"same"}
    for kind in ("zip", "tar"):
        write_archive(tmp_path / f"x.{kind}", first)
    names = ("a.png", "b.png", "gone.png")
    zips, tars = ([f"{kind}://{name}::x.{kind}" for name in names] for kind in ("zip", "tar"))
    before = versions(*zips, *tars, base=str(tmp_path))
    assert [version is None for version in before] == [False, False, True] * 2
    write_archive(tmp_path / "x.zip", {"new.png": b"new", "b.png": b"same", "a.png": b"two"})
    write_archive(tmp_path / "x.tar", {"a.png": b"other", "b.png": b"same"})
    after = versions(*zips, *tars, base=str(tmp_path))
    assert after[0] != before[0]  # of the same size
    assert after[1] == before[1]  # though the archive is another
    assert after[3] != before[3]
