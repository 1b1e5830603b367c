"""Where an image's bytes come from, and what is said when they do not come."""

import asyncio
import base64
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from vlmbatch.errors import ErrorCode, Failure, RequestFailed, Stage
from vlmbatch.images.failures import Larger
from vlmbatch.images.fetch import Fetcher, Reach, page_of, reference
from vlmbatch.images.local import LocalFiles, file_errors
from vlmbatch.records import ImageRef

MAX = 1000


def fetch(ref: ImageRef, *, base="/nowhere", max_bytes=MAX, roots=()) -> bytes:
    """All bytes of an image, with as much reserved as it may have."""

    async def scene() -> bytes:
        reach = Reach(max_bytes=max_bytes, roots=tuple(map(str, roots)))
        with ThreadPoolExecutor(2) as executor:
            fetcher = Fetcher(base=str(base), reach=reach, executor=executor)
            try:
                return await fetcher.fetch(ref, max_bytes)
            finally:
                await fetcher.close()

    return asyncio.run(scene())


def bytes_of(uri, base="/nowhere", max_bytes=MAX, roots=()):
    return fetch(ImageRef(uri=uri), base=base, max_bytes=max_bytes, roots=roots)


def failure_of(uri=None, base="/nowhere", data=None, max_bytes=MAX, roots=()) -> Failure:
    with pytest.raises(RequestFailed) as caught:
        fetch(ImageRef(uri=uri, data=data), base=base, max_bytes=max_bytes, roots=roots)
    failure = caught.value.failure
    assert failure.stage is Stage.LOAD
    assert "\n" not in failure.message
    return failure


