"""What vlmbatch costs on top of the vLLM engine that it feeds, and what sharing an image saves.

Three ways to get the same answers from the same engine settings, in turn, five rounds in one call:

(a) raw: AsyncLLM with full-size RGB images that are decoded in memory already, all requests at once
(b) chat: `LLM.chat`, which opens the files itself
(c) vlmbatch: `vlmbatch run --engine vllm`, from the manifest to finished parts

and (d) five questions per image against the same requests shuffled, without caches. Engine starts
are not counted: of (c) the time from the first worker's readiness to the last commit.

    python benchmarks/engine_overhead.py --images 600 --rounds 5 --write     (make overhead)

The engines of (a) and (b) stay, stopped while others are measured; (c) starts one each time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OUT = os.fdopen(os.dup(1), "w")
"""Ours; vLLM's processes write to descriptor 1."""
TOKENS = 20
SHORT = 4
QUESTIONS = (
    "what shape is in the image?",
    "what is the color of the shape?",
    "is there a circle?",
    "is there a red shape?",
    "does the image contain a rectangle?",
)
PROMPT = "Describe the image briefly."
ENGINE = {
    "dtype": "float32",
    "max_model_len": 512,
    "enforce_eager": True,
    "block_size": 32,
    "max_num_seqs": 64,
    # The bundled model's processor takes 64 x 64 as it is; here it resizes, as most models' do.
    "mm_processor_kwargs": {"do_resize": True},
}


def make_pictures(folder: Path, count: int) -> list[Path]:
    """JPEGs of about 640 x 480 with noise and shapes, so that decoding costs what photos cost."""
    from PIL import Image, ImageDraw, ImageFilter

    rng = random.Random(7)
    folder.mkdir(parents=True)
    paths = []
    for i in range(count):
        width, height = 640 + rng.randrange(-40, 41), 480 + rng.randrange(-40, 41)
        noise = Image.effect_noise((width, height), 60).convert("RGB")
        picture = noise.filter(ImageFilter.GaussianBlur(1.5))
        draw = ImageDraw.Draw(picture)
        x, y = rng.randrange(300), rng.randrange(200)
        draw.ellipse([x, y, x + 250, y + 200], fill=rng.choice(["red", "blue", "green"]))
        path = folder / f"{i:05d}.jpg"
        picture.save(path, quality=88)
        paths.append(path)
    return paths


def write_manifest(folder: Path, paths: list[Path], questions: bool) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {"image": [str(path) for path in paths]}
    if questions:
        columns["questions"] = [list(QUESTIONS)] * len(paths)
    manifest = folder / ("questions.parquet" if questions else "captions.parquet")
    pq.write_table(pa.table(columns), manifest)
    return manifest


# ways (a) and (b): a process each, which starts its engine once and measures when it is told to


def engine_arguments() -> dict[str, Any]:
    from vlmbatch.models import demo_path

    return {"model": str(demo_path()), "limit_mm_per_prompt": {"image": 1}, **ENGINE}


def conversation(picture: Any) -> list[dict[str, Any]]:
    content = [{"type": "image_pil", "image_pil": picture}, {"type": "text", "text": PROMPT}]
    return [{"role": "user", "content": content}]


def raw(paths: list[Path]) -> None:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.renderers.params import ChatParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    params = SamplingParams(
        temperature=0,
        max_tokens=TOKENS,
        min_tokens=TOKENS,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    template = ChatParams(chat_template_kwargs={"add_generation_prompt": True, "tokenize": False})

    async def ask(engine: Any, number: int, picture: Any) -> int:
        _, (prompt,) = await engine.renderer.render_chat_async([conversation(picture)], template)
        async for output in engine.generate(prompt, params, str(number)):
            last = output
        return len(last.outputs[0].token_ids)

    async def serve() -> None:
        arguments = AsyncEngineArgs(**engine_arguments(), disable_log_stats=True)
        engine = AsyncLLM.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)
        await engine.get_supported_tasks()
        pictures = [opened(path) for path in paths]
        await asyncio.gather(*(ask(engine, i, each) for i, each in enumerate(warm_up(pictures))))
        while await asyncio.to_thread(told):
            await engine.reset_mm_cache()
            await engine.reset_prefix_cache()
            started = time.perf_counter()
            tokens = await asyncio.gather(*(ask(engine, i, p) for i, p in enumerate(pictures)))
            report(time.perf_counter() - started, sum(tokens))

    asyncio.run(serve())


def chat(paths: list[Path]) -> None:
    from vllm import LLM, SamplingParams

    model = LLM(**engine_arguments(), disable_log_stats=True)
    params = SamplingParams(temperature=0, max_tokens=TOKENS, min_tokens=TOKENS)
    first = warm_up([opened(path) for path in paths[:64]])
    model.chat([conversation(picture) for picture in first], params, use_tqdm=False)
    while told():
        model.llm_engine.reset_mm_cache()
        model.llm_engine.reset_prefix_cache()
        started = time.perf_counter()
        asked = [conversation(opened(path)) for path in paths]
        outputs = model.chat(asked, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        report(seconds, sum(len(output.outputs[0].token_ids) for output in outputs))


def told() -> bool:
    """Ready; whether to measure once more."""
    print("READY", file=OUT, flush=True)
    return sys.stdin.readline().strip() == "go"


def report(seconds: float, tokens: int) -> None:
    print(json.dumps({"seconds": seconds, "tokens": tokens}), file=OUT, flush=True)


class Engine:
    """The other side: such a process, stopped while others are measured."""

    def __init__(self, way: str, paths: list[Path], log: Path) -> None:
        words = [sys.executable, __file__, "--way", way, "--pictures", str(paths[0].parent)]
        words += ["--images", str(len(paths))]
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                start_new_session=True,
            )
        self._log = log
        self._hear()
        self._signal(signal.SIGSTOP)

    def measure(self) -> dict[str, Any]:
        self._signal(signal.SIGCONT)
        assert self._process.stdin
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        result: dict[str, Any] = json.loads(self._hear())
        self._hear()
        self._signal(signal.SIGSTOP)
        return result

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _hear(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            sys.exit(self._log.read_text()[-3000:])
        return line

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)


