"""The openai engine against a small real server that has the faults of real ones.

Waits are never measured: the server counts what it was asked.
"""

from __future__ import annotations

import asyncio
import io
import threading
import time
from base64 import b64decode
from collections.abc import Sequence
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.endpoint_faults import (
    FakeEndpoint,
    Fault,
    Reset,
    Stall,
    Status,
    completion,
    files_with,
    first,
    for_prompt,
    image_urls_of,
    prompt_of,
    said,
)
from tests.harness import Finished, assert_adds_up, read_results, run_json, vlmbatch, write_manifest
from vlmbatch.engines.openai import OpenAIEngine, check
from vlmbatch.errors import EndpointError, ErrorCode, Failure, RequestFailed, UsageError
from vlmbatch.grounding import Size
from vlmbatch.images.urls import ImageUrls
from vlmbatch.job import EngineSpec
from vlmbatch.records import (
    Completion,
    ImageRef,
    LoadedImage,
    Request,
    Sampling,
    Structure,
    TaskKind,
)

KEY = "sk-a-secret-that-is-found-nowhere-0123456789"


def engine_for(endpoint: FakeEndpoint, *, model: str = "tiny", **settings: Any) -> OpenAIEngine:
    spec = EngineSpec(name="openai", base_url=endpoint.url, **settings)
    return OpenAIEngine(spec, model=model)


def request(prompt: str, row: int = 0, **more: Any) -> Request:
    return Request(row, 0, 0, "vqa", TaskKind.VQA, prompt, prompt, **more)


def image(width: int = 8, height: int = 6, key: str = "red") -> LoadedImage:
    return LoadedImage(Image.new("RGB", (width, height), "red"), Size(width, height), key)


def ask(engine: OpenAIEngine, requests: Sequence[Request]) -> list[Completion | Failure]:
    """All at once; a failure in the place of its completion."""

    async def one(each: Request) -> Completion | Failure:
        try:
            return await engine.generate(each)
        except RequestFailed as error:
            return error.failure

    async def all_of_them() -> list[Completion | Failure]:
        try:
            await engine.start()
            return await asyncio.gather(*map(one, requests))
        finally:
            await engine.close()

    return asyncio.run(all_of_them())


def failure_of(endpoint: FakeEndpoint, **settings: Any) -> Failure:
    (failure,) = ask(engine_for(endpoint, **settings), [request("why?")])
    assert isinstance(failure, Failure), failure
    return failure


def body_for(asked: Request, *, owner: str = "vllm", **settings: Any) -> dict[str, Any]:
    """What the server gets for this request."""
    with FakeEndpoint(owner=owner) as endpoint:
        (answer,) = ask(engine_for(endpoint, **settings), [asked])
    assert isinstance(answer, Completion), answer
    (body,) = endpoint.bodies
    return body


# what is sent


def test_a_request_is_one_chat_completion_with_the_image_before_the_text() -> None:
    asked = request("what is this?", system="Be brief.", images=(image(),))
    body = body_for(asked, owner="someone")
    assert body.keys() == {"model", "messages", "temperature", "max_tokens"}
    assert body["model"] == "tiny"
    assert (body["temperature"], body["max_tokens"]) == (0.0, 256)
    system, user = body["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    assert user["role"] == "user"
    assert [part["type"] for part in user["content"]] == ["image_url", "text"]
    assert user["content"][1]["text"] == "what is this?"


def test_sampling_is_sent_as_it_was_asked_for() -> None:
    sampling = Sampling(
        temperature=0.5,
        top_p=0.9,
        max_tokens=17,
        min_tokens=3,
        seed=11,
        repetition_penalty=1.1,
        stop=("END", "\n"),
    )
    body = body_for(request("?", sampling=sampling))
    wanted = {
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 17,
        "min_tokens": 3,
        "seed": 11,
        "repetition_penalty": 1.1,
        "stop": ["END", "\n"],
    }
    assert {key: body[key] for key in wanted} == wanted


def test_a_vllm_server_is_told_to_keep_special_tokens_and_not_to_take_its_own_defaults() -> None:
    body = body_for(request("?"))
    assert body["skip_special_tokens"] is False
    assert body["spaces_between_special_tokens"] is False
    assert (body["top_p"], body["top_k"], body["repetition_penalty"]) == (1.0, 0, 1.0)


def test_the_dialect_and_the_fields_can_be_set() -> None:
    args = {"dialect": "openai", "max_tokens_field": "max_completion_tokens", "omit": "temperature"}
    body = body_for(request("?"), args=args)
    assert body.keys() == {"model", "messages", "max_completion_tokens"}


@pytest.mark.parametrize(
    ("structure", "key", "value"),
    [
        (Structure(choices=("a", "b")), "structured_outputs", {"choice": ["a", "b"]}),
        (Structure(regex="[0-9]+"), "structured_outputs", {"regex": "[0-9]+"}),
        (
            Structure(json_schema='{"type": "object"}'),
            "response_format",
            {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True},
            },
        ),
    ],
)
def test_a_form_is_asked_for_in_the_words_of_the_endpoint(
    structure: Structure, key: str, value: object
) -> None:
    assert body_for(request("?", structure=structure))[key] == value


