"""What the trainers' own code makes of the exports: their released packages, from pip's index."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.exports import outputs
from tests.exports.outputs import GONE, ROWS, answered
from tests.harness import vlmbatch
from vlmbatch.models import demo_path

pytestmark = [pytest.mark.consumers, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", params=["paths", "pairs"])
def output(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions and answers about rows of one image, and of two."""
    place = tmp_path_factory.mktemp(request.param)
    return answered(getattr(outputs, request.param)(place / "data"), place / "out")


def packages(folder: Path, *names: str) -> Path:
    """These alone, beside this environment's torch and transformers; skips where pip has none."""
    words = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*words, *names], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install {names}: {done.stderr[-300:]}")
    return folder


def exported(output: Path, place: Path, form: str, *options: str) -> Path:
    done = vlmbatch("export", output, place, "--to", form, "--system", "Be brief.", *options)
    assert done.exit_code == 0, done
    return place


def told(code: str, site: Path, *words: str | Path) -> Any:
    """What the code prints last, as JSON, with these packages."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


TRL = """
import json, sys
import datasets
from transformers import AutoProcessor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling
rows = datasets.load_dataset("parquet", data_dir=sys.argv[1], split="train")
processor = AutoProcessor.from_pretrained(sys.argv[2])
apart = "prompt" in rows.column_names
collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=apart)
batch = collate([rows[i] for i in range(len(rows))])
learnt = [[token for token in row if token >= 0] for row in batch["labels"].tolist()]
print(json.dumps({
    "pixels": list(batch["pixel_values"].shape[:2]),
    "texts": processor.tokenizer.batch_decode(batch["input_ids"]),
    "learnt": processor.tokenizer.batch_decode(learnt),
}))
"""


def test_trl_collates_them(output: Path, tmp_path: Path) -> None:
    site = packages(tmp_path / "site", "trl==1.16.0", "accelerate==1.15.0", "psutil")
    images = 2 if output.parent.name.startswith("pairs") else 1
    found = told(TRL, site, exported(output, tmp_path / "trl", "trl"), demo_path())
    assert found["pixels"] == [ROWS - 1, images]
    for text, row in zip(found["texts"], (i for i in range(ROWS) if i != GONE), strict=True):
        said = [part for part in re.sub(r"<\|?\w+\|?>", "", text).splitlines() if part]
        assert "Be brief." in said[0]
        assert text.count("<global-img>") in (0, images)
        assert said[-3:] == [
            f"Assistant: caption {row}.",
            f"User: question {row}?",
            f"Assistant: answer {row}",
        ]
    apart = ("--conversation", "per-request", "--format-arg", "completion=true")
    found = told(TRL, site, exported(output, tmp_path / "apart", "trl", *apart), demo_path())
    assert len(found["learnt"]) == 2 * (ROWS - 1)
    assert "caption 0." in found["learnt"][0]
    assert "Describe" not in found["learnt"][0]


LLAMA_FACTORY = """
import json, sys, types
import datasets, llamafactory
data = types.ModuleType("llamafactory.data")  # without its __init__, which imports audio
data.__path__ = [f"{llamafactory.__path__[0]}/data"]
sys.modules["llamafactory.data"] = data
from llamafactory.data.converter import get_dataset_converter
from llamafactory.data.parser import get_dataset_list
place = sys.argv[1]
(entry,) = get_dataset_list(["vlmbatch"], place)
convert = get_dataset_converter(entry.formatting, entry, types.SimpleNamespace(media_dir=place))
file = f"{place}/{entry.dataset_name}"
print(json.dumps([convert(row) for row in datasets.load_dataset("json", data_files=file)["train"]]))
"""


def test_llama_factory_converts_them(output: Path, tmp_path: Path) -> None:
    names = ("llamafactory==0.9.5", "peft", "omegaconf", "antlr4-python3-runtime", "accelerate")
    site = packages(tmp_path / "site", *names, "psutil")
    images = 2 if output.parent.name.startswith("pairs") else 1
    found = told(LLAMA_FACTORY, site, exported(output, tmp_path / "made", "sharegpt"))
    assert len(found) == ROWS - 1
    for row, entry in zip((i for i in range(ROWS) if i != GONE), found, strict=True):
        turns = [*entry["_prompt"], *entry["_response"]]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
        assert turns[0]["content"].startswith("<image>" * images + "\n")
        assert [turn["content"] for turn in turns[1::2]] == [f"caption {row}.", f"answer {row}"]
        assert entry["_system"] == "Be brief."
        assert len(entry["_images"]) == images
        assert all(os.path.isfile(name) for name in entry["_images"])


AXOLOTL = """
import json, sys
import datasets
from axolotl.processing_strategies import ProcessingStrategy
from transformers import AutoProcessor
rows = datasets.load_dataset("json", data_files=f"{sys.argv[1]}/train.jsonl", split="train")
processor = AutoProcessor.from_pretrained(sys.argv[2])
examples = ProcessingStrategy(processor)([rows[i] for i in range(len(rows))])
batch = processor.apply_chat_template(
    [example["messages"] for example in examples],
    tokenize=True, return_dict=True, return_tensors="pt", padding=True,
)
print(json.dumps({
    "pixels": list(batch["pixel_values"].shape[:2]),
    "texts": processor.tokenizer.batch_decode(batch["input_ids"]),
}))
"""


def test_axolotl_processes_them(output: Path, tmp_path: Path) -> None:
    site = packages(tmp_path / "site", "axolotl==0.19.0", "addict", "accelerate", "psutil")
    images = 2 if output.parent.name.startswith("pairs") else 1
    found = told(AXOLOTL, site, exported(output, tmp_path / "made", "axolotl"), demo_path())
    assert found["pixels"] == [ROWS - 1, images]
    for text, row in zip(found["texts"], (i for i in range(ROWS) if i != GONE), strict=True):
        assert f"Assistant: caption {row}." in text
        assert f"User: question {row}?" in text
