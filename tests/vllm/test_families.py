"""Tiny checkpoints of many families on vLLM: which load, what they answer, what their images cost.

They have learnt to answer in their family's own syntax (tests/tiny_models_video.py), so a box that
comes back says that prompt, picture and special tokens went through vLLM as the family has them.
The short form starts engines in one process after another; the slow one goes through the command.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_models_video as tiny
from tests.harness import read_results, run_command, run_json, write_manifest
from tests.vllm.common import said_in_logs
from vlmbatch.families import entry_named, family_for
from vlmbatch.models import resolve_model
from vlmbatch.records import TaskKind

if not (tiny.TORCHVISION / "torchvision").is_dir():
    pytest.skip(tiny.MISSING, allow_module_level=True)

REPORT = Path(__file__).parents[2] / "benchmarks" / "vllm_families.txt"
ARCHITECTURES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "internvl": "InternS1ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "glm4v": "Glm4vForConditionalGeneration",
}
"""vLLM's own class for each: none of them falls back to the transformers backend."""
NAMES = sorted(ARCHITECTURES)
SHORT = ("internvl", "llava_onevision", "qwen2_5_vl", "smolvlm")
"""Of the short form: one of each way to cut an image into tokens."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("models")
    slow = any(item.get_closest_marker("slow") for item in request.session.items)
    names = NAMES if slow else SHORT
    words = [sys.executable, "-m", "tests.tiny_models_video", str(folder), *names]
    _succeeds(words, folder)
    return folder


@pytest.fixture(scope="module")
def answered(models: Path) -> dict[str, dict[str, Any]]:
    """What tests/vllm/family_answers.py found, by name."""
    file = models / "answers.jsonl"
    _succeeds([sys.executable, "-m", "tests.vllm.family_answers", models, file, *SHORT], models)
    lines = map(json.loads, file.read_text().splitlines())
    return {line["name"]: line for line in lines}


def _succeeds(words: list[Any], folder: Path) -> None:
    """The process's end, in an environment with torchvision; its log is beside the models."""
    log = folder / "log.txt"
    with log.open("w") as file:
        command = list(map(str, words))
        ended = subprocess.run(command, env=tiny.environment(), stdout=file, stderr=file)
    assert ended.returncode == 0, log.read_text()[-4000:]


@pytest.mark.parametrize("name", SHORT)
def test_vllm_answers_as_the_family_writes(name, models, answered):
    found = answered[name]
    assert found.get("error") is None
    assert found["architecture"] == ARCHITECTURES[name]
    family = family_for(resolve_model(str(models / name)).config)
    assert len(found["answers"]) == len(tiny.SIZES) * len(entry_named(family.name).tasks)
    for answer in found["answers"]:
        assert answer["text"] == tiny.answer(family, TaskKind(answer["task"])), answer
    facts = json.loads((models / name / tiny.MEASURED).read_text())
    for row, fact in enumerate(facts[: len(tiny.SIZES)]):  # against the processor's own count
        first = answered_tokens(found, 0) - facts[0]["tokens"]
        assert answered_tokens(found, row) - fact["tokens"] == first, (row, fact)


def answered_tokens(found: dict[str, Any], row: int) -> int:
    """Of the prompt of a picture's caption, whose words are the same for all of them."""
    captions = {a["row"]: a for a in found["answers"] if a["task"] == TaskKind.CAPTION}
    tokens: int = captions[row]["prompt_tokens"]
    return tokens


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_through_the_command(models, tmp_path, monkeypatch):
    """One run a family, as a user starts it; what came of each is written to ``REPORT``."""
    monkeypatch.setenv("PYTHONPATH", tiny.environment()["PYTHONPATH"])
    encoded = []
    for picture in tiny.pictures():
        file = io.BytesIO()
        picture.save(file, "PNG")
        encoded.append(file.getvalue())
    manifest = write_manifest(tmp_path / "m.parquet", {"image": encoded})
    lines, wrong = [f"{'checkpoint':<16} {'family':<16} {'runs as':<40} answers as taught"], []
    for name in NAMES:
        output = tmp_path / name
        family = family_for(resolve_model(str(models / name)).config)
        kinds = entry_named(family.name).tasks
        asked = ["--question", tiny.QUESTION, *(f"--task={kind}" for kind in kinds)]
        asked += ["--phrase", tiny.PHRASE] if TaskKind.GROUND in kinds else []
        asked += ["--labels", ",".join(tiny.LABELS)] if TaskKind.DETECT in kinds else []
        finished = run_command(
            *("run", manifest, "-m", models / name, "-o", output, "--engine", "vllm", *asked),
            *("--max-model-len", "1024", "--max-num-seqs", "8", "--max-tokens", "96"),
            *("--engine-arg", "enforce_eager=true", "--engine-arg", "block_size=32"),
            seconds=600,
        )
        if finished.exit_code != 0:
            reason = " ".join(finished.stderr.split())[-300:]
            lines.append(f"{name:<16} {family.name:<16} did not start: {reason}")
            wrong.append(name)
            continue
        assert run_json(output)["read"]["family"] == tiny.BUILDERS[name][1]
        (architecture,) = set(said_in_logs(output, r"Resolved architecture: (\w+)"))
        results = read_results(output).to_pylist()
        right = [r for r in results if r["raw"] == tiny.answer(family, TaskKind(r["task"]))]
        if len(right) < len(results):
            wrong.append(name)
        count = f"{len(right)} of {len(results)}"
        lines.append(f"{name:<16} {family.name:<16} {architecture:<40} {count}")
    REPORT.write_text("\n".join(lines) + "\n")
    assert not wrong, "\n".join(lines)