@pytest.mark.parametrize(
    ("size", "args", "kind"),
    [
        ((256, 256), {}, "png"),
        ((257, 256), {}, "jpeg"),
        ((257, 256), {"image_format": "png"}, "png"),
        ((8, 6), {"image_format": "jpeg"}, "jpeg"),
    ],
)
def test_an_image_goes_as_a_data_uri(size: tuple[int, int], args: Any, kind: str) -> None:
    body = body_for(request("?", images=(image(*size),)), args=args)
    (uri,) = image_urls_of(body)
    head, _, payload = uri.partition(",")
    assert head == f"data:image/{kind};base64"
    sent = Image.open(io.BytesIO(b64decode(payload)))
    assert (sent.format, sent.size) == (kind.upper(), size)


def test_an_image_goes_as_its_url_and_is_not_read_here() -> None:
    async def load() -> LoadedImage:
        images = await ImageUrls().load([ImageRef("https://pictures.test/a.jpg?sig=s")])
        return images.images[0]

    by_url = asyncio.run(load())
    body = body_for(request("?", images=(by_url,)), image_transport="url")
    assert image_urls_of(body) == ["https://pictures.test/a.jpg?sig=s"]


# what comes back


def test_the_answer_keeps_the_reason_and_the_counts() -> None:
    with FakeEndpoint() as endpoint:
        assert ask(engine_for(endpoint), [request("who?")]) == [
            Completion("re: who?", "stop", 7, 3)
        ]


def test_an_answer_without_usage_is_an_answer() -> None:
    bare = {"choices": [{"message": {"content": "yes"}}]}
    with FakeEndpoint(first(Status(200, bare))) as endpoint:
        assert ask(engine_for(endpoint), [request("?")]) == [Completion("yes", "unknown")]


@pytest.mark.parametrize("count", [-1, 2**31, 10**12, 1.5, "7", None])
def test_a_count_that_no_column_can_hold_is_left_out(count: object) -> None:
    usage = {"prompt_tokens": count, "completion_tokens": 3}
    odd = {"choices": [{"message": {"content": "yes"}}], "usage": usage}
    with FakeEndpoint(first(Status(200, odd))) as endpoint:
        assert ask(engine_for(endpoint), [request("?")]) == [Completion("yes", "unknown", None, 3)]


def test_a_refusal_fails_with_what_was_said() -> None:
    refusal = completion(None, refusal="I cannot help with that.")
    with FakeEndpoint(first(Status(200, refusal))) as endpoint:
        failure = failure_of(endpoint)
    assert failure.code is ErrorCode.ENGINE_FAILED
    assert "I cannot help with that." in failure.message
    assert len(endpoint.bodies) == 1


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 512 tokens. However, your prompt contains at "
        "least 257 input tokens, which exceeds this limit even without any output tokens.",
        "The decoder prompt (length 600) is longer than the maximum model length of 512.",
        "Input length (600) exceeds model's maximum context length (512).",
    ],
)
def test_a_prompt_that_is_too_long_is_known_by_the_words(message: str) -> None:
    with FakeEndpoint(first(Status(400, said(message)))) as endpoint:
        failure = failure_of(endpoint)
    assert failure.code is ErrorCode.PROMPT_TOO_LONG
    assert not failure.retryable


