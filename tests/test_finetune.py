"""Training data that vlmbatch exported, in TRL itself: its collator, its trainer, and back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from vlmbatch.models import demo_path

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "finetune_trl"
PICTURES, REPLAYED, HELD_OUT = 64, 24, 24

pytestmark = [pytest.mark.consumers, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def with_trl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment variables of a process that has TRL beside what is installed here.

    Its own needs that are not here are few, so that it stands in a folder and not in a virtual
    environment with another PyTorch.
    """
    folder = tmp_path_factory.mktemp("trl")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    pip += ["-c", str(ROOT / "constraints.txt"), "trl", "accelerate", "psutil"]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install trl: {done.stderr[-300:]}")
    path = os.pathsep.join([str(ROOT), str(folder)])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def work(with_trl: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run of the example: 90 steps on a few pictures."""
    work = tmp_path_factory.mktemp("finetune")
    small = ["--pictures", PICTURES, "--replay", REPLAYED, "--held-out", HELD_OUT]
    command = [sys.executable, EXAMPLE / "run.py", "--work", work, *small, "--max-steps", 90]
    done = subprocess.run(list(map(str, command)), env=with_trl, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (work / "printed.txt").write_text(done.stdout)
    return work


def test_the_trained_model_answers_on_held_out_pictures(work: Path) -> None:
    printed = (work / "printed.txt").read_text()
    result = json.loads(printed[printed.rindex("\n{\n") :])
    for state in ("before", "after"):
        counts = {task: score["n"] for task, score in result[state].items()}
        assert counts == {"german": HELD_OUT, "caption": HELD_OUT, "vqa": 2 * HELD_OUT}
    assert result["before"]["german"]["right"] == 0
    assert result["before"]["caption"]["accuracy"] >= 0.9
    assert json.loads((work / "trained" / "config.json").read_text())["dtype"] == "float32"
    answers = pq.read_table(work / "after", columns=["task", "model", "text"]).to_pylist()
    assert all(answer["model"].startswith("trained@") for answer in answers)
    german = [answer["text"] for answer in answers if answer["task"] == "german"]
    assert sum(str(text).startswith("ein ") for text in german) > HELD_OUT / 2, german


def test_what_sees_is_left_as_it_was_and_what_speaks_is_not(work: Path) -> None:
    before = load_file(demo_path() / "model.safetensors")
    after = load_file(work / "trained" / "model.safetensors")
    assert before.keys() == after.keys()
    same = {name for name in before if (before[name] == after[name]).all()}
    assert same == {name for name in before if "vision" in name}


def test_trl_collates_pictures_and_learns_the_answer_only(
    work: Path, with_trl: dict[str, str]
) -> None:
    """The export goes to TRL's own collator, whole, and as ``train.py`` cuts it."""
    command = [sys.executable, "-c", COLLATE, str(EXAMPLE), str(work), str(demo_path())]
    done = subprocess.run(command, env=with_trl, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    collated: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    rows = pq.read_table(work / "german", columns=["text"])["text"].to_pylist()[:3]
    assert collated["rows"] == PICTURES
    assert collated["pixels"] == [3, 1, 3, 64, 64]
    assert collated["image_tokens"] == [64, 64, 64]
    assert collated["learnt"] == [f" {text}<end_of_utterance>\n" for text in rows]
    prompt = "<|im_start|>User:<fake_token_around_image><global-img>" + 64 * "<image>"
    prompt += "<fake_token_around_image>Beschreibe das Bild kurz.<end_of_utterance>\nAssistant:"
    assert collated["whole"] == [f"{prompt} {text}<end_of_utterance>\n" for text in rows]


COLLATE = """
import json, sys
from pathlib import Path

from datasets import load_dataset
from transformers import AutoProcessor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

example, work, model = sys.argv[1:]
sys.path.insert(0, example)
from train import labels

processor = AutoProcessor.from_pretrained(model)
folder = Path(work) / "german-trl"
cut = labels(folder)
batch = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)(
    [cut[n] for n in range(3)]
)
whole = load_dataset("parquet", data_dir=str(folder), split="train")
conversations = DataCollatorForVisionLanguageModeling(processor)([whole[n] for n in range(3)])
decode = processor.tokenizer.decode
image = processor.tokenizer.convert_tokens_to_ids("<image>")
print(json.dumps({
    "rows": len(whole),
    "pixels": list(batch["pixel_values"].shape),
    "image_tokens": [(ids == image).sum().item() for ids in batch["input_ids"]],
    "learnt": [decode(row[row != -100]) for row in batch["labels"]],
    "whole": [decode(row[row != -100]) for row in conversations["labels"]],
}))
"""
