"""Models that bring their own code, through stand-ins with the real ones' entry points.

What a stand-in answers it has seen: the colours of rectangles, and their places, found in the
pixels. The real checkpoints have not been run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.harness import Finished, read_results, run_command, vlmbatch
from tests.own_code.ask import (
    BLUE,
    GREEN,
    RED,
    answers_of,
    ask,
    engine_of,
    picture,
    request,
)
from tests.own_code.build import STAND_INS, build
from vlmbatch.engines.choice import choose_engine
from vlmbatch.engines.own_code import check
from vlmbatch.errors import EngineStartError, RequestFailed, UsageError
from vlmbatch.families import ENTRIES
from vlmbatch.job import EngineSpec, SamplingSpec
from vlmbatch.models import resolve_model
from vlmbatch.records import IMAGE, Completion, Sampling, TaskKind

pytest.importorskip("transformers", reason="models with their own code need transformers")

REQUIREMENTS = {entry.name: entry.requirements for entry in ENTRIES}
TRUST = "--trust-remote-code"
TEXTS_ONLY = ("Phi-3.5-vision-instruct",)
POINTS = ("Molmo-7B-D-0924",)
VARIANTS = ("moondream3-preview", "Qwen-VL")
"""Asked one by one: their code is mostly that of another one, which has a run."""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``m.parquet``: red and blue, one that no stand-in can bear, and green."""
    folder = tmp_path_factory.mktemp("own code")
    picture((200, 100), red=RED, blue=BLUE).save(folder / "a.png")
    Image.new("RGB", (50, 50), (255, 0, 255)).save(folder / "bad.png")
    picture((100, 200), green=GREEN).save(folder / "b.png")
    columns: dict[str, Any] = {
        "image": ["a.png", "bad.png", "b.png"],
        "questions": [["which colour?", "how many are there?"]] * 3,
        "phrase": ["the red one", "the red one", "the green one"],
        "labels": [["red thing", "blue thing"], ["red thing"], ["green thing"]],
    }
    pq.write_table(pa.table(columns), folder / "m.parquet")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: build(name, folder) for name in STAND_INS}


@pytest.fixture(autouse=True)
def ours() -> Iterator[None]:
    """The stand-ins run on the libraries that are installed here: their families ask for no others.

    Those that the real ones' code needs are in the processes of the test for consumers.
    """
    for entry in ENTRIES:
        object.__setattr__(entry, "requirements", ())
    yield
    for entry in ENTRIES:
        object.__setattr__(entry, "requirements", REQUIREMENTS[entry.name])


def run(manifest: Path, model: Path, output: Path, *options: str) -> Finished:
    engine = ["--engine", "transformers", "--max-failure-rate", "1", "-o", str(output), "--json"]
    return vlmbatch("run", manifest, "-m", model, *engine, *options)


def tasks_of(name: str) -> list[str]:
    tasks = ["caption", "vqa"] if name in TEXTS_ONLY else ["caption", "vqa", "ground", "detect"]
    return [word for task in tasks for word in ("-t", task)]


# runs