def test_a_prompt_that_is_too_long_is_known_by_its_code() -> None:
    with FakeEndpoint(first(Status(400, said("no.", "context_length_exceeded")))) as endpoint:
        assert failure_of(endpoint).code is ErrorCode.PROMPT_TOO_LONG


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_what_the_endpoint_refuses_is_asked_once(status: int) -> None:
    with FakeEndpoint(first(Status(status, said("this picture is odd")))) as endpoint:
        failure = failure_of(endpoint)
    assert failure.code is ErrorCode.ENGINE_FAILED
    assert "this picture is odd" in failure.message
    assert not failure.retryable
    assert len(endpoint.bodies) == 1


# what passes

_LATER = {"retry-after": "0"}


@pytest.mark.parametrize(
    "fault",
    [
        Status(429, said("slow down"), _LATER),
        Status(429, said("slow down"), {"retry-after": formatdate(0, usegmt=True)}),
        Status(503, "loading the model", _LATER),
        Status(503, said("later"), {"retry-after": "nonsense"}),
        Status(502, "<html>Bad Gateway</html>"),
        Status(504, ""),
        Status(500, said("an accident")),
        Status(408, said("too slow")),
        Status(200, "not JSON"),
        Status(200, {"error": {"message": "upstream"}}),
        Reset(),
    ],
    ids=str,
)
def test_what_passes_is_asked_again_until_it_is_answered(fault: Fault) -> None:
    with FakeEndpoint(first(fault, fault)) as endpoint:
        assert ask(engine_for(endpoint), [request("q")]) == [Completion("re: q", "stop", 7, 3)]
    assert len(endpoint.bodies) == 3
    assert endpoint.answered == {"q": 1}


def test_a_server_that_is_killed_and_started_again_loses_and_fails_nothing() -> None:
    prompts = [f"q{number}" for number in range(60)]
    endpoint: FakeEndpoint

    killed = threading.Event()

    def kill_and_start_again() -> None:
        endpoint.down()
        killed.set()
        threading.Event().wait(1.0)
        endpoint.up()

    def killed_at_20(number: int, _body: dict[str, Any]) -> Fault | None:
        if number == 20:
            threading.Thread(target=kill_and_start_again).start()
        return Stall() if number >= 20 and not killed.is_set() else None

    with FakeEndpoint(killed_at_20) as endpoint:
        answers = ask(engine_for(endpoint), [request(prompt) for prompt in prompts])
    assert answers == [Completion(f"re: {prompt}", "stop", 7, 3) for prompt in prompts]
    assert set(endpoint.answered) == set(prompts)


def test_a_request_that_fails_the_endpoint_each_time_fails_alone() -> None:
    script = for_prompt("poison", Status(500, said("a bug in the server")))
    with FakeEndpoint(script) as endpoint:
        answers = ask(engine_for(endpoint), [request(p) for p in ("a", "poison", "b")])
    assert [isinstance(answer, Completion) for answer in answers] == [True, False, True]
    failure = answers[1]
    assert isinstance(failure, Failure)
    assert failure.code is ErrorCode.ENGINE_FAILED
    assert "6 times" in failure.message
    assert "a bug in the server" in failure.message
    assert sum(prompt_of(body) == "poison" for body in endpoint.bodies) == 6


def test_a_request_without_an_answer_in_time_may_be_asked_again() -> None:
    with FakeEndpoint(first(Stall())) as endpoint:
        failure = failure_of(endpoint, args={"timeout": "0.2"})
    assert failure.code is ErrorCode.ENGINE_TIMEOUT
    assert failure.retryable
    assert "0.2 s" in failure.message


