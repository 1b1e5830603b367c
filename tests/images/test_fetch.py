"""Where an image's bytes come from, and what is said when they do not come."""

import base64
import os
import socket
from contextlib import contextmanager
from pathlib import Path

import pytest

from vlmbatch.errors import ErrorCode, Failure, RequestFailed, Stage
from vlmbatch.images.fetch import fetch, file_errors, locate, read, reference
from vlmbatch.records import ImageRef

MAX = 1000


def bytes_of(uri, base="/nowhere", max_bytes=MAX):
    return fetch(ImageRef(uri=uri), base=str(base), max_bytes=max_bytes)


def failure_of(uri=None, base="/nowhere", data=None, max_bytes=MAX) -> Failure:
    with pytest.raises(RequestFailed) as caught:
        fetch(ImageRef(uri=uri, data=data), base=str(base), max_bytes=max_bytes)
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
        ("s3://bucket/a.png", ErrorCode.IMAGE_FORBIDDEN, "cannot read s3: URIs: s3://bucket/a.png"),
        ("https://u:pw@h/a.png?k=pw", ErrorCode.IMAGE_FORBIDDEN, "https://h/a.png (this version"),
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
    assert "s3://bucket/lists/a.png" in failure_of("a.png", "s3://bucket/lists/").message


def test_a_file_that_changed_under_the_reader_may_be_tried_again(tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_bytes(b"abc")
    source = locate(ImageRef(uri="a.png"), base=str(tmp_path), max_bytes=MAX)
    for changed in (b"ab", b"abcd"):
        path.write_bytes(changed)
        with pytest.raises(RequestFailed) as caught:
            read(source)
        assert caught.value.failure.code is ErrorCode.FETCH_FAILED
        assert caught.value.failure.retryable


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
