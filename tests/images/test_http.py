"""Images from web servers: a real one on loopback, and everything that servers do."""

import asyncio
import gzip
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from io import BytesIO

import pytest
from aiohttp import web
from PIL import Image

from tests.harness import picture
from tests.web import web_server
from vlmbatch import __version__
from vlmbatch.errors import ErrorCode, Failure, RequestFailed
from vlmbatch.images.failures import Busy, Larger
from vlmbatch.images.fetch import Reach
from vlmbatch.images.http import MAX_RETRY_AFTER, HttpImages
from vlmbatch.images.load import ImageLoader, ImageMemory, Limits
from vlmbatch.records import ImageRef

MAX = 100_000
PICTURE = bytes(range(256)) * 4


@asynccontextmanager
async def images_of(answers, *, max_bytes=MAX, at_once=8, seconds=200.0):
    """(server, what fetches from it)."""
    async with web_server(answers) as server:
        images = HttpImages(
            max_bytes=max_bytes, at_once=at_once, seconds=seconds, allow_private=True
        )
        try:
            yield server, images
        finally:
            await images.close()


async def failure_of(images: HttpImages, url: str, reserved: int = MAX) -> Failure:
    with pytest.raises(RequestFailed) as caught:
        await images.get(url, reserved)
    assert "secret" not in caught.value.failure.message
    assert "\n" not in caught.value.failure.message
    return caught.value.failure


def redirect(where: str):
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": where})

    return answer