def test_an_endpoint_that_says_later_for_too_long_stops_the_run() -> None:
    later = Status(429, said("out of tokens today"), _LATER)
    with (
        FakeEndpoint(lambda _number, _body: later) as endpoint,
        pytest.raises(EndpointError) as stopped,
    ):
        ask(engine_for(endpoint, args={"outage": "0.5"}), [request(str(n)) for n in range(5)])
    assert endpoint.url in stopped.value.message
    assert "out of tokens today" in stopped.value.message
    assert "outage" in str(stopped.value.hint)


# how many at once


def test_no_more_are_out_than_asked_for() -> None:
    with FakeEndpoint() as endpoint:
        ask(engine_for(endpoint, concurrency=3), [request(str(n)) for n in range(40)])
    assert endpoint.most_at_once <= 3
    assert len(endpoint.answered) == 40


def test_a_wish_to_be_left_alone_holds_for_all_requests() -> None:
    """While the pause of one 429 lasts nobody is sent, so that a server that refuses whoever comes
    too early counts no more refusals than requests that were out when it spoke."""
    first_came: list[float] = []

    def script(_number: int, _body: dict[str, Any]) -> Fault | None:
        now = time.monotonic()
        first_came.append(now)
        if now - first_came[0] < 0.9:  # nobody who waits is here before a second is over
            return Status(429, said("slow"), {"retry-after": "1"})
        return None

    with FakeEndpoint(script) as endpoint:
        answers = ask(engine_for(endpoint, concurrency=4), [request(str(n)) for n in range(20)])
    assert all(isinstance(answer, Completion) for answer in answers)
    assert len(endpoint.bodies) <= 20 + 4


# what stops the run


def start(endpoint: FakeEndpoint, **settings: Any) -> None:
    ask(engine_for(endpoint, **settings), [])


def test_a_wrong_key_stops_the_run_and_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FakeEndpoint(key="another") as endpoint, pytest.raises(EndpointError) as stopped:
        start(endpoint)
    assert "Incorrect API key provided: [key]" in stopped.value.message
    assert "OPENAI_API_KEY" in stopped.value.message
    assert KEY not in str(stopped.value)


def test_a_missing_key_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with FakeEndpoint(key="another") as endpoint, pytest.raises(EndpointError) as stopped:
        start(endpoint)
    assert "OPENAI_API_KEY is not set" in stopped.value.message


def test_a_key_that_is_withdrawn_in_the_middle_stops_the_run() -> None:
    script = first(Status(403, said("no longer")))
    with FakeEndpoint(script) as endpoint, pytest.raises(EndpointError, match="no longer"):
        ask(engine_for(endpoint), [request("?")])


def test_a_model_that_the_endpoint_does_not_have_is_named_with_those_it_has() -> None:
    with FakeEndpoint(models=("a", "b")) as endpoint, pytest.raises(UsageError) as stopped:
        start(endpoint, model="c")
    assert "no model 'c'" in stopped.value.message
    assert "a, b" in stopped.value.message


def test_a_model_that_is_only_missing_when_it_is_asked_stops_the_run() -> None:
    script = first(Status(404, said("The model `tiny` does not exist.", "model_not_found")))
    with (
        FakeEndpoint(script, owner="someone") as endpoint,
        pytest.raises(EndpointError, match="does not exist"),
    ):
        ask(engine_for(endpoint), [request("?")])


