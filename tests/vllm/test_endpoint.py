"""The openai engine against a real ``vllm serve`` on loopback, with the bundled model.

One server for the module; the run is asked through a proxy that has faults, and the server is
killed and started again in the middle of it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.endpoint_faults import FakeEndpoint, Reset, Status, by_chance, files_with, said
from tests.harness import (
    Command,
    assert_adds_up,
    picture,
    read_results,
    until,
    vlmbatch,
    write_manifest,
)
from vlmbatch.engines.openai import OpenAIEngine
from vlmbatch.errors import ErrorCode, Failure, RequestFailed
from vlmbatch.grounding import Size
from vlmbatch.job import EngineSpec
from vlmbatch.models import demo_path
from vlmbatch.records import Completion, LoadedImage, Request, Sampling, Structure, TaskKind

pytestmark = pytest.mark.timeout(1200)

START_SECONDS = 600
KEY = "sk-a-secret-that-is-found-nowhere-0123456789"
SHAPES = ("circle", "square", "triangle")


class Server:
    """``vllm serve`` with the bundled model, in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._log = folder / "serve.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        settings = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "HF_HUB_OFFLINE": "1",
        }
        # As `vllm serve`, which asks for its own version by the name of another build.
        words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        words += ["--model", str(demo_path()), "--host", "127.0.0.1", "--port", str(self._port)]
        words += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*words, "--api-key", KEY],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **settings},
                start_new_session=True,
            )

    def wait(self) -> None:
        until(self._is_up, f"vllm serves ({self._log})", seconds=START_SECONDS)

    def _is_up(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()[-3000:]
        with suppress(OSError):
            urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
            return True
        return False

    def kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("vllm"))
    try:
        server.start()
        server.wait()
        yield server
    finally:
        server.kill()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def ask(server: Server, *requests: Request) -> list[Completion | Failure]:
    async def one(engine: OpenAIEngine, each: Request) -> Completion | Failure:
        try:
            return await engine.generate(each)
        except RequestFailed as error:
            return error.failure

    async def all_of_them() -> list[Completion | Failure]:
        engine = OpenAIEngine(EngineSpec(base_url=server.url), model=str(demo_path()))
        await engine.start()
        try:
            return await asyncio.gather(*(one(engine, each) for each in requests))
        finally:
            await engine.close()

    return asyncio.run(all_of_them())


def request(prompt: str = "describe the picture", **more: Any) -> Request:
    pixels = Image.new("RGB", (64, 64), "red")
    images = (LoadedImage(pixels, Size(64, 64), "red"),)
    return Request(0, 0, 0, "t", TaskKind.TEXT, prompt, prompt, images=images, **more)


def completion(answer: Completion | Failure) -> Completion:
    assert isinstance(answer, Completion), answer
    return answer


def test_reasons_counts_and_special_tokens_are_kept(server: Server) -> None:
    short, boxes = ask(
        server,
        request(sampling=Sampling(max_tokens=2)),
        request("detect: circle, rectangle, triangle"),
    )
    assert completion(short).finish_reason == "length"
    assert completion(short).completion_tokens == 2
    assert (completion(short).prompt_tokens or 0) > 60
    assert completion(boxes).finish_reason == "stop"


def test_a_form_is_held_to(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2, 3]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    structures = [
        Structure(choices=SHAPES),
        Structure(regex="[a-c]{3} [0-9]{2}"),
        Structure(json_schema=json.dumps(schema)),
    ]
    some = Sampling(max_tokens=200, temperature=1.0, seed=5)
    answers = ask(server, *(request(structure=form, sampling=some) for form in structures))
    choice, match, value = (completion(answer).text for answer in answers)
    assert choice in SHAPES
    assert len(match) == 6
    assert set(match[:3]) <= set("abc")
    with suppress(json.JSONDecodeError):  # this model may write spaces until it is cut
        assert json.loads(value)["n"] in (1, 2, 3)
    assert value.lstrip().startswith("{")


