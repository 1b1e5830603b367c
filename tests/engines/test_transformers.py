"""The transformers engine, on a real Idefics3 of random weights (tests/tiny_models.py)."""

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.tiny_models import CONTEXT, build_idefics3, build_kosmos2, build_llava
from vlmbatch.engines.transformers import TransformersEngine, load
from vlmbatch.errors import EngineDead, EngineStartError, ErrorCode, RequestFailed, Stage
from vlmbatch.grounding import Size
from vlmbatch.records import IMAGE, Completion, LoadedImage, Request, Sampling, TaskKind

pytest.importorskip("torch", reason="the transformers engine needs torch")
pytest.importorskip("transformers", reason="the transformers engine needs transformers")

Outcome = Completion | BaseException

IMAGE_TOKENS = 19  # 16 of the image, three around them


def test_batched_answers_equal_those_given_one_by_one(tiny_idefics3: Path) -> None:
    requests = [
        ask("what is this" + "?" * (7 * i % 11), picture(i, 40 + 9 * (i % 3), 60)) for i in range(9)
    ]
    together = answers(tiny_idefics3, requests, batch_size=4)
    alone = [answers(tiny_idefics3, [request])[0] for request in requests[:3]]
    assert together == answers(tiny_idefics3, requests, batch_size=1)
    assert together[:3] == alone
    assert len({completion.text for completion in together}) > 1


def test_forty_requests_at_once_get_one_answer_each(tiny_idefics3: Path) -> None:
    requests = [ask(f"number {i}", picture(i)) for i in range(40)]
    together = answers(tiny_idefics3, requests, batch_size=16)
    by_length = answers(tiny_idefics3, requests[::-1], batch_size=7)[::-1]
    assert together == by_length


def test_requests_with_other_numbers_of_images_are_answered_side_by_side(
    tiny_idefics3: Path,
) -> None:
    requests = [ask("compare", *(picture(i) for i in range(count))) for count in (2, 0, 1, 3, 2)]
    together = answers(tiny_idefics3, requests)
    words = 25  # without an image the template writes one space more
    assert [done.prompt_tokens for done in together] == [
        words + (IMAGE_TOKENS * count - 1 if count else 0) for count in (2, 0, 1, 3, 2)
    ]
    assert together == answers(tiny_idefics3, requests, batch_size=1)


def test_the_order_of_the_images_matters(tiny_idefics3: Path) -> None:
    black, white = picture_of("black"), picture_of("white")
    first, second = answers(tiny_idefics3, [ask("?", black, white), ask("?", white, black)])
    assert first.text != second.text


def test_one_bad_request_fails_alone(tiny_idefics3: Path) -> None:
    requests = [ask(f"number {i}", picture(i)) for i in range(8)]
    asked = [*requests[:5], with_stray_placeholder(requests[5]), *requests[6:]]
    outcomes = asyncio.run(outcomes_of(tiny_idefics3, asked, batch_size=8))
    good = answers(tiny_idefics3, requests)
    assert [*outcomes[:5], *outcomes[6:]] == [*good[:5], *good[6:]]
    failure = failure_of(outcomes[5])
    assert (failure.code, failure.stage) == (ErrorCode.ENGINE_FAILED, Stage.PROMPT)
    assert not failure.retryable
    assert "<image> tokens in the prompts" in failure.message
    assert "\n" not in failure.message


def test_a_prompt_above_the_context_fails_alone(tiny_idefics3: Path) -> None:
    asked = [ask("short", picture(1)), ask("long " * CONTEXT, picture(2)), ask("?", picture(3))]
    outcomes = asyncio.run(outcomes_of(tiny_idefics3, asked))
    failure = failure_of(outcomes[1])
    assert (failure.code, failure.stage) == (ErrorCode.PROMPT_TOO_LONG, Stage.PROMPT)
    assert f"the model takes {CONTEXT - 1}" in failure.message
    assert isinstance(outcomes[0], Completion)
    assert isinstance(outcomes[2], Completion)