def test_an_address_without_an_api_stops_the_run() -> None:
    with FakeEndpoint() as endpoint:
        engine = OpenAIEngine(EngineSpec(base_url=f"{endpoint.url}/api"), model="tiny")
        with pytest.raises(EndpointError, match="is not there"):
            ask(engine, [request("?")])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "needs the address"),
        ({"base_url": "127.0.0.1:8000/v1"}, "no http"),
        ({"base_url": "ftp://host/v1"}, "no http"),
        ({"base_url": "http://host:port/v1"}, "no http"),
        ({"base_url": f"https://me:{KEY}@host/v1"}, "more than an address"),
        ({"base_url": f"https://host/v1?key={KEY}"}, "more than an address"),
        ({"base_url": "http://host", "api_key_env": KEY}, "no name of an environment variable"),
        ({"base_url": "http://host", "concurrency": 2000}, "1000"),
        ({"base_url": "http://host", "args": {"outtage": "1"}}, "outtage"),
        ({"base_url": "http://host", "args": {"api_key": KEY}}, "api_key"),
        ({"base_url": "http://host", "args": {"timeout": "soon"}}, "timeout"),
        ({"base_url": "http://host", "args": {"image_format": "gif"}}, "auto, png, jpeg"),
        ({"base_url": "http://host", "args": {"omit": "model"}}, "its model"),
    ],
)
def test_settings_that_cannot_be_are_refused_without_their_secrets(
    settings: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UsageError) as refused:
        check(EngineSpec(name="openai", **settings))
    assert problem in refused.value.message
    assert KEY not in str(refused.value)


# whole runs


def asked_of(endpoint: FakeEndpoint, folder: Path, *more: str, rows: int = 12) -> Finished:
    manifest = folder / "m.parquet"
    if not manifest.exists():
        write_manifest(manifest, {"question": [f"q{number}" for number in range(rows)]})
    options = ["-t", "vqa", f"--base-url={endpoint.url}", "-o", str(folder / "out"), "--json"]
    return vlmbatch("run", manifest, *options, *more)


def test_a_run_takes_the_only_model_and_waits_out_what_passes(tmp_path: Path) -> None:
    faults = first(None, Status(429, said("slow"), _LATER), Reset(), Status(503, "", _LATER))  # type: ignore[arg-type]
    with FakeEndpoint(faults) as endpoint:
        done = asked_of(endpoint, tmp_path, "--engine-arg=outage=60")
        again = asked_of(endpoint, tmp_path)
    assert done.exit_code == 0, done
    assert_adds_up(done.json)
    assert (done.json["ok"], done.json["failed"]) == (12, 0)
    assert (done.json["model"], done.json["engine"]) == ("tiny", "openai")
    table = read_results(tmp_path / "out")
    assert table["raw"].to_pylist() == [f"re: q{number}" for number in range(12)]
    assert set(table["finish_reason"].to_pylist()) == {"stop"}
    assert set(table["prompt_tokens"].to_pylist()) == {7}
    assert endpoint.answered == {f"q{number}": 1 for number in range(12)}
    assert again.exit_code == 0, again
    assert again.json["skipped"] == 12


def test_another_address_goes_on_with_the_run_and_another_model_does_not(tmp_path: Path) -> None:
    with FakeEndpoint() as one, FakeEndpoint(models=("tiny", "other")) as two:
        assert asked_of(one, tmp_path, "--limit=5").exit_code == 0
        elsewhere = asked_of(two, tmp_path)
        refused = asked_of(two, tmp_path, "-m", "other")
    assert elsewhere.exit_code == 0, elsewhere
    assert (elsewhere.json["skipped"], elsewhere.json["ok"]) == (5, 7)
    assert (len(one.answered), len(two.answered)) == (5, 7)
    assert refused.exit_code == 2
    assert "model: was 'tiny', now 'other'" in refused.stderr


def test_a_resume_speaks_as_the_run_began(tmp_path: Path) -> None:
    with FakeEndpoint() as one, FakeEndpoint(owner="someone") as two:
        assert asked_of(one, tmp_path, "--limit=1").exit_code == 0
        done = asked_of(two, tmp_path, "--limit=2")
    assert done.exit_code == 0, done
    assert "skip_special_tokens" in two.bodies[0]


def test_several_models_are_a_choice_of_the_user(tmp_path: Path) -> None:
    with FakeEndpoint(models=("a", "b")) as endpoint:
        refused = asked_of(endpoint, tmp_path)
    assert refused.exit_code == 2
    assert "a, b" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_an_endpoint_that_is_not_up_stops_a_new_run_before_it_begins(tmp_path: Path) -> None:
    with FakeEndpoint() as endpoint:
        endpoint.down()
        stopped = asked_of(endpoint, tmp_path)
    assert stopped.exit_code == 1
    assert endpoint.url in stopped.stderr
    assert not (tmp_path / "out").exists()


