"""A manifest cannot make the worker talk to hosts inside, whatever name it gives them."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from tests.web import web_server
from vlmbatch.errors import ErrorCode, RequestFailed
from vlmbatch.images.http import HttpImages
from vlmbatch.images.public import NotPublic, is_public, public_socket

INSIDE = [
    *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.255"),
    *("192.168.1.1", "169.254.169.254", "100.64.0.1", "100.100.100.200", "192.0.0.192"),
    *("224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "198.18.0.1"),
    *("192.0.2.1", "198.51.100.1", "203.0.113.1", "192.88.99.1", "168.63.129.16"),
    *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1"),
    *("::ffff:127.0.0.1", "::ffff:a9fe:a9fe", "::127.0.0.1", "::ffff:0:127.0.0.1"),
    *("2002:7f00:1::", "2002:a9fe:a9fe::1", "2002:0808:0808::1"),  # 6to4
    *("2001:0:7f00:1::", "2001::1", "2001:db8::1", "3fff::1", "100::1", "5f00::1"),
    *("64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::808:808"),  # NAT64
    *("4000::1", "1.2.3", "2130706433", "localhost", "", "not an address"),
]
OUTSIDE = [
    *("8.8.8.8", "1.1.1.1", "172.15.255.255", "172.32.0.1", "100.63.255.255", "100.128.0.1"),
    *("223.255.255.255", "168.63.129.17", "2606:4700::1111", "2a00:1450:4001::200e"),
    *("::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2001:4860:4860::8888"),
]


@pytest.mark.parametrize("address", INSIDE)
def test_an_address_inside_is_not_public(address: str):
    assert not is_public(address)


@pytest.mark.parametrize("address", OUTSIDE)
def test_an_address_outside_is_public(address: str):
    assert is_public(address)


def test_no_socket_is_made_for_an_address_inside_or_for_another_family():
    for family, address in (
        (socket.AF_INET, ("127.0.0.1", 80)),
        (socket.AF_INET6, ("::1", 80, 0, 0)),
        (socket.AF_UNIX, "/run/docker.sock"),
    ):
        with pytest.raises(NotPublic):
            public_socket((family, socket.SOCK_STREAM, 0, "", address))
    with public_socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("8.8.8.8", 80))) as made:
        assert made.family is socket.AF_INET


class Names:
    """DNS of the test's own: each name answers with these addresses, the last one for ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **answers: list[str]) -> None:
        self.asked: list[str] = []
        self._answers: dict[str, Iterator[str]] = {}
        self._last: dict[str, str] = {}
        self._real = socket.getaddrinfo
        for name, addresses in answers.items():
            self._answers[f"{name}.test"] = iter(addresses)
        monkeypatch.setattr(socket, "getaddrinfo", self.getaddrinfo)

    def getaddrinfo(self, host, port, *args, **kwargs):
        if host not in self._answers:
            return self._real(host, port, *args, **kwargs)
        self.asked.append(host)
        self._last[host] = next(self._answers[host], self._last.get(host, ""))
        found = []
        for address in self._last[host].split(","):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            where = (address, port, 0, 0) if ":" in address else (address, port)
            found.append((family, socket.SOCK_STREAM, 6, "", where))
        return found


def answer_to(url: str, *, allow_private: bool = False) -> str:
    """The code of the failure, with its message; ``ok`` where the image came."""

    async def scene() -> str:
        images = HttpImages(max_bytes=1000, at_once=2, seconds=100, allow_private=allow_private)
        try:
            await images.get(url, 1000)
        except RequestFailed as error:
            return f"{error.failure.code} {error.failure.message}"
        finally:
            await images.close()
        return "ok"

    return asyncio.run(scene())


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.1", "0x7f.0.0.1", "0x7f000001", "2130706433", "0177.0.0.1"),
        *("127.0.0.1.", "localhost", "localhost.", "LOCALHOST", "0", "0.0.0.0", "127.000.000.001"),
        *("[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]"),
        *("[fe80::1%25lo]", "169.254.169.254", "[fd00:ec2::254]", "[2002:7f00:1::1]"),
        *("１２７.0.0.1", "127。0。0。1", "user@127.0.0.1", "example.com@127.0.0.1"),
    ],
)
def test_every_spelling_of_a_host_inside_is_refused(host: str):
    """A real server listens there, and is never asked."""

    async def scene() -> str:
        async with web_server({"/a": b"picture"}) as server:
            images = HttpImages(max_bytes=1000, at_once=2, seconds=100, allow_private=False)
            try:
                await images.get(f"http://{host}:{server.port}/a", 1000)
            except RequestFailed as error:
                return f"{error.failure.code} {error.failure.message}"
            finally:
                await images.close()
                assert not server.peers
        return "ok"

    said = asyncio.run(scene())
    # An odd spelling may also be no name at all, depending on the C library.
    assert said.startswith(("image_forbidden", "fetch_failed no answer", "image_missing not a URL"))
    if host in ("127.0.0.1", "localhost", "[::1]", "169.254.169.254", "[::ffff:127.0.0.1]"):
        assert said.startswith("image_forbidden")
        assert "--allow-private-hosts" in said


