"""The images of a row, loaded within the budget, or one failure and nothing held."""

import asyncio
import base64
import platform
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from io import BytesIO

import pytest
import xxhash
from PIL import Image

from tests.harness import PATIENCE
from vlmbatch.errors import ErrorCode, RequestFailed, Stage, failed
from vlmbatch.grounding import Size
from vlmbatch.images.budget import ByteBudget
from vlmbatch.images.load import ImageLoader, ImageMemory, Limits
from vlmbatch.records import ImageRef

LIMITS = Limits(backoff=0)


class FailsFirst(ThreadPoolExecutor):
    """The first ``times`` pieces of work fail as a store that is busy does."""

    def __init__(self, times: int) -> None:
        super().__init__(1)
        self.times = times

    def submit(self, work, /, *args, **kwargs):
        if self.times > 0:
            self.times -= 1
            done = Future()
            done.set_exception(
                failed(ErrorCode.FETCH_FAILED, Stage.LOAD, "store is busy", retryable=True)
            )
            return done
        return super().submit(work, *args, **kwargs)


class Held(ThreadPoolExecutor):
    """Counts what is submitted; nothing runs before ``go`` is set."""

    def __init__(self) -> None:
        super().__init__(1)
        self.go = threading.Event()
        self.submitted = 0

    def submit(self, work, /, *args, **kwargs):
        self.submitted += 1
        return super().submit(lambda: self.go.wait(PATIENCE) and work(*args, **kwargs))


@pytest.fixture
def folder(tmp_path):
    for name, size in (("wide.png", (400, 100)), ("small.png", (10, 10)), ("tall.jpg", (50, 80))):
        Image.new("RGB", size, "teal").save(tmp_path / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (400, 100)).save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "text.jpg").write_text("<html>404</html>")
    return tmp_path


def refs(*uris: str) -> list[ImageRef]:
    return [ImageRef(uri=uri) for uri in uris]