def test_an_answer_ends_with_the_context_whatever_its_neighbours_are(
    tiny_idefics3: Path, tmp_path: Path
) -> None:
    unending = without_end(tiny_idefics3, tmp_path / "unending")
    requests = [
        ask("a" * length, sampling=Sampling(max_tokens=CONTEXT)) for length in (1, CONTEXT // 2)
    ]
    for done in answers(unending, requests, batch_size=2):
        assert done.prompt_tokens is not None
        assert done.completion_tokens == CONTEXT - done.prompt_tokens
        assert done.finish_reason == "length"


def test_max_tokens_ends_an_answer_with_length(tiny_idefics3: Path) -> None:
    (cut,) = answers(tiny_idefics3, [ask("?", picture(1), sampling=Sampling(max_tokens=3))])
    assert (cut.finish_reason, cut.completion_tokens) == ("length", 3)


def test_min_tokens_keeps_an_answer_from_ending(tiny_idefics3: Path, tmp_path: Path) -> None:
    silent = ending_at_once(tiny_idefics3, tmp_path / "silent")
    exactly = Sampling(min_tokens=20, max_tokens=20)
    requests = [ask("describe" + "?" * i, picture(i), sampling=exactly) for i in range(3)]
    for done in answers(silent, requests):
        assert (done.finish_reason, done.completion_tokens) == ("length", 20)
    (five,) = answers(silent, [ask("?", sampling=Sampling(min_tokens=5, max_tokens=20))])
    assert (five.finish_reason, five.completion_tokens) == ("stop", 6)


def test_the_repetition_penalty_changes_answers_and_not_by_the_batch(
    tiny_idefics3: Path, tmp_path: Path
) -> None:
    unending = without_end(tiny_idefics3, tmp_path / "unending")
    plain, strict = Sampling(max_tokens=40), Sampling(max_tokens=40, repetition_penalty=1.8)

    def asked(sampling: Sampling) -> list[Request]:
        return [ask("a" * (9 * i + 1), picture(i), sampling=sampling) for i in range(4)]

    together = answers(unending, asked(strict), batch_size=4)
    assert together == answers(unending, asked(strict), batch_size=1)
    for repeats, varies in zip(answers(unending, asked(plain)), together, strict=True):
        assert varies.text != repeats.text


def test_the_repetition_penalty_is_that_of_transformers(tiny_idefics3: Path) -> None:
    from transformers import GenerationConfig

    checkpoint = load_tiny(tiny_idefics3)
    sampling = Sampling(max_tokens=30, repetition_penalty=1.5)
    request = ask("what is this?", picture(3), sampling=sampling)
    inputs = checkpoint.prepare([request])
    theirs = GenerationConfig(max_new_tokens=30, repetition_penalty=1.5, **checkpoint._token_ids)
    output = checkpoint._model.generate(**inputs.tensors, generation_config=theirs)
    ids = output[0, inputs.tensors["input_ids"].shape[1] :].tolist()
    (ours,) = checkpoint.answer(inputs, lambda: False)
    assert ours == checkpoint._completion(ids, inputs.lengths[0], cut=False)


def test_an_answer_ends_before_a_stop_text(tiny_idefics3: Path, tmp_path: Path) -> None:
    unending = without_end(tiny_idefics3, tmp_path / "unending")
    prompts = ["what?", "what is it?", "describe the red circle"]

    def asked(*stop: str) -> list[Request]:
        sampling = Sampling(max_tokens=40, stop=stop)
        return [ask(text, picture(i), sampling=sampling) for i, text in enumerate(prompts)]

    whole = answers(unending, asked())
    text = whole[0].text
    at = next(i for i in range(8, len(text)) if text.find(text[i : i + 2]) == i)
    stop = text[at : at + 2]
    for size in (1, 3):
        ended = answers(unending, asked("never said", stop), batch_size=size)
        for full, done in zip(whole, ended, strict=True):
            before, found, _ = full.text.partition(stop)
            assert (done.text, done.finish_reason) == (before, "stop" if found else "length")
            assert done.completion_tokens is not None
            assert (done.completion_tokens < 40) == bool(found)
    assert ended[0].finish_reason == "stop"


def test_the_end_of_turn_token_ends_an_answer_with_stop_and_is_cut_off(
    tiny_idefics3: Path, tmp_path: Path
) -> None:
    silent = ending_at_once(tiny_idefics3, tmp_path / "silent")
    requests = [ask("describe" + "?" * i, picture(i)) for i in range(4)]
    for done in answers(silent, requests):
        assert (done.finish_reason, done.completion_tokens) == ("stop", 1)
        assert done.text == ""


def test_special_tokens_inside_an_answer_are_kept(tiny_idefics3: Path) -> None:
    checkpoint = load_tiny(tiny_idefics3)
    vocabulary = checkpoint._tokenizer.get_vocab()
    ids = [vocabulary[token] for token in ("<global-img>", "a", "<end_of_utterance>", "<pad>")]
    assert checkpoint._completion(ids, 5, cut=False) == Completion("<global-img>a", "stop", 5, 3)


def test_the_prompt_is_worded_by_the_chat_template(tiny_idefics3: Path) -> None:
    checkpoint = load_tiny(tiny_idefics3)
    plain = ask("what?", picture(1), picture(2))
    assert checkpoint.render(plain) == (
        "<|im_start|>User:<image><image>what?<end_of_utterance>\nAssistant:"
    )
    assert checkpoint.render(replace(plain, system="Be short.")) == (
        "<|im_start|>System: Be short.<end_of_utterance>\n"
        "User:<image><image>what?<end_of_utterance>\nAssistant:"
    )


def test_a_system_prompt_reaches_the_model(tiny_idefics3: Path) -> None:
    plain = ask("what?", picture(1))
    without, given = answers(tiny_idefics3, [plain, replace(plain, system="Be short.")])
    assert without.prompt_tokens is not None
    assert given.prompt_tokens is not None
    assert given.prompt_tokens > without.prompt_tokens


def test_without_a_chat_template_the_images_stand_before_the_raw_prompt(tmp_path: Path) -> None:
    folder = build_idefics3(tmp_path / "plain", chat_template=None)
    checkpoint = load_tiny(folder)
    request = ask("caption en", picture(1), picture(2), system="unused")
    assert checkpoint.render(request) == "<image><image>caption en"
    assert isinstance(answers(folder, [request])[0], Completion)


def test_a_template_for_text_alone_gets_the_images_as_placeholders(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    checkpoint = load_tiny(build_idefics3(tmp_path / "text", chat_template=template))
    assert checkpoint.render(ask("what?", picture(1))) == "user: <image>what?\nassistant:"


def test_kosmos2_places_images_itself(tmp_path: Path) -> None:
    folder = build_kosmos2(tmp_path / "kosmos2")
    assert load_tiny(folder).render(ask("An image of", picture(1))) == "An image of"


def test_kosmos2_is_asked_equal_prompts_together_and_answers_as_one_by_one(tmp_path: Path) -> None:
    folder = build_kosmos2(tmp_path / "kosmos2")
    captions = [ask("An image of", picture(i)) for i in range(12)]
    questions = [ask("Question: what?" + "?" * (i % 5), picture(i)) for i in range(12)]
    requests = [request for pair in zip(captions, questions, strict=True) for request in pair]
    batches: list[int] = []

    async def scenario() -> list[Outcome]:
        async with started(folder, batch_size=6) as engine:
            assert engine._model is not None
            counts_batches(engine._model._model, batches)
            return await gathered(engine, requests)

    assert asyncio.run(scenario()) == answers(folder, requests, batch_size=1)
    assert batches.count(6) == 2  # the captions
    assert sum(batches) == 24
    assert max(batches) == 6


def test_without_a_chat_template_a_request_is_put_into_its_familys_frame(tmp_path: Path) -> None:
    checkpoint = load_tiny(build_llava(tmp_path / "plain", chat_template=None))
    checkpoint.frame = f"USER: {IMAGE}\n{{text}} ASSISTANT:"
    assert checkpoint.render(ask("what {text}?", picture(1), picture(2))) == (
        "USER: <image><image>\nwhat {text}? ASSISTANT:"
    )
    whole = ask(f"{IMAGE}caption en", picture(1))
    assert checkpoint.render(whole) == "<image>caption en"
    checkpoint = load_tiny(build_llava(tmp_path / "templated"))
    checkpoint.frame = "unused"
    assert checkpoint.render(ask("what?", picture(1))) == "USER: <image>\nwhat? ASSISTANT:"


def test_greedy_answers_ignore_the_sampling_of_the_checkpoint(
    tiny_idefics3: Path, tmp_path: Path
) -> None:
    plain = shutil.copytree(tiny_idefics3, tmp_path / "plain")
    config = json.loads((plain / "generation_config.json").read_text())
    for name in ("do_sample", "temperature", "repetition_penalty"):
        del config[name]
    (plain / "generation_config.json").write_text(json.dumps(config))
    longer = Sampling(max_tokens=40)
    requests = [ask("what?", picture(i), sampling=longer) for i in range(4)]
    assert answers(tiny_idefics3, requests) == answers(plain, requests)


def test_a_seed_gives_the_same_sample_again(tiny_idefics3: Path) -> None:
    def sample(seed: int) -> str:
        sampling = Sampling(temperature=1.5, top_p=0.9, max_tokens=12, seed=seed)
        return answers(tiny_idefics3, [ask("what?", picture(1), sampling=sampling)])[0].text

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_requests_with_other_sampling_are_answered_side_by_side(tiny_idefics3: Path) -> None:
    requests = [
        ask("what?", picture(1), sampling=Sampling(max_tokens=most)) for most in (2, 5, 2, 9)
    ]
    together = answers(tiny_idefics3, requests)
    assert [done.completion_tokens for done in together] == [2, 5, 2, 9]


def test_a_cancelled_request_leaves_the_others_alone(tiny_idefics3: Path) -> None:
    async def scenario() -> list[Outcome]:
        async with started(tiny_idefics3, batch_size=2) as engine:
            tasks = [
                asyncio.create_task(engine.generate(ask(f"number {i}", picture(i))))
                for i in range(9)
            ]
            await tasks[0]
            for task in tasks[6:]:
                task.cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    outcomes = asyncio.run(scenario())
    assert all(isinstance(outcome, Completion) for outcome in outcomes[:6])
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes[6:])


def test_close_fails_what_waits_and_soon_ends_what_runs(
    tiny_idefics3: Path, tmp_path: Path
) -> None:
    unending = without_end(tiny_idefics3, tmp_path / "unending")

    async def scenario() -> list[Outcome]:
        async with started(unending, batch_size=1) as engine:
            endless = Sampling(max_tokens=CONTEXT)
            tasks = [
                asyncio.create_task(engine.generate(ask("?", picture(i), sampling=endless)))
                for i in range(30)
            ]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            await engine.close()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            with pytest.raises(EngineDead, match="the engine was closed"):
                await engine.generate(ask("?", picture(1)))
            await engine.close()
            return list(outcomes)

    outcomes = asyncio.run(scenario())
    assert isinstance(outcomes[0], Completion)
    assert isinstance(outcomes[-1], EngineDead)
    assert {type(outcome) for outcome in outcomes} == {Completion, EngineDead}


def test_a_batch_that_does_not_fit_into_memory_is_answered_in_smaller_ones(
    tiny_idefics3: Path,
) -> None:
    requests = [ask(f"number {i}", picture(i)) for i in range(8)]

    async def scenario() -> tuple[list[Outcome], int]:
        async with started(tiny_idefics3, batch_size=8) as engine:
            assert engine._model is not None
            assert engine._batcher is not None
            fails_above(3, engine._model._model, MemoryError())
            outcomes = await gathered(engine, requests)
            return outcomes, engine._batcher.batch_size

    outcomes, batch_size = asyncio.run(scenario())
    assert outcomes == answers(tiny_idefics3, requests)
    assert batch_size == 2


def test_a_request_that_never_fits_into_memory_fails_alone(tiny_idefics3: Path) -> None:
    async def scenario() -> list[Outcome]:
        async with started(tiny_idefics3) as engine:
            assert engine._model is not None
            fails_above(0, engine._model._model, MemoryError())
            return await gathered(engine, [ask("what?", picture(1))])

    failure = failure_of(asyncio.run(scenario())[0])
    assert (failure.code, failure.stage) == (ErrorCode.ENGINE_FAILED, Stage.GENERATE)
    assert failure.message.startswith("out of memory on cpu with 1 request(s)")


def test_a_cuda_error_is_the_end_of_the_engine(tiny_idefics3: Path) -> None:
    async def scenario() -> list[Outcome]:
        async with started(tiny_idefics3, batch_size=2) as engine:
            assert engine._model is not None
            error = RuntimeError("CUDA error: device-side assert triggered\nand much more")
            fails_above(0, engine._model._model, error)
            first = await gathered(engine, [ask(f"{i}", picture(i)) for i in range(5)])
            return first + await gathered(engine, [ask("later", picture(1))])

    for outcome in asyncio.run(scenario()):
        assert isinstance(outcome, EngineDead)
        assert "CUDA error: device-side assert triggered" in outcome.message
        assert "\n" not in str(outcome)


def test_on_the_cpu_the_dtype_is_float32_unless_asked_otherwise(tiny_idefics3: Path) -> None:
    async def scenario(dtype: str) -> tuple[str, str | None, int]:
        async with started(tiny_idefics3, dtype=dtype) as engine:
            await engine.generate(ask("what?", picture(1)))
            return engine.dtype, engine.device, engine.capacity

    assert asyncio.run(scenario("auto")) == ("float32", "cpu", 32)
    assert asyncio.run(scenario("bfloat16"))[0] == "bfloat16"


def test_a_missing_model_is_said_in_one_line(tmp_path: Path) -> None:
    for model, message in (
        (f"{tmp_path}/nowhere", f"no such folder: {tmp_path}/nowhere"),
        ("acme/tiny", "cannot load acme/tiny: OSError: "),
        (str(tmp_path), f"no config.json in the model folder {tmp_path}"),
    ):
        with pytest.raises(EngineStartError) as raised:
            asyncio.run(outcomes_of(Path(model), []))
        assert raised.value.message.startswith(message)
        assert "\n" not in raised.value.message
        assert raised.value.hint is not None


def test_a_checkpoint_that_lacks_weights_is_refused(tiny_idefics3: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_idefics3, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineStartError, match=r"lacks 1 weights .* lm_head\.weight"):
        asyncio.run(outcomes_of(folder, []))


def test_an_architecture_that_transformers_does_not_know_is_named(
    tiny_idefics3: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_idefics3, tmp_path / "model")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"idefics3"', '"idefics99"'))
    with pytest.raises(EngineStartError) as raised:
        asyncio.run(outcomes_of(folder, []))
    assert f"cannot run {folder}" in raised.value.message
    assert "upgrade transformers" in str(raised.value)


def test_an_unknown_dtype_is_refused(tiny_idefics3: Path) -> None:
    with pytest.raises(EngineStartError, match="unknown dtype 'float31'"):
        asyncio.run(outcomes_of(tiny_idefics3, [], dtype="float31"))


def test_a_missing_library_is_answered_with_the_pip_command(
    tiny_idefics3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EngineStartError) as raised:
        asyncio.run(outcomes_of(tiny_idefics3, []))
    assert raised.value.hint == "pip install 'vlmbatch[transformers]'"


# --- asking ---------------------------------------------------------------------------------------


def ask(
    prompt: str,
    *images: Image.Image,
    system: str | None = None,
    sampling: Sampling = Sampling(max_tokens=8),  # noqa: B008 (frozen)
) -> Request:
    return Request(
        row=0,
        request=0,
        sample=0,
        task="caption",
        kind=TaskKind.CAPTION,
        prompt=prompt,
        question=None,
        system=system,
        images=tuple(
            LoadedImage(image, Size(image.width, image.height), str(image.tobytes()))
            for image in images
        ),
        sampling=sampling,
    )


def picture(number: int, width: int = 48, height: int = 48) -> Image.Image:
    """Noise that differs between numbers, the same each time."""
    return Image.effect_mandelbrot(
        (width, height), (-2 + number / 20, -1.5, 1, 1.5), 20 + number
    ).convert("RGB")


def picture_of(colour: str) -> Image.Image:
    return Image.new("RGB", (48, 48), colour)


def answers(folder: Path, requests: Iterable[Request], **settings: Any) -> list[Completion]:
    """The completions of a fresh engine that is asked everything at once."""
    outcomes = asyncio.run(outcomes_of(folder, requests, **settings))
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return [outcome for outcome in outcomes if isinstance(outcome, Completion)]


async def outcomes_of(folder: Path, requests: Iterable[Request], **settings: Any) -> list[Outcome]:
    async with started(folder, **settings) as engine:
        return await gathered(engine, requests)


async def gathered(engine: TransformersEngine, requests: Iterable[Request]) -> list[Outcome]:
    tasks: list[Coroutine[Any, Any, Completion]] = [engine.generate(r) for r in requests]
    return list(await asyncio.gather(*tasks, return_exceptions=True))


@asynccontextmanager
async def started(folder: Path, **settings: Any) -> AsyncIterator[TransformersEngine]:
    engine = TransformersEngine(str(folder), device="cpu", **settings)
    try:
        await engine.start()
        yield engine
    finally:
        await engine.close()


def failure_of(outcome: Outcome) -> Any:
    assert isinstance(outcome, RequestFailed), outcome
    return outcome.failure


# --- other checkpoints, and faults ----------------------------------------------------------------


def load_tiny(folder: Path) -> Any:
    from vlmbatch.engines.transformers import Source

    return load(Source(str(folder), None, False), "auto", "cpu")


def with_stray_placeholder(request: Request) -> Request:
    """A request whose prompt spells the image token: the processor refuses its whole batch."""
    return replace(request, prompt=request.prompt + " <image>")


def without_end(folder: Path, target: Path) -> Path:
    """The checkpoint, never emitting its end-of-turn token."""
    return suppressing(folder, target, lambda token: token == "<end_of_utterance>")


def ending_at_once(folder: Path, target: Path) -> Path:
    """The checkpoint, never emitting anything but its end-of-turn token."""
    return suppressing(folder, target, lambda token: token != "<end_of_utterance>")


def suppressing(folder: Path, target: Path, unwanted: Callable[[str], bool]) -> Path:
    shutil.copytree(folder, target)
    vocabulary = load_tiny(folder)._tokenizer.get_vocab()
    file = target / "generation_config.json"
    config = json.loads(file.read_text())
    config["suppress_tokens"] = [token for text, token in vocabulary.items() if unwanted(text)]
    file.write_text(json.dumps(config))
    return target


def fails_above(requests: int, model: Any, error: Exception) -> None:
    """Lets generate() of this model raise ``error`` for batches of more than so many requests."""
    generate = model.generate

    def failing(**options: Any) -> Any:
        if len(options["input_ids"]) > requests:
            raise error
        return generate(**options)

    model.generate = failing


def counts_batches(model: Any, batches: list[int]) -> None:
    """Lets generate() of this model write down how many requests it was given."""
    generate = model.generate

    def counting(**options: Any) -> Any:
        batches.append(len(options["input_ids"]))
        return generate(**options)

    model.generate = counting