def drips(chunk: bytes, headers: dict[str, str], *, pause: float = 0.0):
    """Never ends by itself."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        while True:
            await response.write(chunk)
            await asyncio.sleep(pause)

    return answer


def test_connections_are_used_again_and_the_user_agent_says_who_asks():
    async def scene():
        async with images_of({"/a.png": PICTURE}) as (server, images):
            for _ in range(5):
                assert await images.get(server.url("/a.png"), MAX) == PICTURE
            assert len(server.peers) == 1
            assert server.requests[0].headers["User-Agent"] == f"vlmbatch/{__version__}"
            assert "Accept-Encoding" not in server.requests[0].headers

    asyncio.run(scene())


def test_a_signed_url_is_sent_as_it_is_and_never_shown():
    async def scene():
        async with images_of({"/a%2Fb c.png": PICTURE, "/a/b c.png": PICTURE}) as (server, images):
            query = "?X-Sig=secret%2Bsecret%3D&name=%e4%b8%ad"
            await images.get(server.url(f"/a%2Fb%20c.png{query}"), MAX)
            assert server.requests[0].raw_path == f"/a%2Fb%20c.png{query}"
            await images.get(server.url("/a/b c.png"), MAX)  # nobody encoded this one
            failure = await failure_of(images, server.url(f"/gone.png{query}"))
            assert failure.code is ErrorCode.IMAGE_MISSING
            assert failure.message == f"the server says 404: {server.url('/gone.png')}"
            with_user = server.url("/gone.png").replace("//", "//secret:secret@")
            await failure_of(images, with_user)

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("status", "code", "retryable"),
    [
        (404, ErrorCode.IMAGE_MISSING, False),
        (410, ErrorCode.IMAGE_MISSING, False),
        (401, ErrorCode.IMAGE_FORBIDDEN, False),
        (403, ErrorCode.IMAGE_FORBIDDEN, False),
        (400, ErrorCode.FETCH_FAILED, False),
        (429, ErrorCode.FETCH_FAILED, True),
        (500, ErrorCode.FETCH_FAILED, True),
        (503, ErrorCode.FETCH_FAILED, True),
        (304, ErrorCode.FETCH_FAILED, False),
        (204, ErrorCode.FETCH_FAILED, False),
    ],
)
def test_what_each_status_means(status: int, code: ErrorCode, retryable: bool):
    async def scene():
        async with images_of({"/a": web.Response(status=status)}) as (server, images):
            failure = await failure_of(images, server.url("/a"))
        assert (failure.code, failure.retryable) == (code, retryable)
        assert str(status) in failure.message

    asyncio.run(scene())


def test_a_body_of_nothing_is_no_image():
    async def scene():
        async with images_of({"/a": web.Response(body=b"")}) as (server, images):
            assert (await failure_of(images, server.url("/a"))).code is ErrorCode.IMAGE_UNREADABLE

    asyncio.run(scene())


def test_what_the_server_says_is_larger_is_not_read():
    async def scene():
        answers = {"/a": PICTURE, "/big": drips(b"x" * 1000, {"Content-Length": str(MAX + 1)})}
        async with images_of(answers) as (server, images):
            with pytest.raises(Larger) as caught:
                await images.get(server.url("/a"), len(PICTURE) - 1)
            assert caught.value.size == len(PICTURE)
            failure = await failure_of(images, server.url("/big"))
        assert failure.code is ErrorCode.IMAGE_TOO_LARGE
        assert failure.message.startswith("100,001 bytes, more than the 100,000 allowed")

    asyncio.run(scene())


def test_an_answer_without_an_end_stops_at_the_limit():
    async def scene():
        async with images_of({"/a": drips(b"x" * 4096, {})}) as (server, images):
            failure = await failure_of(images, server.url("/a"))
            with pytest.raises(Larger) as caught:
                await images.get(server.url("/a"), 10_000)
        assert failure.code is ErrorCode.IMAGE_TOO_LARGE
        assert 20_000 < caught.value.size <= MAX  # more than came: there may be more

    asyncio.run(scene())


def test_answers_whose_length_is_not_told_may_be_of_any_size_after_small_ones():
    """The guess is LEAST_BYTES by then; what is too large is said at once, and not asked again."""
    large = BytesIO()
    Image.new("RGB", (1800, 1000)).save(large, "BMP")
    reach = Reach(max_bytes=6 * 2**20, allow_private=True)

    async def chunked(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(large.getvalue())
        return response

    async def scene():
        answers = {"/a": picture(), "/large": chunked, "/endless": drips(b"x" * 2**18, {})}
        async with web_server(answers) as server:
            with ThreadPoolExecutor(1) as threads:
                memory = ImageMemory(2**28)
                limits = Limits(reach, backoff=0)
                loader = ImageLoader(
                    base="/", memory=memory, executor=threads, limits=limits, target=None
                )
                for path in ("/a",) * 64 + ("/large",):
                    (await loader.load([ImageRef(server.url(path))])).release()
                with pytest.raises(RequestFailed) as caught:
                    await loader.load([ImageRef(server.url("/endless"))])
                await loader.close()
        assert caught.value.failure.code is ErrorCode.IMAGE_TOO_LARGE
        assert server.asked["/large"] <= 3
        assert server.asked["/endless"] <= 3
        assert memory.encoded.held == 0

    asyncio.run(scene())


def test_an_answer_that_unpacks_to_more_stops_at_the_limit():
    async def scene():
        body = gzip.compress(b"\0" * 50 * MAX)
        assert len(body) < MAX
        bomb = web.Response(body=body, headers={"Content-Encoding": "gzip"})
        async with images_of({"/a": bomb}) as (server, images):
            failure = await failure_of(images, server.url("/a"))
        assert failure.code is ErrorCode.IMAGE_TOO_LARGE

    asyncio.run(scene())


def test_an_answer_that_ends_before_its_length_may_be_tried_again():
    async def short(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"x" * 500)
        request.transport.close()
        return response

    async def scene():
        async with images_of({"/a": short}) as (server, images):
            failure = await failure_of(images, server.url("/a"))
        assert (failure.code, failure.retryable) == (ErrorCode.FETCH_FAILED, True)
        assert "ended before its end" in failure.message

    asyncio.run(scene())


def test_a_server_that_is_silent_or_drips_is_given_up():
    async def scene():
        silent = asyncio.Event()

        async def never(request: web.Request) -> web.StreamResponse:
            await silent.wait()
            return web.Response(body=PICTURE)

        slow = drips(b"x", {"Content-Length": "5000"}, pause=0.01)
        async with images_of({"/never": never, "/slow": slow}, seconds=0.2) as (server, images):
            for path in ("/never", "/slow"):
                failure = await failure_of(images, server.url(path))
                assert (failure.code, failure.retryable) == (ErrorCode.FETCH_TIMEOUT, True)
            silent.set()

    asyncio.run(scene())


def test_nobody_there_may_be_tried_again():
    async def scene():
        async with images_of({}) as (server, images):
            url = server.url("/a")
        failure = await failure_of(images, url)
        assert (failure.code, failure.retryable) == (ErrorCode.FETCH_FAILED, True)
        await images.close()

    asyncio.run(scene())


def test_redirects_are_followed_five_times():
    async def scene():
        chain = {f"/{n}": redirect(f"/{n + 1}") for n in range(5)}
        async with images_of({**chain, "/5": PICTURE}) as (server, images):
            assert await images.get(server.url("/0"), MAX) == PICTURE
            server.answers["/start"] = redirect(server.url("/0"))
            failure = await failure_of(images, server.url("/start"))
        assert failure.code is ErrorCode.FETCH_FAILED
        assert failure.message.startswith("more than 5 redirects")

    asyncio.run(scene())


@pytest.mark.parametrize(
    "where", ["file:///etc/passwd", "ftp://h/a.png", "data:text/plain,x", "gopher://h", "s3://b/a"]
)
def test_a_redirect_leads_to_web_servers_only(where: str):
    async def scene():
        async with images_of({"/a": redirect(where)}) as (server, images):
            failure = await failure_of(images, server.url("/a"))
        assert failure.code is ErrorCode.IMAGE_FORBIDDEN

    asyncio.run(scene())


def test_so_many_requests_at_once_go_to_one_host():
    async def scene():
        at_server, go = asyncio.Semaphore(0), asyncio.Event()

        async def waits(request: web.Request) -> web.StreamResponse:
            at_server.release()
            await go.wait()
            return web.Response(body=PICTURE)

        async with images_of({"/a": waits}, at_once=3) as (server, images):
            asking = [asyncio.create_task(images.get(server.url("/a"), MAX)) for _ in range(10)]
            for _ in range(3):
                await at_server.acquire()
            assert server.in_flight == 3
            go.set()
            assert await asyncio.gather(*asking) == [PICTURE] * 10
            assert server.most_in_flight == 3

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7),
        ("100000", MAX_RETRY_AFTER),
        ("-5", 0),
        (format_datetime(datetime.now(UTC) + timedelta(days=1)), MAX_RETRY_AFTER),
        (format_datetime(datetime.now(UTC) - timedelta(days=1)), 0),
    ],
    ids=[
        "seconds",
        "too many",
        "negative",
        "a day to come",
        "a day past",
    ],  # the same in each worker
)
def test_retry_after_is_heard_within_bounds(value: str, seconds: float):
    async def scene():
        answer = web.Response(status=429, headers={"Retry-After": value})
        async with images_of({"/a": answer}) as (server, images):
            with pytest.raises(Busy) as caught:
                await images.get(server.url("/a"), MAX)
        assert caught.value.seconds == seconds

    asyncio.run(scene())


@pytest.mark.parametrize("value", ["soon", "nan", ""])
def test_a_retry_after_that_says_nothing_is_a_plain_failure(value: str):
    async def scene():
        answer = web.Response(status=503, headers={"Retry-After": value})
        async with images_of({"/a": answer}) as (server, images):
            with pytest.raises(RequestFailed) as caught:
                await images.get(server.url("/a"), MAX)
        assert not isinstance(caught.value, Busy)
        assert caught.value.failure.retryable

    asyncio.run(scene())


def test_while_a_host_wants_a_pause_nobody_asks_it():
    async def scene():
        loop = asyncio.get_running_loop()
        answers = {
            "/busy": web.Response(status=503, headers={"Retry-After": "0.3"}),
            "/a": PICTURE,
        }
        async with images_of(answers) as (server, images):
            before = loop.time()
            with pytest.raises(Busy):
                await images.get(server.url("/busy"), MAX)
            assert await images.get(server.url("/a"), MAX) == PICTURE
            assert loop.time() - before >= 0.3

    asyncio.run(scene())