def half(size: Size) -> Size:
    return Size(max(size.width // 2, 1), max(size.height // 2, 1))


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def loader(folder, budget: ByteBudget, executor: Executor, limits=LIMITS, target=None):
    """``budget`` is that of the pixels; there is room enough for what is encoded."""
    memory = ImageMemory(2**30)
    memory.pixels = budget
    return ImageLoader(
        base=str(folder), memory=memory, executor=executor, limits=limits, target=target
    )


def test_images_come_in_order_with_their_sizes_and_what_they_keep_is_held(folder):
    async def scene():
        budget = ByteBudget(10**7)
        with ThreadPoolExecutor(2) as executor:
            loaded = await loader(folder, budget, executor, target=half).load(
                refs("wide.png", "turned.jpg", "small.png")
            )
        with loaded:
            assert [image.size for image in loaded.images] == [
                Size(400, 100),
                Size(100, 400),
                Size(10, 10),
            ]
            assert [image.pixels.size for image in loaded.images] == [(200, 50), (50, 200), (5, 5)]
            assert budget.held == 4 * (200 * 50 + 50 * 200 + 5 * 5)
        assert budget.held == 0
        loaded.release()
        assert budget.held == 0

    asyncio.run(scene())


def test_the_key_is_of_the_content_and_of_the_size_given_to_the_model(folder):
    async def scene():
        data = (folder / "wide.png").read_bytes()
        with ThreadPoolExecutor(1) as executor:
            full = loader(folder, ByteBudget(10**7), executor)
            shrunk = loader(folder, ByteBudget(10**7), executor, target=half)
            both = [*refs("wide.png"), ImageRef(uri="elsewhere.png", data=data)]
            keys = [image.key for image in (await full.load(both)).images]
            keys += [image.key for image in (await shrunk.load(both)).images]
        digest = xxhash.xxh3_128_hexdigest(data)
        assert keys == [f"{digest}-400x100"] * 2 + [f"{digest}-200x50"] * 2

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("uri", "code", "message"),
    [
        ("gone.png", ErrorCode.IMAGE_MISSING, "no such file: gone.png"),
        ("text.jpg", ErrorCode.IMAGE_UNREADABLE, "text.jpg: an HTML page, not an image"),
        ("wide.png", ErrorCode.IMAGE_TOO_LARGE, "wide.png: 400 x 100 is 40,000 pixels"),
    ],
)
def test_one_bad_image_fails_the_row_and_holds_nothing(folder, uri, code, message):
    async def scene():
        budget = ByteBudget(10**7)
        with ThreadPoolExecutor(1) as executor:
            limited = loader(folder, budget, executor, Limits(max_pixels=20_000, backoff=0))
            with pytest.raises(RequestFailed) as caught:
                await limited.load(refs("small.png", uri))
        assert budget.held == 0
        assert caught.value.failure.code is code
        assert caught.value.failure.message.startswith(message)

    asyncio.run(scene())


def test_an_image_that_breaks_only_in_decoding_holds_nothing(folder):
    data = (folder / "tall.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(data[:-60])

    async def scene():
        budget = ByteBudget(10**7)
        with ThreadPoolExecutor(1) as executor:
            with pytest.raises(RequestFailed) as caught:
                await loader(folder, budget, executor).load(refs("cut.jpg"))
        assert caught.value.failure.message.startswith("cut.jpg: truncated JPEG")
        assert budget.held == 0

    asyncio.run(scene())


@pytest.mark.parametrize(("failures", "answered"), [(1, True), (2, True), (3, False)])
def test_a_passing_failure_is_tried_three_times(folder, failures: int, answered: bool):
    async def scene():
        budget = ByteBudget(10**7)
        with FailsFirst(failures) as executor:
            load = loader(folder, budget, executor).load(refs("small.png"))
            if answered:
                (await load).release()
            else:
                with pytest.raises(RequestFailed, match="store is busy"):
                    await load
        assert executor.times == 0
        assert budget.held == 0

    asyncio.run(scene())


def test_a_lasting_failure_is_tried_once(folder):
    async def scene():
        with Held() as executor:
            executor.go.set()
            with pytest.raises(RequestFailed):
                await loader(folder, ByteBudget(10**7), executor).load(refs("gone.png"))
        assert executor.submitted == 1

    asyncio.run(scene())


def test_rows_of_several_images_take_turns_where_both_do_not_fit(folder):
    async def scene():
        budget = ByteBudget(400 * 100 * 4 * 3 + 10_000)  # one row: two images and one being decoded
        with ThreadPoolExecutor(4) as executor:
            row_loader = loader(folder, budget, executor)

            async def one_row() -> int:
                with await row_loader.load(refs("wide.png", "wide.png")) as loaded:
                    await asyncio.sleep(0)
                    assert budget.held <= budget.total
                    return len(loaded.images)

            rows = asyncio.gather(*(one_row() for _ in range(10)))
            assert await asyncio.wait_for(rows, 30) == [2] * 10
        assert budget.held == 0

    asyncio.run(scene())


def test_an_image_above_the_budget_is_loaded_alone(folder):
    async def scene():
        budget = ByteBudget(1000)
        with ThreadPoolExecutor(4) as executor:
            row_loader = loader(folder, budget, executor)
            small = await row_loader.load(refs("small.png"))
            large = asyncio.create_task(row_loader.load(refs("wide.png")))
            await settle()
            assert not large.done()
            small.release()
            (await asyncio.wait_for(large, 10)).release()
        assert budget.held == 0

    asyncio.run(scene())


def test_a_cancelled_load_holds_nothing(folder):
    async def scene():
        budget = ByteBudget(10**7)
        with ThreadPoolExecutor(1) as free, Held() as held:
            reading = asyncio.create_task(loader(folder, budget, held).load(refs("small.png")))
            other = await budget.reserve(budget.total)
            queued = asyncio.create_task(loader(folder, budget, free).load(refs("small.png")))
            await settle()
            for task in (reading, queued):
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            held.go.set()
        other.release()
        assert budget.held == 0

    asyncio.run(scene())


def test_a_row_without_images_loads_nothing(folder):
    async def scene():
        with ThreadPoolExecutor(1) as executor:
            assert (await loader(folder, ByteBudget(1), executor).load([])).images == ()

    asyncio.run(scene())


def noise(size: int) -> bytes:
    file = BytesIO()
    Image.effect_noise((size, size), 80).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("as_uri", [False, True])
def test_images_in_the_manifest_count_before_their_row_is_loaded(as_uri: bool):
    data = noise(100)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    ref = ImageRef(uri=uri) if as_uri else ImageRef(data=data)

    async def scene():
        memory = ImageMemory(4 * 5 * len(data))  # of what is encoded: room for two rows of two
        with ThreadPoolExecutor(1) as executor:
            row_loader = ImageLoader(
                base="/", memory=memory, executor=executor, limits=LIMITS, target=None
            )
            admitted = [await row_loader.admit([ref, ref]) for _ in range(2)]
            waits = asyncio.create_task(row_loader.admit([ref, ref]))
            await settle()
            assert not waits.done()
            assert memory.encoded.held >= 4 * len(data)
            (await row_loader.load([ref, ref], admitted[0])).release()
            await asyncio.wait_for(waits, 10)
            assert await row_loader.admit([ref, ImageRef(uri="a.png")]) is None
            for held in (admitted[1], await waits):
                held.release()
        assert memory.encoded.held == memory.pixels.held == 0

    asyncio.run(scene())


def test_rows_that_wait_for_room_for_their_pixels_hold_no_one_up(folder):
    """Rows of several images, more than either part of the memory has room for, in any order."""
    for number in range(6):
        (folder / f"{number}.png").write_bytes(noise(40 + 10 * number))

    async def scene():
        memory = ImageMemory(150_000)
        with ThreadPoolExecutor(4) as executor:
            row_loader = ImageLoader(
                base=str(folder), memory=memory, executor=executor, limits=LIMITS, target=None
            )

            async def row(number: int) -> None:
                some = refs(f"{number % 6}.png", f"{(number + 3) % 6}.png", "small.png")
                embedded = [ImageRef(data=noise(30))] * (number % 3)
                all_of_it = embedded if number % 5 == 0 else [*some, *embedded]
                admitted = await row_loader.admit(all_of_it)
                with await row_loader.load(all_of_it, admitted):
                    await asyncio.sleep(0.001 * (number % 4))

            await asyncio.wait_for(asyncio.gather(*map(row, range(60))), PATIENCE)
        assert memory.encoded.held == memory.pixels.held == 0

    asyncio.run(scene())


class Counts(ThreadPoolExecutor):
    """Counts what is submitted."""

    def __init__(self) -> None:
        super().__init__(2)
        self.submitted = 0

    def submit(self, work, /, *args, **kwargs):
        self.submitted += 1
        return super().submit(work, *args, **kwargs)


def test_a_small_image_at_hand_takes_one_turn_of_a_thread_and_a_large_one_is_read_once(folder):
    """``large``: more than a thirty-second part of the memory for pixels."""

    async def scene(ref: ImageRef, pixels: int) -> int:
        budget = ByteBudget(pixels)
        with Counts() as executor:
            loads = loader(folder, budget, executor)
            with await loads.load([ref]) as loaded:
                assert loaded.images[0].size == Size(400, 100)
                assert budget.held == 4 * 400 * 100
            assert budget.held == 0
            assert loads.counters["decoded_images"] == 1
        return executor.submitted

    data = (folder / "wide.png").read_bytes()
    uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    for ref in (ImageRef(uri="wide.png"), ImageRef(data=data), ImageRef(uri=uri)):
        assert asyncio.run(scene(ref, 64 * 320_000)) == 1
        assert asyncio.run(scene(ref, 8 * 320_000)) == 3  # read with its header, measured, decoded


def test_what_is_reserved_for_small_images_holds_no_more_than_the_budget(folder):
    async def scene():
        budget = ByteBudget(32 * 320_000)
        with Counts() as executor:
            loads = loader(folder, budget, executor)
            first = [await loads.load(refs("wide.png")) for _ in range(60)]
            assert budget.held == 60 * 160_000
            waits = [asyncio.ensure_future(loads.load(refs("wide.png"))) for _ in range(5)]
            await settle()
            assert budget.held <= budget.total
            for each in first:
                each.release()
            for each in await asyncio.gather(*waits):
                each.release()
        assert budget.held == 0

    asyncio.run(scene())


def test_a_file_above_what_was_reserved_while_others_grew_too(folder):
    """What is expected of the next image is no longer what was reserved for this one."""
    (folder / "large.png").write_bytes(noise(600))
    (folder / "larger.bin").write_bytes(b"x" * 2**20)

    async def scene():
        memory = ImageMemory(2**30)
        with ThreadPoolExecutor(2) as executor:
            loads = ImageLoader(
                base=str(folder), memory=memory, executor=executor, limits=LIMITS, target=None
            )
            for _ in range(8):
                (await loads.load(refs("small.png"))).release()
            everything = await memory.pixels.reserve(memory.pixels.total)
            large = asyncio.ensure_future(loads.load(refs("large.png")))
            await settle()
            assert 0 < memory.encoded.held < (folder / "large.png").stat().st_size
            with pytest.raises(RequestFailed):
                await loads.load(refs(*["larger.bin"] * 10))
            everything.release()
            with await large as loaded:
                assert loaded.images[0].size == Size(600, 600)
        assert memory.encoded.held == memory.pixels.held == 0

    asyncio.run(scene())


def test_a_data_uri_of_text_beyond_ascii_is_no_image_and_nothing_worse(folder):
    async def scene():
        with ThreadPoolExecutor(1) as executor:
            loads = loader(folder, ByteBudget(10**7), executor)
            row = refs("data:,\u00e9\u7dda", "data:,\u00e9")
            with pytest.raises(RequestFailed) as caught:
                await loads.load(row, await loads.admit(row))
        assert caught.value.failure.code is ErrorCode.IMAGE_UNREADABLE

    asyncio.run(scene())


FAULTS = """
    import asyncio, resource, sys
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path
    from vlmbatch.images.load import ImageLoader, ImageMemory, Limits
    from vlmbatch.records import ImageRef

    async def main(path):
        with ThreadPoolExecutor(4) as threads:
            loader = ImageLoader(
                base="/", memory=ImageMemory(2**28), executor=threads, limits=Limits(), target=None
            )
            for several in (40, 200):
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                turns = asyncio.Semaphore(8)

                async def load():
                    async with turns:
                        (await loader.load([ImageRef(uri=path)])).release()

                await asyncio.gather(*(load() for _ in range(several)))
                faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        print(faults / several)

    asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="the C library is not glibc")
def test_the_pages_of_freed_images_are_used_again(tmp_path):
    """An image of 640 x 480 pixels has 300 pages, and its copy as many."""
    Image.new("RGB", (640, 480), "teal").save(tmp_path / "a.jpg")
    words = [sys.executable, "-c", textwrap.dedent(FAULTS), str(tmp_path / "a.jpg")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 60, "page faults for each image"