@pytest.mark.parametrize("name", [name for name in STAND_INS if name not in VARIANTS])
def test_a_run_has_what_the_model_saw(
    name: str,
    here: Path,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encodes = tmp_path / "encodes"
    monkeypatch.setenv("ENCODES_LOG", str(encodes))
    done = run(here / "m.parquet", models[name], tmp_path / "out", TRUST, *tasks_of(name))
    assert done.exit_code == 0, done
    assert (done.json["ok"], done.json["failed"]) == (2, 1)
    assert_run_saw(name, tmp_path / "out")
    if name == "moondream2":  # once for an image, whatever is asked about it
        seen = encodes.read_text().split()
        assert (len(seen), len(set(seen))) == (2 + 5, 3)  # the bad one is tried for each


def assert_run_saw(name: str, output: Path) -> None:
    """The answers about the three pictures of ``here``."""
    found = read_results(output).to_pylist()
    first, bad, last = ([r for r in found if r["row"] == row] for row in range(3))

    assert {r["error"]["code"] for r in bad} == {"engine_failed"}
    assert all("this image is magenta" in r["error"]["message"] for r in bad)
    assert [r["status"] for r in first + last] == ["ok"] * len(first + last)
    said = [r["text"] for r in first[:3]]
    assert said == ["a picture with red and blue", "red and blue", "2"]
    assert [r["text"] for r in last[:3]] == ["a picture with green", "green", "1"]
    assert {r["finish_reason"] for r in first + last} == {"stop"}

    if name not in ("Qwen-VL-Chat", "moondream2"):
        assert all(r["completion_tokens"] == len(r["raw"].encode()) + 1 for r in first + last)
    if name in POINTS:
        assert_points(first[3], [("the red one", 50, 35)])
        assert_points(first[4], [("red thing", 50, 35), ("blue thing", 150, 65)])
        assert_points(last[3], [("the green one", 35, 140)])
    elif name not in TEXTS_ONLY:
        assert_boxes(first[3], [("the red one", RED)])
        assert_boxes(first[4], [("red thing", RED), ("blue thing", BLUE)])
        assert_boxes(last[3], [("the green one", GREEN)])
        assert (last[4]["image_width"], last[4]["image_height"]) == (100, 200)


def assert_boxes(
    result: dict[str, Any], wanted: Sequence[tuple[str, tuple[int, int, int, int]]]
) -> None:
    boxes = result["boxes"]
    assert [box["label"] for box in boxes] == [label for label, _ in wanted]
    for box, (_, edges) in zip(boxes, wanted, strict=True):
        found = [box[name] for name in ("x1", "y1", "x2", "y2")]
        assert found == pytest.approx(edges, abs=0.2)


def assert_points(result: dict[str, Any], wanted: Sequence[tuple[str, int, int]]) -> None:
    found = [(p["label"], p["x"], p["y"]) for p in result["points"]]
    assert [label for label, *_ in found] == [label for label, *_ in wanted]
    for (_, *place), (_, *right) in zip(found, wanted, strict=True):
        assert place == pytest.approx(right, abs=0.2)


def test_code_that_fails_when_it_is_imported_is_named_with_its_place(
    here: Path, tmp_path: Path
) -> None:
    folder = build("moondream2", tmp_path)
    broken = folder / "hf_moondream.py"
    broken.write_text(f"{broken.read_text()}\nraise RuntimeError('no\\nluck')\n")
    line = len(broken.read_text().splitlines())
    done = run(here / "m.parquet", folder, tmp_path / "out", TRUST, "-t", "caption")
    assert done.exit_code == 1, done
    (said,) = (line for line in done.stderr.splitlines() if line.startswith("Error: "))
    assert f"the own code of {folder} fails under transformers" in said
    assert said.endswith(f"(hf_moondream.py, line {line}): RuntimeError: no")
    assert "Traceback" not in done.stderr


# what is refused before anything runs


def refused(here: Path, model: Path, output: Path, *options: str) -> str:
    done = run(here / "m.parquet", model, output, *options)
    assert done.exit_code == 2, done
    assert "Traceback" not in done.stderr
    assert not output.exists()
    return done.stderr


def test_without_the_flag_nothing_runs(here: Path, models: dict[str, Path], tmp_path: Path) -> None:
    for folder in models.values():
        said = refused(here, folder, tmp_path / "out", "-t", "caption")
        assert f"Error: {folder.name} brings its own code" in said
        assert "-> after reading that code: --trust-remote-code\n" in said


def test_the_commit_of_a_hub_id_is_part_of_the_hint(models: dict[str, Path]) -> None:
    config = resolve_model(str(models["moondream2"])).config
    commit = "0123456789" * 4
    model = {"label": "a/b@012", "revision": commit, "config": config, "hub": True}
    engine = EngineSpec(name="transformers")
    with pytest.raises(UsageError, match="a/b brings its own code") as caught:
        check(model, engine, trusted=False, sampling=SamplingSpec(), system=None)
    assert str(caught.value.hint).endswith(f"--trust-remote-code --revision {commit}")
    check(model, engine, trusted=True, sampling=SamplingSpec(), system=None)


def test_moondream_is_not_for_vllm(models: dict[str, Path]) -> None:
    for name in ("moondream2", "moondream3-preview"):
        chosen, reason = choose_engine(resolve_model(str(models[name])).config)
        assert chosen == "transformers"
        assert "gives its boxes" in reason


def test_code_of_a_kind_that_is_not_known_needs_the_flag_too(here: Path, tmp_path: Path) -> None:
    config = {"model_type": "brand_new", "auto_map": {"AutoModelForCausalLM": "new.New"}}
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    said = refused(here, tmp_path / "model", tmp_path / "out", "-t", "caption")
    assert "brings its own code" in said


def test_a_revision_is_nothing_for_a_folder(
    here: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    options = [TRUST, "--revision", "0" * 40, "-t", "caption"]
    said = refused(here, models["moondream2"], tmp_path / "out", *options)
    assert "was given for the local model" in said


@pytest.mark.parametrize(
    ("name", "option", "says"),
    [
        ("moondream2", "--min-tokens=5", "--min-tokens is nothing that the code of moondream2"),
        ("moondream2", "--repetition-penalty=1.5", "--repetition-penalty is nothing"),
        ("moondream2", "--system=Be brief.", "--system is nothing that the code of moondream2"),
        ("moondream2", "--engine-arg=points=maybe", "expected true or false, got 'maybe'"),
        ("moondream2", "--engine-arg=tokenizer=a/b", "tokenizer is nothing that moondream2 takes"),
        ("Qwen-VL", "--engine-arg=point=true", "did you mean 'points'?"),
    ],
)
def test_what_the_code_does_not_take_is_refused(
    name: str, option: str, says: str, here: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    said = refused(here, models[name], tmp_path / "out", TRUST, "-t", "caption", option)
    assert says in said


def test_a_checkpoint_in_the_form_of_another_repository_says_so(here: Path, tmp_path: Path) -> None:
    folder = tmp_path / "Yi-VL-6B"
    folder.mkdir()
    config = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    said = refused(here, folder, tmp_path / "out", TRUST, "-t", "caption")
    assert "Yi-VL-6B is in the form of another repository (LlavaLlamaForCausalLM)" in said
    assert "converted for transformers" in said


# single requests


def assert_seen(name: str, answers: Sequence[Any]) -> None:
    """Of the picture with red and blue, and the blue one's place."""
    caption, colour, *place = answers
    assert (caption, colour) == ("a picture with red and blue", "red and blue")
    edges = (150, 65) if name in POINTS else BLUE
    assert len(place) == (0 if name in TEXTS_ONLY else 1)
    for ((label, *found),) in place:
        assert label == "the blue one"
        assert found == pytest.approx(edges, abs=0.2)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_asked_and_read_as_their_families_say(
    name: str, models: dict[str, Path]
) -> None:
    assert_seen(name, answers_of(models[name]))


@pytest.mark.consumers
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name", [n for n in STAND_INS if n not in VARIANTS and not n.startswith("moondream")]
)
def test_a_run_has_the_same_in_the_versions_that_the_family_names(
    name: str,
    here: Path,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Needs pip's index: through Ray, in an environment of its own with the pinned versions."""
    monkeypatch.setenv("VLMBATCH_CACHE", str(tmp_path / "cache"))
    words = ["run", here / "m.parquet", "-m", models[name], TRUST, *tasks_of(name)]
    words += ["-o", tmp_path / "out", "--engine=transformers", "--max-failure-rate=1"]
    done = run_command(*words, seconds=500)
    assert done.exit_code == 0, done
    assert "in an environment of its own" in done.stderr
    print(done.stderr)
    assert_run_saw(name, tmp_path / "out")


PROMPTS = {
    "cogvlm-grounding-generalist-hf": f"{IMAGE}{{}}",
    "Qwen-VL-Chat": f"<|im_start|>user\nPicture 1: {IMAGE}\n{{}}<|im_end|>\n",
    "Molmo-7B-D-0924": f"{IMAGE} User: {{}} Assistant:",
    "Phi-3.5-vision-instruct": "{}",
    "MiniCPM-V-2_6": "{}",
    "moondream2": "{}",
}


@pytest.mark.parametrize("name", PROMPTS)
def test_an_answer_ends_at_a_stop_text_and_at_its_last_token(
    name: str, models: dict[str, Path]
) -> None:
    prompt = PROMPTS[name].format("stop?")
    stopped = request(prompt, sampling=Sampling(stop=("STOP", "!")))
    cut = request(prompt, sampling=Sampling(max_tokens=3))
    first, second = ask(engine_of(models[name]), stopped, cut)
    assert isinstance(first, Completion)
    assert (first.text, first.finish_reason) == ("one two ", "stop")
    assert isinstance(second, Completion)
    assert second.finish_reason == "length"
    assert second.completion_tokens == 3
    assert "one two STOP three".startswith(second.text)


SAMPLED = [name for name in PROMPTS if name != "moondream2"]


@pytest.mark.parametrize("name", SAMPLED)
def test_a_seed_gives_the_same_sample_again(name: str, models: dict[str, Path]) -> None:
    prompt = PROMPTS[name].format("which colour?")
    hot = [Sampling(temperature=99.0, max_tokens=9, min_tokens=9, seed=seed) for seed in (3, 3, 4)]
    asked = [request(prompt, sampling=sampling) for sampling in (*hot, Sampling())]
    answers = ask(engine_of(models[name]), *asked)
    first, again, other, greedy = (a.text for a in answers if isinstance(a, Completion))
    assert first == again
    assert len({first, other, greedy}) == 3
    assert greedy == "red and blue"


def test_a_system_prompt_goes_to_the_models_that_take_one(models: dict[str, Path]) -> None:
    for name in ("Phi-3.5-vision-instruct", "MiniCPM-V-2_6"):
        (answer,) = ask(engine_of(models[name]), request("which colour?", system="Say yes first."))
        assert isinstance(answer, Completion)
        assert answer.text == "Yes, red and blue"


def test_moondream_points_where_points_are_asked_for(models: dict[str, Path]) -> None:
    asked = request("red", kind=TaskKind.DETECT, labels=("red", "green", "blue"))
    (answer,) = ask(engine_of(models["moondream2"], points="true"), asked)
    assert isinstance(answer, Completion)
    found = json.loads(answer.text)
    assert [each["label"] for each in found] == ["red", "blue"]
    places = [(each["x"] * 200, each["y"] * 100) for each in found]
    assert places == [pytest.approx((50, 35)), pytest.approx((150, 65))]


def test_several_images_go_to_the_models_that_take_them(models: dict[str, Path]) -> None:
    pair = picture((200, 100), red=RED), picture((200, 100), blue=BLUE)
    chat = PROMPTS["Qwen-VL-Chat"].format("which colour?")
    for name, prompt in {"Phi-3.5-vision-instruct": "which colour?", "Qwen-VL-Chat": chat}.items():
        (answer,) = ask(engine_of(models[name]), request(prompt, *pair))
        assert isinstance(answer, Completion), answer
        assert answer.text == "red"
    (answer,) = ask(engine_of(models["moondream2"]), request("which colour?", *pair))
    assert isinstance(answer, RequestFailed)
    assert answer.message == "the model takes 1 image, and this row has 2"


def test_an_image_file_lives_no_longer_than_its_request(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    asked = request(PROMPTS["Qwen-VL-Chat"].format("which colour?"))
    failing = request(asked.prompt, Image.new("RGB", (9, 9), (255, 0, 255)))
    good, bad = ask(engine_of(models["Qwen-VL-Chat"]), asked, failing)
    assert isinstance(good, Completion)
    assert isinstance(bad, RequestFailed)
    assert not list(tmp_path.iterdir())


def start_error(folder: Path) -> EngineStartError:
    with pytest.raises(EngineStartError) as caught:
        ask(engine_of(folder))
    assert "\n" not in caught.value.message
    return caught.value


def test_missing_weights_stop_the_start(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder = build("Molmo-7B-D-0924", tmp_path)
    save_file({"other": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    error = start_error(folder)
    assert "lacks 1 weights that the model needs: eye.palette" in error.message


def test_code_for_other_versions_says_so(tmp_path: Path) -> None:
    folder = build("Qwen-VL-Chat", tmp_path)
    code = folder / "modeling_qwen.py"
    code.write_text(f"from transformers import BeamSearchScorer\n{code.read_text()}")
    error = start_error(folder)
    assert "fails under transformers" in error.message
    assert "(modeling_qwen.py, line " in error.message
    assert "cannot import name 'BeamSearchScorer'" in error.message


def test_an_old_moondream_is_told_from_a_new_one(tmp_path: Path) -> None:
    folder = build("moondream2", tmp_path)
    code = folder / "hf_moondream.py"
    code.write_text(code.read_text().replace("def detect(self):", "def find(self):"))
    error = start_error(folder)
    assert "has no detect()" in error.message
    assert error.hint is not None
    assert "--revision" in error.hint