@contextmanager
def as_nobody():
    """Without root's right to read everything; a plain user keeps their own identity."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_embedded_bytes_win_over_the_uri():
    assert fetch(ImageRef(uri="gone.png", data=b"abc"), base="/nowhere", max_bytes=MAX) == b"abc"


def test_relative_paths_start_at_the_base(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"abc")
    assert bytes_of("photos/a.png", tmp_path) == b"abc"
    assert bytes_of("a.png", tmp_path / "photos") == b"abc"


@pytest.mark.parametrize("name", ["a b.png", "what?.png", "50%.png", "scan:12.png", "ü#1.png"])
def test_a_local_path_and_its_file_uri_are_taken_as_they_are(tmp_path: Path, name: str):
    path = tmp_path / name
    path.write_bytes(b"abc")
    assert bytes_of(name, tmp_path) == b"abc"
    assert bytes_of(str(path)) == b"abc"
    assert bytes_of(path.as_uri()) == b"abc"
    assert bytes_of(path.as_uri().replace("file:///", "FILE:/")) == b"abc"
    assert bytes_of(path.as_uri().replace("file:///", "file://localhost/")) == b"abc"


def test_data_uris_in_base64_and_percent_encoded():
    data = bytes(range(256))
    text = base64.b64encode(data).decode()
    urlsafe = base64.urlsafe_b64encode(data).decode().rstrip("=")
    assert bytes_of(f"data:image/png;base64,{text}") == data
    assert bytes_of(f"data:;base64,{text[:100]}\n {text[100:]}") == data
    assert bytes_of(f"DATA:image/png;BASE64,{urlsafe}") == data
    assert bytes_of("data:image/png;base64," + text.replace("+", "%2B").replace("/", "%2F")) == data
    assert bytes_of("data:text/plain,a%00b+c") == b"a\0b+c"


@pytest.mark.parametrize(
    ("uri", "code", "message"),
    [
        ("gone.png", ErrorCode.IMAGE_MISSING, "no such file: gone.png"),
        ("file.png/below", ErrorCode.IMAGE_MISSING, "no such file"),
        ("x" * 300, ErrorCode.IMAGE_MISSING, "name too long"),
        ("nul\0.png", ErrorCode.IMAGE_MISSING, "not a path"),
        ("\ud800.png", ErrorCode.IMAGE_MISSING, "not a path"),
        ("file:///\ud800.png", ErrorCode.IMAGE_MISSING, "not a path"),
        ("loop.png", ErrorCode.IMAGE_MISSING, "levels of symbolic links"),
        ("", ErrorCode.IMAGE_MISSING, "names no image"),
        (".", ErrorCode.IMAGE_UNREADABLE, "a folder"),
        ("pipe", ErrorCode.IMAGE_UNREADABLE, "a pipe"),
        ("socket", ErrorCode.IMAGE_UNREADABLE, "a pipe"),
        ("/dev/zero", ErrorCode.IMAGE_UNREADABLE, "a pipe"),
        ("empty.png", ErrorCode.IMAGE_UNREADABLE, "empty (0 bytes): empty.png"),
        ("big.png", ErrorCode.IMAGE_TOO_LARGE, "1,001 bytes, more than the 1,000 allowed"),
        ("data:image/png;base64,A", ErrorCode.IMAGE_UNREADABLE, "not valid base64"),
        ("data:image/png;base64,<html>", ErrorCode.IMAGE_UNREADABLE, "not valid base64"),
        ("data:image/png", ErrorCode.IMAGE_UNREADABLE, "without a comma"),
        ("data:image/png,", ErrorCode.IMAGE_UNREADABLE, "empty"),
        ("data:," + "x" * 1001, ErrorCode.IMAGE_TOO_LARGE, "more than the 1,000"),
        ("data:," + "x" * 9000, ErrorCode.IMAGE_TOO_LARGE, "more than the 1,000"),
        ("file://elsewhere/a.png", ErrorCode.IMAGE_FORBIDDEN, "another host"),
        ("ftp://u:pw@h/a.png?k=pw", ErrorCode.IMAGE_FORBIDDEN, "not read from ftp: ftp://h/a.png"),
        ("local:///etc/hostname", ErrorCode.IMAGE_FORBIDDEN, "not read from local:"),
        ("simplecache::file:///etc/hostname", ErrorCode.IMAGE_FORBIDDEN, "from simplecache:"),
        ("reference://x", ErrorCode.IMAGE_FORBIDDEN, "not read from reference:"),
        ("s3://b/k::file:///etc/hostname", ErrorCode.IMAGE_FORBIDDEN, "not read from s3:"),
        ("http:///a.png", ErrorCode.IMAGE_MISSING, "not a URL"),
        ("http://h:70000/a.png", ErrorCode.IMAGE_MISSING, "not a URL"),
    ],
)
def test_a_failure_names_the_image_and_its_cause(tmp_path, monkeypatch, uri, code, message):
    (tmp_path / "file.png").write_bytes(b"abc")
    (tmp_path / "empty.png").touch()
    (tmp_path / "big.png").write_bytes(b"x" * 1001)
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        failure = failure_of(uri, tmp_path)
    assert failure.code is code
    assert message in failure.message
    assert "pw" not in failure.message
    assert not failure.retryable


def test_embedded_bytes_have_the_same_limits():
    assert failure_of(data=b"").code is ErrorCode.IMAGE_UNREADABLE
    assert failure_of(data=b"x" * 1001).code is ErrorCode.IMAGE_TOO_LARGE
    assert failure_of().code is ErrorCode.IMAGE_MISSING


def test_a_file_without_permission_is_forbidden(tmp_path: Path):
    path = tmp_path / "secret.png"
    path.write_bytes(b"abc")
    path.chmod(0)
    with as_nobody():
        failure = failure_of("secret.png", tmp_path)
    assert failure.code is ErrorCode.IMAGE_FORBIDDEN
    assert failure.message == "permission denied: secret.png"


def test_a_manifest_elsewhere_may_not_name_local_files():
    for uri in ("/etc/hostname", "file:///etc/hostname"):
        failure = failure_of(uri, "s3://bucket/lists")
        assert failure.code is ErrorCode.IMAGE_FORBIDDEN
        assert "may not name local files" in failure.message
    assert "ftp://h/lists/a.png" in failure_of("a.png", "ftp://h/lists/").message


def test_a_file_above_what_is_reserved_is_not_read(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"x" * 900)
    files = LocalFiles(str(tmp_path), (), MAX)
    with pytest.raises(Larger) as caught:
        files.read("a.png", "a.png", 899)
    assert caught.value.size == 900
    assert files.read("a.png", "a.png", 900) == b"x" * 900


@pytest.fixture
def two_folders(tmp_path: Path) -> Path:
    for name in ("inside", "outside", "inside-not"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(b"abc")
    (tmp_path / "inside" / "link.png").symlink_to("../outside/a.png")
    (tmp_path / "outside" / "back.png").symlink_to("../inside/a.png")
    return tmp_path


def test_with_roots_a_file_must_be_below_one_of_them(two_folders: Path):
    def allowed(uri: str, *roots: str, base: str = str(two_folders)) -> bool:
        paths = [two_folders / root for root in roots]
        try:
            return bytes_of(uri, base, roots=paths) == b"abc"
        except RequestFailed as error:
            if "not below an --allow-root" not in error.failure.message:
                raise
            return error.failure.code is not ErrorCode.IMAGE_FORBIDDEN

    assert allowed("inside/a.png", "inside")
    assert allowed("inside/a.png", "outside", "inside")
    assert allowed("outside/../inside/a.png", "inside")
    assert allowed("outside/back.png", "inside")  # what it is counts, not what leads to it
    assert not allowed("outside/a.png", "inside")
    assert not allowed("inside/../outside/a.png", "inside")
    assert not allowed("inside/link.png", "inside")
    assert not allowed("inside-not/a.png", "inside")
    assert not allowed("file:///etc/hostname", "inside")
    elsewhere = "s3://bucket/lists"
    assert allowed(str(two_folders / "inside" / "a.png"), "inside", base=elsewhere)
    assert not allowed(str(two_folders / "outside" / "a.png"), "inside", base=elsewhere)


def test_what_a_root_hides_does_not_show_whether_it_exists(two_folders: Path):
    failure = failure_of("outside/gone.png", two_folders, roots=[two_folders / "inside"])
    assert failure.code is ErrorCode.IMAGE_FORBIDDEN


def test_the_page_of_a_document():
    assert page_of(ImageRef(uri="scan.tif#page=12")) == 12
    assert page_of(ImageRef(uri="s3://b/scan.tif?versionId=v#page=3")) == 3
    assert page_of(ImageRef(uri="scan#page.tif")) is None
    assert page_of(ImageRef(data=b"abc")) is None
    shown = reference(ImageRef(uri="https://u:pw@h/scan.tif?sig=pw#page=2"))
    assert shown == "https://h/scan.tif#page=2"


def test_a_data_uri_far_above_the_limit_is_refused_without_a_copy():
    script = (
        "import resource;"
        "from vlmbatch.images.data_uri import data_of;"
        "from vlmbatch.images.fetch import reference;"
        "from vlmbatch.records import ImageRef;"
        "from vlmbatch.errors import RequestFailed;\n"
        "uri = 'data:image/png;base64,' + 'A' * 2**28\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert reference(ImageRef(uri=uri)) == 'data:image/png'\n"
        "try: data_of('it', uri, 2**26)\n"
        "except RequestFailed as error: print(error.failure.code, error.failure.message)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, grown = done.stdout.splitlines()
    assert said == "image_too_large 201,326,592 bytes, more than the 67,108,864 allowed: it"
    assert int(grown) < 64  # MiB


def test_trouble_with_the_disk_may_be_tried_again():
    with pytest.raises(RequestFailed) as caught, file_errors("a.png"):
        raise OSError(5, "Input/output error")
    failure = caught.value.failure
    assert (failure.code, failure.retryable) == (ErrorCode.FETCH_FAILED, True)
    assert failure.message == "cannot read a.png: Input/output error"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        (None, None),
        ("", None),
        ("photos/what?.png", "photos/what?.png"),
        ("me@home.png", "me@home.png"),
        ("s3://bucket/me@home.png", "s3://bucket/me@home.png"),
        ("https://user:secret@host/a.png?sig=secret#x", "https://host/a.png"),
        ("https://secret@host", "https://host"),
        ("zip://a.png::https://u:secret@h/b.zip?sig=secret", "zip://a.png::https://h/b.zip"),
        ("file:///tmp/a%20b.png", "file:///tmp/a%20b.png"),
        ("data:image/png;base64,secret", "data:image/png"),
        ("data:image/svg+xml,secret", "data:image/svg+xml"),
        ("data:;base64,secret", "data:"),
        ("data:secret/secret", "data:"),
    ],
)
def test_the_reference_holds_neither_credentials_nor_payload(uri, shown):
    assert reference(ImageRef(uri=uri)) == shown
    assert reference(ImageRef(uri=uri, data=b"abc")) == shown