def test_stop_seed_and_min_tokens_are_obeyed(server: Server) -> None:
    text = completion(ask(server, request())[0]).text
    word = text.split()[1][:4]
    stopped, again, same, long = ask(
        server,
        request(sampling=Sampling(stop=(word,))),
        *[request(sampling=Sampling(temperature=1.5, seed=3))] * 2,
        request(sampling=Sampling(min_tokens=30, max_tokens=40)),
    )
    assert completion(stopped).text == text[: text.index(word)]
    assert completion(again).text == completion(same).text
    assert (completion(long).completion_tokens or 0) >= 30


def test_a_prompt_that_does_not_fit_is_told_apart(server: Server) -> None:
    long, odd = ask(server, request("word " * 4000), request(sampling=Sampling(temperature=1e9)))
    assert isinstance(long, Failure)
    assert long.code is ErrorCode.PROMPT_TOO_LONG
    assert isinstance(odd, Completion) or odd.code is ErrorCode.ENGINE_FAILED


def test_a_wrong_key_and_a_wrong_model_are_said_before_anything_runs(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write_manifest(tmp_path / "m.parquet", {"id": ["a"]})
    run = ("run", manifest, "-t", "caption", f"--base-url={server.url}", "-o", tmp_path / "out")
    wrong_model = vlmbatch(*run, "-m", "nothing")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another-secret")
    wrong_key = vlmbatch(*run)
    assert wrong_model.exit_code == 2
    assert str(demo_path()) in wrong_model.stderr
    assert wrong_key.exit_code == 1
    assert "(401; " in wrong_key.stderr
    assert "sk-another-secret" not in wrong_key.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_outlives_faults_and_a_server_that_is_killed_and_started_again(
    server: Server, tmp_path: Path
) -> None:
    rows, samples = 60, 2
    colours = ["red", "green", "blue", "yellow"]
    images = [picture(64, 64, colours[number % 4]) for number in range(rows)]
    manifest = tmp_path / "m.parquet"
    write_manifest(manifest, {"image": images, "question": [f"what is {n}?" for n in range(rows)]})
    later = {"retry-after": "0"}
    faults = [Status(429, said("slow"), later), Status(503, said("busy"), later), Reset()]
    script = by_chance(0.15, *faults, seed=7)
    options = [manifest, "-t", "caption", "-t", "vqa", "-o", tmp_path / "out", "--json"]
    options += ["--temperature=0.7", "--seed=1", f"--num-samples={samples}"]
    for task in ("caption", "vqa"):  # this model has not much to say by itself
        options += [f"--choices={task}={','.join(SHAPES)}"]
    with FakeEndpoint(script, key=KEY, upstream=server.url, upstream_key=KEY) as proxy:
        options += [f"--base-url={proxy.url}", "--engine-arg=outage=600"]
        with Command("run", *map(str, options)) as command:
            until(
                lambda: proxy.answered.total() >= 50 or not command.is_running,
                "50 answers",
                seconds=300,
            )
            assert command.is_running, command.wait()
            server.kill()
            killed_at = proxy.answered.total()
            server.start()
            finished = command.wait(START_SECONDS)
    assert finished.exit_code == 0, finished
    summary = finished.json
    assert_adds_up(summary)
    assert killed_at < rows * 2 * samples, "the kill came too late"
    assert (summary["ok"], summary["failed"]) == (rows, 0)
    table = read_results(tmp_path / "out")
    keys = table.select(["row", "request", "sample"]).to_pylist()
    wanted = [(row, r, s) for row in range(rows) for r in range(2) for s in range(samples)]
    assert [(k["row"], k["request"], k["sample"]) for k in keys] == wanted
    assert set(table["status"].to_pylist()) == {"ok"}
    assert set(table["text"].to_pylist()) <= set(SHAPES)
    assert None not in table["completion_tokens"].to_pylist()
    assert None not in table["finish_reason"].to_pylist()
    setbacks = summary["engine_counters"]["endpoint_setbacks"]
    assert setbacks >= 10
    print(f"{len(proxy.bodies)} requests, {setbacks} setbacks, killed after {killed_at} answers")
    assert KEY not in finished.stdout + finished.stderr
    assert not list(files_with(tmp_path, KEY))
