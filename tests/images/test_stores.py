"""Images from object stores: a real S3 server, and a proxy that injects faults before it."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from io import BytesIO

import pytest
from fsspec import AbstractFileSystem
from fsspec.registry import _registry
from PIL import Image

from tests.harness import PATIENCE, echo, picture, read_results, vlmbatch, write_manifest
from tests.s3 import S3Endpoint
from tests.s3_faults import (
    EXPIRED,
    INTERNAL,
    Error,
    FaultProxy,
    Reset,
    Stall,
    Together,
    first,
    from_request,
    never,
    where,
)
from vlmbatch.errors import CredentialsRefused, ErrorCode, RequestFailed
from vlmbatch.images.failures import Larger
from vlmbatch.images.fetch import Fetcher, Reach
from vlmbatch.images.load import ImageLoader, ImageMemory, Limits
from vlmbatch.records import ImageRef

pytest.importorskip("s3fs")
MAX = 300_000
PICTURE = picture(200, 100)


@pytest.fixture(scope="module")
def bucket(rclone_server) -> str:
    name = rclone_server.new_bucket()
    fs = rclone_server.fs()
    fs.pipe_file(f"{name}/a.png", PICTURE)
    fs.pipe_file(f"{name}/empty.png", b"")
    fs.pipe_file(f"{name}/big.png", b"x" * (MAX + 1))
    for number in range(40):
        fs.pipe_file(f"{name}/many/{number}.png", PICTURE)
    return name


@contextmanager
def faults(server, rule=never):
    with FaultProxy(server, rule, read_timeout=200) as proxy, proxy.in_environment():
        yield proxy


@asynccontextmanager
async def fetching(*, base="/nowhere", seconds=200.0, at_once=32, max_bytes=MAX):
    with ThreadPoolExecutor(4) as executor:
        reach = Reach(max_bytes=max_bytes, at_once=at_once, seconds=seconds)
        fetcher = Fetcher(base=base, reach=reach, executor=executor)
        try:
            yield fetcher
        finally:
            await fetcher.close()


async def failure_of(fetcher, uri):
    with pytest.raises(RequestFailed) as caught:
        await fetcher.fetch(ImageRef(uri), MAX)
    assert "secret" not in caught.value.failure.message
    return caught.value.failure


def test_an_image_is_one_request(rclone_server, bucket):
    async def scene(proxy):
        async with fetching() as fetcher:
            for _ in range(3):
                assert await fetcher.fetch(ImageRef(f"s3://{bucket}/a.png"), MAX) == PICTURE
        assert proxy.operations == {"GET": 3}

    with faults(rclone_server) as proxy:
        asyncio.run(scene(proxy))


def test_relative_paths_start_at_a_manifest_in_the_store(rclone_server, bucket):
    async def scene():
        async with fetching(base=f"s3://{bucket}") as fetcher:
            assert await fetcher.fetch(ImageRef("a.png"), MAX) == PICTURE

    with faults(rclone_server):
        asyncio.run(scene())


def test_what_is_larger_is_not_sent(rclone_server, bucket):
    async def scene(proxy):
        async with fetching(max_bytes=2 * MAX) as fetcher:
            with pytest.raises(Larger) as caught:
                await fetcher.fetch(ImageRef(f"s3://{bucket}/big.png"), 1000)
            assert caught.value.size == MAX + 1
        async with fetching() as fetcher:
            failure = await failure_of(fetcher, f"s3://{bucket}/big.png")
        assert sum(proxy.sent.values()) <= 1001 + MAX + 1
        assert failure.code is ErrorCode.IMAGE_TOO_LARGE
        assert "300,001 bytes, more than the 300,000 allowed" in failure.message

    async def scene_with_room():
        async with fetching(max_bytes=2 * MAX) as fetcher:
            data = await fetcher.fetch(ImageRef(f"s3://{bucket}/big.png"), MAX + 1)
        assert len(data) == MAX + 1

    with faults(rclone_server) as proxy:
        asyncio.run(scene(proxy))
        asyncio.run(scene_with_room())


@pytest.mark.parametrize(
    ("fault", "code", "retryable"),
    [
        (Error(404, "NoSuchKey"), ErrorCode.IMAGE_MISSING, False),
        (Error(404, "NoSuchBucket"), ErrorCode.IMAGE_MISSING, False),
        (Error(403, "AccessDenied"), ErrorCode.IMAGE_FORBIDDEN, False),
        (Error(400, "Odd"), ErrorCode.FETCH_FAILED, True),
    ],
)
def test_what_the_store_s_codes_mean(rclone_server, bucket, fault, code, retryable):
    async def scene():
        async with fetching() as fetcher:
            return await failure_of(fetcher, f"s3://{bucket}/a.png?versionId=secret")

    with faults(rclone_server, where(lambda _: fault, key="a.png")):
        failure = asyncio.run(scene())
    assert (failure.code, failure.retryable) == (code, retryable)
    assert f"s3://{bucket}/a.png" in failure.message


def test_objects_that_are_not_there_or_empty(rclone_server, bucket):
    async def scene():
        async with fetching() as fetcher:
            missing = await failure_of(fetcher, f"s3://{bucket}/gone.png")
            no_bucket = await failure_of(fetcher, "s3://no-such-bucket/gone.png")
            empty = await failure_of(fetcher, f"s3://{bucket}/empty.png")
        assert missing.code is no_bucket.code is ErrorCode.IMAGE_MISSING
        assert missing.message == f"no such object: s3://{bucket}/gone.png"
        assert empty.code is ErrorCode.IMAGE_UNREADABLE
        assert empty.message == f"empty (0 bytes): s3://{bucket}/empty.png"

    with faults(rclone_server):
        asyncio.run(scene())


def test_an_address_that_no_store_is_asked_for(rclone_server, bucket):
    async def scene():
        async with fetching() as fetcher:
            for uri, said in {
                f"s3://key:secret@{bucket}/a.png": "credentials do not belong into the address of",
                f"s3://{bucket}": "names no object",
                f"s3://{bucket}/": "names no object",
                "s3:///a.png": "names no object",
                "zip://a.png::s3://key:secret@bucket/a.zip": "credentials do not belong",
            }.items():
                failure = await failure_of(fetcher, uri)
                assert failure.code is ErrorCode.IMAGE_FORBIDDEN, uri
                assert said in failure.message

    with faults(rclone_server) as proxy:
        asyncio.run(scene())
    assert not proxy.log


def test_names_of_objects_may_have_a_hash_and_a_question_mark(rclone_server, bucket):
    names = ("a #1?.png", "a#2.png", "a#page=2.png")
    for name in names:
        rclone_server.fs().pipe_file(f"{bucket}/odd/{name}", PICTURE)

    async def scene():
        async with fetching(base=f"S3://{bucket}/odd") as fetcher:
            for name in names:
                for uri in (name, f"S3://{bucket}/odd/{name}"):
                    assert await fetcher.fetch(ImageRef(uri), MAX) == PICTURE

    with faults(rclone_server):
        asyncio.run(scene())


@pytest.mark.parametrize(
    "fault",
    [
        EXPIRED,
        Error(400, "ExpiredToken"),
        Error(403, "InvalidAccessKeyId"),
        Error(403, "SignatureDoesNotMatch"),
    ],
)
def test_refused_credentials_are_no_row_s_failure(rclone_server, bucket, fault):
    async def scene():
        async with fetching() as fetcher:
            with pytest.raises(CredentialsRefused) as caught:
                await fetcher.fetch(ImageRef(f"s3://{bucket}/a.png?sig=secret"), MAX)
        assert caught.value.message.startswith(f"s3://{bucket} does not let us in")
        assert "secret" not in str(caught.value)

    with faults(rclone_server, lambda _: fault):
        asyncio.run(scene())


def test_wrong_and_missing_credentials(rclone_server, bucket, monkeypatch):
    async def scene():
        async with fetching() as fetcher:
            with pytest.raises(CredentialsRefused):
                await fetcher.fetch(ImageRef(f"s3://{bucket}/a.png"), MAX)

    with S3Endpoint(rclone_server.port).in_environment():
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        asyncio.run(scene())
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        asyncio.run(scene())


def test_a_store_whose_library_does_not_start_is_a_row_s_failure(monkeypatch):
    class Broken(AbstractFileSystem):
        def __init__(self, **_):
            raise RuntimeError("no such region")

    async def scene():
        async with fetching() as fetcher:
            failure = await failure_of(fetcher, "oss://place/a.png")
            assert failure.message == "cannot read oss://place/a.png (no such region)"
            with pytest.raises(RequestFailed):
                await fetcher.version("oss://place/a.png")

    monkeypatch.setitem(_registry, "oss", Broken)
    asyncio.run(scene())


def test_a_store_that_stalls_is_a_timeout(rclone_server, bucket):
    async def scene():
        async with fetching(seconds=0.5) as fetcher:
            return await failure_of(fetcher, f"s3://{bucket}/a.png")

    with faults(rclone_server, where(lambda _: Stall(), key="a.png")):
        failure = asyncio.run(scene())
    assert (failure.code, failure.retryable) == (ErrorCode.FETCH_TIMEOUT, True)


def loader_of(memory: ImageMemory, threads) -> ImageLoader:
    reach = Reach(max_bytes=MAX)
    return ImageLoader(
        base="/nowhere",
        memory=memory,
        executor=threads,
        limits=Limits(reach, backoff=0),
        target=None,
    )


def test_faults_that_pass_cost_no_row(rclone_server, bucket):
    passing = first(INTERNAL, Reset(), Error(503, "SlowDown"))

    async def scene():
        memory = ImageMemory(2**26)
        with ThreadPoolExecutor(2) as threads:
            with await loader_of(memory, threads).load(
                [ImageRef(f"s3://{bucket}/many/{number}.png") for number in range(4)]
            ) as loaded:
                assert [image.pixels.size for image in loaded.images] == [(200, 100)] * 4
        assert memory.pixels.held == memory.encoded.held == 0

    with faults(rclone_server, where(passing, operation="GET")) as proxy:
        asyncio.run(scene())
    assert sum(proxy.injected.values()) == 3


def test_many_rows_wait_for_a_far_store_together(rclone_server, bucket):
    """32 requests at once, where botocore has 10 connections by itself."""

    async def scene():
        memory = ImageMemory(2**30)
        with ThreadPoolExecutor(2) as threads:
            loader = loader_of(memory, threads)
            await loader.load([ImageRef(f"s3://{bucket}/a.png")])  # connects

            async def row(number: int) -> None:
                (await loader.load([ImageRef(f"s3://{bucket}/many/{number}.png")])).release()

            await asyncio.gather(*map(row, range(40)))

    with faults(rclone_server, where(lambda _: Together(32), key="many")) as proxy:
        asyncio.run(scene())
        assert proxy.most_in_flight == 32
        assert proxy.operations == {"GET": 41}


def test_images_that_turn_out_larger_are_fetched_again_when_there_is_room(rclone_server, bucket):
    """The guess is made small by small images; nothing is held twice, and nobody waits for ever."""

    async def scene():
        memory = ImageMemory(4 * 2**20)
        with ThreadPoolExecutor(2) as threads:
            loader = ImageLoader(
                base="/nowhere",
                memory=memory,
                executor=threads,
                limits=Limits(Reach(max_bytes=2**21), backoff=0),
                target=None,
            )
            for number in range(10):
                (await loader.load([ImageRef(f"s3://{bucket}/many/{number}.png")])).release()
            rows = [loader.load([ImageRef(f"s3://{bucket}/noise.png")] * 2) for _ in range(4)]
            for loaded in asyncio.as_completed(rows):
                (await loaded).release()
        assert memory.pixels.held == memory.encoded.held == 0

    noise = Image.effect_noise((600, 600), 80)
    file = BytesIO()
    noise.save(file, "PNG")
    assert len(file.getvalue()) > 2**18
    rclone_server.fs().pipe_file(f"{bucket}/noise.png", file.getvalue())
    with faults(rclone_server) as proxy:
        asyncio.run(asyncio.wait_for(scene(), PATIENCE))
        assert proxy.operations["HEAD"] > 0


def test_a_run_over_a_store_and_a_resume_after_its_credentials_expired(
    rclone_server, bucket, tmp_path
):
    rows = 40
    manifest = write_manifest(
        tmp_path / "m.parquet",
        {"image": [f"s3://{bucket}/many/{number}.png" for number in range(rows)]},
    )
    output = tmp_path / "out"
    options = ["-t", "caption", "-o", output, "--checkpoint-rows=4", "--json", *echo()]
    with faults(rclone_server, from_request(20, EXPIRED)) as proxy:
        stopped = vlmbatch("run", manifest, *options)
        assert stopped.exit_code == 1, stopped
        assert f"s3://{bucket} does not let us in" in stopped.stderr
        assert "ExpiredToken" in stopped.stderr or "injected" in stopped.stderr
        proxy.rule = never
        done = vlmbatch("run", manifest, *options)
        assert done.exit_code == 0, done
    assert done.json["ok"] + done.json["skipped"] == rows
    found = read_results(output).to_pylist()
    assert [row["status"] for row in found] == ["ok"] * rows