def test_a_form_that_only_vllm_knows_is_refused_elsewhere(tmp_path: Path) -> None:
    with FakeEndpoint(owner="someone") as endpoint:
        refused = asked_of(endpoint, tmp_path, "--choices=yes,no")
    assert refused.exit_code == 2
    assert "dialect=vllm" in refused.stderr


def test_what_was_answered_before_the_endpoint_went_away_is_kept(tmp_path: Path) -> None:
    def gone_after_8(number: int, _body: dict[str, Any]) -> Fault | None:
        return None if number < 8 else Status(401, said("the key has expired"))

    with FakeEndpoint(gone_after_8) as endpoint:
        stopped = asked_of(endpoint, tmp_path, "--concurrency=1")
    assert stopped.exit_code == 1
    assert "the key has expired" in stopped.stderr
    with FakeEndpoint() as another:
        done = asked_of(another, tmp_path)
    assert done.exit_code == 0, done
    assert done.json["skipped"] == 8
    assert len(another.answered) == 4


def test_the_key_is_stored_and_printed_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    quoted = Status(400, said(f"bad request by {KEY}"))
    with FakeEndpoint(first(quoted, Status(500, f"key {KEY}")), key=KEY) as endpoint:
        done = asked_of(endpoint, tmp_path, "--api-key-env=MY_KEY", "--concurrency=1")
        monkeypatch.setenv("MY_KEY", f"{KEY}-expired")
        stopped = asked_of(endpoint, tmp_path, "--api-key-env=MY_KEY", "--overwrite")
    assert done.exit_code == 0, done
    assert (done.json["ok"], done.json["failed"]) == (11, 1)
    assert stopped.exit_code == 1
    assert "[key]" in stopped.stderr
    for text in (done.stdout, done.stderr, stopped.stdout, stopped.stderr):
        assert KEY not in text
    assert not list(files_with(tmp_path, KEY))
    assert run_json(tmp_path / "out")["job"]["engine"]["api_key_env"] == "MY_KEY"


def test_a_variable_that_is_not_set_is_not_repeated(tmp_path: Path) -> None:
    with FakeEndpoint() as endpoint:
        stopped = asked_of(endpoint, tmp_path, "--api-key-env=deadbeefdeadbeef")
    assert stopped.exit_code == 1
    assert "deadbeef" not in stopped.stderr
    assert not (tmp_path / "out").exists()


def test_images_go_as_urls_and_a_row_without_one_fails(tmp_path: Path) -> None:
    images = ["https://pictures.test/a.jpg?sig=secret", "b.jpg", "http://pictures.test/c.png"]
    write_manifest(tmp_path / "m.parquet", {"image": images, "question": ["a", "b", "c"]})
    with FakeEndpoint(for_prompt("c", Status(400, said(f"cannot fetch {images[2]}")))) as endpoint:
        done = asked_of(endpoint, tmp_path, "--image-transport=url", "--max-failure-rate=1")
        boxes = vlmbatch(
            *("run", tmp_path / "m.parquet", "-t", "detect", "--labels", "cat"),
            *(f"--base-url={endpoint.url}", "--image-transport=url", "-o", tmp_path / "boxes"),
        )
    assert done.exit_code == 0, done
    sent = {prompt_of(body): image_urls_of(body) for body in endpoint.bodies}
    assert sent == {"a": [images[0]], "c": [images[2]]}
    good, local, unfetched = read_results(tmp_path / "out").to_pylist()
    assert good["text"] == "re: a"
    assert (good["image"], good["image_width"]) == ("https://pictures.test/a.jpg", None)
    assert local["error"]["code"] == "bad_row"
    assert "b.jpg" in local["error"]["message"]
    assert "cannot fetch [address]" in unfetched["error"]["message"]
    assert boxes.exit_code == 2
    assert "--image-transport inline" in boxes.stderr
