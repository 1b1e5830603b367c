"""Models whose processors need torchvision, through the real command, for every task.

The checkpoints are tiny, but their architectures, processors and chat templates are the real ones;
they have learnt to answer in their family's own syntax (tests/tiny_models_video.py).
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer

from tests import tiny_models_video as tiny
from tests.harness import read_results, run_command, run_json, write_manifest
from vlmbatch.families import entry_named, family_for
from vlmbatch.families.base import Family
from vlmbatch.grounding import Size
from vlmbatch.models import resolve_model
from vlmbatch.records import TaskKind

if not (tiny.TORCHVISION / "torchvision").is_dir():
    pytest.skip(tiny.MISSING, allow_module_level=True)

NAMES = sorted(tiny.BUILDERS)
RAW = {
    "qwen2_vl": "<|object_ref_start|>the red cup<|object_ref_end|>"
    "<|box_start|>(250,125),(750,625)<|box_end|>",
    "qwen2_5_vl": '```json\n[{"bbox_2d": [28, 14, 84, 70], "label": "the red cup"}]\n```',
    "qwen3_vl": '```json\n[{"bbox_2d": [250, 125, 750, 625], "label": "the red cup"}]\n```',
    "internvl": "<ref>the red cup</ref><box>[[250, 125, 750, 625]]</box>",
    "smolvlm": '[{"bbox_2d": [250, 125, 750, 625], "label": "the red cup"}]',
    "llava_onevision": "[0.25, 0.13, 0.75, 0.63]",
    "glm4v": "<|begin_of_box|>[[250,125,750,625]]<|end_of_box|>",
}
"""What each says when it is asked for the phrase."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all checkpoints, and the grids that Qwen's processor resizes to."""
    folder = tmp_path_factory.mktemp("models")
    words = [sys.executable, "-m", "tests.tiny_models_video", str(folder)]
    made = subprocess.run(words, env=tiny.environment(), capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures, one a row."""
    encoded = []
    for picture in tiny.pictures():
        file = io.BytesIO()
        picture.save(file, "PNG")
        encoded.append(file.getvalue())
    return write_manifest(tmp_path_factory.mktemp("data") / "m.parquet", {"image": encoded})


def family_of(folder: Path) -> Family:
    return family_for(resolve_model(str(folder)).config)


def measured(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / tiny.MEASURED).read_text())
    assert found
    return found


def options_of(kinds: tuple[TaskKind, ...]) -> list[str]:
    options = ["--question", tiny.QUESTION]
    if TaskKind.GROUND in kinds:
        options += ["--phrase", tiny.PHRASE]
    if TaskKind.DETECT in kinds:
        options += ["--labels", ",".join(tiny.LABELS)]
    return [*(f"--task={kind}" for kind in kinds), *options]


@pytest.mark.parametrize("name", NAMES)
def test_every_task_of_the_family(name, models, manifest, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", tiny.environment()["PYTHONPATH"])
    family_name = tiny.BUILDERS[name][1]
    kinds = entry_named(family_name).tasks
    folder, output = models / name, tmp_path / "out"
    finished = run_command(
        *("run", manifest, "--engine", "transformers", "-m", folder, "-o", output),
        *("--max-tokens", "96", *options_of(kinds)),
    )
    assert finished.exit_code == 0, finished
    assert run_json(output)["read"]["family"] == family_name
    results = read_results(output).to_pylist()
    assert [result["status"] for result in results] == ["ok"] * (len(kinds) * len(tiny.SIZES))
    for result in results:
        kind, size = TaskKind(result["task"]), tiny.SIZES[result["row"]]
        fact = measured(folder)[result["row"]]
        assert fact["size"] == [size.width, size.height]
        assert [result["image_width"], result["image_height"]] == fact["size"]
        told = fact["grid"] if name == "qwen2_5_vl" else fact["given"]
        assert [result["model_image_width"], result["model_image_height"]] == told
        assert result["finish_reason"] == "stop"
        assert result["raw"] == tiny.answer(family_of(folder), kind)
        words = text_tokens(folder, family_of(folder), kind)
        assert result["prompt_tokens"] == words + fact["tokens"], result
        if kind in tiny.TEXTS:
            assert result["text"] == tiny.TEXTS[kind]
            continue
        if kind is TaskKind.GROUND:
            assert result["raw"] == RAW[name]
        labels = [tiny.PHRASE] if kind is TaskKind.GROUND else list(tiny.LABELS)
        canvas = told if name == "qwen2_5_vl" else [tiny.CANVAS, tiny.CANVAS]
        step = told if name == "qwen2_5_vl" else [100] * 2 if "llava" in name else [1000] * 2
        for box, edges in zip(result["boxes"], tiny.BOXES[: len(labels)], strict=True):
            for edge, wanted in zip(("x1", "y1", "x2", "y2"), edges, strict=True):
                axis = 0 if edge[0] == "x" else 1
                expected = wanted / canvas[axis] * fact["size"][axis]
                assert abs(box[edge] - expected) <= fact["size"][axis] / step[axis], (result, edge)
        if name != "glm4v" or kind is TaskKind.GROUND:  # its syntax has no labels
            assert [box["label"] for box in result["boxes"]] == labels


def text_tokens(folder: Path, family: Family, kind: TaskKind) -> int:
    """Of the chat template's text without the one token that stands for the image."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((folder / "chat_template.jinja").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (ask,) = tiny.asks([kind])
    content = [{"type": "image"}, {"type": "text", "text": family.word(ask)}]
    messages = [{"role": "user", "content": content}]
    text = template.render(
        messages=messages, add_generation_prompt=True, bos_token=settings["bos_token"]
    )
    return len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids) - 1


@pytest.mark.parametrize("name", NAMES)
def test_the_tokens_of_an_image_are_those_of_its_processor(name, models):
    family = family_of(models / name)
    for fact in measured(models / name):
        assert family.image_tokens(Size(*fact["size"])) == fact["tokens"], fact


@pytest.mark.parametrize("settings", sorted(tiny.GRIDS))
def test_qwen2_5_vl_counts_pixels_of_what_its_processor_resizes_to(settings, models):
    """Whatever the size, and however the pixel budget is spelt in preprocessor_config.json."""
    folder = models / "grids" / settings
    family = family_of(folder)
    facts = measured(folder)
    assert len(facts) == 200
    for fact in facts:
        given, grid = Size(*fact["given"]), fact["grid"]
        assert family.target(Size(*fact["size"])) == given
        if grid is None:
            assert family.image_tokens(Size(*fact["size"])) is None
        else:
            assert family.seen(given) == Size(*grid), fact
