"""Options of a run that need an engine start of their own: LoRA, several samples, truncation."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.easy_vqa_data import write_manifest
from tests.harness import Finished, read_results, run_command
from tests.vllm.common import ENGINE

ROWS = 12


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of rank 4 on the demo model's language half; random, not trained."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    from vlmbatch.models import demo_path

    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_pretrained(demo_path(), dtype=torch.float32)
    config = LoraConfig(
        r=4,
        lora_alpha=64,
        target_modules=r".*text_model.*\.(q_proj|v_proj)",
        init_lora_weights=False,
    )
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.mark.timeout(600)
def test_lora_samples_and_truncation(tmp_path: Path, adapter: Path) -> None:
    """One run with all three: an adapter that changes the answers; three samples of each, which
    differ and can be had again; answers cut at two tokens, asked again with more."""
    manifest = write_manifest(tmp_path / "easy-vqa.parquet", rows=ROWS)
    words = ("run", manifest, "-t", "caption", *ENGINE, "--json")
    how = (
        *("--num-samples", "3", "--temperature", "1.5", "--seed", "11"),
        *("--max-tokens", "2", "--on-truncation", "retry"),
    )
    plain = run_command(*words, *how, "-o", tmp_path / "plain", seconds=300)
    assert plain.exit_code == 0, plain
    adapted = run_command(*words, *how, "--lora", adapter, "-o", tmp_path / "lora", seconds=300)
    assert adapted.exit_code == 0, adapted
    table = read_results(tmp_path / "plain").to_pylist()
    keys = [(each["row"], each["request"], each["sample"]) for each in table]
    assert keys == [(row, 0, sample) for row in range(ROWS) for sample in range(3)]
    texts: dict[int, set[str]] = {}
    for each in table:
        texts.setdefault(each["row"], set()).add(each["text"])
    assert any(len(samples) > 1 for samples in texts.values())
    assert_attempts_told(plain, table)
    other = [each["text"] for each in read_results(tmp_path / "lora").to_pylist()]
    changed = sum(a != each["text"] for a, each in zip(other, table, strict=True))
    assert changed >= ROWS, (other, texts)


def assert_attempts_told(run: Finished, table: list[dict[str, Any]]) -> None:
    """Nothing is said in two tokens: each answer took more than one attempt, and says how many."""
    attempts = Counter(str(each["attempts"]) for each in table)
    assert run.json["attempts"] == dict(sorted(attempts.items()))
    assert set(attempts) <= {"2", "3"}
    for each in table:
        assert each["completion_tokens"] <= 2 * 2 ** (each["attempts"] - 1)