def opened(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as picture:
        return picture.convert("RGB")


def warm_up(pictures: list[Any]) -> list[Any]:
    """Mirrored, so that no cache knows the real ones."""
    from PIL import ImageOps

    return [ImageOps.mirror(picture) for picture in pictures[:64]]


def through_vlmbatch(manifest: Path, folder: Path, tokens: int, **changes: Any) -> dict[str, Any]:
    """The command line, as a user types it."""
    output = folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    settings = {**ENGINE, **changes}
    options = ["--dtype", settings.pop("dtype")]
    for name in ("max_model_len", "max_num_seqs"):
        options += [f"--{name.replace('_', '-')}", str(settings.pop(name))]
    for name, value in settings.items():
        text = value if isinstance(value, str) else json.dumps(value)
        options += ["--engine-arg", f"{name}={text}"]
    task = "vqa" if "question" in manifest.name else "caption"
    words = [sys.executable, "-m", "vlmbatch", "run", str(manifest), "-m", "demo", "-t", task]
    words += ["--engine", "vllm", "-o", str(output), "--json", *options]
    words += ["--max-tokens", str(tokens), "--min-tokens", str(tokens)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    summary = json.loads(done.stdout)
    assert summary["failed"] == 0, summary
    return {
        "seconds": summary["seconds"],
        "tokens": summary["completion_tokens"],
        "starved": summary["engine_starved"],
        "counters": summary["engine_counters"],
    }


# the table


def ratio(rounds: list[dict[str, Any]], over: str, under: str) -> dict[str, float]:
    """Of the rates, round by round."""
    each = [one[under]["seconds"] / one[over]["seconds"] for one in rounds]
    return {
        "median": round(statistics.median(each), 3),
        "least": round(min(each), 3),
        "most": round(max(each), 3),
    }


def measure(folder: Path, images: int, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    paths = make_pictures(folder / "pictures", images)
    captions = write_manifest(folder, paths, questions=False)
    engines = {way: Engine(way, paths, folder / f"{way}.log") for way in ("raw", "chat")}
    found = []
    for number in range(rounds):
        one = {}
        order = ["raw", "chat", "vlmbatch"]
        for way in order[number % 3 :] + order[: number % 3]:
            if way == "vlmbatch":
                one[way] = through_vlmbatch(captions, folder, TOKENS)
            else:
                one[way] = engines[way].measure()
            assert one[way]["tokens"] == images * TOKENS, (way, one[way])
            rate = images / one[way]["seconds"]
            say(f"round {number + 1} {way:<9} {rate:6.2f} images/s")
        found.append(one)
    for engine in engines.values():
        engine.close()
    rates = {
        way: round(statistics.median(images / one[way]["seconds"] for one in found), 2)
        for way in ("raw", "chat", "vlmbatch")
    }
    return {
        "images": images,
        "rounds": rounds,
        "images_per_second": rates,
        "vlmbatch_over_raw": ratio(found, "vlmbatch", "raw"),
        "vlmbatch_over_chat": ratio(found, "vlmbatch", "chat"),
        "engine_starved": [one["vlmbatch"]["starved"] for one in found],
    }


def measure_questions(folder: Path, images: int, say: Callable[[str], None]) -> dict[str, Any]:
    """(d) five questions per image, together and sharing caches; then shuffled, without caches."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = sorted((folder / "pictures").iterdir())[:images]
    together = write_manifest(folder, paths, questions=True)
    shared = through_vlmbatch(together, folder, SHORT)
    pairs = [(str(path), question) for path in paths for question in QUESTIONS]
    random.Random(3).shuffle(pairs)
    scattered = folder / "question-by-question.parquet"
    columns = {"image": [path for path, _ in pairs], "question": [q for _, q in pairs]}
    pq.write_table(pa.table(columns), scattered)
    apart = through_vlmbatch(
        scattered, folder, SHORT, enable_prefix_caching=False, mm_processor_cache_gb=0
    )
    say(f"questions: together {shared['seconds']:.1f} s, apart {apart['seconds']:.1f} s")
    return {
        "images": len(paths),
        "questions_per_image": len(QUESTIONS),
        "tokens_per_answer": SHORT,
        "counters": shared["counters"],
        "time_apart_over_together": round(apart["seconds"] / shared["seconds"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="to engine_overhead.json")
    parser.add_argument("--way", choices=["raw", "chat"], help=argparse.SUPPRESS)
    parser.add_argument("--pictures", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.way:
        os.dup2(2, 1)
        paths = sorted(options.pictures.iterdir())[: options.images]
        {"raw": raw, "chat": chat}[options.way](paths)
        return
    with tempfile.TemporaryDirectory(prefix="vlmbatch-overhead-") as name:
        folder = Path(name)
        table = measure(folder, options.images, options.rounds, print)
        table["questions"] = measure_questions(folder, options.images // 3, print)
    table["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    text = json.dumps(table, indent=1) + "\n"
    print(text)
    if options.write:
        (HERE / "engine_overhead.json").write_text(text)


if __name__ == "__main__":
    main()