def test_a_public_name_with_an_address_inside_is_refused(monkeypatch):
    names = Names(monkeypatch, inside=["10.0.0.7"], both=["10.0.0.7,192.168.0.1,fd00::1"])
    for name in ("inside", "both"):
        said = answer_to(f"http://{name}.test/a.png?key=secret")
        assert said.startswith(f"image_forbidden {name}.test is not a public address")
        assert "secret" not in said
    assert names.asked


@pytest.fixture
def other_loopback(monkeypatch):
    """For the guard, 127.0.0.2 is the public internet and 127.0.0.1 is not."""
    monkeypatch.setattr("vlmbatch.images.public.is_public", lambda address: address == "127.0.0.2")


@asynccontextmanager
async def outside_at(port: int, answer):
    """A server at 127.0.0.2."""
    runner = web.ServerRunner(web.Server(answer), shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.2", port).start()
    try:
        yield
    finally:
        await runner.cleanup()


def test_dns_that_changes_its_answer_does_not_pass(monkeypatch, other_loopback):
    """A name is asked for once per connection, and that very answer is what is connected to."""

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=b"picture", headers={"Connection": "close"})

    async def scene() -> None:
        async with web_server({"/a": b"secret"}) as server, outside_at(server.port, answer):
            names = Names(monkeypatch, rebinding=["127.0.0.2", "127.0.0.1"])
            images = HttpImages(max_bytes=1000, at_once=2, seconds=100, allow_private=False)
            url = f"http://rebinding.test:{server.port}/a"
            assert await images.get(url, 1000) == b"picture"
            await images.close()  # and with it what it remembers of the name
            images = HttpImages(max_bytes=1000, at_once=2, seconds=100, allow_private=False)
            with pytest.raises(RequestFailed) as caught:
                await images.get(url, 1000)
            assert caught.value.failure.code is ErrorCode.IMAGE_FORBIDDEN
            await images.close()
            assert names.asked == ["rebinding.test"] * 2
            assert not server.peers

    asyncio.run(scene())


def test_a_redirect_to_a_host_inside_is_refused(monkeypatch, other_loopback):
    async def redirect(request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": request.query["to"]})

    async def scene() -> None:
        async with web_server({"/secret": b"secret"}) as server, outside_at(server.port, redirect):
            Names(monkeypatch, outside=["127.0.0.2"], inside=["127.0.0.1"])
            images = HttpImages(max_bytes=1000, at_once=2, seconds=100, allow_private=False)
            for host in ("127.0.0.1", "inside.test", "[::ffff:127.0.0.1]", "0x7f.1"):
                target = f"http://{host}:{server.port}/secret"
                with pytest.raises(RequestFailed) as caught:
                    await images.get(f"http://outside.test:{server.port}/?to={target}", 1000)
                assert caught.value.failure.code is ErrorCode.IMAGE_FORBIDDEN
            await images.close()
            assert not server.peers

    asyncio.run(scene())


def test_private_hosts_are_allowed_where_that_is_asked_for(monkeypatch):
    async def scene() -> bytes:
        async with web_server({"/a": b"picture"}) as server:
            Names(monkeypatch, inside=["127.0.0.1"])
            images = HttpImages(max_bytes=1000, at_once=2, seconds=100, allow_private=True)
            try:
                return await images.get(f"http://inside.test:{server.port}/a", 1000)
            finally:
                await images.close()

    assert asyncio.run(scene()) == b"picture"


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch):
    async def scene() -> None:
        async with web_server({}) as proxy:
            for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
                monkeypatch.setenv(name, proxy.url(""))
            Names(monkeypatch, inside=["10.0.0.7"])
            images = HttpImages(max_bytes=1000, at_once=2, seconds=100, allow_private=False)
            with pytest.raises(RequestFailed, match="not a public address"):
                await images.get("http://inside.test/a", 1000)
            await images.close()
            assert not proxy.peers

    asyncio.run(scene())
